"""Arbitrary orders of everything the block manager offers, against a model that only remembers who wrote what into which block."""

from baton_engine.blocks import BlockManager, CacheFull
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

TEXTS = st.text(alphabet="ab", min_size=0, max_size=5)
OWNERS = st.integers(0, 5)


def chain(text: str) -> list[bytes]:
    return [text[: end + 1].encode() for end in range(len(text))]


class Blocks(RuleBasedStateMachine):
    """memory plays the pool: whoever holds a block exclusively writes to it, so a block given away too early shows."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks)
        self.memory: dict[int, object] = {}
        self.text: dict[object, str] = {}
        self.expected: dict[object, list[object]] = {}  # contents of the table, block by block
        self.num_reserved: dict[object, int] = {}
        self.pins: dict[object, dict[int, tuple[int, object]]] = {}
        self.published: set[bytes] = set()
        self.generation = 0

    def owner(self, number: int) -> object | None:
        alive = [owner for owner in self.expected if owner[0] == number]
        return alive[-1] if alive else None

    def fresh_owner(self, number: int) -> object:
        self.generation += 1
        return (number, self.generation)

    def write_fresh(self, owner: object, start: int) -> None:
        for index, block in enumerate(self.manager.table(owner)[start:], start):
            self.memory[block] = (owner, index)
            self.expected[owner].append(self.memory[block])

    @rule(number=OWNERS, text=TEXTS, extra=st.integers(0, 2), reserve=st.booleans(), keep_free=st.integers(0, 2))
    def take(self, number: int, text: str, extra: int, reserve: bool, keep_free: int) -> None:
        owner, before = self.fresh_owner(number), self.manager.counts()
        take = self.manager.reserve if reserve else self.manager.acquire
        matched = self.manager.match_prefix(chain(text))
        try:
            shared = take(owner, chain(text), len(text) + extra, keep_free=keep_free)
        except CacheFull as error:
            full = error
        else:
            full = None
        if full is not None:
            assert full.needed == len(text) + extra - matched
            assert self.manager.counts() == before
            return
        assert shared == matched
        table = self.manager.table(owner)
        assert len(table) == len(text) + extra
        assert [self.memory[block] for block in table[:shared]] == chain(text)[:shared]
        self.text[owner], self.expected[owner] = text, list(chain(text)[:shared])
        self.write_fresh(owner, shared)
        self.num_reserved[owner] = len(table) - shared if reserve else 0

    @rule(number=OWNERS, data=st.data())
    def commit(self, number: int, data: st.DataObject) -> None:
        owner = self.owner(number)
        if owner is None:
            return
        table, hashes = self.manager.table(owner), chain(self.text[owner])
        end = data.draw(st.integers(0, len(table)))
        committed = len(table) - self.num_reserved[owner]
        for index in range(committed, min(end, len(hashes))):
            self.memory[table[index]] = self.expected[owner][index] = hashes[index]
        self.manager.commit(owner, end, hashes)
        self.num_reserved[owner] = len(table) - max(end, committed)

    @rule(number=OWNERS)
    def grow(self, number: int) -> None:
        owner = self.owner(number)
        if owner is None or self.num_reserved[owner]:
            return
        length = len(self.manager.table(owner))
        try:
            self.manager.grow(owner)
        except CacheFull:
            assert self.manager.counts().free == self.manager.counts().cached == 0
        self.write_fresh(owner, length)

    @rule(number=OWNERS)
    def publish(self, number: int) -> None:
        owner = self.owner(number)
        if owner is None:
            return
        table, hashes = self.manager.table(owner), chain(self.text[owner])
        for index in range(min(len(table) - self.num_reserved[owner], len(hashes))):
            if self.expected[owner][index] != hashes[index]:
                self.memory[table[index]] = self.expected[owner][index] = hashes[index]
                for pins in (pins for other, pins in self.pins.items() if other == owner):
                    if index in pins:
                        pins[index] = (table[index], hashes[index])
            self.manager.publish(owner, index, hashes[index])

    @rule(number=OWNERS, data=st.data())
    def pin(self, number: int, data: st.DataObject) -> None:
        owner = self.owner(number)
        if owner is None:
            return
        usable = len(self.manager.table(owner)) - self.num_reserved[owner]
        first = data.draw(st.integers(0, usable))
        count = data.draw(st.integers(0, usable - first))
        for index, block in enumerate(self.manager.pin(owner, first, count), first):
            self.pins.setdefault(owner, {}).setdefault(index, (block, self.expected[owner][index]))

    @rule(number=OWNERS, text=TEXTS, first=st.integers(0, 3), most=st.integers(0, 5))
    def pin_cached(self, number: int, text: str, first: int, most: int) -> None:
        owner, hashes = self.fresh_owner(number), chain(text)[first:]
        matched = min(most, self.manager.match_prefix(hashes))
        blocks = self.manager.pin_cached(owner, first, hashes, most)
        assert [self.memory[block] for block in blocks] == hashes[:matched]
        if blocks:
            self.pins[owner] = {index: (block, self.memory[block]) for index, block in enumerate(blocks, first)}

    @rule(number=OWNERS)
    def rematch(self, number: int) -> None:
        owner = self.owner(number)
        if owner is None:
            return
        hashes, length, before = chain(self.text[owner]), len(self.manager.table(owner)), self.manager.prefix(owner).shared
        try:
            shared = self.manager.rematch(owner, hashes)
        except ValueError:
            is_touched = any(isinstance(content, bytes) for content in self.expected[owner][before:])
            assert is_touched or self.num_reserved[owner] or owner in self.pins
            return
        assert shared == max(before, min(length, self.manager.match_prefix(hashes)))
        assert len(self.manager.table(owner)) == length
        self.expected[owner][:shared] = hashes[:shared]

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), end=st.none() | st.integers(0, 7))
    def unpin(self, data: st.DataObject, end: int | None) -> None:
        owner = data.draw(st.sampled_from(sorted(self.pins)))
        for _ in range(data.draw(st.integers(1, 2))):
            self.manager.unpin(owner, end)
        self.pins[owner] = {index: pin for index, pin in self.pins[owner].items() if end is not None and index >= end}
        if not self.pins[owner]:
            del self.pins[owner]

    @rule(number=OWNERS, times=st.integers(1, 2))
    def release(self, number: int, times: int) -> None:
        owner = self.owner(number)
        if owner is None:
            return
        for _ in range(times):
            self.manager.release(owner)
        del self.text[owner], self.expected[owner], self.num_reserved[owner]

    @invariant()
    def books_are_sound(self) -> None:
        self.manager.check()
        counts = self.manager.counts()
        assert counts.total == counts.free + counts.cached + counts.pinned + counts.reserved + counts.used
        assert counts.reserved == sum(self.num_reserved.values())
        in_tables = {block for owner in self.expected for block in self.manager.table(owner)}
        assert counts.used + counts.reserved == len(in_tables)
        assert counts.pinned == len({block for pins in self.pins.values() for block, _ in pins.values()} - in_tables)
        held = {owner: len(pins) for owner, pins in self.pins.items()}
        for owner, number in self.num_reserved.items():
            if number:
                held[owner] = held.get(owner, 0) + number
        assert self.manager.pinned_owners() == held

    @invariant()
    def nothing_in_use_was_overwritten(self) -> None:
        for owner, contents in self.expected.items():
            assert [self.memory[block] for block in self.manager.table(owner)] == contents
        for pins in self.pins.values():
            for block, content in pins.values():
                assert self.memory[block] == content

    @invariant()
    def events_tell_the_published_hashes(self) -> None:
        events = self.manager.drain_events()
        assert not self.published & set(events.stored)
        assert set(events.removed) <= self.published
        self.published = (self.published | set(events.stored)) - set(events.removed)
        assert self.published == set(self.manager.cached_hashes())
        for block_hash in self.published:
            assert self.memory[self.manager._states.by_hash[block_hash]] == block_hash


Blocks.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase
