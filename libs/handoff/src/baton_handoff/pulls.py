"""The bytes part: opens peers' pools over the best transport that works, runs operations, says how they ended."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_runtime.errors import BatonError
from baton_runtime.log import get_logger

from baton_handoff.actions import StartPull
from baton_handoff.ids import FailureCause
from baton_handoff.introductions import Introductions
from baton_handoff.link import until_first
from baton_handoff.transports import choose
from baton_handoff.transports.base import ChecksumMismatch, PeerPool, PullFailed, PullStats, Transport, TransportUnavailable

# The speed of a link is measured over about its last so many bytes.
RECENT_BYTES = 256 << 20

log = get_logger(__name__)


# An operation that nobody wants any more is cancelled after this.
UNWANTED_S = 1.0


class PullKey(NamedTuple):
    """Which operation. Handoffs and fetches number theirs apart."""

    operation: int
    is_fetch: bool


class NoTransport(BatonError):
    """The pair was not introduced, or has no transport in common."""

    reason = "NO_TRANSPORT"


@dataclass(frozen=True, slots=True)
class PullResult:
    """How an operation ended: stats, or why not. is_retry: on a fresh pool, after it had failed on one opened before."""

    stats: PullStats | None = None
    failure: FailureCause | None = None
    is_retry: bool = False


@dataclass(slots=True)
class LinkStats:
    """One source we pull from, for the books and people. version rises with every change."""

    transport: str
    reason: str  # why this transport
    pulled_bytes: int = 0
    version: int = 1
    recent_bytes: float = 0.0
    recent_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Of the latest operations while they ran; 0 before the first."""
        return self.recent_bytes / self.recent_s if self.recent_s > 0 else 0.0

    def pulled(self, stats: PullStats) -> None:
        """An operation has ended well."""
        self.version += 1
        self.pulled_bytes += stats.num_bytes
        self.recent_bytes += stats.num_bytes
        self.recent_s += stats.duration_s
        if self.recent_bytes > RECENT_BYTES:  # older ones count less and less
            self.recent_bytes, self.recent_s = self.recent_bytes / 2, self.recent_s / 2


