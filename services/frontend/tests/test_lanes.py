"""Slots and the dispatch of frames."""

from array import array
from collections.abc import Sequence

import pytest
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_frontend.generation import TokenLogprob
from baton_frontend.lanes import INDEX_BITS, Lane, LaneTable
from baton_frontend.placement import Role
from baton_frontend.stream_io import StreamBroken
from baton_runtime.errors import QueueFull


class Owner:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fails = False

    def next_position(self) -> int:
        return 0

    def on_tokens(self, lane: Lane, first_position: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        if self.fails:
            raise RuntimeError("handler is closed")
        self.calls.append(("tokens", first_position, list(token_ids), logprobs))

    def on_gap(self, lane: Lane) -> None:
        self.calls.append(("gap",))

    def on_finished(self, lane: Lane, finished: pb.Finished) -> None:
        self.calls.append(("finished", finished.reason))

    def on_lost(self, lane: Lane, reason: str) -> None:
        self.calls.append(("lost",))

    def on_owner_failed(self, lane: Lane) -> None:
        self.calls.append(("failed",))


def frame(*entries: tuple[int, int, int], finished: Sequence[int] = (), logprobs: Sequence[pb.Logprobs] = ()) -> pb.AttachResponse:
    columns = [array("I", column).tobytes() for column in zip(*entries, strict=True)] if entries else [b"", b"", b""]
    ends = [pb.Finished(slot=slot, reason=pb.FINISH_REASON_LENGTH) for slot in finished]
    return pb.AttachResponse(slots=columns[0], positions=columns[1], token_ids=columns[2], finished=ends, logprobs=logprobs)


def u32(*values: int) -> bytes:
    return array("I", values).tobytes()


def opened(table: LaneTable) -> tuple[Owner, Lane]:
    owner = Owner()
    return owner, table.open(owner, "r", 1, Role.DECODE)


def test_each_slot_gets_its_token() -> None:
    table = LaneTable()
    (a, lane_a), (b, lane_b) = opened(table), opened(table)
    table.dispatch(frame((lane_b.slot, 4, 40), (lane_a.slot, 0, 10)))
    assert a.calls == [("tokens", 0, [10], None)]
    assert b.calls == [("tokens", 4, [40], None)]


def test_tokens_of_one_slot_in_one_frame_come_in_one_call_before_the_end() -> None:
    table = LaneTable()
    (a, lane_a), (b, lane_b) = opened(table), opened(table)
    table.dispatch(frame((lane_a.slot, 0, 1), (lane_a.slot, 1, 2), (lane_a.slot, 2, 3), (lane_b.slot, 7, 9), finished=[lane_a.slot]))
    assert a.calls == [("tokens", 0, [1, 2, 3], None), ("finished", pb.FINISH_REASON_LENGTH)]
    assert b.calls == [("tokens", 7, [9], None)]


def test_positions_that_jump_within_a_frame_are_a_gap() -> None:
    table = LaneTable()
    owner, lane = opened(table)
    table.dispatch(frame((lane.slot, 0, 1), (lane.slot, 2, 3)))
    assert owner.calls == [("gap",)]


def test_slot_used_again_has_another_name() -> None:
    table = LaneTable()
    first, lane = opened(table)
    table.dispatch(frame(finished=[lane.slot]))
    second, again = opened(table)
    assert again.slot != lane.slot
    assert again.slot % (1 << INDEX_BITS) == lane.slot % (1 << INDEX_BITS)
    table.dispatch(frame((lane.slot, 0, 1), finished=[lane.slot]))
    assert second.calls == []
    assert first.calls == [("finished", pb.FINISH_REASON_LENGTH)]


def test_generations_wrap_without_leaving_32_bits() -> None:
    table = LaneTable()
    slots = []
    for _ in range((1 << (32 - INDEX_BITS)) + 2):
        _, lane = opened(table)
        slots.append(lane.slot)
        table.close(lane)
    assert max(slots) < 1 << 32
    assert min(slots) >= 1 << INDEX_BITS


def test_full_table_refuses() -> None:
    table = LaneTable(max_lanes=1)
    _, lane = opened(table)
    with pytest.raises(QueueFull):
        opened(table)
    table.close(lane)
    table.close(lane)
    opened(table)
    with pytest.raises(QueueFull):
        opened(table)


def test_owner_that_raises_does_not_stop_the_others() -> None:
    table = LaneTable()
    (a, lane_a), (b, lane_b) = opened(table), opened(table)
    a.fails = True
    table.dispatch(frame((lane_a.slot, 0, 1), (lane_b.slot, 0, 2)))
    assert a.calls == [("failed",)]
    assert b.calls == [("tokens", 0, [2], None)]


def test_logprobs_find_their_tokens() -> None:
    table = LaneTable()
    owner, lane = opened(table)
    rows = [
        pb.Logprobs(
            slot=lane.slot, position=p, logprob=-0.5 * p, top_token_ids=array("I", [p]).tobytes(), top_logprobs=array("f", [-1.0]).tobytes()
        )
        for p in (1, 0)
    ]
    table.dispatch(frame((lane.slot, 0, 5), (lane.slot, 1, 6), logprobs=rows))
    assert owner.calls == [("tokens", 0, [5, 6], [TokenLogprob(0.0, [0], [-1.0]), TokenLogprob(-0.5, [1], [-1.0])])]


def test_incomplete_logprobs_are_none() -> None:
    table = LaneTable()
    owner, lane = opened(table)
    table.dispatch(frame((lane.slot, 0, 5), (lane.slot, 1, 6), logprobs=[pb.Logprobs(slot=lane.slot, position=0)]))
    assert owner.calls == [("tokens", 0, [5, 6], None)]


@pytest.mark.parametrize("columns", [(b"\0\0\0", b"", b""), (b"\0" * 4, b"\0" * 8, b"\0" * 4)])
def test_columns_that_do_not_fit_break_the_stream(columns: tuple[bytes, bytes, bytes]) -> None:
    with pytest.raises(StreamBroken):
        LaneTable().dispatch(pb.AttachResponse(slots=columns[0], positions=columns[1], token_ids=columns[2]))
