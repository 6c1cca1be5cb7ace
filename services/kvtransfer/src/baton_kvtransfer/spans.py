"""The books as part of a request's trace: one span per handoff, from the source's BEGUN to its end."""

from collections.abc import Callable

from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_runtime import semconv
from baton_runtime.telemetry import context_from, is_sampled
from opentelemetry.trace import Span, Tracer

from baton_kvtransfer.books import Handoff, HandoffKey

# Spans of handoffs whose end never comes (their worker was cut off) must not fill memory.
MAX_OPEN_SPANS = 10_000


class BookSpans:
    """Observer of the books that writes spans. Source side only: one span per handoff, below the span that began it."""

    def __init__(self, tracer: Tracer, instance_id_of: Callable[[str], str]) -> None:
        """instance_id_of: the stable name of an incarnation."""
        self._tracer = tracer
        self._instance_id_of = instance_id_of
        self._open: dict[HandoffKey, Span] = {}

    def begun(self, key: HandoffKey, event: pb.HandoffEvent, incarnation: str) -> None:
        """Start the handoff's span, if its request is traced."""
        traceparent = event.traceparent
        if not is_sampled(traceparent) or len(self._open) >= MAX_OPEN_SPANS:
            return  # the others are most of them: not worth an object of OpenTelemetry's each
        span = self._tracer.start_span(semconv.SPAN_BOOKS_HANDOFF, context_from(traceparent))
        if not span.is_recording():
            return
        span.set_attribute(semconv.BATON_REQUEST_ID, key.request_id)
        span.set_attribute(semconv.BATON_ATTEMPT, key.attempt)
        span.set_attribute(semconv.BATON_PREFILL_INSTANCE_ID, self._instance_id_of(incarnation))
        span.set_attribute(semconv.BATON_DECODE_INSTANCE_ID, self._instance_id_of(key.decode_incarnation))
        self._open[key] = span

    def ended(self, handoff: Handoff, outcome: str) -> None:
        """End the handoff's span."""
        span = self._open.pop(handoff.key, None)
        if span is None:
            return
        source, sink = handoff.source, handoff.sink
        span.set_attribute(semconv.BATON_OUTCOME, outcome)
        span.set_attribute(semconv.BATON_BYTES, source.confirmed_bytes if source is not None else 0)
        span.set_attribute(semconv.BATON_TRANSPORT, sink.transport if sink is not None else "")
        span.end()
