"""What state each block of a pool is in, and which prefix it holds. Knows no owners, takes no lock: that is the block manager's.

state      tables   pins      published   leaves it by
free       0        0         no          take_fresh
cached     0        0         yes         add_ref, add_pin, or eviction (take_fresh)
pinned     0        1 or more either      drop_pin, add_ref
held       1 or more          either      drop_ref     (reserved or used: its owner's table says which)
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """Block hashes that became or stopped being reusable since the last drain, stored before removed. 16 bytes each."""

    stored: Sequence[bytes]
    removed: Sequence[bytes]


class BlockStates:
    """The blocks of one pool. Published ones are evicted least recently used first (`touch`)."""

    def __init__(self, num_blocks: int) -> None:
        self.total = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.refs = [0] * num_blocks  # tables the block is in
        self.pin_refs = [0] * num_blocks  # owners that pin it
        self.num_pinned = 0  # blocks with pins and no table
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.by_hash: dict[bytes, int] = {}
        self.distrusted: set[int] = set()  # held blocks whose contents may be wrong: never published again
        self._stored: dict[bytes, None] = {}  # ordered sets; net change since the last drain, so at most two per block
        self._removed: dict[bytes, None] = {}

    @property
    def num_available(self) -> int:
        """Blocks nobody holds."""
        return len(self.free) + len(self.cached)

    def matching(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the leading hashes that are published."""
        blocks = []
        for block_hash in hashes:
            block = self.by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take_fresh(self, num_blocks: int) -> list[int]:
        """Blocks with one reference and no content, evicting if too few are free; the caller made sure that there are so many.

        Ascending: a chain is evicted from its end, and neighbours in rising order travel as one run.
        """
        return sorted(self._take_fresh() for _ in range(num_blocks))

    def _take_fresh(self) -> int:
        if not self.free:
            block, _ = self.cached.popitem(last=False)
            self._unpublish(block)
            self.free.append(block)
        block = self.free.pop()
        self.refs[block] = 1
        return block

    def add_ref(self, block: int) -> None:
        """It is in one more table."""
        if self.refs[block] == 0:
            if self.pin_refs[block]:
                self.num_pinned -= 1
            else:
                del self.cached[block]
        self.refs[block] += 1

    def drop_ref(self, block: int) -> None:
        """It is in one table less."""
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if self.pin_refs[block]:
                self.num_pinned += 1
            else:
                self._let_go(block)

    def add_pin(self, block: int) -> None:
        """One more owner pins it."""
        if self.refs[block] == 0 and self.pin_refs[block] == 0:
            del self.cached[block]
            self.num_pinned += 1
        self.pin_refs[block] += 1

    def drop_pin(self, block: int) -> None:
        """One owner less pins it."""
        self.pin_refs[block] -= 1
        if self.pin_refs[block] == 0 and self.refs[block] == 0:
            self.num_pinned -= 1
            self._let_go(block)

    def _let_go(self, block: int) -> None:
        self.distrusted.discard(block)
        if self.hashes[block] is None:
            self.free.append(block)
        else:
            self.cached[block] = None

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Make a chain the most recently used, its beginning most of all: so that a parent is never older than its children."""
        for block_hash in reversed(hashes):
            block = self.by_hash.get(block_hash)
            if block is not None and block in self.cached:
                self.cached.move_to_end(block)

    def publish(self, block: int, block_hash: bytes) -> None:
        """A held block is reusable under block_hash, unless another one is already, or it has a hash, or is distrusted."""
        if block_hash in self.by_hash or self.hashes[block] is not None or block in self.distrusted:
            return
        self.hashes[block] = block_hash
        self.by_hash[block_hash] = block
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._stored[block_hash] = None

    def distrust(self, block: int) -> None:
        """A held block is no reusable prefix, now and until nobody holds it."""
        self.distrusted.add(block)
        if self.hashes[block] is not None:
            self._unpublish(block)

    def _unpublish(self, block: int) -> None:
        block_hash = self.hashes[block]
        assert block_hash is not None, "only published blocks are unpublished"
        self.hashes[block] = None
        del self.by_hash[block_hash]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None

    def drain(self) -> CacheEvents:
        """Net change since the last call."""
        events = CacheEvents(tuple(self._stored), tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events
