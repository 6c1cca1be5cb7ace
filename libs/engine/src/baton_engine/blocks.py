"""Who holds which KV block.

A block is in exactly one state: free; cached (holds a reusable prefix, nobody uses it, evictable); pinned (held only for a
handoff that is not confirmed); reserved (set aside for an incoming handoff, contents not confirmed); used (in the table of
a sequence). free + cached + pinned + reserved + used = total, checked by `BlockManager.check`.

    state      in a table   pinned    published   who ends it
    free       no           no        no          acquire, reserve, grow
    cached     no           no        yes         acquire, reserve (shared), or eviction
    pinned     no           yes       either      unpin
    reserved   one          no        no          commit, release
    used       one or more  either    either      release

States and cached prefixes: block_states.py. Who waits for blocks, and for whom they are kept: waiting_room.py.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from baton_engine.block_states import BlockStates, CacheEvents
from baton_engine.errors import CacheFull, IntegrityError
from baton_engine.integrity import Ledger, find_problems
from baton_engine.waiting_room import Turn, WaitingRoom

__all__ = ["BlockCounts", "BlockManager", "CacheEvents", "CacheFull", "IntegrityError", "TablePrefix", "Turn"]

GROWTH_SHARE = 0.05  # of all blocks, kept free for growth when admitting (design.md, section 4, decode)


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks by state."""

    total: int
    free: int
    cached: int
    pinned: int
    reserved: int
    used: int


class TablePrefix(NamedTuple):
    """Leading blocks of a table whose contents need not be computed."""

    shared: int  # taken from this worker's cache when the table was made
    ready: int  # shared, or committed since


@dataclass(slots=True)
class _Table:
    """blocks[:committed] are used, the rest reserved. hashes is the chain as far as known, by index."""

    blocks: list[int]
    committed: int
    shared: int
    ready: int
    hashes: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class _Pins:
    """Block id by index within the sequence, and the chain to touch once the pins are gone."""

    blocks: dict[int, int] = field(default_factory=dict)
    hashes: Sequence[bytes] = ()


