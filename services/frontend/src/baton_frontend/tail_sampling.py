"""Traces that head sampling left out and that turn out to matter: requests that failed, were resumed, or were slow.

What can be known at the end is what the frontend knows. Its own two spans are made then, under the ids that were given out when the
request began, with the latency budget of all phases; the spans of other services do not exist, for they were told that the trace is not
sampled. Recording everything everywhere in order to decide at the end would cost each request what a sampled one costs (docs/tracing.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

from baton_runtime.errors import Cancelled, InvalidArgument, NotFound, QueueFull
from baton_runtime.telemetry import LateSpans
from opentelemetry import trace

from baton_frontend.generation import GenerationEnd

_MAX_KEPT = 1024
_NO_FAULT_OF_OURS = (InvalidArgument, NotFound, QueueFull, Cancelled)


@dataclass(frozen=True, slots=True)
class TailLimits:
    """slow_ttft_s: time to the first token, or without one to the end, from which on a request is slow. slow_tpot_s: the same of the time
    per output token. max_traces_per_s: so many are kept per second, so that an outage does not cost what it leaves."""

    slow_ttft_s: float = 5.0
    slow_tpot_s: float = 0.25
    max_traces_per_s: int = 50


class TailSampling:
    """Decides per trace, once; nothing is done for a request that ends well."""

    def __init__(self, spans: LateSpans, limits: TailLimits, clock: Callable[[], float], on_decided: Callable[[str], None]) -> None:
        """on_decided: told per trace: "error", "resumed", "slow", or "dropped" if there were too many in this second."""
        self.spans = spans  # through which those that are kept are exported
        self._limits = limits
        self._clock = clock
        self._on_decided = on_decided
        self._kept: dict[int, None] = {}  # traces with a span exported, whose call has not ended
        self._second = 0
        self._num_in_second = 0

    def why(self, end: GenerationEnd, ttft_s: float | None, tpot_s: float | None, duration_s: float) -> str:
        """Why the trace of this generation should be kept; empty: it should not."""
        if end.error is not None and not isinstance(end.error, _NO_FAULT_OF_OURS):
            return "error"
        if end.resumed:
            return "resumed"
        is_slow = (duration_s if ttft_s is None else ttft_s) > self._limits.slow_ttft_s
        return "slow" if is_slow or (tpot_s is not None and tpot_s > self._limits.slow_tpot_s) else ""

    def keep(self, span: trace.Span, why: str) -> bool:
        """Whether spans of this one's trace may be exported now."""
        trace_id = span.get_span_context().trace_id
        if trace_id in self._kept:
            return True
        second = int(self._clock())
        if second != self._second:
            self._second, self._num_in_second = second, 0
        if self._num_in_second >= self._limits.max_traces_per_s:
            self._on_decided("dropped")
            return False
        if len(self._kept) >= _MAX_KEPT:
            del self._kept[next(iter(self._kept))]  # the oldest: its call was over before it, for the client had left
        self._num_in_second += 1
        self._kept[trace_id] = None
        self._on_decided(why)
        return True

    def call_over(self, span: trace.Span, status: int) -> bool:
        """An HTTP call is over, and with it its trace. Whether its own span should be exported: with those of its generations, or alone if
        it failed before them."""
        trace_id = span.get_span_context().trace_id
        is_kept = trace_id in self._kept or (status >= 500 and self.keep(span, "error"))
        if is_kept:
            del self._kept[trace_id]
        return is_kept
