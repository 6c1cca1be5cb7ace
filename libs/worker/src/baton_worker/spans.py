"""The spans of one attempt on one worker: queue, then execute or generate. Made at the end, from the times noted on the way."""

import time
from collections.abc import Sequence

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import Work
from baton_runtime import semconv
from baton_runtime.telemetry import context_from
from opentelemetry.trace import Tracer
from opentelemetry.util.types import AttributeValue

from baton_worker.starts import CheckedStart

_QUEUE = {
    Work.WHOLE: semconv.SPAN_DECODE_QUEUE,
    Work.DECODE_ONLY: semconv.SPAN_DECODE_QUEUE,
    Work.PREFILL_ONLY: semconv.SPAN_PREFILL_QUEUE,
}
_GOOD_ENDS = (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_PREFILLED, pb.FINISH_REASON_CANCELLED)


def outcome(reason: "pb.FinishReason") -> str:
    """ "stop" for FINISH_REASON_STOP."""
    return pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


class AttemptSpans:
    """Times of one sampled attempt. Wall clock, because spans are for people; nothing is decided by them."""

    __slots__ = ("_accepted_ns", "_attributes", "_chunks_ns", "_first_step_ns", "_first_token_ns", "_start", "_tracer")

    def __init__(self, tracer: Tracer, start: CheckedStart, instance_id: str) -> None:
        self._tracer = tracer
        self._start = start
        self._accepted_ns = time.time_ns()
        self._first_step_ns = 0
        self._first_token_ns = 0
        self._chunks_ns: list[int] = []
        key = start.request.key
        self._attributes: dict[str, AttributeValue] = {
            semconv.BATON_REQUEST_ID: key.request_id,
            semconv.BATON_ATTEMPT: key.attempt,
            semconv.BATON_INSTANCE_ID: instance_id,
            semconv.BATON_PRIORITY: start.request.priority.name.lower(),
            semconv.BATON_PROMPT_TOKENS: start.request.num_prompt_tokens,
        }

    def first_step(self, ago_s: float) -> None:
        """The sequence was in a step for the first time; the step began so long ago."""
        self._first_step_ns = max(self._accepted_ns, time.time_ns() - int(ago_s * 1e9))

    def chunk(self) -> None:
        """Blocks of the prompt are computed and can be pulled."""
        self._chunks_ns.append(time.time_ns())

    def first_token(self) -> None:
        """The first token was drawn."""
        self._first_token_ns = time.time_ns()

    def end(self, finished: pb.Finished) -> None:
        """Emit the spans."""
        now = time.time_ns()
        result: dict[str, AttributeValue] = {semconv.BATON_OUTCOME: outcome(finished.reason)}
        if finished.reason not in _GOOD_ENDS:
            result[semconv.ERROR_TYPE] = finished.error.reason or outcome(finished.reason)
        work = self._start.request.work
        if not self._first_step_ns:
            return self._emit(_QUEUE[work], self._accepted_ns, now, result)
        self._emit(_QUEUE[work], self._accepted_ns, self._first_step_ns, {})
        used = finished.usage
        result |= {semconv.BATON_CACHED_TOKENS: used.cached_tokens, semconv.BATON_OUTPUT_TOKENS: used.output_tokens}
        if work is Work.PREFILL_ONLY:
            result[semconv.BATON_CHUNKS] = len(self._chunks_ns)
            chunks = [(semconv.EVENT_PREFILL_CHUNK, at_ns) for at_ns in self._chunks_ns]
            return self._emit(semconv.SPAN_PREFILL_EXECUTE, self._first_step_ns, now, result, chunks)
        if work is Work.WHOLE:
            self._emit(semconv.SPAN_PREFILL_EXECUTE, self._first_step_ns, self._first_token_ns or now, {})
        generate_from = self._first_step_ns if work is Work.DECODE_ONLY else self._first_token_ns
        if generate_from:
            first = [(semconv.EVENT_FIRST_TOKEN, self._first_token_ns)] if self._first_token_ns else []
            self._emit(semconv.SPAN_DECODE_GENERATE, generate_from, now, result, first)

    def _emit(
        self, name: str, start_ns: int, end_ns: int, attributes: dict[str, AttributeValue], events: Sequence[tuple[str, int]] = ()
    ) -> None:
        span = self._tracer.start_span(
            name, context_from(self._start.traceparent), attributes=self._attributes | attributes, start_time=start_ns
        )
        for event, at_ns in events:
            span.add_event(event, timestamp=at_ns)
        span.end(end_ns)
