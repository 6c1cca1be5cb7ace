"""What is told of one request: its span, the time of its first token, its metrics, and one line in the log."""

from collections.abc import Callable
from typing import NamedTuple

from baton_runtime import semconv
from baton_runtime.telemetry import start_child, traceparent_of
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.util.types import AttributeValue
from structlog.stdlib import BoundLogger

from baton_frontend.generation import Generation, GenerationEnd
from baton_frontend.latency_budget import LatencyBudget, PhaseTimes, latency_budget, milliseconds
from baton_frontend.metrics import FrontendMetrics, outcome_of
from baton_frontend.placement import Placement
from baton_frontend.tail_sampling import TailSampling

PROVIDER = "baton"
_BUDGET_NAMES = (
    semconv.BATON_BUDGET_ROUTE_MS,
    semconv.BATON_BUDGET_QUEUE_MS,
    semconv.BATON_BUDGET_PREFILL_MS,
    semconv.BATON_BUDGET_PULL_MS,
    semconv.BATON_BUDGET_FIRST_STEP_MS,
    semconv.BATON_BUDGET_STREAM_MS,
)


class Ending(NamedTuple):
    """What is told of the one end of a request."""

    end: GenerationEnd
    attempts: int
    decode: str | None  # instance ids of the last placement
    prefill: str | None
    duration_s: float
    ttft_s: float | None
    tpot_s: float | None
    budget: LatencyBudget


