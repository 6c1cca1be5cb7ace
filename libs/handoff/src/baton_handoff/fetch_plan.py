"""What one fetch is about: leading full blocks of a sequence, in the source's blocks and in our own, whose sizes may differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton_engine.api import EngineRequest
from baton_engine.pool import BlockLayout
from baton_runtime.hashing import block_hashes

from baton_handoff.cut import Cut
from baton_handoff.tag import KvShape


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Tokens [0, num_tokens) of a sequence, whole blocks on both sides. hashes[i] is own block i's, source_hashes[i] that of the
    source's block i: links of the same chain."""

    source: BlockLayout
    own: BlockLayout
    hashes: Sequence[bytes]
    source_hashes: Sequence[bytes]

    @property
    def num_blocks(self) -> int:
        """Own blocks."""
        return len(self.hashes)

    @property
    def num_tokens(self) -> int:
        """Tokens of all of them."""
        return len(self.hashes) * self.own.block_tokens

    def shortened(self, num_blocks: int) -> "FetchPlan":
        """The same for at most so many own blocks; perhaps for none."""
        num_tokens = num_blocks * self.own.block_tokens // _step(self.source, self.own) * _step(self.source, self.own)
        hashes = self.hashes[: num_tokens // self.own.block_tokens]
        return FetchPlan(self.source, self.own, hashes, self.source_hashes[: num_tokens // self.source.block_tokens])

    def cut(self, num_cached: int) -> Cut:
        """How the two sides lie on each other if so many own blocks are cached."""
        return Cut(self.source, self.own, self.num_tokens, num_cached)


def plan_fetch(shape: KvShape, source: BlockLayout, request: EngineRequest, hashes: Sequence[bytes], num_tokens: int) -> FetchPlan:
    """For the tokens below num_tokens that fill blocks of both sides. hashes: of all own full blocks of the request."""
    own, step = shape.layout, _step(source, shape.layout)
    num_tokens = min(num_tokens, len(hashes) * own.block_tokens) // step * step
    hashes = hashes[: num_tokens // own.block_tokens]
    every, rest = divmod(source.block_tokens, own.block_tokens)
    if not rest:
        return FetchPlan(source, own, hashes, hashes[every - 1 :: every])  # the same links, or every n-th
    finer = block_hashes(request.cache_root, request.token_ids[:num_tokens], shape.hash_block_tokens, source.block_tokens)
    return FetchPlan(source, own, hashes, finer)


def _step(source: BlockLayout, own: BlockLayout) -> int:
    return max(source.block_tokens, own.block_tokens)  # the one is a multiple of the other, or the pair would not be introduced
