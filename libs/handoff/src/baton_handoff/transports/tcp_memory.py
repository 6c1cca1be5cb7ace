"""Block memory as what sockets and checksums want of it: short lists of views, each list for one system call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from baton_engine.pool import KvPool

from baton_handoff.transports.base import MAX_OPERATION_BYTES
from baton_handoff.transports.operation import BlockIds
from baton_handoff.transports.reslice import Reslice
from baton_handoff.transports.tcp_wire import MAX_CALL_BYTES, MAX_CALL_VIEWS

# At most MAX_CALL_BYTES and MAX_CALL_VIEWS, in the order of the bytes; and how many bytes. A plain tuple, and counted beforehand: asking
# each view for its length took 4 % of a transfer of 16 KiB blocks.
Batch: TypeAlias = tuple[list[memoryview], int]

# Views of single blocks that are kept, some 190 bytes each: making them anew took 4 % of a transfer of 16 KiB blocks.
_MAX_KEPT_VIEWS = 1 << 16


class BlockBytes:
    """Blocks in memory, shape (num_blocks, block_bytes), uint8. Raises: ValueError if there are gaps between them."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        if not data.flags.c_contiguous:
            raise ValueError("the blocks' memory is not contiguous")
        num_blocks, size = data.shape
        self._block_bytes = size
        self._bytes = memory = data.reshape(-1).data
        is_kept = num_blocks <= _MAX_KEPT_VIEWS and size <= MAX_CALL_BYTES
        self._views = [memory[start : start + size] for start in range(0, num_blocks * size, size)] if is_kept else []

    def batches(self, block_ids: BlockIds) -> Iterator[Batch]:
        """The blocks in the order given, neighbours as one view. Views are made as they are asked for: bytes travel meanwhile."""
        firsts = np.concatenate(([0], np.flatnonzero(np.diff(block_ids) != 1) + 1))
        if self._views and len(firsts) == len(block_ids):
            return self._single_blocks(block_ids.tolist())
        return self._runs(block_ids, firsts)

    def _single_blocks(self, block_ids: list[int]) -> Iterator[Batch]:
        views, step = self._views, min(MAX_CALL_VIEWS, MAX_CALL_BYTES // self._block_bytes)
        for start in range(0, len(block_ids), step):
            ids = block_ids[start : start + step]
            yield [views[block_id] for block_id in ids], len(ids) * self._block_bytes

    def _runs(self, block_ids: BlockIds, firsts: BlockIds) -> Iterator[Batch]:
        # Where the runs start in memory and in the stream of bytes; both are cut at every MAX_CALL_BYTES of the stream.
        run_offsets, run_starts = block_ids[firsts] * self._block_bytes, firsts * self._block_bytes
        num_bytes = len(block_ids) * self._block_bytes
        cuts = np.arange(0, num_bytes, MAX_CALL_BYTES)
        starts = np.union1d(run_starts, cuts)
        run = np.searchsorted(run_starts, starts, side="right") - 1
        offsets = run_offsets[run] + starts - run_starts[run]
        begins, ends = offsets.tolist(), (offsets + np.diff(starts, append=num_bytes)).tolist()
        memory = self._bytes
        for first, last in pairwise([*np.searchsorted(starts, cuts).tolist(), len(begins)]):
            for start in range(first, last, MAX_CALL_VIEWS):
                call = slice(start, min(last, start + MAX_CALL_VIEWS))
                num_call_bytes = sum(ends[call]) - sum(begins[call])
                yield [memory[begin:end] for begin, end in zip(begins[call], ends[call], strict=True)], num_call_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """One request of an operation. batches: where its bytes go, in order; each is to be filled before the next is asked for."""

    block_ids: BlockIds  # of the peer
    num_bytes: int
    batches: Callable[[], Iterator[Batch]]


class Landing:
    """Where the bytes of a peer's blocks go: straight into own blocks, or, if they are re-sliced, through a small buffer."""

    def __init__(self, pool: KvPool, memory: BlockBytes, reslice: Reslice | None) -> None:
        """memory: the pool's."""
        self._pool = pool
        self._reslice = reslice
        self._memory = memory
        self._staging = np.empty((0, 0), np.uint8)  # (num_blocks, bytes of the peer's blocks), made when needed

    @property
    def peer_block_bytes(self) -> int:
        """Bytes of one of the peer's blocks."""
        return self._pool.block_bytes if self._reslice is None else self._reslice.source.block_bytes

    @property
    def unit_bytes(self) -> int:
        """Bytes that one pair of ids moves."""
        return self._pool.block_bytes if self._reslice is None else self._reslice.unit_bytes

    def parts(self, source_ids: BlockIds, dest_ids: BlockIds) -> list[Part]:
        """What to ask for. Several only where single units of large blocks are wanted."""
        if self._reslice is None:
            return [Part(source_ids, len(source_ids) * self._pool.block_bytes, partial(self._memory.batches, dest_ids))]
        order = np.argsort(source_ids, kind="stable")
        sources, dests = source_ids[order], dest_ids[order]
        owners = sources // self._reslice.units_per_source_block
        block_ids = np.unique(owners)
        step = max(1, MAX_OPERATION_BYTES // self.peer_block_bytes)
        parts = []
        for start in range(0, len(block_ids), step):
            ids = block_ids[start : start + step]
            units = slice(*np.searchsorted(owners, (ids[0], ids[-1] + 1)))
            parts.append(
                Part(ids, len(ids) * self.peer_block_bytes, partial(self._staged, self._reslice, ids, sources[units], dests[units]))
            )
        return parts

    def _staged(self, reslice: Reslice, block_ids: BlockIds, sources: BlockIds, dests: BlockIds) -> Iterator[Batch]:
        """Whole blocks, as many as one call brings; when they have come, their units are copied to where they belong."""
        if not len(self._staging):
            self._staging = np.empty((max(1, MAX_CALL_BYTES // self.peer_block_bytes), self.peer_block_bytes), np.uint8)
        memory, step = BlockBytes(self._staging), len(self._staging)
        rows = np.searchsorted(block_ids, sources // reslice.units_per_source_block)
        for start in range(0, len(block_ids), step):
            end = min(len(block_ids), start + step)
            yield from memory.batches(np.arange(end - start))
            units = slice(*np.searchsorted(rows, (start, end)))
            staged = (rows[units] - start) * reslice.units_per_source_block + sources[units] % reslice.units_per_source_block
            reslice.copy(self._pool.data, dests[units], self._staging, staged)
