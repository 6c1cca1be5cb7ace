"""What the sim engine takes from a Hugging Face folder: sizes and token ids, so that its tokens can be turned into text.

No weights are needed, and any architecture will do.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from baton_engine.errors import ProfileError
from baton_engine.sim_profile import SimModel

_T = TypeVar("_T")
_SPECIAL_IDS_WITHOUT_TOKENIZER = 3  # ids 0 to 2 are never drawn: where most vocabularies keep unknown, begin and end


@dataclass(frozen=True, slots=True)
class SimFolder:
    """allowed_token_ids: what may be drawn, ascending: ids the tokenizer knows, without special and end-of-sequence ones."""

    max_model_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    fingerprint: str
    allowed_token_ids: npt.NDArray[np.uint32]


class _Config(msgspec.Struct):
    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int | list[int] | None = None


class _AddedToken(msgspec.Struct):
    id: int
    special: bool = False


class _TokenizerModel(msgspec.Struct):
    vocab: dict[str, int] | list[object]  # a list in unigram models: the id is the index


class _Tokenizer(msgspec.Struct):
    model: _TokenizerModel
    added_tokens: list[_AddedToken] = []


def read_sim_folder(path: Path | None, model: SimModel) -> SimFolder:
    """Facts for the sim engine; those of the profile's model without a folder.

    fingerprint: as everywhere, instances with different ones do not exchange KV. Raises: ProfileError naming the file.
    """
    if path is None:
        digest = hashlib.sha256(f"sim {model.vocab_size} {model.max_model_tokens}".encode()).hexdigest()
        allowed = np.arange(min(_SPECIAL_IDS_WITHOUT_TOKENIZER, model.vocab_size - 1), model.vocab_size, dtype=np.uint32)
        return SimFolder(model.max_model_tokens, model.vocab_size, frozenset(), digest[:16], allowed)
    config = _decode(path / "config.json", _Config)
    eos = _ids(config.eos_token_id)
    generation = path / "generation_config.json"
    if generation.is_file():
        eos |= _ids(_decode(generation, dict[str, object]).get("eos_token_id"))
    allowed = _allowed(_decode(path / "tokenizer.json", _Tokenizer), config.vocab_size, eos)
    if not len(allowed):
        raise ProfileError(f"{path / 'tokenizer.json'}: model.vocab", "no token that is not special")
    digest = hashlib.sha256(b"sim" + (path / "config.json").read_bytes() + allowed.tobytes()).hexdigest()
    return SimFolder(config.max_position_embeddings, config.vocab_size, eos, digest[:16], allowed)


def _allowed(tokenizer: _Tokenizer, vocab_size: int, eos: frozenset[int]) -> npt.NDArray[np.uint32]:
    vocab = tokenizer.model.vocab
    ids = set(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
    ids |= {token.id for token in tokenizer.added_tokens}
    ids -= {token.id for token in tokenizer.added_tokens if token.special} | eos
    return np.array(sorted(token_id for token_id in ids if token_id < vocab_size), dtype=np.uint32)


def _ids(value: object) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(token_id for token_id in values if isinstance(token_id, int))


def _decode(file: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as error:
        raise ProfileError(str(file), error.strerror or str(error)) from error
    except msgspec.DecodeError as error:
        raise ProfileError(str(file), str(error)) from error
