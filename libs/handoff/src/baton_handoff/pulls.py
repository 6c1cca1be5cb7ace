"""The bytes part: opens peers' pools over the best transport that works, runs operations, says how they ended."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_runtime.errors import BatonError
from baton_runtime.log import get_logger

from baton_handoff.actions import StartPull
from baton_handoff.ids import FailureCause
from baton_handoff.introductions import Introductions
from baton_handoff.transports import choose
from baton_handoff.transports.base import ChecksumMismatch, PeerPool, PullFailed, PullStats, Transport, TransportUnavailable

log = get_logger(__name__)


class NoTransport(BatonError):
    """The pair was not introduced, or has no transport in common."""

    reason = "NO_TRANSPORT"


@dataclass(frozen=True, slots=True)
class PullResult:
    """How an operation ended: stats, or why not."""

    stats: PullStats | None = None
    failure: FailureCause | None = None


@dataclass(slots=True, eq=False)
class _Peer:
    pool: PeerPool | None = None
    is_dropped: bool = False
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)


class Puller:
    """Opened pools by the source's incarnation. Operations of one peer share a pool, opened by the first."""

    def __init__(
        self, transports: Sequence[Transport], introductions: Introductions, own: Callable[[], Instance], open_limit_s: float
    ) -> None:
        self._transports = transports
        self._introductions = introductions
        self._own = own
        self._open_limit_s = open_limit_s
        self._peers: dict[str, _Peer] = {}

    def transport_of(self, incarnation: str) -> str:
        """Name of the transport in use with a peer; "" before the first operation."""
        peer = self._peers.get(incarnation)
        return peer.pool.name if peer is not None and peer.pool is not None else ""

    def drop(self, incarnation: str) -> None:
        """End running operations soon, and forget the pool. Idempotent."""
        peer = self._peers.pop(incarnation, None)
        if peer is not None:
            peer.is_dropped = True
            if peer.pool is not None:
                peer.pool.drop()

    async def run(self, start: StartPull) -> PullResult:
        """Run one operation. When it returns or raises CancelledError, nothing writes to the destination any more."""
        try:
            peer = self._peers.setdefault(start.peer_incarnation, _Peer())
            pool = await self._opened(peer, start.peer_incarnation)
            return PullResult(await pool.pull(start.source_ids, start.dest_ids))
        except NoTransport as error:
            return self._failed(start, FailureCause.NO_INTRODUCTION, error)
        except ChecksumMismatch as error:
            return self._failed(start, FailureCause.DATA_LOSS, error)
        except (PullFailed, TransportUnavailable) as error:
            return self._failed(start, FailureCause.PATH_DOWN, error)

    def _failed(self, start: StartPull, cause: FailureCause, error: BatonError) -> PullResult:
        log.warning("pull_failed", request_id=start.key.request_id, peer=start.peer_incarnation, cause=cause.name, why=error.message)
        if cause is FailureCause.PATH_DOWN:
            self.drop(start.peer_incarnation)  # the next operation opens it afresh
        return PullResult(failure=cause)

    async def _opened(self, peer: _Peer, incarnation: str) -> PeerPool:
        async with peer.opening:
            if peer.pool is None and not peer.is_dropped:
                peer.pool = await self._open(incarnation)
            if peer.is_dropped:
                if peer.pool is not None:
                    peer.pool.drop()
                raise PullFailed("any", "the peer was dropped")
            assert peer.pool is not None
            return peer.pool

    async def _open(self, incarnation: str) -> PeerPool:
        """The first transport that works, best first: shared memory may turn out not to be shared."""
        known = self._introductions.get(incarnation)
        if known is None or not known.secrets:
            raise NoTransport("the pair is not introduced")
        candidates = choose(self._transports, known.peer)
        if not candidates:
            ours, theirs = [t.name for t in self._transports], [offer.name for offer in known.peer.transports]
            raise NoTransport(f"no transport in common: {ours} against {theirs}")
        problems: list[str] = []
        for candidate in candidates:
            for secret in known.secrets:
                try:
                    async with asyncio.timeout(self._open_limit_s):
                        pool = await candidate.transport.open_peer(known.peer, candidate.parameters, secret, self._own().incarnation)
                except TransportUnavailable as error:
                    problems.append(error.message)
                except TimeoutError:
                    problems.append(f"{candidate.transport.name}: not open after {self._open_limit_s} s")
                else:
                    log.info("peer_pool_opened", peer=incarnation, transport=pool.name, why=candidate.reason)
                    return pool
        raise TransportUnavailable("any", "; ".join(problems))