class BlockManager:
    """Thread-safe owner of the pool's blocks. Owners are SequenceKeys; one owner has at most one table.

    A handoff's source: acquire -> (engine computes, pins as chunks end) -> release by the engine -> unpin by the handoff.
    A handoff's sink: reserve -> commit per confirm -> the engine decodes -> release.
    A fetch's source: pin_cached -> unpin per confirm. Its sink: reserve -> commit per confirm -> release; then the sequence it
    was for finds the blocks (rematch, or acquire).
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError("a pool has at least one block")
        self._lock = threading.Lock()
        self._states = BlockStates(num_blocks)
        self._tables: dict[Hashable, _Table] = {}
        self._pins: dict[Hashable, _Pins] = {}
        self._reserving: set[Hashable] = set()  # owners of the tables with reserved blocks
        self._reserved = 0
        self._room = WaitingRoom()
        self._listeners: list[Callable[[], None]] = []
        self._watched: dict[Hashable, Callable[[], None]] = {}

    @property
    def growth_headroom(self) -> int:
        """Blocks to keep free for growth when admitting: pass it as keep_free."""
        return max(1, int(self._states.total * GROWTH_SHARE))

    def subscribe_available(self, callback: Callable[[], None]) -> None:
        """Call back, from any thread and with no lock held, after blocks became free or cached. It must not block."""
        self._listeners.append(callback)

    def when_let_go(self, owner: Hashable, callback: Callable[[], None] | None) -> None:
        """Call back once, from whichever thread and with no lock held, after the release or unpin that leaves owner without table and
        pins (a release of an owner that has neither is one too). A later callback replaces an earlier one; None: no longer.
        """
        with self._lock:
            if callback is None:
                self._watched.pop(owner, None)
            else:
                self._watched[owner] = callback

    def match_prefix(self, hashes: Sequence[bytes]) -> int:
        """Leading hashes that are cached or in use, hence shareable, now. Takes nothing."""
        with self._lock:
            return len(self._states.matching(hashes))

    def promised(self) -> int:
        """Blocks promised to anybody; they are free or cached."""
        with self._lock:
            return self._room.promised

    def available(self) -> int:
        """Blocks that could be taken now without a turn: free and cached ones, but what is promised or kept for the first in line."""
        with self._lock:
            return self._available(None, None)

    def acquire(self, owner: Hashable, hashes: Sequence[bytes], num_blocks: int, *, keep_free: int = 0, turn: Turn | None = None) -> int:
        """Give owner a table of num_blocks blocks, state used: the cached prefix of hashes (at most num_blocks), then fresh
        ones, zeroed lazily by the engine. All or nothing. Returns the number of leading blocks from the cache.

        keep_free blocks must stay free or evictable afterwards; waived while nobody holds anything, so that what fits alone can
        run alone, and for the one who goes first. turn: who is refused waits in line; None: it does not, and goes last.
        Raises: CacheFull, nothing taken; ValueError if owner has a table or pins.
        """
        return self._take(owner, hashes, num_blocks, keep_free, turn, reserved=False)

    def reserve(self, owner: Hashable, hashes: Sequence[bytes], num_blocks: int, *, keep_free: int = 0, turn: Turn | None = None) -> int:
        """As acquire, but fresh blocks are reserved until commit; the shared prefix counts as used."""
        return self._take(owner, hashes, num_blocks, keep_free, turn, reserved=True)

    def promise(self, owner: Hashable, num_blocks: int, turn: Turn) -> None:
        """Count num_blocks as taken, until owner acquires or reserves them (that many cannot fail then) or withdraws. Idempotent.

        Raises: CacheFull, nothing promised; owner waits in line.
        """
        with self._lock:
            if not self._room.has_promise(owner):
                self._admit(owner, num_blocks, 0, 0, turn)
                self._room.leave(owner)
                self._room.promise(owner, num_blocks)

    def withdraw(self, owner: Hashable) -> None:
        """Owner waits in line no longer, and needs no promise. Idempotent."""
        with self._lock:
            has_left = self._room.leave(owner)
        self._tell(has_left)

    def expire_waiting(self, now: float) -> None:
        """Those who ask again and again, and have stopped to, are in line no longer. now: time.monotonic()."""
        with self._lock:
            has_left = self._room.expire(now)
        self._tell(has_left)

    def first_in_line(self) -> Hashable | None:
        """Whose room is kept from all who come after it; None: nobody's."""
        with self._lock:
            return self._room.first()

    def commit(self, owner: Hashable, end_block: int, hashes: Sequence[bytes]) -> None:
        """Blocks [.., end_block) of owner's table are confirmed: reserved -> used; full ones published under hashes
        (hashes[i] is block i's; may be shorter than end_block: a partial last block has no hash). Idempotent.

        Raises: KeyError if owner has no table, ValueError if it is shorter than end_block.
        """
        with self._lock:
            table = self._tables[owner]
            if end_block > len(table.blocks):
                raise ValueError(f"table has {len(table.blocks)} blocks, not {end_block}")
            newly = range(table.committed, end_block)
            self._reserved -= len(newly)
            table.committed = max(table.committed, end_block)
            if table.committed == len(table.blocks):
                self._reserving.discard(owner)
            table.ready = max(table.ready, end_block)
            for index in newly:
                if index < len(hashes):
                    self._publish(table, index, hashes[index])

    def grow(self, owner: Hashable, num_blocks: int = 1) -> Sequence[int]:
        """Append fresh used blocks to owner's table; their ids. Goes before everybody in line, but takes nothing that is promised.

        Raises: CacheFull, nothing taken; KeyError; ValueError while blocks of the table are reserved.
        """
        with self._lock:
            table = self._tables[owner]
            if table.committed != len(table.blocks):
                raise ValueError("a table grows after everything reserved is committed")
            available = self._states.num_available - self._room.promised
            if num_blocks > available:
                raise CacheFull(num_blocks, max(0, available))
            fresh = self._states.take_fresh(num_blocks)
            table.blocks += fresh
            table.committed = len(table.blocks)
            return fresh

    def rematch(self, owner: Hashable, hashes: Sequence[bytes]) -> int:
        """Look again for the cached prefix of a table from `acquire` in which nothing was computed: fresh blocks for which there are
        cached ones by now become free. Never takes more than owner has. Returns the number of leading blocks from the cache.

        Raises: KeyError; ValueError for a table with reserved, pinned or computed blocks.
        """
        with self._lock:
            table = self._tables[owner]
            if owner in self._pins or table.committed != len(table.blocks) or len(table.hashes) != table.shared:
                raise ValueError("only an untouched table is matched again")
            shared = self._states.matching(hashes[: len(table.blocks)])
            for index in range(table.shared, len(shared)):
                self._states.add_ref(shared[index])
                self._states.drop_ref(table.blocks[index])
                table.blocks[index] = shared[index]
            is_longer = len(shared) > table.shared
            if is_longer:
                table.shared = table.ready = len(shared)
                table.hashes = list(hashes[: len(shared)])
        self._tell(is_longer, None)
        return table.shared

    def publish(self, owner: Hashable, index: int, block_hash: bytes) -> None:
        """Block index of owner's table is full and computed: reusable under block_hash. If another block has that hash
        already, that one stays the published one. Idempotent.

        Raises: KeyError, IndexError; ValueError if the block is still reserved.
        """
        with self._lock:
            table = self._tables[owner]
            if not 0 <= index < len(table.blocks):
                raise IndexError(f"table has {len(table.blocks)} blocks, no index {index}")
            if index >= table.committed:
                raise ValueError("a reserved block is published by commit")
            self._publish(table, index, block_hash)

    def unpublish(self, owner: Hashable) -> None:
        """The contents of owner's blocks are not to be trusted: none of them is a reusable prefix any more, and each becomes
        free when nobody holds it. Sequences that share them go on. Raises: KeyError.
        """
        with self._lock:
            table = self._tables[owner]
            for block in table.blocks:
                self._states.distrust(block)

    def table(self, owner: Hashable) -> Sequence[int]:
        """Block ids of owner, in order. Raises: KeyError."""
        with self._lock:
            return tuple(self._tables[owner].blocks)

    def prefix(self, owner: Hashable) -> TablePrefix:
        """How much of owner's table need not be computed. Raises: KeyError."""
        with self._lock:
            table = self._tables[owner]
            return TablePrefix(table.shared, table.ready)

    def has_table(self, owner: Hashable) -> bool:
        """Whether owner has a table now."""
        with self._lock:
            return owner in self._tables

    def pin(self, owner: Hashable, first: int, count: int) -> Sequence[int]:
        """Pin blocks [first, first + count) of owner's table for its handoff; their ids. Pins survive release(owner).
        Pinning a pinned block again changes nothing.

        Raises: KeyError; IndexError; ValueError for reserved blocks.
        """
        with self._lock:
            table = self._tables[owner]
            if first < 0 or count < 0 or first + count > len(table.blocks):
                raise IndexError(f"table has {len(table.blocks)} blocks, not [{first}, {first + count})")
            if first + count > table.committed:
                raise ValueError("reserved blocks hold nothing to hand over")
            if count == 0:
                return ()
            pins = self._pins.setdefault(owner, _Pins())
            for index in range(first, first + count):
                if index not in pins.blocks:
                    pins.blocks[index] = table.blocks[index]
                    self._states.add_pin(table.blocks[index])
            return tuple(table.blocks[first : first + count])

    def pin_cached(self, owner: Hashable, first: int, hashes: Sequence[bytes], most: int) -> Sequence[int]:
        """Pin the longest leading run of these hashes that is cached or in use, at most `most` blocks, for another worker's fetch;
        their ids, possibly none. They count as blocks [first, ...) of the sequence for `unpin`. Takes no block from anybody, and
        no room that is promised or kept.

        Raises: ValueError if owner has a table or pins.
        """
        with self._lock:
            if owner in self._tables or owner in self._pins:
                raise ValueError(f"{owner} has a table or pins already")
            blocks = self._with_room(self._states.matching(hashes[:most]))
            if not blocks:
                return ()
            for block in blocks:
                self._states.add_pin(block)
            self._pins[owner] = _Pins(dict(enumerate(blocks, first)), hashes[: len(blocks)])
            return tuple(blocks)

    def is_trusted(self, owner: Hashable) -> bool:
        """Whether no block that owner pins was taken back by `unpublish` since."""
        with self._lock:
            pins = self._pins.get(owner)
            return pins is None or self._states.distrusted.isdisjoint(pins.blocks.values())

    def unpin(self, owner: Hashable, end_block: int | None = None) -> None:
        """Drop owner's pins of blocks with index below end_block (None: all). Idempotent, unknown owners ignored."""
        with self._lock:
            pins = self._pins.get(owner)
            if pins is None:
                return
            below = [index for index in pins.blocks if end_block is None or index < end_block]
            for index in reversed(below):
                self._states.drop_pin(pins.blocks.pop(index))
            if not pins.blocks:
                del self._pins[owner]
                self._states.touch(pins.hashes)
            callback = self._let_go_of(owner)
        self._tell(bool(below), callback)

    def release(self, owner: Hashable) -> None:
        """Drop owner's table (not its pins). Reserved blocks become free, hashed ones cached, others free. Idempotent."""
        with self._lock:
            table = self._tables.pop(owner, None)
            if table is not None:
                self._drop_table(owner, table)
            callback = self._let_go_of(owner)
        self._tell(table is not None, callback)

    def counts(self) -> BlockCounts:
        """Blocks by state, now."""
        with self._lock:
            return self._counts()

    def held(self, owner: Hashable) -> int:
        """Blocks pinned or reserved for owner now (what the books call held)."""
        with self._lock:
            return self._held(owner)

    def pinned_owners(self) -> dict[Hashable, int]:
        """Owners of pins and reservations with their number of blocks: what stranded memory is looked for in."""
        with self._lock:
            return {owner: self._held(owner) for owner in dict.fromkeys([*self._pins, *self._reserving])}

    def drain_events(self) -> CacheEvents:
        """Net change since the last call. Bounded by twice the number of blocks even if nobody drains."""
        with self._lock:
            return self._states.drain()

    def cached_hashes(self) -> Sequence[bytes]:
        """All published hashes, for a snapshot."""
        with self._lock:
            return tuple(self._states.by_hash)

    def drain_with_hashes(self) -> tuple[CacheEvents, Sequence[bytes]]:
        """drain_events and cached_hashes at one instant. Events are net changes: a snapshot taken at any other instant than a
        drain could hold a hash whose coming and going cancelled out between two drains."""
        with self._lock:
            return self._states.drain(), tuple(self._states.by_hash)

    def check(self) -> None:
        """Integrity, of a copy: nobody waits for it. Raises: IntegrityError saying which sum or block is wrong."""
        with self._lock:
            ledger = self._ledger()
        if problems := find_problems(ledger):
            raise IntegrityError("; ".join(problems))

    # Everything below is called with the lock held.

    def _ledger(self) -> Ledger:
        return Ledger(
            total=self._states.total,
            free=self._states.free[:],
            cached=set(self._states.cached),
            refs=self._states.refs[:],
            pin_refs=self._states.pin_refs[:],
            hashes=self._states.hashes[:],
            by_hash=self._states.by_hash.copy(),
            distrusted=self._states.distrusted.copy(),
            tables=[(owner, table.blocks[:], table.committed) for owner, table in self._tables.items()],
            pins=[list(pins.blocks.values()) for pins in self._pins.values()],
            num_reserved=self._reserved,
            num_pinned=self._states.num_pinned,
            num_promised=self._room.promised,
        )

    def _take(self, owner: Hashable, hashes: Sequence[bytes], num_blocks: int, keep_free: int, turn: Turn | None, *, reserved: bool) -> int:
        """Called without the lock."""
        with self._lock:
            if owner in self._tables or owner in self._pins:
                raise ValueError(f"{owner} has a table or pins already")
            shared = self._states.matching(hashes[:num_blocks])
            num_evictable = sum(1 for block in shared if block in self._states.cached)
            self._admit(owner, num_blocks - len(shared), num_evictable, keep_free, turn)
            self._make_table(owner, hashes, shared, num_blocks, reserved=reserved)
            has_left = self._room.leave(owner)
        self._tell(has_left)  # who was behind it in line may have room now
        return len(shared)

    def _admit(self, owner: Hashable, num_fresh: int, num_evictable: int, keep_free: int, turn: Turn | None) -> None:
        """Whether owner may take num_fresh blocks, and num_evictable ones out of the cache, now. Raises: CacheFull."""
        if turn is not None:
            self._room.at(turn.now)
        if not num_fresh or (not self._tables and not self._pins) or self._room.first() == owner:
            keep_free = 0
        available = self._available(owner, turn) - keep_free
        num_wanted = num_fresh + num_evictable
        if num_wanted > max(0, available):
            if turn is not None:
                self._room.refuse(owner, turn, num_wanted)
            raise CacheFull(num_fresh, max(0, available - num_evictable))

    def _available(self, owner: Hashable, turn: Turn | None) -> int:
        """Free and cached blocks that owner may take; below 0 if others are promised or kept more than there are."""
        kept = self._room.kept_from(owner, turn) + self._room.promised_to_others(owner)
        return self._states.num_available - kept

    def _with_room(self, blocks: list[int]) -> list[int]:
        """The leading ones that can be pinned without taking room: those nobody holds are available until then."""
        available = self._available(None, None)
        for index, block in enumerate(blocks):
            if block in self._states.cached:
                if available <= 0:
                    return blocks[:index]
                available -= 1
        return blocks

    def _make_table(self, owner: Hashable, hashes: Sequence[bytes], shared: list[int], num_blocks: int, *, reserved: bool) -> None:
        for block in shared:  # before any eviction, which must not take these
            self._states.add_ref(block)
        fresh = self._states.take_fresh(num_blocks - len(shared))
        committed = len(shared) if reserved else num_blocks
        self._reserved += num_blocks - committed
        if committed < num_blocks:
            self._reserving.add(owner)
        self._tables[owner] = _Table([*shared, *fresh], committed, len(shared), len(shared), list(hashes[: len(shared)]))

    def _drop_table(self, owner: Hashable, table: _Table) -> None:
        self._reserved -= len(table.blocks) - table.committed
        self._reserving.discard(owner)
        for block in reversed(table.blocks):
            self._states.drop_ref(block)
        self._states.touch(table.hashes)
        if owner in self._pins:
            self._pins[owner].hashes = table.hashes

    def _let_go_of(self, owner: Hashable) -> Callable[[], None] | None:
        """Who waits for owner to hold nothing, if that is so now."""
        if owner not in self._watched or owner in self._tables or owner in self._pins:
            return None
        return self._watched.pop(owner)

    def _publish(self, table: _Table, index: int, block_hash: bytes) -> None:
        if index == len(table.hashes):
            table.hashes.append(block_hash)
        self._states.publish(table.blocks[index], block_hash)

    def _held(self, owner: Hashable) -> int:
        pins = self._pins.get(owner)
        table = self._tables.get(owner)
        return (len(pins.blocks) if pins else 0) + (len(table.blocks) - table.committed if table else 0)

    def _counts(self) -> BlockCounts:
        free, cached, pinned, reserved = len(self._states.free), len(self._states.cached), self._states.num_pinned, self._reserved
        return BlockCounts(self._states.total, free, cached, pinned, reserved, self._states.total - free - cached - pinned - reserved)

    def _tell(self, available: bool, let_go: Callable[[], None] | None = None) -> None:
        """Called without the lock. available: blocks may be available to somebody to whom they were not."""
        if let_go is not None:
            let_go()
        if available:
            for callback in self._listeners:
                callback()
