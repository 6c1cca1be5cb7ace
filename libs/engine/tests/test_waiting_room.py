"""The line for blocks, and that what is promised is there: by itself, and through the block manager."""

import pytest
from baton_engine.blocks import BlockManager, CacheFull, IntegrityError, Turn
from baton_engine.waiting_room import WaitingRoom
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


def refused(room: WaitingRoom, owner: str, rank: float, *times: float, num_blocks: int = 5, stays: bool = False) -> None:
    for now in times:
        room.refuse(owner, Turn(rank, now, stays), num_blocks)


def test_room_is_kept_after_a_second_of_refusals_from_who_comes_later():
    room = WaitingRoom()
    refused(room, "old", 1.0, 10.0, 10.9)
    assert room.kept_from("young", Turn(2.0, 10.9)) == 0
    room.at(11.1)
    assert room.kept_from("young", Turn(2.0, 11.1)) == 5
    assert room.kept_from("older", Turn(0.5, 11.1)) == 0
    assert room.kept_from("old", Turn(1.0, 11.1)) == 0
    assert room.first() == "old"


def test_who_asks_without_a_turn_goes_last():
    room = WaitingRoom()
    refused(room, "old", 1.0, 10.0, 11.1)
    assert room.kept_from("fetch", None) == 5


def test_room_is_kept_for_one_only_the_lowest_rank():
    room = WaitingRoom()
    refused(room, "batch", 15.0, 10.0, 11.1, num_blocks=9)
    refused(room, "old", 9.0, 10.0, 11.1, num_blocks=3)
    refused(room, "new", 5.0, 11.0, num_blocks=7)  # not for a second yet
    assert room.first() == "old"
    assert room.kept_from("batch", Turn(15.0, 11.1)) == 3


def test_who_asks_no_more_keeps_nobody_out_unless_it_stays():
    room = WaitingRoom()
    refused(room, "ticket", 1.0, 10.0)
    refused(room, "whole", 2.0, 10.0, stays=True)
    assert not room.expire(11.0)
    assert room.expire(11.1)
    assert room.first() == "whole"
    assert not room.expire(100.0)


def test_who_leaves_is_out_of_line_and_needs_no_promise():
    room = WaitingRoom()
    refused(room, "a", 1.0, 10.0, 11.1)
    room.promise("b", 4)
    assert (room.promised, room.promised_to_others("b"), room.promised_to_others("a")) == (4, 0, 4)
    assert [room.leave("a"), room.leave("b"), room.leave("b")] == [True, True, False]
    assert (room.first(), room.promised) == (None, 0)


def at(rank: float, now: float | None = None, *, stays: bool = False) -> Turn:
    return Turn(rank, rank if now is None else now, stays)


def test_promised_blocks_are_nobody_elses_and_always_there():
    manager = BlockManager(8)
    manager.promise("offer", 6, at(1.0))
    manager.promise("offer", 6, at(1.0))
    with pytest.raises(CacheFull) as error:
        manager.acquire("whole", [], 3, turn=at(2.0))
    assert (error.value.needed, error.value.available) == (3, 2)
    with pytest.raises(CacheFull):
        manager.promise("second", 3, at(2.0))
    manager.reserve("ticket", [], 2)
    with pytest.raises(CacheFull):
        manager.acquire("fetch", [], 1)
    manager.acquire("offer", [], 6)
    manager.check()
    assert manager.counts().free == 0


def test_growth_takes_nothing_that_is_promised():
    manager = BlockManager(4)
    manager.acquire("a", [], 2)
    manager.promise("offer", 2, at(1.0))
    with pytest.raises(CacheFull):
        manager.grow("a")
    manager.withdraw("offer")
    manager.grow("a", 2)


def test_promise_covers_cached_blocks_that_turn_out_to_be_shared():
    """They leave the cache as well when they are taken: a promise counts both."""
    manager = BlockManager(4)
    hashes = [b"a", b"b"]
    manager.acquire("x", [], 2)
    for index, block_hash in enumerate(hashes):
        manager.publish("x", index, block_hash)
    manager.release("x")
    manager.promise("offer", 4, at(1.0))
    with pytest.raises(CacheFull):
        manager.acquire("y", hashes, 2)
    assert manager.acquire("offer", hashes, 4) == 2
    manager.check()


def test_broken_promise_is_an_integrity_error():
    manager = BlockManager(4)
    manager.acquire("a", [], 3)
    manager._room.promise("offer", 2)
    with pytest.raises(IntegrityError, match="promised"):
        manager.check()


