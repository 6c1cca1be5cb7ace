"""What is told of one request: its span, the time of its first token, its metrics, and one line in the log."""

from collections.abc import Callable

from baton_runtime import semconv
from baton_runtime.telemetry import traceparent
from opentelemetry import trace
from opentelemetry.context import Context
from structlog.stdlib import BoundLogger

from baton_frontend.generation import Generation, GenerationEnd
from baton_frontend.metrics import FrontendMetrics, outcome_of
from baton_frontend.placement import Placement

PROVIDER = "baton"


class RequestReport:
    """Opened at admission, closed at the one end."""

    __slots__ = (
        "_clock",
        "_first_token_at",
        "_generation",
        "_last_token_at",
        "_log",
        "_metrics",
        "_of_class",
        "_question",
        "_request_id",
        "_span",
        "_started_at",
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
    ) -> None:
        self._request_id = request_id
        self._generation = generation
        self._tracer = tracer
        self._metrics = metrics
        self._of_class = metrics.of_class(generation.model, interactive=generation.interactive)
        self._log = log
        self._clock = clock
        self._started_at = clock()
        self._first_token_at: float | None = None
        self._last_token_at = 0.0
        self._span = self._open_span(trace_context)
        self._question: trace.Span | None = None
        self.traceparent = traceparent(trace.set_span_in_context(self._span))  # of the request's span; "" if it has none

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

    def open_question(self, attempt: int) -> str:
        """A question goes to a router. Returns: the traceparent it carries."""
        self.close_question()
        if not self._span.is_recording():
            return self.traceparent
        context = trace.set_span_in_context(self._span)
        self._question = self._tracer.start_span(semconv.SPAN_ROUTER_SELECT, context, attributes={semconv.BATON_ATTEMPT: attempt})
        return traceparent(trace.set_span_in_context(self._question))

    def close_question(self) -> None:
        """It is answered, withdrawn or lost. Idempotent."""
        if self._question is not None:
            self._question.end()
            self._question = None

    def close(self, end: GenerationEnd, placement: Placement | None, attempts: int) -> None:
        """The one end. placement: the last one."""
        duration_s = self._clock() - self._started_at
        ttft_s = None if self._first_token_at is None else self._first_token_at - self._started_at
        tpot_s = None
        if self._first_token_at is not None and end.output_tokens > 1:
            tpot_s = (self._last_token_at - self._first_token_at) / (end.output_tokens - 1)
        self._metrics.on_end(self._of_class, end, ttft_s, tpot_s, duration_s)
        decode = placement.decode.instance_id if placement is not None else None
        prefill = placement.prefill.instance_id if placement is not None and placement.prefill is not None else None
        self._close_span(end, attempts, decode, prefill)
        context = self._span.get_span_context()
        self._log.info(
            "request_finished",
            request_id=self._request_id,
            trace_id=f"{context.trace_id:032x}" if context.is_valid else None,
            model=self._generation.model,
            operation=self._generation.operation,
            outcome=outcome_of(end),
            error=None if end.error is None else str(end.error),
            ttft_ms=_ms(ttft_s),
            exposed_handoff_ms=_ms(end.exposed_handoff_s),
            tpot_ms=_ms(tpot_s),
            duration_ms=_ms(duration_s),
            prompt_tokens=end.prompt_tokens,
            cached_tokens=end.cached_tokens,
            output_tokens=end.output_tokens,
            attempts=attempts,
            resumed=end.resumed,
            decode=decode,
            prefill=prefill,
        )

    def _open_span(self, trace_context: Context | None) -> trace.Span:
        generation = self._generation
        span = self._tracer.start_span(
            f"{generation.operation} {generation.model}", context=trace_context or Context(), kind=trace.SpanKind.CLIENT
        )
        if span.is_recording():
            span.set_attributes(
                {
                    semconv.GEN_AI_OPERATION_NAME: generation.operation,
                    semconv.GEN_AI_PROVIDER_NAME: PROVIDER,
                    semconv.GEN_AI_REQUEST_MODEL: generation.model,
                    semconv.GEN_AI_REQUEST_MAX_TOKENS: generation.max_tokens,
                    semconv.BATON_REQUEST_ID: self._request_id,
                }
            )
        return span

    def _close_span(self, end: GenerationEnd, attempts: int, decode: str | None, prefill: str | None) -> None:
        self.close_question()
        span = self._span
        if span.is_recording():
            attributes: dict[str, str | int | float | list[str]] = {
                semconv.GEN_AI_USAGE_INPUT_TOKENS: end.prompt_tokens,
                semconv.GEN_AI_USAGE_OUTPUT_TOKENS: end.output_tokens,
                semconv.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: end.cached_tokens,
                semconv.GEN_AI_RESPONSE_FINISH_REASONS: [end.reason],
                semconv.BATON_ATTEMPT: attempts,
                semconv.BATON_EXPOSED_MS: round(end.exposed_handoff_s * 1e3, 3),
                semconv.BATON_OUTCOME: outcome_of(end),
            }
            if decode is not None:
                attributes[semconv.BATON_DECODE_INSTANCE_ID] = decode
            if prefill is not None:
                attributes[semconv.BATON_PREFILL_INSTANCE_ID] = prefill
            if end.error is not None:
                attributes[semconv.ERROR_TYPE] = end.error.reason
                span.set_status(trace.StatusCode.ERROR, str(end.error))
            span.set_attributes(attributes)
        span.end()


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
