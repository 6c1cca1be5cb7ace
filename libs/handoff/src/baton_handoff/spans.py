"""Spans of one handoff: kv.begin at the source, kv.pull and kv.confirm at the sink, all children of the request's traceparent."""

import time
from dataclasses import dataclass

from baton_runtime import semconv
from baton_runtime.telemetry import context_from
from opentelemetry.trace import Tracer

from baton_handoff.ids import HandoffKey
from baton_handoff.transports.base import PullStats


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


def is_sampled(traceparent: str) -> bool:
    """Whether the last field of a W3C traceparent has the sampled bit."""
    try:
        return bool(int(traceparent.rpartition("-")[2], 16) & 1)
    except ValueError:
        return False


class HandoffTrace:
    """Collects what the spans of one handoff say, and emits them when it is over."""

    def __init__(self, traceparent: str) -> None:
        self._traceparent = traceparent
        self.begin = Interval()
        self.pull = Interval()
        self.confirm = Interval()
        self.compute_ended_at = 0.0  # by our own clock, of the last announced block; 0: none was announced
        self._num_bytes = 0
        self._num_operations = 0
        self._transport = ""

    def pulled(self, transport: str, stats: PullStats) -> None:
        """One operation is over."""
        self.pull.closed()
        self._num_bytes += stats.num_bytes
        self._num_operations += 1
        self._transport = transport

    def emit(self, tracer: Tracer, key: HandoffKey, outcome: str) -> None:
        """Nothing is emitted for requests that are not sampled."""
        if not is_sampled(self._traceparent):
            return
        pull: dict[str, str | int] = {
            semconv.BATON_BYTES: self._num_bytes,
            semconv.BATON_TRANSPORT: self._transport,
            semconv.BATON_OPERATIONS: self._num_operations,
        }
        self._emit(tracer, semconv.SPAN_KV_BEGIN, self.begin, key, outcome, {})
        self._emit(tracer, semconv.SPAN_KV_PULL, self.pull, key, outcome, pull)
        self._emit(tracer, semconv.SPAN_KV_CONFIRM, self.confirm, key, outcome, {})

    def _emit(self, tracer: Tracer, name: str, interval: Interval, key: HandoffKey, outcome: str, attributes: dict[str, str | int]) -> None:
        if not interval.start_ns:
            return
        common: dict[str, str | int] = {
            semconv.BATON_REQUEST_ID: key.request_id,
            semconv.BATON_ATTEMPT: key.attempt,
            semconv.BATON_OUTCOME: outcome,
        }
        span = tracer.start_span(
            name, context=context_from(self._traceparent), start_time=interval.start_ns, attributes={**common, **attributes}
        )
        span.end(interval.end_ns or time.time_ns())
