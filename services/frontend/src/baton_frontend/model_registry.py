"""Tokenizer, chat template and token text of each model, loaded once from its folder."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
from baton_runtime.errors import BatonError, Unavailable
from baton_runtime.log import get_logger
from tokenizers import Tokenizer

from baton_frontend.chat_template import ChatTemplate, load_chat_template
from baton_frontend.generation import ModelInfo
from baton_frontend.openai_format import TokenNames
from baton_frontend.segment_cache import find_borders
from baton_frontend.token_text import TokenText, build_token_text
from baton_frontend.tokenizer import PromptTokenizer, WorkPool

log = get_logger(__name__)
_RETRY_S = 10.0  # a folder that could not be read is not tried again before
_MAX_MODELS = 16
_PRELOAD_S = 0.5  # between two looks at what is served


class _Key(NamedTuple):
    path: str
    fingerprint: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the HTTP side needs of one model."""

    tokenizer: PromptTokenizer
    text: TokenText
    names: TokenNames
    template: ChatTemplate | None
    eos_token_ids: frozenset[int]  # end the output unless ignore_eos


class ModelRegistry:
    """Models by folder and fingerprint; each is loaded in a thread, once, by whoever asks first."""

    def __init__(self, pool: WorkPool, load_timeout_s: float = 60.0) -> None:
        self._pool = pool
        self._load_timeout_s = load_timeout_s
        self._loaded: dict[_Key, LoadedModel] = {}
        self._failed_at: dict[_Key, float] = {}
        self._lock = asyncio.Lock()

    def find(self, info: ModelInfo) -> LoadedModel | None:
        """The model if it is loaded."""
        return self._loaded.get(_Key(info.path, info.fingerprint, info.vocab_size))

    async def load(self, info: ModelInfo) -> LoadedModel:
        """The model, loaded now if it was not. Several callers wait for one load; cancelling one does not harm the others.

        Raises: Unavailable (cannot be read, or not in time), QueueFull.
        """
        if (model := self.find(info)) is not None:
            return model
        async with self._lock:
            if (model := self.find(info)) is not None:
                return model
            return await self._load(_Key(info.path, info.fingerprint, info.vocab_size), info.served_name)

    async def keep_loaded(self, models: Callable[[], Sequence[ModelInfo]]) -> NoReturn:
        """Load what is served before anyone asks for it, so that no first request waits. Runs until it is cancelled."""
        while True:
            for info in models():
                if self.find(info) is None:
                    try:
                        await self.load(info)
                    except BatonError as error:
                        log.debug("model_preload_failed", model=info.served_name, reason=error.reason)  # load has logged why
            await asyncio.sleep(_PRELOAD_S)

    async def _load(self, key: _Key, served_name: str) -> LoadedModel:
        refused = Unavailable(f"the frontend cannot read the tokenizer of model {served_name!r}; its log says why")
        if time.monotonic() - self._failed_at.get(key, -_RETRY_S) < _RETRY_S:
            raise refused
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._load_timeout_s):
                model, no_table = await self._pool.run(lambda: read_model(Path(key.path), key.vocab_size, self._pool))
        except (OSError, ValueError, jinja2.TemplateError) as error:  # TimeoutError is an OSError
            self._failed_at[key] = time.monotonic()
            log.error("model_load_failed", model=served_name, path=key.path, error=f"{type(error).__name__}: {error}")
            raise refused from error
        if no_table:
            log.warning("token_table_unusable", model=served_name, reason=no_table, effect="slower text, same result")
        log.info("model_loaded", model=served_name, path=key.path, duration_s=round(time.monotonic() - started, 3))
        while len(self._loaded) >= _MAX_MODELS:
            del self._loaded[next(iter(self._loaded))]
        self._loaded[key] = model
        return model


def read_model(folder: Path, vocab_size: int, pool: WorkPool) -> tuple[LoadedModel, str]:
    """Read a Hugging Face folder; blocking. Also says why there is no token table (empty if there is one).

    Raises: OSError (no folder, no tokenizer.json), ValueError (not readable as what it is), jinja2.TemplateSyntaxError.
    """
    config = _read_json(folder / "tokenizer_config.json")
    source = (folder / "tokenizer.json").read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # the library raises bare Exception for any fault of the file
        raise ValueError(f"tokenizer.json: {error}") from error
    text, no_table = build_token_text(tokenizer, vocab_size)
    template = load_chat_template(folder, config)
    eos = _eos_token_ids(folder, config, tokenizer)
    prompts = PromptTokenizer(tokenizer, pool, find_borders(tokenizer))
    return LoadedModel(prompts, text, TokenNames(text), template, eos), no_table


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name}: not an object")
    return content


def _eos_token_ids(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """generation_config.json before config.json before the tokenizer's, as the engines read it."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    token = config.get("eos_token")
    token_id = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
    return frozenset() if token_id is None else frozenset({token_id})
