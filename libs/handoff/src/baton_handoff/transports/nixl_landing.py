"""Where the bytes of a peer's blocks go: straight into own blocks, piece by piece, or through a buffer."""

from collections.abc import Iterator

import numpy as np
from baton_engine.pool import KvPool

from baton_handoff.transports.nixl_agent import NixlAgent
from baton_handoff.transports.operation import BlockIds
from baton_handoff.transports.reslice import Reslice

# A read costs microseconds, however short: pieces smaller than this come as whole blocks and are cut up here (measured: 1 KiB
# pieces move at a hundredth of the speed of whole blocks).
_MIN_PIECE_BYTES = 16 << 10
_STAGING_BYTES = 4 << 20


class Landing:
    """How operations with one peer are read. staging_rows: blocks of the peer that the buffer holds; 0: there is none."""

    def __init__(self, pool: KvPool, reslice: Reslice | None) -> None:
        self._pool = pool
        self._reslice = reslice
        # What is cut up here must be where this process can reach it.
        is_staged = reslice is not None and reslice.piece_bytes < _MIN_PIECE_BYTES and pool.place.device is None
        self.staging_rows = max(1, _STAGING_BYTES // reslice.source.block_bytes) if is_staged and reslice is not None else 0

    @property
    def unit_bytes(self) -> int:
        """Bytes that one pair of ids moves."""
        return self._pool.block_bytes if self._reslice is None else self._reslice.unit_bytes

    def transfers(self, agent: NixlAgent, source_ids: BlockIds, dest_ids: BlockIds) -> Iterator[int]:
        """Post the reads of one operation one after the other. To be resumed when the one it gave is done."""
        if self._reslice is None:
            yield agent.post_blocks(source_ids, dest_ids)
        elif not self.staging_rows:
            yield agent.post_ranges(*self._reslice.descriptors(source_ids, dest_ids))
        else:
            yield from self._staged(self._reslice, agent, source_ids, dest_ids)

    def _staged(self, reslice: Reslice, agent: NixlAgent, source_ids: BlockIds, dest_ids: BlockIds) -> Iterator[int]:
        order = np.argsort(source_ids, kind="stable")
        sources, dests = source_ids[order], dest_ids[order]
        owners, inner = np.divmod(sources, reslice.units_per_source_block)
        block_ids = np.unique(owners)
        for start in range(0, block_ids.size, self.staging_rows):
            ids = block_ids[start : start + self.staging_rows]
            yield agent.post_blocks(ids, np.arange(ids.size))
            units = slice(*np.searchsorted(owners, (ids[0], ids[-1] + 1)))
            staged = np.searchsorted(ids, owners[units]) * reslice.units_per_source_block + inner[units]
            reslice.copy(self._pool.data, dests[units], agent.staging, staged)
