from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from baton_engine.pool import BlockLayout
from baton_handoff.transports.reslice import Reslice
from hypothesis import given, settings
from hypothesis import strategies as st

BASE = BlockLayout(num_layers=2, block_tokens=4, num_kv_heads=4, head_dim=3, dtype="float16")
Pool = npt.NDArray[np.uint8]


def pool_of(layout: BlockLayout, num_tokens: int) -> Pool:
    """Room for so many tokens, holding what no source holds."""
    return np.full((num_tokens // layout.block_tokens, layout.block_bytes), 255, np.uint8)


def address(layout: BlockLayout, place: tuple[int, int, int, int, int]) -> tuple[int, slice]:
    """Block, and byte range of one value: what the layout's docstring says, written out. place: token, layer, K or V, head, dim."""
    token, layer, kv, head, dim = place
    heads = layout.num_kv_heads // layout.num_shards
    index = head // heads
    for size, value in (
        (layout.num_layers, layer),
        (2, kv),
        (layout.block_tokens, token % layout.block_tokens),
        (heads, head % heads),
        (layout.head_dim, dim),
    ):
        index = index * size + value
    return token // layout.block_tokens, slice(index * layout.item_bytes, (index + 1) * layout.item_bytes)


def oracle(reslice: Reslice, dest: Pool, dest_units: list[int], source: Pool, source_units: list[int]) -> None:
    """Copy element by element over (unit, token, layer, kv, head, dim)."""
    layout = reslice.source
    for source_unit, dest_unit in zip(source_units, dest_units, strict=True):
        ranges = (range(reslice.unit_tokens), range(layout.num_layers), range(2), range(layout.num_kv_heads), range(layout.head_dim))
        for token, *rest in product(*ranges):
            here = address(reslice.source, (source_unit * reslice.unit_tokens + token, *rest))  # type: ignore[arg-type]
            there = address(reslice.dest, (dest_unit * reslice.unit_tokens + token, *rest))  # type: ignore[arg-type]
            dest[there] = source[here]


def by_descriptors(reslice: Reslice, dest: Pool, dest_units: list[int], source: Pool, source_units: list[int]) -> None:
    """Copy range by range, as a NIC would."""
    froms, tos, length = reslice.descriptors(source_units, dest_units)
    assert froms.dtype == tos.dtype == np.uint64
    assert len(froms) == len(tos) == len(source_units) * reslice.unit_bytes // length
    flat_source, flat_dest = source.reshape(-1), dest.reshape(-1)
    for start, end in zip(froms.tolist(), tos.tolist(), strict=True):
        flat_dest[end : end + length] = flat_source[start : start + length]


def check(source_layout: BlockLayout, dest_layout: BlockLayout, units: tuple[list[int], list[int]], num_tokens: int) -> None:
    reslice = Reslice(source_layout, dest_layout)
    source = pool_of(source_layout, num_tokens)
    source[:] = np.random.default_rng(0).integers(0, 255, source.shape, dtype=np.uint8)
    wanted, copied, described = (pool_of(dest_layout, num_tokens) for _ in range(3))
    oracle(reslice, wanted, units[1], source, units[0])
    reslice.copy(copied, units[1], source, units[0])
    by_descriptors(reslice, described, units[1], source, units[0])
    np.testing.assert_array_equal(copied, wanted)
    np.testing.assert_array_equal(described, wanted)


@pytest.mark.parametrize("shards", [(1, 2), (2, 1), (2, 4), (4, 2), (1, 1), (4, 1)], ids=lambda pair: f"{pair[0]}to{pair[1]}")
@pytest.mark.parametrize("tokens", [(16, 64), (64, 16), (16, 32), (16, 16)], ids=lambda pair: f"{pair[0]}to{pair[1]}")
def test_copies_and_descriptors_give_what_the_element_by_element_oracle_gives(shards: tuple[int, int], tokens: tuple[int, int]) -> None:
    layouts = [replace(BASE, block_tokens=tokens[side], num_shards=shards[side], head_dim=1, num_layers=1) for side in (0, 1)]
    num_units = 128 // min(tokens)
    order = np.random.default_rng(1).permutation(num_units)[: num_units - 1].tolist()
    check(layouts[0], layouts[1], (order, order[::-1]), 128)


@st.composite
def cases(draw: st.DrawFn) -> tuple[BlockLayout, BlockLayout, tuple[list[int], list[int]], int]:
    fine = draw(st.sampled_from([1, 2, 3]))
    tokens = [fine * draw(st.sampled_from([1, 2, 4])), fine]
    shards = [draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4]))]
    for values in (tokens, shards):
        if draw(st.booleans()):
            values.reverse()
    layout = BlockLayout(
        num_layers=draw(st.integers(1, 3)),
        block_tokens=tokens[0],
        num_kv_heads=draw(st.sampled_from([4, 8])),
        head_dim=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        num_shards=shards[0],
    )
    num_tokens = fine * 8
    num_units = num_tokens // fine
    length = draw(st.integers(0, num_units))
    units = tuple(draw(st.permutations(range(num_units)))[:length] for _ in range(2))
    return layout, replace(layout, block_tokens=tokens[1], num_shards=shards[1]), (units[0], units[1]), num_tokens


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_pair_of_layouts_moves_every_value_to_its_place(
    case: tuple[BlockLayout, BlockLayout, tuple[list[int], list[int]], int],
) -> None:
    check(*case)