@dataclass(slots=True, eq=False)
class _Peer:
    pool: PeerPool | None = None
    why: str = ""  # this transport
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    dropped: asyncio.Event = field(default_factory=asyncio.Event)

    def drop(self) -> None:
        self.dropped.set()
        if self.pool is not None:
            self.pool.drop()


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
        self._running: dict[PullKey, asyncio.Task[object]] = {}
        self._unwanted_since: dict[PullKey, float] = {}
        self.links: dict[str, LinkStats] = {}  # by the source's incarnation, from its first opened pool until it is dropped

    def transport_of(self, incarnation: str) -> str:
        """Name of the transport in use with a peer; "" before the first operation."""
        peer = self._peers.get(incarnation)
        return peer.pool.name if peer is not None and peer.pool is not None else ""

    def why_of(self, incarnation: str) -> str:
        """Why that transport is in use with a peer, for people; "" before the first operation."""
        peer = self._peers.get(incarnation)
        return peer.why if peer is not None else ""

    def drop(self, incarnation: str) -> None:
        """End running operations soon, also those that are still opening the pool, and forget it. Idempotent."""
        self.links.pop(incarnation, None)
        peer = self._peers.pop(incarnation, None)
        if peer is not None:
            peer.drop()

    def end_unwanted(self, unwanted: Iterable[PullKey], now: float) -> None:
        """Cancel the operations that nobody has wanted for UNWANTED_S; to be called often, with all of them.

        One that nobody wants keeps its blocks until it ends (docs/handoff.md, draining), and over a slow link to a living peer that
        may take as long as a transport lets it. Most end by themselves in milliseconds, and keep their connection then.
        """
        self._unwanted_since = {key: self._unwanted_since.get(key, now) for key in unwanted}
        for key, since in self._unwanted_since.items():
            if now - since >= UNWANTED_S and key in self._running:
                self._running[key].cancel()

    async def run(self, start: StartPull) -> PullResult:
        """Run one operation. When it returns or raises CancelledError, nothing writes to the destination any more.

        An operation that fails on a pool opened before it is run once more on a fresh one: the connection may have been cut
        since the last operation, by the source or for another operation's sake, which says nothing about the path.
        """
        key, task = PullKey(start.operation, start.key.is_fetch), asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._running[key] = task
        try:
            return await self._run(start)
        finally:
            self._running.pop(key, None)

    async def _run(self, start: StartPull) -> PullResult:
        peer = self._peers.setdefault(start.peer_incarnation, _Peer())
        was_open = peer.pool is not None
        result, error = await self._attempt(peer, start)
        if error is not None and was_open and not peer.dropped.is_set() and result.failure is FailureCause.PATH_DOWN:
            peer = self._peers.setdefault(start.peer_incarnation, _Peer())
            result, error = await self._attempt(peer, start)
            result = replace(result, is_retry=True)
        if error is not None:
            log.warning(
                "pull_failed",
                request_id=start.key.request_id,
                peer=start.peer_incarnation,
                cause=result.failure and result.failure.name,
                why=error.message,
            )
        return result

    async def _attempt(self, peer: _Peer, start: StartPull) -> tuple[PullResult, BatonError | None]:
        try:
            return PullResult(await self._pull(peer, start)), None
        except ChecksumMismatch as error:
            return PullResult(failure=FailureCause.DATA_LOSS), error
        except NoTransport as error:
            return PullResult(failure=FailureCause.NO_INTRODUCTION), error
        except (PullFailed, TransportUnavailable) as error:
            if self._peers.get(start.peer_incarnation) is peer:
                del self._peers[start.peer_incarnation]  # the next operation opens it afresh
            if peer.pool is not None:
                peer.pool.drop()
            return PullResult(failure=FailureCause.PATH_DOWN), error

    async def _pull(self, peer: _Peer, start: StartPull) -> PullStats:
        async with peer.opening:
            if peer.pool is None and not peer.dropped.is_set():
                opened = await self._open_unless_dropped(peer, start.peer_incarnation)
                if opened is not None:
                    peer.pool, peer.why = opened
                    self._opened(start.peer_incarnation, *opened)
        if peer.pool is None or peer.dropped.is_set():
            raise PullFailed("any", "the peer was dropped")
        stats = await peer.pool.pull(start.source_ids, start.dest_ids)
        if not peer.dropped.is_set():
            link = self.links.get(start.peer_incarnation)
            if link is not None:
                link.pulled(stats)
        return stats

    def _opened(self, incarnation: str, pool: PeerPool, why: str) -> None:
        link = self.links.setdefault(incarnation, LinkStats(pool.name, why))
        if (link.transport, link.reason) != (pool.name, why):  # opened afresh, another way
            link.transport, link.reason = pool.name, why
            link.recent_bytes = link.recent_s = 0.0
            link.version += 1

    async def _open_unless_dropped(self, peer: _Peer, incarnation: str) -> tuple[PeerPool, str] | None:
        """None: the peer was dropped meanwhile. Blocks wait for this, so it is bounded in all and not only per transport."""
        opened: list[tuple[PeerPool, str]] = []

        async def open_pool() -> None:
            try:
                async with asyncio.timeout(self._open_limit_s):
                    opened.append(await self._open(incarnation))
            except TimeoutError:
                raise TransportUnavailable("any", f"not open after {self._open_limit_s} s") from None

        try:
            await until_first(open_pool(), peer.dropped.wait())
        except asyncio.CancelledError:
            for pool, _ in opened:
                pool.drop()  # nobody else knows of it
            raise
        return opened[0] if opened else None

    async def _open(self, incarnation: str) -> tuple[PeerPool, str]:
        """The first transport that works, best first (shared memory may turn out not to be shared), and why it is that one."""
        known = self._introductions.get(incarnation)
        if known is None or not known.secrets:
            raise NoTransport("the pair is not introduced")
        candidates = choose(self._transports, known.peer)
        if not candidates:
            ours, theirs = [t.name for t in self._transports], [offer.name for offer in known.peer.transports]
            raise NoTransport(f"no transport can be used with the peer: {ours} against {theirs}")
        problems: list[str] = []
        own, reslice = self._own().incarnation, self._introductions.reslice_of(incarnation)
        for candidate in candidates:
            for secret in known.secrets:
                try:
                    pool = await candidate.transport.open_peer(known.peer, candidate.parameters, secret, own, reslice)
                except TransportUnavailable as error:
                    problems.append(error.message)
                else:
                    log.info("peer_pool_opened", peer=incarnation, transport=pool.name, why=candidate.reason, problems=problems)
                    return pool, "; ".join([*problems, candidate.reason])
        raise TransportUnavailable("any", "; ".join(problems))
