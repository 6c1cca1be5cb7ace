"""Prometheus metrics of the frontend. GenAI names of OpenTelemetry, with the prefix and separators of Prometheus."""

from dataclasses import dataclass

from baton_runtime.metrics import HotHistogram, Series
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton_frontend.generation import GenerationEnd
from baton_frontend.openai_http import HttpRecord

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 180.0)
_PER_TOKEN_SECONDS = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0)
_TOKENS = (1, 2, 3, 4, 8, 16, 32, 64)
_CANCEL_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """Metrics of one model and class ("interactive", "batch"), looked up once per request."""

    prompt_tokens: Counter
    cached_tokens: Counter
    output_tokens: Counter
    time_to_first_token: Histogram
    time_per_output_token: Histogram
    request_duration: Histogram
    inter_token: Series
    tokens_per_event: Series


class FrontendMetrics:
    """All of them; also the observer of the HTTP side."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by_class = ("model", "class")
        self.requests = Counter(
            "baton_requests",
            "Generations by outcome: stop, length, cancelled, or why they failed.",
            ("outcome",),
            registry=registry,
        )
        self.inflight = Gauge("baton_inflight_requests", "Generations that have not ended.", registry=registry)
        self.resumes = Counter("baton_resumes", "Attempts that failed and were placed again.", registry=registry)
        self.worker_losses = Counter("baton_worker_losses", "Workers fenced, by reason.", ("reason",), registry=registry)
        self.cancel_to_sent = Histogram(
            "baton_cancel_to_sent_seconds",
            "From the end of an attempt (its client left, a stop string, ...) to its Cancel being on the worker's stream.",
            buckets=_CANCEL_SECONDS,
            registry=registry,
        )
        self.cancel_to_freed = Histogram(
            "baton_cancel_to_freed_seconds",
            "From the end of an attempt (its client left, a stop string, ...) to its worker's word that it is over, its blocks free.",
            buckets=_CANCEL_SECONDS,
            registry=registry,
        )
        self.attached_workers = Gauge("baton_attached_workers", "Workers with a live Attach stream.", registry=registry)
        self.live_routers = Gauge("baton_live_routers", "Routers with a live Route stream.", registry=registry)
        self.paced_asks = Gauge("baton_paced_asks", "Questions held back so that resumes go first.", registry=registry)
        self.fallbacks = Counter("baton_fallback_placements", "Requests the frontend placed itself, without a router.", registry=registry)
        self.prompt_tokens = Counter("baton_prompt_tokens", "Prompt tokens of ended generations.", by_class, registry=registry)
        self.cached_tokens = Counter("baton_cached_prompt_tokens", "Of them, tokens whose KV was cached.", by_class, registry=registry)
        self.output_tokens = Counter("baton_output_tokens", "Tokens delivered.", by_class, registry=registry)
        self.time_to_first_token = Histogram(
            "baton_gen_ai_server_time_to_first_token_seconds",
            "Request accepted to first token out.",
            by_class,
            buckets=_SECONDS,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "baton_gen_ai_server_time_per_output_token_seconds",
            "(E2E - TTFT) / (output tokens - 1), per request of at least two tokens.",
            by_class,
            buckets=_PER_TOKEN_SECONDS,
            registry=registry,
        )
        self.request_duration = Histogram(
            "baton_gen_ai_server_request_duration_seconds", "Request accepted to its end.", by_class, buckets=_SECONDS, registry=registry
        )
        self.inter_token = HotHistogram(
            "baton_inter_token_seconds",
            "Between consecutive output tokens of a request as they leave for the client; 0 for those that came together.",
            by_class,
            _PER_TOKEN_SECONDS,
            registry,
        )
        self.tokens_per_event = HotHistogram(
            "baton_tokens_per_event", "Tokens that came together from a worker, and go out as one event.", by_class, _TOKENS, registry
        )
        self._of_class: dict[tuple[str, bool], ClassMetrics] = {}  # models are few: admission takes only known ones
        self.http_requests = Counter("baton_http_requests", "HTTP requests by route and status.", ("route", "status"), registry=registry)

    def on_refused(self, reason: str) -> None:
        """A generation was refused at admission."""
        self.requests.labels(reason.lower()).inc()

    def of_class(self, model: str, *, interactive: bool) -> ClassMetrics:
        """What is counted for requests of this model and class."""
        found = self._of_class.get((model, interactive))
        if found is None:
            labels = (model, "interactive" if interactive else "batch")
            found = self._of_class[model, interactive] = ClassMetrics(
                self.prompt_tokens.labels(*labels),
                self.cached_tokens.labels(*labels),
                self.output_tokens.labels(*labels),
                self.time_to_first_token.labels(*labels),
                self.time_per_output_token.labels(*labels),
                self.request_duration.labels(*labels),
                self.inter_token.series(*labels),
                self.tokens_per_event.series(*labels),
            )
        return found

    def on_end(self, of_class: ClassMetrics, end: GenerationEnd, ttft_s: float | None, tpot_s: float | None, duration_s: float) -> None:
        """A generation ended. ttft_s, tpot_s: None if there is none."""
        self.requests.labels(outcome_of(end)).inc()
        if end.resumed:
            self.resumes.inc(end.resumed)
        of_class.prompt_tokens.inc(end.prompt_tokens)
        of_class.cached_tokens.inc(end.cached_tokens)
        of_class.output_tokens.inc(end.output_tokens)
        if ttft_s is not None:
            of_class.time_to_first_token.observe(ttft_s)
        if tpot_s is not None:
            of_class.time_per_output_token.observe(tpot_s)
        of_class.request_duration.observe(duration_s)

    def on_call_end(self, record: HttpRecord) -> None:
        """See `HttpObserver`."""
        self.http_requests.labels(record.route, str(record.status)).inc()


def outcome_of(end: GenerationEnd) -> str:
    """One word: how a generation ended."""
    return end.error.reason.lower() if end.error is not None else end.reason
