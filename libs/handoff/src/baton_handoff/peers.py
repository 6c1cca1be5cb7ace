"""Whom this worker is linked to, and when it gives them up: judges every link by the clock, and fences.

    as a sink, of sources     one PairClient each, opened with the first ticket, closed when unused
    as a source, of sinks     one SinkPeer each, made by the sink's hello

Fencing is local: links are closed, running pulls dropped, the books told. Each link is judged by itself; two workers that are
source and sink to each other have two.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_runtime.log import get_logger

from baton_handoff.audit import Start
from baton_handoff.config import HandoffConfig
from baton_handoff.handoff_metrics import HandoffMetrics
from baton_handoff.ids import FailureCause, HandoffKey, PeerRef
from baton_handoff.introductions import Introductions
from baton_handoff.link import LinkOwner
from baton_handoff.messages import Message
from baton_handoff.native import NativeReceiver
from baton_handoff.pair_client import PairClient
from baton_handoff.pair_servicer import PairServicer, SinkPeer
from baton_handoff.peer_watch import FenceReason, PeerState
from baton_handoff.pulls import Puller
from baton_handoff.transports.base import Transport

# Deaths told by kvtransfer and remembered; the oldest go first.
MAX_RUMOURS = 4096

log = get_logger(__name__)


class PeersOwner(LinkOwner, Protocol):
    """What else peers tell the manager."""

    def run_link(self, client: PairClient) -> None:
        """Run the client in a task until it ends."""

    def source_over(self, incarnation: str, cause: FailureCause) -> None:
        """Every handoff pulled from that source ends."""

    def sink_over(self, incarnation: str, cause: FailureCause) -> None:
        """Every handoff pinned for that sink ends."""

    def sink_suspect(self, incarnation: str, is_suspect: bool) -> None:
        """Whether new offers may go to a sink."""

    def begun_with(self, incarnation: str) -> list[HandoffKey]:
        """Handoffs begun and not ended with a source."""

    def is_source_in_use(self, incarnation: str) -> bool:
        """Whether any handoff, ticket or not, is live with a source."""

    def peer_down(self, incarnation: str, reason: str) -> None:
        """News for kvtransfer."""


class Peers:
    """All its state: `clients` by incarnation of the source; `servicer.peers` by incarnation of the sink; `_rumours`, lives of which
    kvtransfer said that they are dead, and nobody said or showed anything else since."""

    def __init__(
        self,
        owner: PeersOwner,
        own: Callable[[], Instance],
        transports: Sequence[Transport],
        metrics: HandoffMetrics,
        config: HandoffConfig,
        clock: Callable[[], float],
        make_puller: Callable[[Introductions], Puller | NativeReceiver],
    ) -> None:
        self.introductions = Introductions(own)
        self.introductions.subscribe(self._introduced)
        self.puller = make_puller(self.introductions)
        self.servicer = PairServicer(owner, self.introductions, own, config)
        self.clients: dict[str, PairClient] = {}
        self._rumours: dict[str, str] = {}
        self._owner = owner
        self._own = own
        self._transports = transports
        self._metrics = metrics
        self._config = config
        self._times = config.times
        self._clock = clock

    def use_source(self, prefill: PeerRef, now: float) -> None:
        """A ticket for this source was taken: open the link if there is none."""
        client = self.clients.get(prefill.incarnation)
        if client is None:
            client = PairClient(prefill, self._owner, self.introductions, self._own, self._owner.begun_with, self._config, self._clock)
            self.clients[prefill.incarnation] = client
            self._owner.run_link(client)
        client.used_at = now

    def may_fetch_from(self, incarnation: str) -> bool:
        """Whether a fetch from there could begin at once: introduced, nothing known against it."""
        known = self.introductions.get(incarnation)
        if known is None or not known.secrets or known.refusal:
            return False
        client = self.clients.get(incarnation)
        return client is None or client.watch is None or client.watch.judge(self._clock())[0] is PeerState.OK

    def is_linked(self, incarnation: str) -> bool:
        """Whether what is said to a source now goes out behind the newest hello."""
        client = self.clients.get(incarnation)
        return client is not None and client.is_open

    def send_to_source(self, incarnation: str, message: Message) -> None:
        """As a sink; dropped if the link is not open."""
        client = self.clients.get(incarnation)
        if client is not None:
            client.send(message)

    def allow_sink(self, incarnation: str, secret: bytes) -> None:
        """A sink has linked: it may read."""
        for transport in self._transports:
            transport.allow(incarnation, secret)

    def judge(self, now: float) -> None:
        """Fence whom the clock condemns, close what is unused."""
        for incarnation, client in list(self.clients.items()):
            self._judge_source(incarnation, client, now)
        for incarnation, peer in list(self.servicer.peers.items()):
            self._judge_sink(incarnation, peer, now)

    def next_due(self) -> float:
        """When the next lost link will be given up; infinity if none is lost."""
        watches = [client.watch for client in self.clients.values() if client.watch is not None]
        watches += [peer.watch for peer in self.servicer.peers.values()]
        return min((watch.reopen_due() for watch in watches), default=float("inf"))

    def hinted(self, incarnation: str, reason: str) -> None:
        """kvtransfer has heard of a death. A link that works is not given up for it; one that we doubt ourselves, now or later, is,
        at once: lost, silent for 1 s, or not to be opened at the first try."""
        now = self._owner.notice()
        if incarnation not in self._rumours:
            log.info("peer_down_heard", peer=incarnation, reason=reason)
        self._rumours[incarnation] = reason
        while len(self._rumours) > MAX_RUMOURS:
            del self._rumours[next(iter(self._rumours))]
        client = self.clients.get(incarnation)
        if client is not None:
            if client.watch is not None:
                client.watch.rumoured()
            self._judge_source(incarnation, client, now)
        peer = self.servicer.peers.get(incarnation)
        if peer is not None:
            peer.watch.rumoured()
            self._judge_sink(incarnation, peer, now)

    def fence_source(self, incarnation: str, cause: FailureCause, reason: FenceReason, *, is_news: bool = True) -> None:
        """A source is over for us: every handoff pulled from it ends, running operations end soon."""
        client = self.clients.pop(incarnation, None)
        if client is not None:
            client.close()
            log.warning("source_fenced", peer=incarnation, peer_instance_id=client.peer.instance_id, cause=cause.name, reason=reason)
            self._metrics.fenced("sink", reason)
        self.puller.drop(incarnation)
        self._metrics.peer_gone(incarnation)
        self._owner.source_over(incarnation, cause)
        if is_news:
            self._owner.peer_down(incarnation, reason)

    def fence_sink(
        self, incarnation: str, reason: FenceReason, *, is_news: bool = True, cause: FailureCause = FailureCause.PEER_FENCED
    ) -> None:
        """A sink is over for us: what was pinned for it is free."""
        if incarnation in self.servicer.peers:
            log.warning("sink_fenced", peer=incarnation, reason=reason)
            self._metrics.fenced("source", reason)
        self.servicer.drop(incarnation, f"fenced: {reason}")
        for transport in self._transports:
            transport.forbid(incarnation)
        self._owner.sink_over(incarnation, cause)
        if is_news:
            self._owner.peer_down(incarnation, reason)

    def silent_s(self, start: Start, now: float) -> float:
        """For the audit: how long the other side of a Start was not heard; one without a link counts as silent for ever, one that is
        being linked for the first time (a fetch takes its blocks before it asks) as long as that takes."""
        if start.is_source:
            peer = self.servicer.peers.get(start.peer_incarnation)
            return peer.watch.silent_s(now) if peer is not None else float("inf")
        client = self.clients.get(start.peer_incarnation)
        if client is None:
            return float("inf")
        return client.watch.silent_s(now) if client.watch is not None else now - client.created_at

    def _introduced(self, incarnation: str) -> None:
        self._rumours.pop(incarnation, None)  # it has said hello since
        client = self.clients.get(incarnation)
        known = self.introductions.get(incarnation)
        if client is not None and known is not None:
            client.introduced()
        if known is not None and known.refusal:
            log.warning("pair_refused", peer=incarnation, why=known.refusal)
            refused, reason = FailureCause.NO_INTRODUCTION, FenceReason.STREAM_BROKEN
            if client is not None:
                self.fence_source(incarnation, refused, reason, is_news=False)
            self.fence_sink(incarnation, reason, is_news=False, cause=refused)

    def _judge_sink(self, incarnation: str, peer: SinkPeer, now: float) -> None:
        if not peer.watch.is_rumoured:
            self._rumours.pop(incarnation, None)  # heard since
        state, reason = peer.watch.judge(now)
        if reason is not None:
            self.fence_sink(incarnation, reason)
        elif peer.session is not None and peer.is_suspect != (state is PeerState.SUSPECT):
            peer.is_suspect = state is PeerState.SUSPECT
            self._owner.sink_suspect(incarnation, peer.is_suspect)

    def _judge_source(self, incarnation: str, client: PairClient, now: float) -> None:
        if client.watch is None:
            return self._judge_first_link(incarnation, client, now - client.created_at)
        if not client.watch.is_rumoured:
            self._rumours.pop(incarnation, None)  # heard since
        _, reason = client.watch.judge(now)
        if reason is not None:
            self.fence_source(incarnation, FailureCause.PEER_FENCED, reason)
        elif now - client.used_at >= self._times.link_idle_s and not self._owner.is_source_in_use(incarnation):
            client.close_idle()
            del self.clients[incarnation]
            self._metrics.peer_gone(incarnation)

    def _judge_first_link(self, incarnation: str, client: PairClient, waited_s: float) -> None:
        if incarnation in self._rumours and (client.has_failed or waited_s >= self._times.suspect_s):
            cause = FailureCause.PEER_FENCED
        elif not client.is_introduced and waited_s >= self._times.introduction_s:
            cause = FailureCause.NO_INTRODUCTION
        elif waited_s >= self._times.first_link_s:
            cause = FailureCause.NO_INTRODUCTION if client.was_refused else FailureCause.PATH_DOWN
        else:
            return
        # No news: that we cannot reach it says nothing about whether it lives.
        self.fence_source(incarnation, cause, FenceReason.STREAM_BROKEN, is_news=False)
