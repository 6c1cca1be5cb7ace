"""How one sequence lies in the source's blocks and in the sink's, whose sizes may differ. Integer arithmetic, nothing else.

    source    |       0       |       1       |   2    :      S = 64 tokens
    own       | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9: |      D = 16; or the other way round
              |-- cached ---------|                           shared with others: never written

Only blocks of the source are ever spoken of between the two sides. A unit is the smaller of the two blocks (`transports.reslice`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from baton_engine.pool import BlockLayout

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """One sequence of num_tokens in both layouts. num_cached: own leading blocks that were in the own cache, full ones."""

    source: BlockLayout
    own: BlockLayout
    num_tokens: int
    num_cached: int

    @property
    def num_source_blocks(self) -> int:
        """Blocks of the source it takes."""
        return num_blocks(self.source, self.num_tokens)

    @property
    def num_own_blocks(self) -> int:
        """Own blocks it takes."""
        return num_blocks(self.own, self.num_tokens)

    @property
    def first_block(self) -> int:
        """First block of the source that holds a token we lack; its head may lie in our cache. All of them if we lack nothing."""
        if self.num_cached == self.num_own_blocks:
            return self.num_source_blocks
        return self.num_cached * self.own.block_tokens // self.source.block_tokens

    def own_blocks(self, end_block: int) -> int:
        """Own leading blocks that are complete when those of the source below end_block are; a partial last one when all are."""
        end = min(end_block * self.source.block_tokens, self.num_tokens)
        complete = self.num_own_blocks if end == self.num_tokens else end // self.own.block_tokens
        return max(self.num_cached, complete)

    def units(self, first_block: int, source_ids: Sequence[int], table: Sequence[int]) -> tuple[Ids, Ids]:
        """Unit ids there and here of blocks [first_block, first_block + len(source_ids)) of the source, pairwise.

        table: own blocks of the whole sequence. Left out: what lies in cached blocks, and what lies beyond the sequence.
        """
        end_block = first_block + len(source_ids)
        if self.source.block_tokens == self.own.block_tokens:
            return tuple(source_ids), tuple(table[first_block:end_block])
        unit_tokens = min(self.source.block_tokens, self.own.block_tokens)
        per_source, per_own = self.source.block_tokens // unit_tokens, self.own.block_tokens // unit_tokens
        start = max(first_block * per_source, self.num_cached * per_own)
        end = min(end_block * per_source, -(-self.num_tokens // unit_tokens))
        units = np.arange(start, end)
        there = np.asarray(source_ids)[units // per_source - first_block] * per_source + units % per_source
        here = np.asarray(table)[units // per_own] * per_own + units % per_own
        return tuple(there.tolist()), tuple(here.tolist())


def num_blocks(layout: BlockLayout, num_tokens: int) -> int:
    """Blocks of that layout that num_tokens take."""
    return -(-num_tokens // layout.block_tokens)
