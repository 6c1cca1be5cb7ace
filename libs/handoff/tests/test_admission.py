from array import array

import pytest
from baton_engine.api import EngineRequest, Priority, SequenceKey, Work
from baton_handoff.admission import OfferQueue, Waiting, check_start
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