class RequestReport:
    """Opened at admission, closed at the one end."""

    __slots__ = (
        "_clock",
        "_first_token_at",
        "_generation",
        "_is_pair",
        "_last_token_at",
        "_log",
        "_metrics",
        "_of_class",
        "_question",
        "_request_id",
        "_span",
        "_start_sent_at",
        "_started_at",
        "_tail",
        "_trace_context",
        "_tracer",
        "traceparent",
    )

    def __init__(
        self,
        request_id: str,
        generation: Generation,
        tracer: trace.Tracer,
        metrics: FrontendMetrics,
        log: BoundLogger,
        clock: Callable[[], float],
        trace_context: Context | None,
        tail: TailSampling | None = None,
    ) -> None:
        """tail: what becomes of the span if it is not sampled; None: nothing."""
        self._request_id = request_id
        self._generation = generation
        self._tracer = tracer
        self._metrics = metrics
        self._of_class = metrics.of_class(generation.model, interactive=generation.interactive)
        self._log = log
        self._clock = clock
        self._started_at = clock()
        self._start_sent_at: float | None = None  # of the attempt that draws the first token
        self._is_pair = False
        self._first_token_at: float | None = None
        self._last_token_at = 0.0
        self._tail = tail
        self._trace_context = trace_context
        self._span = self._open_span(trace_context)
        self._question: trace.Span | None = None
        self.traceparent = traceparent_of(self._span)  # of the request's span; "" if it has none

    def on_tokens(self, count: int) -> None:
        """So many tokens went out together."""
        now, of_class = self._clock(), self._of_class
        of_class.tokens_per_event.observe(count)
        if self._first_token_at is None:
            self._first_token_at = now
            self._span.add_event(semconv.EVENT_FIRST_TOKEN)
        else:
            of_class.inter_token.observe(now - self._last_token_at)
        if count > 1:
            of_class.inter_token.observe(0.0, count - 1)
        self._last_token_at = now

    def on_start(self, now: float, *, is_pair: bool) -> None:
        """An attempt begins. is_pair: its prompt is computed by another worker."""
        if self._first_token_at is None:
            self._start_sent_at, self._is_pair = now, is_pair

    def open_question(self, attempt: int) -> str:
        """A question goes to a router. Returns: the traceparent it carries."""
        self.close_question()
        if not self._span.is_recording():
            return self.traceparent
        context = trace.set_span_in_context(self._span)
        self._question = self._tracer.start_span(semconv.SPAN_ROUTER_SELECT, context, attributes={semconv.BATON_ATTEMPT: attempt})
        return traceparent_of(self._question)

    def close_question(self) -> None:
        """It is answered, withdrawn or lost. Idempotent."""
        if self._question is not None:
            self._question.end()
            self._question = None

    def close(self, end: GenerationEnd, placement: Placement | None, attempts: int, times: PhaseTimes) -> LatencyBudget:
        """The one end. placement: the last one. times: what the workers said. Returns: where the time went."""
        now = self._clock()
        duration_s = now - self._started_at
        budget = latency_budget(self._started_at, self._start_sent_at, self._first_token_at, now, times, is_pair=self._is_pair)
        ttft_s = None if self._first_token_at is None else self._first_token_at - self._started_at
        tpot_s = None
        if self._first_token_at is not None and end.output_tokens > 1:
            tpot_s = (self._last_token_at - self._first_token_at) / (end.output_tokens - 1)
        self._metrics.on_end(self._of_class, end, ttft_s, tpot_s, duration_s)
        decode = placement.decode.instance_id if placement is not None else None
        prefill = placement.prefill.instance_id if placement is not None and placement.prefill is not None else None
        self._close_span(Ending(end, attempts, decode, prefill, duration_s, ttft_s, tpot_s, budget))
        context = self._span.get_span_context()
        self._log.info(
            "request_finished",
            request_id=self._request_id,
            trace_id=f"{context.trace_id:032x}" if context.is_valid else None,
            model=self._generation.model,
            operation=self._generation.operation,
            outcome=outcome_of(end),
            error=None if end.error is None else str(end.error),
            ttft_ms=milliseconds(ttft_s),
            exposed_handoff_ms=milliseconds(end.exposed_handoff_s),
            tpot_ms=milliseconds(tpot_s),
            duration_ms=milliseconds(duration_s),
            prompt_tokens=end.prompt_tokens,
            cached_tokens=end.cached_tokens,
            output_tokens=end.output_tokens,
            attempts=attempts,
            resumed=end.resumed,
            decode=decode,
            prefill=prefill,
            **budget.in_ms(),
        )
        return budget

    def _open_span(self, trace_context: Context | None) -> trace.Span:
        span = start_child(self._tracer, self._span_name, trace_context or Context(), trace.SpanKind.CLIENT)
        if span.is_recording():
            span.set_attributes(self._opening_attributes())
        return span

    @property
    def _span_name(self) -> str:
        return f"{self._generation.operation} {self._generation.model}"

    def _opening_attributes(self) -> dict[str, AttributeValue]:
        generation = self._generation
        return {
            semconv.GEN_AI_OPERATION_NAME: generation.operation,
            semconv.GEN_AI_PROVIDER_NAME: PROVIDER,
            semconv.GEN_AI_REQUEST_MODEL: generation.model,
            semconv.GEN_AI_REQUEST_MAX_TOKENS: generation.max_tokens,
            semconv.BATON_REQUEST_ID: self._request_id,
        }

    def _close_span(self, ending: Ending) -> None:
        self.close_question()
        span, error = self._span, ending.end.error
        if span.is_recording():
            if error is not None:
                span.set_status(trace.StatusCode.ERROR, str(error))
            span.set_attributes(_closing_attributes(ending))
        elif self._tail is not None and (why := self._tail.why(ending.end, ending.ttft_s, ending.tpot_s, ending.duration_s)):
            self._close_late(self._tail, ending, why)
        span.end()

    def _close_late(self, tail: TailSampling, ending: Ending, why: str) -> None:
        if not tail.keep(self._span, why):
            return
        tail.spans.emit(
            self._span,
            self._span_name,
            trace.SpanKind.CLIENT,
            trace.get_current_span(self._trace_context).get_span_context(),
            ending.duration_s,
            {**self._opening_attributes(), **_closing_attributes(ending), semconv.BATON_SAMPLED_BECAUSE: why},
            error="" if ending.end.error is None else str(ending.end.error),
            event_ago_s=None if ending.ttft_s is None else ending.duration_s - ending.ttft_s,
        )


def _closing_attributes(ending: Ending) -> dict[str, AttributeValue]:
    end = ending.end
    attributes: dict[str, AttributeValue] = {
        semconv.GEN_AI_USAGE_INPUT_TOKENS: end.prompt_tokens,
        semconv.GEN_AI_USAGE_OUTPUT_TOKENS: end.output_tokens,
        semconv.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: end.cached_tokens,
        semconv.GEN_AI_RESPONSE_FINISH_REASONS: [end.reason],
        semconv.BATON_ATTEMPT: ending.attempts,
        semconv.BATON_EXPOSED_MS: round(end.exposed_handoff_s * 1e3, 3),
        semconv.BATON_OUTCOME: outcome_of(end),
    }
    optional = zip(_BUDGET_NAMES, map(milliseconds, ending.budget), strict=True)
    attributes.update({name: value for name, value in optional if value is not None})
    if ending.decode is not None:
        attributes[semconv.BATON_DECODE_INSTANCE_ID] = ending.decode
    if ending.prefill is not None:
        attributes[semconv.BATON_PREFILL_INSTANCE_ID] = ending.prefill
    if end.error is not None:
        attributes[semconv.ERROR_TYPE] = end.error.reason
    return attributes