def test_units_larger_than_a_gather_are_moved_the_same_way() -> None:
    layout = BlockLayout(num_layers=1, block_tokens=4, num_kv_heads=2, head_dim=2048, dtype="float32")
    reslice = Reslice(layout, replace(layout, block_tokens=8, num_shards=2))
    source, copied, wanted = pool_of(reslice.source, 16), pool_of(reslice.dest, 16), pool_of(reslice.dest, 16)
    source[:] = np.random.default_rng(0).integers(0, 255, source.shape, dtype=np.uint8)
    reslice.copy(copied, [3, 0], source, [1, 2])
    by_descriptors(reslice, wanted, [3, 0], source, [1, 2])
    np.testing.assert_array_equal(copied, wanted)


def test_equal_layouts_are_the_identity_on_whole_blocks() -> None:
    reslice = Reslice(BASE, BASE)
    assert reslice.is_identity
    assert (reslice.units_per_source_block, reslice.units_per_dest_block, reslice.unit_bytes) == (1, 1, BASE.block_bytes)
    assert not Reslice(BASE, replace(BASE, num_shards=2)).is_identity


def test_a_unit_is_the_smaller_sides_block() -> None:
    larger = replace(BASE, block_tokens=16)
    assert (Reslice(BASE, larger).units_per_source_block, Reslice(BASE, larger).units_per_dest_block) == (1, 4)
    assert (Reslice(larger, BASE).units_per_source_block, Reslice(larger, BASE).units_per_dest_block) == (4, 1)
    assert Reslice(larger, BASE).unit_bytes == BASE.block_bytes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_layers": 3}, "num_layers 2 against 3"),
        ({"num_kv_heads": 8}, "num_kv_heads 4 against 8"),
        ({"head_dim": 6}, "head_dim 3 against 6"),
        ({"dtype": "bfloat16"}, "dtype float16 against bfloat16"),
        ({"block_tokens": 6}, "block_tokens 4 against 6 .set block_tokens of one to a multiple"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_matched_is_refused_naming_both_layouts(change: dict[str, int], why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        Reslice(BASE, replace(BASE, **change))  # type: ignore[arg-type]
    assert str(refused.value).count("layers=") == 2


def test_a_unit_that_is_not_there_is_refused_before_anything_is_copied() -> None:
    reslice = Reslice(BASE, replace(BASE, num_shards=2))
    source, dest = pool_of(BASE, 8), pool_of(reslice.dest, 8)
    source[:] = 0
    for bad in ([0, 2], [0, -1]):
        with pytest.raises(IndexError, match=r"in a pool of 2"):
            reslice.copy(dest, [0, 1], source, bad)
    assert (dest == 255).all()


def test_a_pool_of_other_blocks_is_refused() -> None:
    reslice = Reslice(BASE, replace(BASE, num_shards=2))
    with pytest.raises(ValueError, match="not a contiguous pool"):
        reslice.copy(pool_of(reslice.dest, 8), [0], np.zeros((8, BASE.block_bytes), np.uint8)[::2], [0])
