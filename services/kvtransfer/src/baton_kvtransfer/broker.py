"""The broker: who reports, who is introduced to whom, who is told about whose death.

Decides only: every method changes state and returns what is to be sent and which streams are to be closed. A death told here is
a hint; each side fences by its own clock (docs/handoff.md, section 4).
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_runtime.errors import InvalidArgument, StaleIncarnation
from baton_runtime.log import get_logger

from baton_kvtransfer.books import Books
from baton_kvtransfer.pairing import is_pair, refusal
from baton_kvtransfer.watch import Watches

log = get_logger(__name__)

SECRET_BYTES = 16
STREAM_BROKEN, SILENT, REPLACED = "STREAM_BROKEN", "SILENT", "REPLACED"
# Lives remembered after they were replaced, so that one that wakes up late does not replace its successor.
MAX_REPLACED = 4096
# Deaths as peers see them that our own healthy stream to the same worker cannot rule out.
_SEEN_BY_PEERS_ONLY = frozenset({"STEP_STUCK"})


@dataclass(frozen=True, slots=True)
class Limits:
    """Times of docs/handoff.md, section 4, in seconds.

    reopen_s: a broken stream may come back. silence_s: a stream without messages is dead. fresh_s: a worker heard from so
    recently is alive, whatever a peer that cannot reach it says. gone_s: sums of a worker without a stream count this long.
    forget_s: until a dead worker's record and secrets are dropped.
    """

    reopen_s: float = 0.2
    silence_s: float = 2.0
    fresh_s: float = 1.2
    gone_s: float = 5.0
    forget_s: float = 60.0


@dataclass(slots=True)
class Worker:
    """One life of a worker."""

    record: discovery.Instance
    session: int  # of its newest stream
    heard_s: float
    broken_s: float | None = None  # since when it has no stream
    down: str = ""  # reason, once told
    secrets: dict[str, bytes] = field(default_factory=dict)  # pairs it was introduced to, by the other's incarnation
    told_s: dict[str, float] = field(default_factory=dict)  # when peers' news of it were passed on, by reason

    @property
    def name(self) -> tuple[int, str]:
        """What stays the same from life to life."""
        return (self.record.service, self.record.instance_id)


@dataclass(slots=True)
class Outgoing:
    """What to do: messages by incarnation, and sessions whose streams end."""

    messages: dict[str, pb.BooksResponse] = field(default_factory=dict)
    closed: dict[int, str] = field(default_factory=dict)  # session to reason

    def to(self, incarnation: str) -> pb.BooksResponse:
        """The message for a worker, to be added to."""
        return self.messages.setdefault(incarnation, pb.BooksResponse())


class Broker:
    """Workers by incarnation, over the books."""

    def __init__(
        self,
        books: Books,
        limits: Limits | None = None,
        draw_secret: Callable[[int], bytes] = secrets.token_bytes,
        registered_incarnation: Callable[[discovery.Instance], str] = lambda _: "",
    ) -> None:
        """registered_incarnation: the life that discovery has under a record's name; "" if it does not know."""
        self.books = books
        self.watches = Watches(books, self)
        self.workers: dict[str, Worker] = {}
        self.num_reports = 0
        self.num_introduced = 0
        self.num_refused = 0
        self.deaths: dict[str, int] = {}  # told, by reason
        self._limits = limits or Limits()
        self._draw_secret = draw_secret
        self._registered_incarnation = registered_incarnation
        self._replaced: dict[str, str] = {}  # incarnation to its successor's, oldest first
        self._sessions = 0
        self._excused_until_s = float("-inf")

    def hello(self, record: discovery.Instance, now_s: float) -> tuple[int, Outgoing]:
        """A worker opens a stream; its snapshot follows in report(). Returns: the session, to be given with what follows.

        Raises: InvalidArgument for a record that cannot be introduced, StaleIncarnation for a life that was replaced.
        """
        _check(record)
        self._refuse_stale(record, now_s)
        known = self.workers.get(record.incarnation)
        out = Outgoing()
        self._sessions += 1
        worker = Worker(record, self._sessions, now_s, secrets=known.secrets if known is not None else {})
        if known is not None and known.broken_s is None:
            out.closed[known.session] = "a newer stream of the same worker"
        self._replace_earlier_lives(worker, now_s, out)
        self.workers[record.incarnation] = worker
        self.books.open_account(record.incarnation, now_s)
        self._introduce(worker, out)
        log.info("worker_reports", peer_instance_id=record.instance_id, peer_incarnation=record.incarnation, again=known is not None)
        return worker.session, out

    def report(self, incarnation: str, session: int, request: pb.BooksRequest, now_s: float) -> Outgoing:
        """One message of a worker's stream. Of a stream that was replaced: ignored."""
        out = Outgoing()
        worker = self._current(incarnation, session)
        if worker is None:
            return out
        worker.heard_s = now_s
        self.num_reports += 1
        if request.events and (num_malformed := self.books.apply(incarnation, request.events, now_s)):
            log.warning("handoff_events_malformed", peer_incarnation=incarnation, num_events=num_malformed)
        for link in request.links:
            self.books.accounts[incarnation].note_link(link)
        if request.HasField("sums"):
            self._close_sums(worker, request.sums, now_s)
        for told in request.peers_down:
            self._spread(told, incarnation, now_s, out)
        return out

    def stream_ended(self, incarnation: str, session: int, now_s: float) -> None:
        """A stream is over, however. It may come back within reopen_s."""
        worker = self._current(incarnation, session)
        if worker is not None:
            worker.broken_s = now_s

    def tick(self, now_s: float) -> Outgoing:
        """Notice silence, broken streams that did not come back, and what can be forgotten. Call it by `next_due`."""
        out = Outgoing()
        reopen_s = self._limits.silence_s if now_s < self._excused_until_s else self._limits.reopen_s
        for incarnation, worker in tuple(self.workers.items()):
            if worker.broken_s is None:
                if now_s - worker.heard_s >= self._limits.silence_s:
                    out.closed[worker.session] = SILENT
                    worker.broken_s = now_s
                    self._declare_down(worker, SILENT, out)
            elif not worker.down and now_s - worker.broken_s >= reopen_s:
                self._declare_down(worker, STREAM_BROKEN, out)
            elif worker.down and now_s - worker.broken_s >= self._limits.forget_s:
                self._forget(incarnation, now_s)
        self.books.expire(now_s)
        return out

    def next_due(self) -> float:
        """When the next worker could be given up, if nothing is heard of it until then; infinity if there is none."""
        due_s = (
            worker.heard_s + self._limits.silence_s if worker.broken_s is None else worker.broken_s + self._limits.reopen_s
            for worker in self.workers.values()
            if not worker.down
        )
        return min(due_s, default=float("inf"))

    def excuse(self, now_s: float) -> None:
        """Our own loop stood still: what was not heard meanwhile is not the workers' silence. They may have given our streams up,
        so those that now turn out to be broken get as long to come back as a silent one."""
        self._excused_until_s = now_s + self._limits.silence_s
        for worker in self.workers.values():
            worker.heard_s = now_s
            if worker.broken_s is not None and not worker.down:
                worker.broken_s = now_s

    def reporting(self) -> list[str]:
        """Incarnations with a stream."""
        return [incarnation for incarnation, worker in self.workers.items() if worker.broken_s is None]

    def instance_id(self, incarnation: str) -> str:
        """The stable name of a life that reports or reported; the incarnation itself if it is not known."""
        worker = self.workers.get(incarnation)
        return worker.record.instance_id if worker is not None else incarnation

    def is_down(self, incarnation: str) -> bool:
        """Whether a life is known to be dead; one we never heard of is not."""
        worker = self.workers.get(incarnation)
        return worker is not None and bool(worker.down)

    def links(self) -> list[pb.Link]:
        """Who pulls from whom, of the workers with a stream."""
        found = []
        for incarnation in self.reporting():
            for source, report in self.books.accounts[incarnation].links.items():
                found.append(
                    pb.Link(
                        sink_instance_id=self.instance_id(incarnation),
                        sink_incarnation=incarnation,
                        source_instance_id=self.instance_id(source),
                        report=report,
                    )
                )
        return sorted(found, key=lambda link: (link.sink_instance_id, link.source_instance_id))

    def held_bytes(self) -> tuple[int, int]:
        """Bytes pinned at sources and reserved at sinks by the books, of workers not known to be dead."""
        alive = [self.books.accounts[i] for i, worker in self.workers.items() if not worker.down]
        return sum(account.source_held_bytes for account in alive), sum(account.sink_held_bytes for account in alive)

    def stranded_bytes(self) -> int:
        """As the workers with a stream report it."""
        return sum(self.books.accounts[incarnation].stranded_bytes for incarnation in self.reporting())

    def mismatch_bytes(self, now_s: float) -> int:
        """Sum over workers of |pinned - books| + |reserved - books|; of those without a stream until they are gone for 5 s."""
        return sum(self.books.accounts[i].mismatch_bytes for i, worker in self.workers.items() if self._counts(worker, now_s))

    def num_live(self) -> int:
        """Handoffs with a side that is not over at a worker not known to be dead."""
        return sum(
            any(not side.is_ended and not self.workers[side.incarnation].down for side in handoff.sides()) for handoff in self.books.live()
        )

    def _counts(self, worker: Worker, now_s: float) -> bool:
        if worker.broken_s is None:
            return True
        return worker.down != REPLACED and now_s - worker.broken_s < self._limits.gone_s

    def _current(self, incarnation: str, session: int) -> Worker | None:
        worker = self.workers.get(incarnation)
        return worker if worker is not None and worker.session == session and worker.broken_s is None else None

    def _close_sums(self, worker: Worker, sums: pb.BooksSums, now_s: float) -> None:
        account = self.books.accounts[worker.record.incarnation]
        before = account.mismatch_bytes
        account.close_sums(sums, now_s)
        if account.mismatch_bytes and account.mismatch_bytes != before:
            log.error(
                "ledger_mismatch",
                peer_instance_id=worker.record.instance_id,
                mismatch_bytes=account.mismatch_bytes,
                pinned_bytes=account.pinned_bytes,
                booked_source_bytes=account.source_held_bytes,
                reserved_bytes=account.reserved_bytes,
                booked_sink_bytes=account.sink_held_bytes,
            )

    def _introduce(self, worker: Worker, out: Outgoing) -> None:
        mine = worker.record.incarnation
        for incarnation, other in self.workers.items():
            if incarnation == mine or other.down or not is_pair(worker.record, other.record):
                continue
            why_not = refusal(worker.record, other.record)
            pair_secret = b"" if why_not else self._pair_secret(worker, other)
            out.to(mine).introductions.add(peer=other.record, pair_secret=pair_secret, refusal=why_not)
            out.to(incarnation).introductions.add(peer=worker.record, pair_secret=pair_secret, refusal=why_not)
            if why_not:
                self.num_refused += 1
                log.warning("pair_refused", why=why_not)
            else:
                self.num_introduced += 1

    def _pair_secret(self, a: Worker, b: Worker) -> bytes:
        """The same for both, and the same again when one of them comes back with a new stream."""
        secret = a.secrets.get(b.record.incarnation) or self._draw_secret(SECRET_BYTES)
        a.secrets[b.record.incarnation] = b.secrets[a.record.incarnation] = secret
        return secret

    def _replace_earlier_lives(self, worker: Worker, now_s: float, out: Outgoing) -> None:
        for incarnation, earlier in self.workers.items():
            if earlier.name != worker.name or incarnation == worker.record.incarnation or earlier.down == REPLACED:
                continue
            self._replaced[incarnation] = worker.record.incarnation
            if earlier.broken_s is None:
                out.closed[earlier.session] = REPLACED
                earlier.broken_s = now_s
            self._declare_down(earlier, REPLACED, out)
        while len(self._replaced) > MAX_REPLACED:
            del self._replaced[next(iter(self._replaced))]

    def _refuse_stale(self, record: discovery.Instance, now_s: float) -> None:
        """Two processes of one name: the later one wins, unless it is the earlier one, woken up."""
        if successor := self._replaced.get(record.incarnation):
            raise StaleIncarnation(expected=successor, got=record.incarnation)
        registered = self.workers.get(self._registered_incarnation(record))
        if registered is None or registered.record.incarnation == record.incarnation:
            return
        if (record.service, record.instance_id) == registered.name and self._is_heard(registered, now_s):
            raise StaleIncarnation(expected=registered.record.incarnation, got=record.incarnation)

    def _is_heard(self, worker: Worker, now_s: float) -> bool:
        return worker.broken_s is None and now_s - worker.heard_s < self._limits.fresh_s

    def _declare_down(self, worker: Worker, reason: str, out: Outgoing) -> None:
        worker.down = reason
        self.watches.worker_down(worker.record.incarnation)
        log.warning("worker_down", peer_instance_id=worker.record.instance_id, peer_incarnation=worker.record.incarnation, reason=reason)
        self._tell(worker, reason, worker.secrets, out)

    def _spread(self, told: pb.PeerDown, reporter: str, now_s: float, out: Outgoing) -> None:
        """A worker fenced a peer. Others hear of it unless we know better: then only the path between the two is down."""
        peer = self.workers.get(told.incarnation)
        if peer is None or peer.down or reporter not in peer.secrets:
            return
        if self._is_heard(peer, now_s) and told.reason not in _SEEN_BY_PEERS_ONLY:
            log.info("path_down_reported", peer_incarnation=told.incarnation, by=reporter, reason=told.reason)
            return
        if now_s - peer.told_s.get(told.reason, float("-inf")) < self._limits.gone_s:
            return  # several observers, one piece of news
        peer.told_s[told.reason] = now_s
        self._tell(peer, told.reason, [incarnation for incarnation in peer.secrets if incarnation != reporter], out)

    def _tell(self, worker: Worker, reason: str, incarnations: Iterable[str], out: Outgoing) -> None:
        self.deaths[reason] = self.deaths.get(reason, 0) + 1
        for incarnation in incarnations:
            other = self.workers.get(incarnation)
            if other is not None and other.broken_s is None:
                out.to(incarnation).peers_down.add(incarnation=worker.record.incarnation, reason=reason)

    def _forget(self, incarnation: str, now_s: float) -> None:
        forgotten = self.workers.pop(incarnation)
        self.books.close_account(incarnation, now_s)
        for other in forgotten.secrets:
            if other in self.workers:
                self.workers[other].secrets.pop(incarnation, None)


def _check(record: discovery.Instance) -> None:
    """Raises: InvalidArgument naming the field."""
    if record.service not in (discovery.SERVICE_PREFILL, discovery.SERVICE_DECODE):
        raise InvalidArgument("hello.instance.service", "must be prefill or decode")
    for name in ("instance_id", "incarnation"):
        if not getattr(record, name):
            raise InvalidArgument(f"hello.instance.{name}", "must be set")
    for name in ("model", "layout"):
        if not record.HasField(name):
            raise InvalidArgument(f"hello.instance.{name}", "must be set")
