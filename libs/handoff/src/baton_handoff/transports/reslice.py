"""Blocks of one layout turned into blocks of another while they are copied: other block sizes, other tensor-parallel shards.

    block   (num_shards, num_layers, 2, block_tokens, num_kv_heads / num_shards, head_dim), C order
    unit    the smaller side's block: min(block_tokens) tokens, all layers and heads. One unit of the source becomes one of the
            destination. unit id = block id * units per block + index in the block; one of the two sides has one unit per block
    group   the heads that one shard of the more finely sharded side has; a shard of the other side has several
    piece   bytes that lie together on both sides: of one (layer, K or V) and one group, the whole unit if both sides have the same
            shards, else one token of it (heads lie inside tokens)

Nothing of the bytes is interpreted: values are moved, not converted.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from baton_engine.pool import BlockLayout
from baton_runtime.layouts import layout_mismatch, layout_text

UnitIds: TypeAlias = npt.NDArray[np.int64] | Sequence[int]
Pool: TypeAlias = npt.NDArray[np.uint8]
Offsets: TypeAlias = npt.NDArray[np.uint64]

# Small units are gathered, many at a time, before they are scattered: what still lies in the cache then. Larger ones are copied
# one by one without the detour.
_GATHER_BYTES = 1 << 14


class Reslice:
    """How units of `source` become units of `dest`. Immutable; made once per opened peer.

    Raises: ValueError naming both layouts if the one cannot be turned into the other.
    """

    def __init__(self, source: BlockLayout, dest: BlockLayout) -> None:
        if why := layout_mismatch(source, dest):
            raise ValueError(f"{layout_text(source)} cannot become {layout_text(dest)}: {why}")
        self.source = source
        self.dest = dest
        self.unit_tokens = min(source.block_tokens, dest.block_tokens)
        self.units_per_source_block = source.block_tokens // self.unit_tokens
        self.units_per_dest_block = dest.block_tokens // self.unit_tokens
        self.unit_bytes = source.block_bytes // self.units_per_source_block
        self._num_groups = max(source.num_shards, dest.num_shards)
        self._source = _Side(source, self.unit_tokens, self._num_groups, source.num_shards == dest.num_shards)
        self._dest = _Side(dest, self.unit_tokens, self._num_groups, source.num_shards == dest.num_shards)

    @property
    def is_identity(self) -> bool:
        """Whether both sides have the same blocks: unit ids are block ids then, and whole blocks may be copied."""
        return self.source == self.dest

    @property
    def piece_bytes(self) -> int:
        """Length of what lies together on both sides; a unit is unit_bytes / piece_bytes of them."""
        return self._source.piece_bytes

    def copy(self, dest_data: Pool, dest_units: UnitIds, source_data: Pool, source_units: UnitIds) -> None:
        """Copy units pairwise. data: shape (num_blocks, block_bytes), uint8, C-contiguous; ids: shape (num_units,).

        It runs to its end: callers that must be able to stop pass few units at a time.
        Raises: ValueError for data of another shape or lengths that differ; IndexError for a unit that is not there; nothing
        was copied then.
        """
        sources, dests = _columns(source_units, dest_units)
        _require(sources, len(source_data) * self.units_per_source_block)
        _require(dests, len(dest_data) * self.units_per_dest_block)
        groups = list(zip(self._source.groups(source_data), self._dest.groups(dest_data), strict=True))
        source_at, dest_at = divmod(sources, self.units_per_source_block), divmod(dests, self.units_per_dest_block)
        per_gather = _GATHER_BYTES * self._num_groups // self.unit_bytes
        if per_gather > 1:
            for start in range(0, sources.size, per_gather):
                batch = slice(start, start + per_gather)
                for source_group, dest_group in groups:
                    dest_group[dest_at[0][batch], dest_at[1][batch]] = source_group[source_at[0][batch], source_at[1][batch]]
            return
        for source, source_inner, dest, dest_inner in zip(*(column.tolist() for column in (*source_at, *dest_at)), strict=True):
            for source_group, dest_group in groups:
                dest_group[dest, dest_inner] = source_group[source, source_inner]

    def descriptors(self, source_units: UnitIds, dest_units: UnitIds) -> tuple[Offsets, Offsets, int]:
        """The same copies as byte ranges: offsets in the source's pool, offsets in the destination's, and the length of each.

        Offsets have shape (num_units * unit_bytes / length,) and stand pairwise, unit after unit.
        Raises: ValueError if lengths differ.
        """
        sources, dests = _columns(source_units, dest_units)
        return self._source.offsets(sources), self._dest.offsets(dests), self.piece_bytes


class _Side:
    """Where the pieces of a unit lie in the blocks of one side, in the order that both sides share: group, plane, row.

    A plane is one (layer, K or V) of a shard, a row one token of it or, with equal shards, all of the unit's tokens.
    """

    def __init__(self, layout: BlockLayout, unit_tokens: int, num_groups: int, has_equal_shards: bool) -> None:
        group_bytes = layout.num_kv_heads // num_groups * layout.head_dim * layout.item_bytes
        self._layout = layout
        self._units_per_block = layout.block_tokens // unit_tokens
        self._groups_per_shard = num_groups // layout.num_shards
        self._num_rows = 1 if has_equal_shards else unit_tokens
        self.piece_bytes = group_bytes * unit_tokens // self._num_rows
        # shard, plane, unit in the block, row, group in the shard: C order over these, then the piece's bytes.
        self._shape = (layout.num_shards, layout.num_layers * 2, self._units_per_block, self._num_rows, self._groups_per_shard)
        self._unit_offsets = self._offsets_in_block()

    def groups(self, data: Pool) -> list[Pool]:
        """One view of the pool per group, shape (num_blocks, units per block, planes, rows, piece_bytes)."""
        if data.ndim != 2 or data.shape[1] != self._layout.block_bytes or data.dtype != np.uint8 or not data.flags.c_contiguous:
            raise ValueError(f"{data.dtype} {data.shape} is not a contiguous pool of blocks of {self._layout.block_bytes} bytes")
        pieces = data.reshape(len(data), *self._shape, self.piece_bytes).transpose(1, 5, 0, 3, 2, 4, 6)
        return [group for shard in pieces for group in shard]

    def offsets(self, units: npt.NDArray[np.int64]) -> Offsets:
        """Byte offset in the pool of every piece of these units, shape (num_units * pieces per unit,)."""
        block_ids, inner = divmod(units, self._units_per_block)
        starts = (block_ids * self._layout.block_bytes).astype(np.uint64)
        return (starts[:, None] + self._unit_offsets[inner]).reshape(-1)

    def _offsets_in_block(self) -> Offsets:
        """Shape (units per block, pieces per unit): offsets in the block, in the shared order."""
        positions = np.arange(int(np.prod(self._shape)), dtype=np.uint64).reshape(self._shape) * np.uint64(self.piece_bytes)
        return np.ascontiguousarray(positions.transpose(2, 0, 4, 1, 3)).reshape(self._units_per_block, -1)


def _columns(source_units: UnitIds, dest_units: UnitIds) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    sources, dests = np.asarray(source_units, np.int64), np.asarray(dest_units, np.int64)
    if sources.shape != dests.shape or sources.ndim != 1:
        raise ValueError(f"{sources.size} source units for {dests.size} destination units")
    return sources, dests


def _require(units: npt.NDArray[np.int64], num_units: int) -> None:
    if units.size and not 0 <= units.min() <= units.max() < num_units:  # numpy would take -1 for the last one
        raise IndexError(f"units {units.min()}..{units.max()} in a pool of {num_units}")
