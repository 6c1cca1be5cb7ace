"""Both fetch books of a worker, and who waits for each fetch: the part of the manager that is about fetches.

Used twice (docs/handoff.md, section 9): by a handoff's source whose sink, or another instance, has more of the prefix (`StartFetch`),
and by the worker before it starts a whole request (`HandoffManager.start_fetch`).
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from baton_engine.api import EngineRequest
from baton_engine.blocks import BlockManager
from baton_runtime import semconv
from baton_runtime.log import get_logger
from baton_runtime.telemetry import context_from, is_sampled
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry, Counter

from baton_handoff.actions import Action, FetchEnded
from baton_handoff.config import HandoffConfig
from baton_handoff.fetch_plan import FetchPlan, plan_fetch
from baton_handoff.fetch_policy import FetchPolicy
from baton_handoff.fetch_sink import FetchSinkBook, SinkFetch
from baton_handoff.fetch_source import FetchSourceBook
from baton_handoff.ids import FetchEnd, FetchOutcome, HandoffKey, PeerRef
from baton_handoff.peers import Peers
from baton_handoff.spans import PullTotals
from baton_handoff.tag import KvShape
from baton_handoff.transports.base import PullStats

# A source whose fetch did not come in time or broke off is not asked again for so long, or every request would wait for it in turn;
# as the router bars a pair without a path.
BARRED_S = 10.0
_BARRING = (FetchOutcome.FENCED, FetchOutcome.PULL_FAILED, FetchOutcome.TIMEOUT, FetchOutcome.DATA_LOSS)

log = get_logger(__name__)


class FetchMetrics:
    """What fetches export to Prometheus. Made once per worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._fetches = Counter("baton_fetches", "Fetches of ours that are over.", ["outcome"], registry=registry)
        for outcome in FetchOutcome:
            self._fetches.labels(outcome=outcome.value)  # shown as 0 until there is one
        self._tokens = Counter("baton_fetched_tokens", "Tokens whose KV was fetched from another instance's cache.", registry=registry)
        self._bytes = Counter("baton_fetched_bytes", "Bytes fetched from other instances' caches and confirmed.", registry=registry)

    def ended(self, end: FetchEnd) -> None:
        """A fetch of ours is over."""
        self._fetches.labels(outcome=end.outcome.value).inc()
        self._tokens.inc(end.num_tokens)
        self._bytes.inc(end.num_bytes)


@dataclass(slots=True)
class _Waiter:
    """Who waits for one fetch, and what its span will say."""

    on_end: Callable[[FetchEnd], None]
    peer: PeerRef
    wanted_tokens: int
    traceparent: str
    started_ns: int
    totals: PullTotals


