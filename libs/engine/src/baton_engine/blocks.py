"""Who holds which KV block.

A block is in exactly one state: free; cached (holds a reusable prefix, nobody uses it, evictable); pinned (held only for a
handoff that is not confirmed); reserved (set aside for an incoming handoff, contents not confirmed); used (in the table of
a sequence). free + cached + pinned + reserved + used = total, checked by `BlockManager.check`.

Interface only so far; see the class below.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Hashable


@dataclass(frozen=True, slots=True)
class BlockCounts:
    total: int
    free: int
    cached: int
    pinned: int
    reserved: int
    used: int


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """Block hashes that became or stopped being reusable since the last drain, stored before removed. 16 bytes each."""

    stored: Sequence[bytes]
    removed: Sequence[bytes]


class BlockManager:
    """Thread-safe owner of the pool's blocks. Owners are SequenceKeys; one owner has at most one table.

    A handoff's source: acquire -> (engine computes, pins as chunks end) -> release by the engine -> unpin by the handoff.
    A handoff's sink: reserve -> commit per confirm -> the engine decodes -> release.
    """

    def __init__(self, num_blocks: int) -> None: ...

    def match_prefix(self, hashes: Sequence[bytes]) -> int:
        """Leading hashes that are cached or in use, hence shareable, now. Takes nothing."""

    def can_hold(self, num_blocks: int) -> bool:
        """Whether num_blocks could be taken now (free + cached)."""

    def acquire(self, owner: Hashable, hashes: Sequence[bytes], num_blocks: int) -> int:
        """Give owner a table of num_blocks blocks, state used: the cached prefix of hashes (at most num_blocks), then fresh
        ones, zeroed lazily by the engine. All or nothing. Returns the number of leading blocks from the cache.

        Raises: CacheFull, nothing taken; ValueError if owner has a table.
        """

    def reserve(self, owner: Hashable, hashes: Sequence[bytes], num_blocks: int) -> int:
        """As acquire, but fresh blocks are reserved until commit; the shared prefix counts as used."""

    def commit(self, owner: Hashable, end_block: int, hashes: Sequence[bytes]) -> None:
        """Blocks [.., end_block) of owner's table are confirmed: reserved -> used; full ones published under hashes
        (hashes[i] is block i's; may be shorter than end_block: a partial last block has no hash)."""

    def grow(self, owner: Hashable, num_blocks: int = 1) -> Sequence[int]:
        """Append fresh used blocks to owner's table; their ids. Raises: CacheFull, nothing taken."""

    def publish(self, owner: Hashable, index: int, block_hash: bytes) -> None:
        """Block index of owner's table is full and computed: reusable under block_hash. If another block has that hash
        already, that one stays the published one."""

    def table(self, owner: Hashable) -> Sequence[int]:
        """Block ids of owner, in order. Raises: KeyError."""

    def pin(self, owner: Hashable, first: int, count: int) -> Sequence[int]:
        """Pin blocks [first, first + count) of owner's table for its handoff; their ids. Pins survive release(owner)."""

    def unpin(self, owner: Hashable, end_block: int | None = None) -> None:
        """Drop owner's pins of blocks with index below end_block (None: all). Idempotent, unknown owners ignored."""

    def release(self, owner: Hashable) -> None:
        """Drop owner's table (not its pins). Reserved blocks become free, hashed ones cached, others free. Idempotent."""

    def counts(self) -> BlockCounts: ...

    def held(self, owner: Hashable) -> int:
        """Blocks pinned or reserved for owner now (what the books call held)."""

    def pinned_owners(self) -> dict[Hashable, int]:
        """Owners of pins and reservations with their number of blocks: what stranded memory is looked for in."""

    def drain_events(self) -> CacheEvents: ...

    def cached_hashes(self) -> Sequence[bytes]:
        """All published hashes, for a snapshot."""

    def check(self) -> None:
        """Integrity. Raises: IntegrityError saying which sum or block is wrong."""
