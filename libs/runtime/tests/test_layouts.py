import pytest
from baton_contracts.discovery.v1.instance_pb2 import KvLayout, Model
from baton_runtime.layouts import layout_mismatch, layout_text, model_mismatch


def layout(**changes: int | str) -> KvLayout:
    fields = {"block_tokens": 16, "num_layers": 2, "num_kv_heads": 12, "head_dim": 8, "dtype": "float32", "num_shards": 1} | changes
    record = KvLayout(**fields)  # type: ignore[arg-type]
    if not record.block_bytes:
        record.block_bytes = record.block_tokens * record.num_layers * 2 * record.num_kv_heads * record.head_dim * 4
    return record


@pytest.mark.parametrize(
    "changes", [{}, {"block_tokens": 64}, {"block_tokens": 4}, {"num_shards": 4}, {"block_tokens": 32, "num_shards": 2}]
)
def test_layouts_that_divide_each_other_match(changes: dict[str, int]) -> None:
    assert layout_mismatch(layout(), layout(**changes)) == layout_mismatch(layout(**changes), layout()) == ""


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ({}, {"num_layers": 4}, "num_layers 2 against 4"),
        ({}, {"head_dim": 4, "num_kv_heads": 24}, "num_kv_heads 12 against 24, head_dim 8 against 4"),
        ({}, {"dtype": "float16"}, "dtype float32 against float16"),
        ({}, {"block_tokens": 24}, "block_tokens 16 against 24 (set block_tokens of one to a multiple of the other's)"),
        ({"num_shards": 2}, {"num_shards": 3}, "num_shards 2 against 3"),
        ({}, {"dtype": "float16", "block_tokens": 24}, "dtype float32 against float16, block_tokens 16 against 24 (serve the same model"),
        ({}, {"num_shards": 8}, "num_shards 8 does not divide num_kv_heads 12"),
        ({}, {"block_bytes": 5}, "block_bytes 24576 against 5"),
        ({}, {"num_shards": 0}, "num_shards not given"),
        ({}, {"block_tokens": 0, "block_bytes": 1}, "block_tokens not given"),
    ],
)
def test_what_cannot_be_matched_is_named(a: dict[str, int], b: dict[str, int], why: str) -> None:
    assert why in layout_mismatch(layout(**a), layout(**b))


def test_a_layout_is_spelled_with_every_field_that_decides() -> None:
    assert layout_text(layout(num_shards=2)) == "layers=2 block_tokens=16 kv_heads=12 head_dim=8 dtype=float32 shards=2"


def test_models_differ_by_what_kv_depends_on_and_not_by_name_or_folder() -> None:
    model = Model(fingerprint="a", hash_block_tokens=16, vocab_size=10, max_model_tokens=20)
    other = Model(fingerprint="a", hash_block_tokens=16, vocab_size=10, max_model_tokens=20, served_name="n", path="/p")
    assert model_mismatch(model, other) == []
    other.hash_block_tokens, other.vocab_size = 64, 11
    assert [why.split(" (")[0] for why in model_mismatch(model, other)] == ["hash_block_tokens 16 against 64", "vocab_size 10 against 11"]
