from array import array
from dataclasses import replace

import pytest
from baton_engine.pool import BlockLayout
from baton_handoff.tag import KvShape, TagChain, layout_from_record
from baton_handoff.testing.worker import layout_record

LAYOUT = BlockLayout(num_layers=2, block_tokens=4, num_kv_heads=1, head_dim=2, dtype="float32")
TOKENS = array("I", range(1, 12))


def shape(**changes: object) -> KvShape:
    fields = {"incarnation": "i", "fingerprint": "f" * 16, "layout": LAYOUT, "hash_block_tokens": 4}
    return KvShape(**{**fields, **changes})  # type: ignore[arg-type]


def chain(of: KvShape | None = None, root: bytes = b"r" * 16, tokens: "array[int]" = TOKENS, num_tokens: int = 10) -> TagChain:
    return TagChain(of or shape(), root, tokens, num_tokens)


def test_tags_of_both_sides_are_equal_however_they_got_there() -> None:
    source, sink = chain(), chain()
    assert source.at(3) == [sink.at(1), sink.at(2), sink.at(3)][-1]
    assert len(chain().at(1)) == 16


def test_tag_covers_the_tokens_in_its_blocks_and_no_others() -> None:
    other = TOKENS[:]
    other[10] = 999  # the token decode runs itself
    assert chain(tokens=other).at(3) == chain().at(3)
    other[9] = 999
    assert chain(tokens=other).at(2) == chain().at(2)
    assert chain(tokens=other).at(3) != chain().at(3)


def test_tag_differs_by_model_layout_and_tenant() -> None:
    tag = chain().at(1)
    other_layout = BlockLayout(num_layers=1, block_tokens=4, num_kv_heads=2, head_dim=2, dtype="float32")
    assert chain(shape(fingerprint="e" * 16)).at(1) != tag
    assert chain(shape(layout=other_layout)).at(1) != tag
    assert chain(root=b"q" * 16).at(1) != tag


def test_tag_does_not_depend_on_the_process() -> None:
    assert chain(shape(incarnation="other")).at(2) == chain().at(2)


def test_both_sides_tag_by_the_layout_of_the_source() -> None:
    source = replace(LAYOUT, block_tokens=2)
    theirs = TagChain(shape(layout=source), b"r" * 16, TOKENS, 10)
    ours = TagChain(shape(), b"r" * 16, TOKENS, 10, source)
    assert [ours.at(end) for end in (1, 3, 5)] == [theirs.at(end) for end in (1, 3, 5)]
    assert ours.at(5) != chain().at(3)


def test_a_layout_survives_its_record() -> None:
    layout = replace(LAYOUT, num_kv_heads=4, num_shards=2)
    assert layout_from_record(layout_record(layout)) == layout


def test_a_record_whose_sizes_contradict_each_other_is_refused() -> None:
    record = layout_record(LAYOUT)
    record.block_bytes += 1
    with pytest.raises(ValueError, match="makes blocks of"):
        layout_from_record(record)
