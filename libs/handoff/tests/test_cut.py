"""Positions are checked token by token against what a list of tokens says."""

import pytest
from baton_engine.pool import BlockLayout
from baton_handoff.cut import Cut
from hypothesis import given
from hypothesis import strategies as st


def layout(block_tokens: int) -> BlockLayout:
    return BlockLayout(1, block_tokens, 1, 1, "float32")


@pytest.mark.parametrize(
    ("sizes", "num_tokens", "num_cached", "first"),
    [
        ((16, 16), 40, 2, 2),
        ((64, 16), 200, 5, 1),  # 80 tokens cached: the second block has some that lack
        ((64, 16), 80, 5, 2),  # all there is is cached, though the source's last block is partial
        ((16, 64), 200, 1, 4),
        ((16, 64), 30, 0, 0),
    ],
)
def test_the_first_block_wanted_is_the_first_with_a_token_that_lacks(
    sizes: tuple[int, int], num_tokens: int, num_cached: int, first: int
) -> None:
    assert Cut(layout(sizes[0]), layout(sizes[1]), num_tokens, num_cached).first_block == first


def test_own_blocks_are_complete_when_all_their_tokens_are() -> None:
    larger = Cut(layout(16), layout(64), num_tokens=100, num_cached=0)
    assert [larger.own_blocks(end) for end in range(8)] == [0, 0, 0, 0, 1, 1, 1, 2]
    smaller = Cut(layout(64), layout(16), num_tokens=100, num_cached=3)
    assert [smaller.own_blocks(end) for end in range(3)] == [3, 4, 7]


@given(
    sizes=st.sampled_from([(2, 2), (2, 8), (8, 2), (4, 12), (12, 4)]),
    num_tokens=st.integers(1, 60),
    cached=st.integers(0, 30),
    steps=st.lists(st.integers(1, 5), min_size=40, max_size=40),
)
def test_units_bring_every_token_that_lacks_to_its_place_and_touch_nothing_cached(
    sizes: tuple[int, int], num_tokens: int, cached: int, steps: list[int]
) -> None:
    source, own = sizes
    cut = Cut(layout(source), layout(own), num_tokens, min(cached, num_tokens // own))
    unit = min(sizes)
    ids = [100 + index for index in range(cut.num_source_blocks)]
    table = [500 - index for index in range(cut.num_own_blocks)]
    found: dict[tuple[int, int], tuple[int, int]] = {}
    start = cut.first_block
    for step in steps:
        there, here = cut.units(start, ids[start : start + step], table)
        assert len(there) == len(here)
        assert bool(there) == (start < cut.num_source_blocks)
        for a, b in zip(there, here, strict=True):
            for offset in range(unit):
                place = divmod(b * unit + offset, own)
                assert place not in found
                found[place] = divmod(a * unit + offset, source)
        start = min(start + step, cut.num_source_blocks)
    for token in range(num_tokens):
        if token >= cut.num_cached * own:
            assert found.pop((table[token // own], token % own)) == (ids[token // source], token % source)
    assert all(block == table[-1] for block, _ in found), "only the tail of the last block is written besides"
