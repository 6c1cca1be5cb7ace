"""From a model folder to engine numbers and memory."""

from pathlib import Path

import pytest
from baton_engine.hf_model import (
    MemoryNeed,
    ModelFolderError,
    ModelTooLarge,
    block_layout,
    engine_info,
    memory_limit_bytes,
    memory_need,
)
from baton_runtime.model_folder import ModelFolder

MODEL = ModelFolder(
    path=Path("m"),
    architecture="LlamaForCausalLM",
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    dtype="bfloat16",
    max_model_tokens=100,
    vocab_size=50,
    eos_token_ids=frozenset({1}),
    fingerprint="00" * 8,
    num_parameters=1 << 30,
    weight_files=(),
    tokenizer_file=Path("t"),
    chat_template=None,
)


def test_layout_is_that_of_the_model_in_the_chosen_type() -> None:
    assert block_layout(MODEL, 16).shape == (1, 2, 2, 16, 2, 8)  # shards first
    assert block_layout(MODEL, 16).block_bytes * 2 == block_layout(MODEL, 16, "float32").block_bytes
    with pytest.raises(ModelFolderError, match="float64"):
        block_layout(MODEL, 16, "float64")


def test_length_limit_can_only_be_lowered() -> None:
    assert engine_info(MODEL).max_model_tokens == 100
    assert engine_info(MODEL, 60).max_model_tokens == 60
    assert engine_info(MODEL, 600).max_model_tokens == 100


def test_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    need = memory_need(MODEL, block_layout(MODEL, 16, "float32"), num_blocks=1 << 20)
    assert need.weights_bytes == 4 << 30
    assert need.pool_bytes == 4 << 30
    need.check(need.total_bytes)
    with pytest.raises(ModelTooLarge, match=r"weights 4\.00 GiB, KV pool 4\.00 GiB.*available are 8\.00 GiB"):
        need.check(8 << 30)


def test_limit_of_this_process_allows_what_it_has() -> None:
    MemoryNeed(weights_bytes=0, pool_bytes=0, work_bytes=10 << 20).check(memory_limit_bytes())
