"""Spans of one handoff: kv.begin at the source, kv.pull and kv.confirm at the sink, all children of the request's traceparent.

Collected as plain numbers while the handoff runs and emitted once it is over, so that tracing costs its hot path nothing.
"""

import time
from dataclasses import dataclass

from baton_runtime import semconv
from baton_runtime.log import get_logger
from baton_runtime.telemetry import context_from, is_sampled
from opentelemetry.trace import Tracer

from baton_handoff.ids import HandoffComplete, HandoffEnd, HandoffKey, Side
from baton_handoff.transports.base import PullStats

log = get_logger(__name__)

_GOOD_OUTCOMES = ("confirmed", "cancelled", "stale")  # nothing went wrong: it was finished, or wanted no more
_Attributes = dict[str, str | int | float]


@dataclass(slots=True)
class Interval:
    """From the first to the last time something happened; wall clock, in ns."""

    start_ns: int = 0
    end_ns: int = 0

    def opened(self) -> None:
        """It happens now; only the first time counts."""
        self.start_ns = self.start_ns or time.time_ns()

    def closed(self) -> None:
        """It has happened now; the last time counts."""
        self.opened()
        self.end_ns = time.time_ns()


@dataclass(slots=True)
class PullTotals:
    """All operations of one handoff. busy_s: sum of their own durations, which may overlap with those of other handoffs."""

    num_bytes: int = 0
    num_operations: int = 0
    num_copies: int = 0
    num_retries: int = 0
    busy_s: float = 0.0
    transport: str = ""
    why: str = ""  # that transport

    def add(self, transport: str, why: str, stats: PullStats, *, is_retry: bool) -> None:
        """One more is over."""
        self.num_bytes += stats.num_bytes
        self.num_operations += 1
        self.num_copies += stats.num_operations
        self.num_retries += is_retry
        self.busy_s += stats.duration_s
        self.transport, self.why = transport, why

    @property
    def gigabytes_per_second(self) -> float:
        """While operations ran; 0 if none did."""
        return self.num_bytes / self.busy_s / 1e9 if self.busy_s > 0 else 0.0


class HandoffTrace:
    """Collects what the spans of one handoff say, and emits them when it is over. Times without unit are time.monotonic()."""

    __slots__ = (
        "_announced_at",
        "_asked_at",
        "_traceparent",
        "announced_s",
        "begin",
        "confirm",
        "first_block",
        "pull",
        "round_trip_s",
        "totals",
    )

    def __init__(self, traceparent: str) -> None:
        self._traceparent = traceparent
        self.begin = Interval()
        self.pull = Interval()
        self.confirm = Interval()
        self.totals = PullTotals()
        self.first_block = 0  # source: blocks the sink had
        self.announced_s = 0.0  # source: from the newest announce to the last confirm
        self.round_trip_s = 0.0  # sink: of the last confirm
        self._announced_at = 0.0
        self._asked_at = 0.0

    def accepted(self, first_block: int) -> None:
        """Source: the sink has reserved everything."""
        self.begin.closed()
        self.first_block = first_block

    def announced(self, now: float) -> None:
        """Source: blocks were announced."""
        self._announced_at = now

    def answered(self, now: float) -> None:
        """Source: a Confirm was answered yes."""
        self.announced_s = now - self._announced_at

    def asked(self, now: float) -> None:
        """Sink: a Confirm is on its way."""
        self.confirm.opened()
        self._asked_at = now

    def confirmed(self, now: float) -> None:
        """Sink: a yes has come."""
        self.confirm.closed()
        self.round_trip_s = now - self._asked_at

    def pulled(self, transport: str, why: str, stats: PullStats, *, is_retry: bool) -> None:
        """Sink: one operation is over."""
        self.pull.closed()
        self.totals.add(transport, why, stats, is_retry=is_retry)

    def tell_completed(self, tracer: Tracer, key: HandoffKey, complete: HandoffComplete) -> None:
        """A sink has everything."""
        self.emit(tracer, key, "confirmed", complete)
        log.debug(
            "handoff_completed",
            request_id=key.request_id,
            attempt=key.attempt,
            num_bytes=complete.handoff_bytes,
            last_chunk_bytes=complete.last_chunk_bytes,
            exposed_ms=_ms(complete.exposed_s),
            round_trip_ms=_ms(self.round_trip_s),
            transport=self.totals.transport,
            num_operations=self.totals.num_operations,
            gigabytes_per_second=round(self.totals.gigabytes_per_second, 3),
        )

    def tell_ended(self, tracer: Tracer, key: HandoffKey, side: Side, end: HandoffEnd, outcome: str) -> None:
        """A Start is over."""
        self.emit(tracer, key, outcome)
        log.debug(
            "handoff_ended",
            side=side.name,
            request_id=key.request_id,
            attempt=key.attempt,
            outcome=outcome,
            exposed_ms=_ms(end.exposed_s),
            announce_to_confirm_ms=_ms(self.announced_s),
        )

    def emit(self, tracer: Tracer, key: HandoffKey, outcome: str, complete: HandoffComplete | None = None) -> None:
        """Nothing is emitted for requests that are not sampled. complete: at a sink that has everything."""
        if not is_sampled(self._traceparent):
            return
        totals = self.totals
        pull: _Attributes = {
            semconv.BATON_BYTES: totals.num_bytes,
            semconv.BATON_GIGABYTES_PER_SECOND: round(totals.gigabytes_per_second, 3),
            semconv.BATON_OPERATIONS: totals.num_operations,
            semconv.BATON_COPIES: totals.num_copies,
            semconv.BATON_RETRIES: totals.num_retries,
            semconv.BATON_TRANSPORT: totals.transport,
            semconv.BATON_TRANSPORT_REASON: totals.why,
        }
        confirm: _Attributes = {semconv.BATON_ROUND_TRIP_MS: _ms(self.round_trip_s)}
        if complete is not None:
            confirm[semconv.BATON_EXPOSED_MS] = _ms(complete.exposed_s)
            confirm[semconv.BATON_LAST_CHUNK_BYTES] = complete.last_chunk_bytes
        self._emit(tracer, semconv.SPAN_KV_BEGIN, self.begin, key, outcome, {semconv.BATON_FIRST_BLOCK: self.first_block})
        self._emit(tracer, semconv.SPAN_KV_PULL, self.pull, key, outcome, pull)
        self._emit(tracer, semconv.SPAN_KV_CONFIRM, self.confirm, key, outcome, confirm)

    def _emit(self, tracer: Tracer, name: str, interval: Interval, key: HandoffKey, outcome: str, attributes: _Attributes) -> None:
        if not interval.start_ns:
            return
        common: _Attributes = {
            semconv.BATON_REQUEST_ID: key.request_id,
            semconv.BATON_ATTEMPT: key.attempt,
            semconv.BATON_OUTCOME: outcome,
        }
        if outcome not in _GOOD_OUTCOMES:
            common[semconv.ERROR_TYPE] = outcome
        span = tracer.start_span(
            name, context=context_from(self._traceparent), start_time=interval.start_ns, attributes={**common, **attributes}
        )
        span.end(interval.end_ns or time.time_ns())


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