class Fetches:
    """All its own state: `_waiters` by identity of the fetch, `_barred`, until when a source is not asked. The books and the policy
    have theirs."""

    def __init__(
        self,
        blocks: BlockManager,
        shape: KvShape,
        config: HandoffConfig,
        peers: Peers,
        metrics: FetchMetrics,
        tracer: Tracer,
        clock: Callable[[], float],
    ) -> None:
        self.source = FetchSourceBook(blocks, shape, config)
        self.sink = FetchSinkBook(blocks, shape, config)
        self.policy = FetchPolicy(config, shape.block_bytes / shape.block_tokens)
        self._blocks = blocks
        self._shape = shape
        self._peers = peers
        self._metrics = metrics
        self._tracer = tracer
        self._clock = clock
        self._waiters: dict[HandoffKey, _Waiter] = {}
        self._barred: dict[str, float] = {}

    def num_live(self) -> int:
        """Fetches that are not over, both sides."""
        return len(self.source.live) + len(self.sink.live)

    def sources(self) -> Collection[str]:
        """Incarnations of all sources we fetch from."""
        return {fetch.peer.incarnation for fetch in self.sink.live}

    def sinks(self) -> Collection[str]:
        """Incarnations of all sinks that fetch from us."""
        return {fetch.peer_incarnation for fetch in self.source.live}

    def is_wanted(self, incarnation: str, num_tokens: int) -> bool:
        """Whether that many leading tokens beyond our own cache should be fetched from there: it can be done, and is worth it."""
        if incarnation == self._shape.incarnation or self._barred.get(incarnation, 0.0) > self._clock():
            return False
        return self.policy.is_worth(incarnation, num_tokens) and self._peers.may_fetch_from(incarnation)

    def key(self, request: EngineRequest) -> HandoffKey:
        """Identity of the one fetch an attempt may make here."""
        return HandoffKey(*request.key, self._shape.incarnation, is_fetch=True)

    def hashes(self, request: EngineRequest) -> list[bytes]:
        """Hashes of the full blocks of all tokens but the last."""
        return self._shape.hashes(request)

    def plan(self, request: EngineRequest, peer: PeerRef, hashes: Sequence[bytes], num_tokens: int) -> FetchPlan:
        """What to fetch from a peer that has num_tokens. hashes: of all own full blocks of the request."""
        layout = self._peers.introductions.layout_of(peer.incarnation) or self._shape.layout
        return plan_fetch(self._shape, layout, request, hashes, num_tokens)

    def missing_tokens(self, plan: FetchPlan) -> int:
        """Of the plan's, those that are not cached here now."""
        return plan.num_tokens - self._blocks.match_prefix(plan.hashes) * self._shape.block_tokens

    def start(
        self, request: EngineRequest, peer: PeerRef, plan: FetchPlan, traceparent: str, on_end: Callable[[FetchEnd], None], now: float
    ) -> list[Action]:
        """Fetch what is missing of a plan; on_end, once, when the actions are performed or later."""
        missing = self.missing_tokens(plan)
        fetch = SinkFetch(
            key=self.key(request),
            peer=peer,
            priority=request.priority,
            plan=plan,
            deadline=now + self.policy.limit_s(missing),
            traceparent=traceparent,
        )
        self._waiters[fetch.key] = _Waiter(on_end, peer, missing, traceparent, time.time_ns(), PullTotals())
        is_linked = self._peers.is_linked(peer.incarnation)
        self._peers.use_source(peer, now)
        return self.sink.start(fetch, is_linked=is_linked)

    def pulled(self, key: HandoffKey, incarnation: str, stats: PullStats, transport: str, why: str, *, is_retry: bool) -> None:
        """One operation is over, of a fetch or of a handoff."""
        self.policy.pulled(incarnation, stats)
        waiter = self._waiters.get(key)
        if waiter is not None:
            waiter.totals.add(transport, why, stats, is_retry=is_retry)

    def totals(self, key: HandoffKey) -> PullTotals:
        """What the operations of a live fetch have moved so far; nothing for others."""
        waiter = self._waiters.get(key)
        return waiter.totals if waiter is not None else PullTotals()

    def ended(self, action: FetchEnded) -> None:
        """Tell who waits."""
        waiter, end = self._waiters.pop(action.key), action.end
        if end.outcome in _BARRING:
            now = self._clock()
            self._barred = {source: until for source, until in self._barred.items() if until > now}
            self._barred[waiter.peer.incarnation] = now + BARRED_S
        self._metrics.ended(end)
        waiter.on_end(end)
        self._emit(action.key, waiter, end)
        log.debug(
            "fetch_ended",
            request_id=action.key.request_id,
            attempt=action.key.attempt,
            peer_instance_id=waiter.peer.instance_id,
            outcome=end.outcome.value,
            wanted_tokens=waiter.wanted_tokens,
            fetched_tokens=end.num_tokens,
            num_bytes=end.num_bytes,
            duration_ms=round((time.time_ns() - waiter.started_ns) / 1e6, 3),
        )

    def _emit(self, key: HandoffKey, waiter: _Waiter, end: FetchEnd) -> None:
        if not is_sampled(waiter.traceparent):
            return
        totals = waiter.totals
        attributes: dict[str, str | int | float] = {
            semconv.BATON_REQUEST_ID: key.request_id,
            semconv.BATON_ATTEMPT: key.attempt,
            semconv.BATON_OUTCOME: end.outcome.value,
            semconv.BATON_FETCH_INSTANCE_ID: waiter.peer.instance_id,
            semconv.BATON_WANTED_TOKENS: waiter.wanted_tokens,
            semconv.BATON_FETCHED_TOKENS: end.num_tokens,
            semconv.BATON_BYTES: end.num_bytes,
            semconv.BATON_GIGABYTES_PER_SECOND: round(totals.gigabytes_per_second, 3),
            semconv.BATON_OPERATIONS: totals.num_operations,
            semconv.BATON_TRANSPORT: totals.transport,
            semconv.BATON_TRANSPORT_REASON: totals.why,
        }
        context = context_from(waiter.traceparent)
        span = self._tracer.start_span(semconv.SPAN_KV_FETCH, context=context, start_time=waiter.started_ns, attributes=attributes)
        span.end(time.time_ns())
