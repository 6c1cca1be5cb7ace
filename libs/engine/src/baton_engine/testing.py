"""Tiny random models for tests: ordinary Hugging Face folders of every supported architecture. Needs the torch extra."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CORPUS = ["the prefill worker computes the keys and values of the prompt", "the decode worker pulls the blocks and samples every token"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_random_model(
    path: Path | str,
    arch: str = "llama",
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_model_tokens: int = 1024,
    dtype: str = "float32",
) -> Path:
    """Write a folder with random weights, a byte-level BPE tokenizer and a chat template; arch: "llama", "qwen2", "qwen3".

    The weights are large enough that greedy tokens are far from ties.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level_tokenizer()
    config = _CONFIGS[arch](
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=hidden // num_heads,
        max_position_embeddings=max_model_tokens,
        initializer_range=0.15,
        tie_word_embeddings=arch == "qwen2",
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=[2, 0],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    about: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _SPECIAL[2], "pad_token": _SPECIAL[0]}
    about |= {"model_max_length": max_model_tokens, "clean_up_tokenization_spaces": False, "chat_template": _CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    return folder


def _byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer
