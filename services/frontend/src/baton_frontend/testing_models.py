"""Small tokenizers of every kind and the model folders around them, for tests and benchmarks of the HTTP side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from baton_frontend.generation import ModelInfo

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SAMPLE_TEXT = [
    "The quick brown fox jumps over the lazy dog. One, two, three; four!",
    '你好，世界。今日はとても寒いです。Привет мир 😀👩‍👩‍👧‍👦 ñandú naïve “quotes”—dash\u2028 \\ "json" </script>',  # noqa: RUF001 - real text
    "hello world, this is a test of tokens that end in the middle of words and of stop strings END",
]


def byte_level_tokenizer(texts: Sequence[str] = SAMPLE_TEXT, vocab_size: int = 400) -> Tokenizer:
    """As Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["héllo wörld", " spaced added "])
    return tokenizer


def byte_fallback_tokenizer(texts: Sequence[str] = SAMPLE_TEXT, vocab_size: int = 300) -> Tokenizer:
    """As Llama 2 has it (SentencePiece)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    content["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def word_piece_tokenizer(texts: Sequence[str] = SAMPLE_TEXT, vocab_size: int = 200) -> Tokenizer:
    """As BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def word_level_tokenizer() -> Tokenizer:
    """Words joined by spaces, no decoder."""
    words = ["[UNK]", "<eos>", "red", "blue", "=", ";", "?", "\n", *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.add_special_tokens(["[UNK]", "<eos>"])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Whole words that carry their space, as the demonstration model has them."""
    words = ["<unk>", "<eos>", *(f"\u2581{word}" for word in ["red", "blue", "=", ";", "?", *map(str, range(10))])]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(split=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.Metaspace(split=False)
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    return tokenizer


def write_model(folder: Path, tokenizer: Tokenizer, *, eos_token: str, template: str | None = CHAT_TEMPLATE) -> Path:
    """The files of a Hugging Face folder the frontend reads."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<|begin|>", "eos_token": {"content": eos_token}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id(eos_token)}))
    return folder


def model_info(folder: Path, name: str = "tiny", max_model_tokens: int = 256) -> ModelInfo:
    """As the request side would tell it."""
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return ModelInfo(name, str(folder), max_model_tokens, size, "f" * 16, 16)
