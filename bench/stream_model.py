"""The model folder both sides of bench/stream_beside_peer.py serve, prompts for it, and the answers the sim engine must give.

The tokenizer is a byte-level BPE of 8,192 tokens, trained here on the ASCII text of Python's standard library: nearly every token is text
of its own, so that tokens per event says whether tokens were merged. The weights are one number: no engine of the benchmark reads them.
"""

import glob
import json
import random
import struct
import sysconfig
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from baton_engine.sim_folder import read_sim_folder
from baton_engine.sim_pattern import next_tokens, states, token_terms
from baton_engine.sim_profile import SimModel
from baton_frontend.chat_template import ChatTemplate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

NAME = "bench"
VOCAB_SIZE, MAX_TOKENS = 8192, 32768
STAMP = "a" * 16  # replaced by other letters in every request
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UNKNOWN = 0xFFFFFFFF
_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "ke", "li", "mo", "nu", "pa", "re", "si", "to", "vu", "za")


def make_model(folder: Path) -> Path:
    """Write the folder unless it is there. Takes some seconds."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:80]
    texts = (Path(file).read_bytes().decode("ascii", "ignore") for file in files)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = {"bos_token_id": 0, "eos_token_id": 1}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_TOKENS,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **eos,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": MAX_TOKENS,
        "chat_template": TEMPLATE,
    }
    for name, content in (("config", config), ("tokenizer_config", tokenizer_config), ("generation_config", eos)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    return folder


@dataclass(frozen=True)
class Asked:
    """What is asked in one case. words: of a prompt; body: further fields of the request."""

    is_stream: bool = True
    words: int = 64
    max_tokens: int = 128
    body: tuple[tuple[str, Any], ...] = ()


class Prompts:
    """Prompts with what the sim engine answers to them: a pure function of the tokens (baton_engine.sim_pattern)."""

    def __init__(self, model: Path, num_checked: int, seed: int = 1) -> None:
        """num_checked: prompts of each length whose answers are known."""
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._template = ChatTemplate(TEMPLATE, {})
        self._allowed = read_sim_folder(model, SimModel()).allowed_token_ids
        self._num_checked = num_checked
        self._random = random.Random(seed)
        self._texts: dict[int, list[str]] = {}
        self._answers: dict[int, npt.NDArray[np.uint32]] = {}
        self._answer_text: dict[tuple[int, int], Sequence[str]] = {}

    def words(self, count: int) -> str:
        """Words of two syllables, two or three tokens each."""
        return " ".join("".join(self._random.choices(_SYLLABLES, k=2)) for _ in range(count))

    def write(self, path: Path, asked: Asked, host: str, *, known: bool) -> None:
        """The file the load client reads. known: the server is the sim engine. Stop strings of `asked` must not occur in answers."""
        texts = self._of(asked.words)
        answers = self._answer_texts(asked) if known else [None] * len(texts)
        unchecked = [f"{STAMP} {self.words(asked.words - 3)}" for _ in range(256)]
        with path.open("wb") as file:
            for text, answer in [*zip(texts, answers, strict=True), *((text, None) for text in unchecked)]:
                request, content = _request(asked, text, host), b"" if answer is None else answer.encode()
                stamp_at = request.index(STAMP.encode()) if STAMP in text else 0
                length = UNKNOWN if answer is None else len(content)
                file.write(struct.pack("<5I", len(request), length, stamp_at, asked.max_tokens, 0) + request + content)

    def _answer_texts(self, asked: Asked) -> Sequence[str | None]:
        key = asked.words, asked.max_tokens
        if key not in self._answer_text:
            self._answer_text[key] = self._tokenizer.decode_batch(self._answers[asked.words][:, : asked.max_tokens].tolist())
        return self._answer_text[key]

    def _of(self, words: int) -> list[str]:
        if words not in self._texts:
            count = self._num_checked if words <= 256 else 64
            self._texts[words] = [self.words(words) for _ in range(count)]
            self._answers[words] = self._answered(self._texts[words], 128)
        return self._texts[words]

    def _answered(self, texts: Sequence[str], num_tokens: int) -> npt.NDArray[np.uint32]:
        """Token ids of the answers, shape (texts, num_tokens)."""
        rendered = [self._template.render([{"role": "user", "content": text}], add_generation_prompt=True, variables={}) for text in texts]
        prompts = [array("I", found.ids) for found in self._tokenizer.encode_batch_fast(rendered, add_special_tokens=False)]
        state = np.array([states(ids)[-1] for ids in prompts])
        positions = np.array([len(ids) for ids in prompts], dtype=np.uint64)
        answers = np.empty((len(texts), num_tokens), dtype=np.uint32)
        for index in range(num_tokens):
            answers[:, index] = next_tokens(state, self._allowed)
            state = state + token_terms(answers[:, index], positions)
            positions = positions + np.uint64(1)
        return answers


def _request(asked: Asked, text: str, host: str) -> bytes:
    stream = {"stream": True, "stream_options": {"include_usage": True}} if asked.is_stream else {}
    body = json.dumps(
        {
            "model": NAME,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": asked.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **stream,
            **dict(asked.body),
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