def test_small_ones_get_room_beside_the_first_only_if_both_fit():
    manager = BlockManager(10)
    manager.acquire("runs", [], 6)
    for now in (10.0, 10.9):
        with pytest.raises(CacheFull):
            manager.reserve("large", [], 8, turn=at(1.0, now))
    manager.reserve("early", [], 1, turn=at(2.0, 10.95))  # it has not waited for a second
    with pytest.raises(CacheFull):
        manager.reserve("small", [], 1, turn=at(2.0, 11.1))
    manager.release("runs")
    with pytest.raises(CacheFull):
        manager.reserve("medium", [], 2, turn=at(2.0, 11.2))
    manager.reserve("small", [], 1, turn=at(2.0, 11.2))  # 8 remain
    manager.reserve("large", [], 8, turn=at(1.0, 11.3), keep_free=manager.growth_headroom)
    manager.check()
    assert manager.counts().free == 0


def test_no_growth_room_is_asked_of_the_one_that_goes_first():
    manager = BlockManager(20)
    manager.acquire("runs", [], 1)
    for now in (10.0, 10.5, 11.0):
        with pytest.raises(CacheFull):
            manager.reserve("large", [], 19, keep_free=1, turn=at(1.0, now))
    manager.reserve("large", [], 19, keep_free=1, turn=at(1.0, 11.1))


def test_those_behind_hear_when_the_first_has_its_blocks_or_gives_up():
    manager = BlockManager(4)
    told: list[int] = []
    manager.acquire("runs", [], 4)
    manager.subscribe_available(lambda: told.append(1))
    for owner in ("a", "b"):
        with pytest.raises(CacheFull):
            manager.acquire(owner, [], 1, turn=at(1.0, stays=owner == "b"))
    manager.withdraw("b")
    assert len(told) == 1
    manager.expire_waiting(1.5)
    assert len(told) == 1
    manager.expire_waiting(2.1)
    assert len(told) == 2
    manager.withdraw("a")
    assert len(told) == 2


class Line(RuleBasedStateMachine):
    """Random claims, promises, takings and returns: promises are kept, and whoever goes first never loses ground but to growth."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(24)
        self.now = 100.0
        self.names = 0
        self.waiting: dict[str, tuple[float, int]] = {}
        self.promised: dict[str, int] = {}
        self.held: set[str] = set()

    def available(self) -> int:
        counts = self.manager.counts()
        return counts.free + counts.cached

    def turn(self, rank: float) -> Turn:
        return Turn(rank, self.now, stays=True)

    @rule(num_blocks=st.integers(1, 20), is_late=st.booleans(), is_promise=st.booleans())
    def ask(self, num_blocks: int, is_late: bool, is_promise: bool) -> None:
        self.names += 1
        name, rank = f"n{self.names}", self.now + (10 if is_late else 0)
        self._ask(name, rank, num_blocks, is_promise=is_promise)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        rank, num_blocks = self.waiting[name]
        self._ask(name, rank, num_blocks, is_promise=False)

    def _ask(self, name: str, rank: float, num_blocks: int, *, is_promise: bool) -> None:
        first = self.manager.first_in_line()
        lacks = self.waiting[str(first)][1] if first is not None else 0
        try:
            if is_promise:
                self.manager.promise(name, num_blocks, self.turn(rank))
                self.promised[name] = num_blocks
            else:
                self.manager.acquire(name, [], num_blocks, turn=self.turn(rank))
                self.held.add(name)
        except CacheFull:
            self.waiting[name] = (rank, num_blocks)
            return
        self.waiting.pop(name, None)
        if first not in (None, name) and rank >= self.waiting[str(first)][0]:
            assert self.available() - sum(self.promised.values()) >= lacks, "the first lost ground to one behind it"

    @precondition(lambda self: self.promised)
    @rule(data=st.data(), is_taken=st.booleans())
    def settle(self, data: st.DataObject, is_taken: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.promised)))
        num_blocks = self.promised.pop(name)
        if is_taken:
            self.manager.acquire(name, [], num_blocks)  # never fails
            self.held.add(name)
        else:
            self.manager.withdraw(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.held.discard(name)
        self.manager.release(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        try:
            self.manager.grow(data.draw(st.sampled_from(sorted(self.held))))
        except CacheFull:
            assert self.available() == sum(self.promised.values())

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[name]
        self.manager.withdraw(name)

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.2, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.manager.expire_waiting(self.now)

    @invariant()
    def books_balance(self) -> None:
        self.manager.check()


Line.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLine = Line.TestCase
