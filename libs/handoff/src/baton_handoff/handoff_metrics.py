"""What one worker's handoffs export to Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton_handoff.ids import EndReason, HandoffEnd, Side
from baton_handoff.transports.base import PullStats

_EXPOSED_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_RATE_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50)


def outcome_of(end: HandoffEnd | None) -> str:
    """Cause or reason of an end, lower case; "confirmed" for none and for PREFILLED."""
    if end is None or end.reason is EndReason.PREFILLED:
        return "confirmed"
    return (end.cause or end.reason).name.lower()


class HandoffMetrics:
    """Metrics of one worker; gauges are read when scraped."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._bytes = Counter("baton_handoff_bytes", "Bytes pulled and confirmed, by the sink.", registry=registry)
        self._handoffs = Counter("baton_handoffs", "Handoffs that are over.", ["outcome", "role"], registry=registry)
        self._exposed = Histogram(
            "baton_handoff_exposed_seconds",
            "From the end of compute of the last block at the source to its confirm at the sink.",
            buckets=_EXPOSED_BUCKETS_S,
            registry=registry,
        )
        self._rate = Histogram(
            "baton_handoff_pull_gigabytes_per_second",
            "Speed of single pull operations.",
            ["transport"],
            buckets=_RATE_BUCKETS,
            registry=registry,
        )
        self._fences = Counter("baton_handoff_fences", "Peers fenced.", ["role", "reason"], registry=registry)

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A gauge read when scraped."""
        Gauge(name, documentation, registry=self._registry).set_function(read)

    def ended(self, side: Side, end: HandoffEnd | None) -> None:
        """A Start is over; end None: the sink has everything."""
        self._handoffs.labels(outcome=outcome_of(end), role=side.name.lower()).inc()

    def confirmed(self, num_bytes: int) -> None:
        """Bytes became the sink's."""
        self._bytes.inc(num_bytes)

    def exposed(self, seconds: float) -> None:
        """A handoff is complete."""
        self._exposed.observe(max(0.0, seconds))

    def pulled(self, transport: str, stats: PullStats) -> None:
        """One operation is over."""
        if stats.duration_s > 0:
            self._rate.labels(transport=transport).observe(stats.num_bytes / stats.duration_s / 1e9)

    def fenced(self, role: str, reason: str) -> None:
        """A peer was fenced; role: ours."""
        self._fences.labels(role=role, reason=reason.lower()).inc()
