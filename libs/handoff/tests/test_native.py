"""Handoffs of engines that move KV themselves: the same protocol and the same books, with one operation that is the whole handoff."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from baton_handoff.ids import EndReason, FailureCause, HandoffKey
from baton_handoff.native import room_of
from baton_handoff.testing import LoopbackNetwork, TestWorker, introduce
from baton_handoff.testing.native import NativeFakeEngine, Room, Rooms
from baton_handoff.testing.worker import TEST_LAYOUT
from baton_runtime.testing import wait_until

TOKENS = list(range(7, 7 + 19))  # 18 to hand over: five blocks, the last of two tokens


@dataclass
class Pair:
    p: TestWorker
    d: TestWorker
    rooms: Rooms

    def place(self, request_id: str = "r", attempt: int = 1) -> None:
        self.p.prefill(request_id, TOKENS, self.d, attempt)
        self.d.decode(request_id, TOKENS, self.p, attempt)

    def room(self, request_id: str = "r", attempt: int = 1) -> Room:
        return self.rooms[room_of(HandoffKey(request_id, attempt, self.d.incarnation))]

    async def both_there(self, request_id: str = "r") -> Room:
        room = self.room(request_id)
        await wait_until(lambda: room.source.is_set() and room.sink.is_set())
        return room

    async def quiet(self) -> None:
        """Nobody holds anything, nothing lives."""
        for worker in (self.p, self.d):
            await wait_until(worker.holds_nothing)
            await wait_until(lambda worker=worker: not worker.manager.live_handoffs())
            assert isinstance(worker.engine, NativeFakeEngine)
            assert worker.engine.num_running == 0
            assert worker.manager.stranded_bytes() == 0


@contextlib.asynccontextmanager
async def make_pair(*, moves: bool = True, tells_source: bool = True, num_blocks: int = 64) -> AsyncIterator[Pair]:
    network, rooms = LoopbackNetwork(), Rooms(moves=moves, tells_source=tells_source)
    async with (
        TestWorker(network, "prefill-0", rooms=rooms, num_blocks=num_blocks) as p,
        TestWorker(network, "decode-0", rooms=rooms, num_blocks=num_blocks) as d,
    ):
        introduce(p, d)
        yield Pair(p, d, rooms)


async def test_the_engines_meet_before_anything_is_computed_and_both_books_end() -> None:
    async with make_pair() as pair:
        pair.place()
        await wait_until(lambda: "r" in pair.d.completions and "r" in pair.p.ends)
        assert pair.p.ends["r"].reason is EndReason.PREFILLED
        assert pair.p.ends["r"].num_bytes == pair.d.completions["r"].handoff_bytes == 5 * TEST_LAYOUT.block_bytes
        assert [output.token_ids for output in pair.d.outputs if output.token_ids] == [[len(TOKENS)]]
        await pair.quiet()
        assert pair.d.metric("baton_handoff_bytes_total") == 5 * TEST_LAYOUT.block_bytes


async def test_decode_has_the_kv_before_prefill_knows_and_waits_for_its_word() -> None:
    async with make_pair(tells_source=False) as pair:
        pair.place()
        room = await pair.both_there()
        assert isinstance(pair.d.engine, NativeFakeEngine)
        engine = pair.d.engine
        await wait_until(lambda: bool(engine.received))
        assert "r" not in pair.d.completions
        room.may_tell_source.set()
        await wait_until(lambda: "r" in pair.d.completions)
        await pair.quiet()


async def test_the_same_prompt_again_is_handed_over_again_for_decode_keeps_no_cache() -> None:
    async with make_pair() as pair:
        for request_id in ("one", "two"):
            pair.place(request_id)
            await wait_until(lambda request_id=request_id: request_id in pair.d.completions)
            assert pair.d.completions[request_id].handoff_bytes == 5 * TEST_LAYOUT.block_bytes
        await pair.quiet()


async def test_many_at_a_time_wait_for_the_engines_and_not_for_places() -> None:
    async with make_pair(moves=False, num_blocks=256) as pair:
        names = [f"r{n}" for n in range(12)]
        for name in names:
            pair.place(name)
        for name in names:
            (await pair.both_there(name)).may_move.set()
        await wait_until(lambda: len(pair.d.completions) == len(names))
        await pair.quiet()


@pytest.mark.parametrize("at", ["prefill", "decode"])
async def test_a_cancel_on_either_side_reaches_both_engines(at: str) -> None:
    async with make_pair(moves=False) as pair:
        pair.place()
        await pair.both_there()
        worker = pair.p if at == "prefill" else pair.d
        worker.manager.cancel("r", 1, "CLIENT_GONE")
        await wait_until(lambda: "r" in pair.p.ends and "r" in pair.d.ends)
        assert worker.ends["r"].reason is EndReason.CANCELLED
        assert "r" not in pair.d.completions
        await pair.quiet()


async def test_blocks_stay_reserved_until_the_engine_has_let_go_however_often_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_pair(moves=False) as pair:
        pair.place()
        room = await pair.both_there()
        room.may_let_go.clear()
        pair.d.manager.cancel("r", 1, "CLIENT_GONE")
        await wait_until(lambda: "r" in pair.d.ends)
        told: list[int] = []
        tell = pair.d.manager._peers.puller.end_unwanted
        monkeypatch.setattr(pair.d.manager._peers.puller, "end_unwanted", lambda keys, now: (told.append(len(keys)), tell(keys, now)))
        await wait_until(lambda: told.count(1) >= 3)
        assert pair.d.engine.blocks.counts().reserved == 5
        room.may_let_go.set()
        await pair.quiet()


async def test_a_transfer_that_fails_ends_the_handoff_on_both_sides() -> None:
    async with make_pair(moves=False) as pair:
        pair.place()
        room = await pair.both_there()
        room.fails = True
        room.may_move.set()
        await wait_until(lambda: "r" in pair.p.ends and "r" in pair.d.ends)
        assert pair.d.ends["r"].reason is EndReason.HANDOFF_FAILED
        assert pair.d.ends["r"].cause in (FailureCause.PATH_DOWN, FailureCause.PEER_CANCELLED)
        assert pair.d.ends["r"].confirmed_tokens == 0
        await pair.quiet()


async def test_decode_gives_up_its_room_when_prefill_is_fenced() -> None:
    async with make_pair(moves=False) as pair:
        pair.place()
        await pair.both_there()
        await pair.p.server.close()  # its links break and do not come back
        await wait_until(lambda: "r" in pair.d.ends)
        assert pair.d.ends["r"].cause is FailureCause.PEER_FENCED
        await wait_until(pair.d.holds_nothing)


async def test_a_new_attempt_meets_in_a_room_of_its_own() -> None:
    async with make_pair(moves=False) as pair:
        pair.place()
        await pair.both_there()
        pair.place(attempt=2)
        room = pair.room(attempt=2)
        room.may_move.set()
        await wait_until(lambda: "r" in pair.d.completions)
        assert room.source.is_set()
        assert not pair.room(attempt=1).may_move.is_set()
        await pair.quiet()


async def test_kv_that_the_engine_cannot_explain_is_stranded() -> None:
    async with make_pair() as pair:
        assert isinstance(pair.p.engine, NativeFakeEngine)
        pair.p.engine.unexplained = 4096
        assert pair.p.manager.stranded_bytes() == 4096
        assert pair.p.metric("baton_kv_stranded_bytes") == 4096


async def test_engines_that_hand_over_in_other_ways_are_not_paired() -> None:
    async with make_pair() as pair:
        pair.p.record.transports[0].name = "fake-2-rooms"
        introduce(pair.p, pair.d)
        pair.place()
        await wait_until(lambda: "r" in pair.d.ends)
        assert pair.d.ends["r"].cause is FailureCause.NO_INTRODUCTION
        await pair.quiet()


def test_rooms_are_63_bits_and_differ_by_everything_a_handoff_is_named_by() -> None:
    rooms = {room_of(HandoffKey(name, attempt, sink)) for name in ("a", "b") for attempt in (1, 2) for sink in ("x", "y")}
    assert len(rooms) == 8
    assert all(0 <= room < 1 << 63 for room in rooms)
