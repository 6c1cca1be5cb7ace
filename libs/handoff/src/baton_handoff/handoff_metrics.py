"""What one worker's handoffs export to Prometheus. Every name with its meaning and unit: docs/handoff-metrics.md."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton_handoff.ids import EndReason, FailureCause, HandoffEnd, Side
from baton_handoff.messages import Message
from baton_handoff.transports.base import PullStats

_EXPOSED_BUCKETS_S = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_RATE_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50)
# What was moved before counts half after this many seconds of moving: short enough to follow a link, long enough for small operations.
LINK_HALF_LIFE_S = 0.25


def outcome_of(end: HandoffEnd | None) -> str:
    """Cause or reason of an end, lower case; "confirmed" for none and for PREFILLED."""
    if end is None or end.reason is EndReason.PREFILLED:
        return "confirmed"
    return (end.cause or end.reason).name.lower()


@dataclass(slots=True)
class _Link:
    """One source we pull from. Bytes and the seconds they took, older ones counting less and less."""

    peer: str
    transport: str
    num_bytes: float = 0.0
    busy_s: float = 0.0

    def add(self, stats: PullStats) -> float:
        """Returns: GB/s now."""
        keep = 0.5 ** (stats.duration_s / LINK_HALF_LIFE_S)
        self.num_bytes = self.num_bytes * keep + stats.num_bytes
        self.busy_s = self.busy_s * keep + stats.duration_s
        return self.num_bytes / self.busy_s / 1e9


class HandoffMetrics:
    """Metrics of one worker; gauges are read when scraped.

    Its state beside the metrics: `_links` by the source's incarnation, one per open link, so that labels of peers that are gone go
    as well.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._links: dict[str, _Link] = {}
        self._bytes = Counter("baton_handoff_bytes", "Bytes pulled and confirmed, by the sink.", registry=registry)
        self._handoffs = Counter("baton_handoffs", "Handoffs that are over.", ["outcome", "role"], registry=registry)
        self._data_loss = Counter(
            "baton_handoff_data_loss", "Handoffs ended because checksum, tag or token counts differed: discarded.", registry=registry
        )
        self._exposed = Histogram(
            "baton_handoff_exposed_seconds",
            "From the end of compute of the last block to its confirm, both at the source; by the sink.",
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
        self._link_rate = Gauge(
            "baton_handoff_link_gigabytes_per_second",
            "Speed of pulls from one source while they run, newest operations counting most.",
            ["peer", "transport"],
            registry=registry,
        )
        self._retries = Counter("baton_handoff_pull_retries", "Operations run again on a fresh connection.", registry=registry)
        self._messages = Counter("baton_handoff_messages", "Messages heard from peers, without beats.", ["kind"], registry=registry)
        self._fences = Counter("baton_handoff_fences", "Peers fenced.", ["role", "reason"], registry=registry)

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A gauge read when scraped."""
        Gauge(name, documentation, registry=self._registry).set_function(read)

    def watch_states(self, states: Mapping[Side, Sequence[str]], count: Callable[[Side, str], int]) -> None:
        """baton_handoffs_by_state, read when scraped. count: handoffs of a side in a state."""
        gauge = Gauge(
            "baton_handoffs_by_state", "Handoffs by side and state (docs/handoff.md).", ["side", "state"], registry=self._registry
        )
        for side, names in states.items():
            for state in names:
                gauge.labels(side=side.name.lower(), state=state).set_function(partial(count, side, state))

    def ended(self, side: Side, end: HandoffEnd | None) -> None:
        """A Start is over; end None: the sink has everything."""
        self._handoffs.labels(outcome=outcome_of(end), role=side.name.lower()).inc()
        if end is not None and end.cause is FailureCause.DATA_LOSS:
            self._data_loss.inc()

    def confirmed(self, num_bytes: int) -> None:
        """Bytes became the sink's."""
        self._bytes.inc(num_bytes)

    def exposed(self, seconds: float) -> None:
        """A handoff is complete."""
        self._exposed.observe(seconds)

    def heard(self, message: Message) -> None:
        """A peer said something."""
        self._messages.labels(kind=type(message).__name__.lower()).inc()

    def pulled(self, incarnation: str, peer: str, transport: str, stats: PullStats, *, is_retry: bool) -> None:
        """One operation from a source (peer: its instance id) is over."""
        if is_retry:
            self._retries.inc()
        if stats.duration_s <= 0:
            return
        self._rate.labels(transport=transport).observe(stats.num_bytes / stats.duration_s / 1e9)
        link = self._links.get(incarnation)
        if link is None or link.transport != transport:
            self.peer_gone(incarnation)
            link = self._links[incarnation] = _Link(peer, transport)
        self._link_rate.labels(peer=peer, transport=transport).set(link.add(stats))

    def peer_gone(self, incarnation: str) -> None:
        """No link to that source any more: its labels go, unless another life of the same instance has them now. Idempotent."""
        gone = self._links.pop(incarnation, None)
        if gone is not None and all((link.peer, link.transport) != (gone.peer, gone.transport) for link in self._links.values()):
            self._link_rate.remove(gone.peer, gone.transport)

    def fenced(self, role: str, reason: str) -> None:
        """A peer was fenced; role: ours."""
        self._fences.labels(role=role, reason=reason.lower()).inc()
