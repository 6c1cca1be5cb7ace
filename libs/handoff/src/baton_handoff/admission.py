"""The checks of a Start, and the order of offers at the source. Who goes first when blocks are short: baton_engine.waiting_room."""

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from baton_engine.api import EngineRequest, Priority
from baton_runtime.errors import Draining, InvalidArgument, StaleAttempt

from baton_handoff.config import Times
from baton_handoff.ids import HandoffKey, PeerRef
from baton_handoff.tombstones import Tombstones

# Answers to offers come within milliseconds; a sink that lets one wait this long no longer keeps others from being offered.
ANSWER_EXPECTED_S = 0.1


@dataclass(slots=True, eq=False, kw_only=True)
class Waiting:
    """What both sides know of a handoff from its Start. num_tokens: those handed over, all of the sequence but the last."""

    key: HandoffKey
    peer: PeerRef
    priority: Priority
    started_at: float
    num_blocks: int
    num_tokens: int
    retry_at: float = 0.0
    offered_at: float | None = None


W = TypeVar("W", bound=Waiting)


def age_order(waiting: Waiting, times: Times) -> float:
    """Rank, oldest first: batch requests count as younger by the ageing time, so that none waits for ever."""
    return waiting.started_at + (times.batch_ageing_s if waiting.priority is Priority.BATCH else 0.0)


def check_start(tombstones: Tombstones, request: EngineRequest, num_blocks: int, total_blocks: int, *, is_draining: bool) -> None:
    """Raises: Draining, StaleAttempt, InvalidArgument: this Start is not taken."""
    if is_draining:
        raise Draining()
    newest = tombstones.newest(request.key.request_id)
    if request.key.attempt <= newest:
        raise StaleAttempt(request.key.request_id, request.key.attempt, newest)
    if request.num_kv_tokens < 1:
        raise InvalidArgument("token_ids", "a sequence of one token has nothing to hand over")
    if num_blocks > total_blocks:
        raise InvalidArgument("token_ids", f"{num_blocks} blocks are needed, the pool has {total_blocks}")


class OfferQueue(Generic[W]):
    """Handoffs of a source that no sink has accepted, oldest first; batch requests count as younger by the ageing time.

    All its state: `_waiting`, sorted; of them `_offered`, whose answer is awaited, and `_told_not_now`, who wait for their retry_at.
    """

    def __init__(self, times: Times) -> None:
        self._times = times
        self._waiting: list[W] = []
        self._offered: dict[HandoffKey, W] = {}
        self._told_not_now: dict[HandoffKey, W] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiting: W) -> None:
        """A Start arrived."""
        bisect.insort(self._waiting, waiting, key=self._order)

    def due(self, now: float) -> Iterator[W]:
        """Those that may be offered now, in order."""
        return (waiting for waiting in tuple(self._waiting) if waiting.offered_at is None and waiting.retry_at <= now)

    def offered(self, waiting: W, now: float) -> None:
        """A Begin is on its way."""
        waiting.offered_at = now
        self._told_not_now.pop(waiting.key, None)
        self._offered[waiting.key] = waiting

    def offer_answered(self, waiting: W, retry_at: float) -> None:
        """The sink said not now."""
        waiting.offered_at = None
        waiting.retry_at = retry_at
        self._offered.pop(waiting.key, None)
        self._told_not_now[waiting.key] = waiting

    def remove(self, waiting: W) -> None:
        """Accepted, or over. Idempotent."""
        self._offered.pop(waiting.key, None)
        self._told_not_now.pop(waiting.key, None)
        index = bisect.bisect_left(self._waiting, self._order(waiting), key=self._order)
        while index < len(self._waiting) and self._waiting[index].key != waiting.key:
            index += 1
        del self._waiting[index : index + 1]

    def awaiting_answer(self) -> Iterable[W]:
        """Offers without an answer."""
        return self._offered.values()

    def recently_offered(self, now: float) -> Iterable[W]:
        """Offers whose answer is still to be expected."""
        return [waiting for waiting in self._offered.values() if now - (waiting.offered_at or 0.0) < ANSWER_EXPECTED_S]

    def next_retry_at(self, now: float) -> float:
        """When the next of those that wait for it is due, later than now; infinity if none waits. Those already due wait for something
        else (room, their link), which is an event of its own."""
        return min((at for waiting in self._told_not_now.values() if (at := waiting.retry_at) > now), default=float("inf"))

    def _order(self, waiting: W) -> float:
        return age_order(waiting, self._times)
