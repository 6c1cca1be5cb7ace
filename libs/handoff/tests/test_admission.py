from array import array

import pytest
from baton_engine.api import EngineRequest, Priority, SequenceKey, Work
from baton_handoff.admission import OfferQueue, OldestRefused, Waiting, check_start
from baton_handoff.config import Times
from baton_handoff.ids import HandoffKey, PeerRef
from baton_handoff.tombstones import Tombstones
from baton_runtime.errors import Draining, InvalidArgument, StaleAttempt

TIMES = Times()


def waiting(name: str, started_at: float, priority: Priority = Priority.INTERACTIVE, num_blocks: int = 2) -> Waiting:
    return Waiting(
        key=HandoffKey(name, 1, "d"), peer=PeerRef("d", "d"), priority=priority, started_at=started_at, num_blocks=num_blocks, num_tokens=8
    )


def names(queue: OfferQueue[Waiting], now: float) -> list[str]:
    return [entry.key.request_id for entry in queue.due(now)]


def test_offers_go_oldest_first_and_batch_after_interactive() -> None:
    queue: OfferQueue[Waiting] = OfferQueue(TIMES)
    for entry in (waiting("b", 1.0, Priority.BATCH), waiting("late", 3.0), waiting("early", 2.0)):
        queue.add(entry)
    assert names(queue, 4.0) == ["early", "late", "b"]


def test_batch_overtakes_interactive_that_came_after_its_ageing() -> None:
    queue: OfferQueue[Waiting] = OfferQueue(TIMES)
    queue.add(waiting("b", 1.0, Priority.BATCH))
    queue.add(waiting("i", 12.0))
    assert names(queue, 13.0) == ["b", "i"]


def test_offered_and_not_due_ones_are_left_out() -> None:
    queue: OfferQueue[Waiting] = OfferQueue(TIMES)
    first, second = waiting("a", 1.0), waiting("b", 1.0)
    queue.add(first)
    queue.add(second)
    queue.offered(first, 2.0)
    assert names(queue, 2.0) == ["b"]
    assert queue.offered_blocks == 2
    queue.offer_answered(first, retry_at=2.5)
    assert names(queue, 2.4) == ["b"]
    assert queue.next_retry_at(2.4) == 2.5
    assert queue.next_retry_at(2.5) == float("inf")
    assert names(queue, 2.5) == ["a", "b"]


def test_equal_times_are_removed_one_by_one() -> None:
    queue: OfferQueue[Waiting] = OfferQueue(TIMES)
    entries = [waiting(name, 1.0) for name in "abc"]
    for entry in entries:
        queue.add(entry)
    queue.remove(entries[1])
    queue.remove(entries[1])
    assert names(queue, 2.0) == ["a", "c"]
    assert len(queue) == 2


def test_offer_nobody_answers_stops_to_count_as_ahead() -> None:
    queue: OfferQueue[Waiting] = OfferQueue(TIMES)
    entry = waiting("a", 1.0)
    queue.add(entry)
    queue.offered(entry, 2.0)
    assert list(queue.recently_offered(2.05)) == [entry]
    assert list(queue.recently_offered(2.2)) == []
    assert queue.offered_blocks == 2


def test_refusals_double_the_delay_up_to_a_quarter_second() -> None:
    refused = OldestRefused(TIMES)
    ticket = waiting("a", 1.0)
    assert [round(refused.refuse(ticket, 5, 2.0), 3) for _ in range(6)] == [0.02, 0.04, 0.08, 0.16, 0.25, 0.25]


def refused_for(seconds: float, ticket: Waiting) -> OldestRefused:
    refused = OldestRefused(TIMES)
    refused.refuse(ticket, 5, 10.0)
    refused.refuse(ticket, 5, 10.0 + seconds)
    return refused


def test_room_is_kept_from_younger_ones_after_a_second_of_refusals() -> None:
    old, young = waiting("old", 1.0), waiting("young", 2.0)
    assert refused_for(0.9, old).room_kept_from(young, 11.0) == 0
    assert refused_for(1.1, old).room_kept_from(young, 11.1) == 5
    assert refused_for(1.1, young).room_kept_from(old, 11.1) == 0
    assert refused_for(1.1, old).room_kept_from(old, 11.1) == 0


def test_ticket_that_is_offered_no_more_keeps_nobody_out() -> None:
    assert refused_for(1.1, waiting("old", 1.0)).room_kept_from(waiting("young", 2.0), 12.5) == 0


def test_batch_keeps_interactive_out_only_when_aged() -> None:
    old = waiting("old", 1.0, Priority.BATCH)
    assert refused_for(1.1, old).room_kept_from(waiting("young", 10.0), 11.1) == 5  # ten seconds old
    old = waiting("old", 9.0, Priority.BATCH)
    assert refused_for(1.1, old).room_kept_from(waiting("young", 10.0), 11.1) == 0
    assert refused_for(1.1, old).room_kept_from(waiting("young", 10.0, Priority.BATCH), 11.1) == 5


def test_forgotten_ticket_keeps_nobody_out() -> None:
    old = waiting("old", 1.0)
    refused = refused_for(1.1, old)
    refused.forget(old)
    assert refused.room_kept_from(waiting("young", 2.0), 11.1) == 0


def test_first_is_the_oldest_of_the_highest_class_that_was_refused_for_a_second() -> None:
    tickets = [waiting("batch", 9.0, Priority.BATCH), waiting("old", 9.5), waiting("young", 10.0)]
    refused = OldestRefused(TIMES)
    for ticket in tickets:
        refused.refuse(ticket, 5, 10.0)
        refused.refuse(ticket, 5, 10.9)
    assert not any(refused.is_first(ticket, 10.9) for ticket in tickets)
    assert [refused.is_first(ticket, 11.1) for ticket in tickets] == [False, True, False]
    assert not refused.is_first(tickets[1], 12.5)  # offered no more


def request(num_tokens: int, attempt: int = 1) -> EngineRequest:
    return EngineRequest(SequenceKey("r", attempt), array("I", range(num_tokens)), num_tokens, b"r" * 16, Work.PREFILL_ONLY)


def test_start_is_refused_for_what_is_wrong_with_it() -> None:
    stones = Tombstones(60.0)
    stones.cancel("r", 1, 0.0)
    with pytest.raises(Draining):
        check_start(stones, request(9), 2, 8, is_draining=True)
    with pytest.raises(StaleAttempt):
        check_start(stones, request(9), 2, 8, is_draining=False)
    with pytest.raises(InvalidArgument, match="one token"):
        check_start(stones, request(1, attempt=2), 0, 8, is_draining=False)
    with pytest.raises(InvalidArgument, match="9 blocks"):
        check_start(stones, request(9, attempt=2), 9, 8, is_draining=False)
    check_start(stones, request(9, attempt=2), 2, 8, is_draining=False)
