"""The books: what each side of each handoff says it holds, against what each worker's block manager counts.

Two counts of the same memory that share no code: a leak in either shows as a mismatch. The books decide nothing about a block.
Plain and synchronous; times are given in seconds of any one clock. `apply` runs some 30,000 times a second on a busy fleet: nothing
in it logs, searches, or makes an object it can do without.
"""

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb

# As long as the workers' tombstones: how long one side that is over waits to be compared with the other.
KEEP_ENDED_S = 60.0
# A difference of sums counts once it has stood for so long; sums come at least once a second.
MISMATCH_WINDOW_S = 1.0
# Ended handoffs kept at most, whatever the rate; the oldest go first.
MAX_ENDED = 100_000
# Links kept per worker: more peers than any fleet has.
MAX_LINKS = 4096

_SOURCE, _SINK = int(pb.SIDE_SOURCE), int(pb.SIDE_SINK)
_ENDED = int(pb.HANDOFF_EVENT_KIND_ENDED)


class HandoffKey(NamedTuple):
    """Identity of a handoff or a fetch, as baton.worker.v1.HandoffId."""

    request_id: str
    attempt: int
    decode_incarnation: str
    is_fetch: bool = False


class Agreement(enum.Enum):
    """What two ended sides say about the bytes confirmed."""

    AGREED = "agreed"  # the sink counts no more than the source: a Cancel may overtake the last answer
    DISAGREED = "disagreed"


@dataclass(slots=True)
class SideEntry:
    """One side of a handoff, as its worker told it last."""

    incarnation: str
    peer_incarnation: str
    kind: int = pb.HANDOFF_EVENT_KIND_UNSPECIFIED
    held_bytes: int = 0
    confirmed_bytes: int = 0
    is_ended: bool = False
    outcome: int = pb.HANDOFF_OUTCOME_UNSPECIFIED
    transport: str = ""
    pulled_bytes: int = 0
    pull_us: int = 0


@dataclass(slots=True)
class Handoff:
    """Both sides of a handoff, as far as they are known."""

    key: HandoffKey
    begun_s: float
    source: SideEntry | None = None
    sink: SideEntry | None = None
    over_s: float | None = None  # since when no known side is live
    agreement: Agreement | None = None

    @property
    def is_live(self) -> bool:
        """Whether a known side is not over."""
        return (self.source is not None and not self.source.is_ended) or (self.sink is not None and not self.sink.is_ended)

    def sides(self) -> tuple[SideEntry, ...]:
        """Those that are known."""
        return tuple(entry for entry in (self.source, self.sink) if entry is not None)


@dataclass(slots=True)
class Account:
    """One worker's page."""

    source_held_bytes: int = 0
    sink_held_bytes: int = 0
    pinned_bytes: int = 0
    reserved_bytes: int = 0
    stranded_bytes: int = 0
    mismatch_bytes: int = 0  # smallest difference of a whole window: what stood
    window_s: float | None = None  # when the present window began, and the smallest difference in it
    window_bytes: int = 0
    sources: set[HandoffKey] = field(default_factory=set)  # of which this worker is a side, live or not
    sinks: set[HandoffKey] = field(default_factory=set)
    links: dict[str, pb.LinkReport] = field(default_factory=dict)  # by source incarnation

    def close_sums(self, sums: pb.BooksSums, now_s: float) -> None:
        """The block manager's own sums, as of the last event applied.

        The engine's thread pins a moment before the worker's loop can tell, so a busy worker's sums often differ for milliseconds;
        a leak stays. A mismatch is therefore what every message of a whole window had in common.
        """
        self.pinned_bytes, self.reserved_bytes, self.stranded_bytes = sums.pinned_bytes, sums.reserved_bytes, sums.stranded_bytes
        difference_bytes = abs(self.pinned_bytes - self.source_held_bytes) + abs(self.reserved_bytes - self.sink_held_bytes)
        self.mismatch_bytes = min(self.mismatch_bytes, difference_bytes)
        self.window_bytes = difference_bytes if self.window_s is None else min(self.window_bytes, difference_bytes)
        if self.window_s is None or now_s - self.window_s >= MISMATCH_WINDOW_S:
            self.mismatch_bytes = self.window_bytes if self.window_s is not None else 0
            self.window_s, self.window_bytes = now_s, difference_bytes

    def note_link(self, report: pb.LinkReport) -> None:
        """A link of this worker's was opened, used, or closed."""
        if report.is_closed:
            self.links.pop(report.source_incarnation, None)
        elif report.source_incarnation in self.links or len(self.links) < MAX_LINKS:
            self.links[report.source_incarnation] = report


class Observer(Protocol):
    """Told about the source side of handoffs, for traces."""

    def begun(self, key: HandoffKey, event: pb.HandoffEvent, incarnation: str) -> None:
        """The source side appeared."""

    def ended(self, handoff: Handoff, outcome: str) -> None:
        """The source side (still in place) is over, or will not be heard of any more. outcome: lower case, for people."""


class Books:
    """Accounts by incarnation, handoffs by identity.

    A handoff is dropped once both sides are over and hold nothing: each side's events come in order on one stream, so nothing can
    follow. One of which only one side is known is kept for KEEP_ENDED_S, for the other's word may be on its way.
    """

    def __init__(self, observer: Observer) -> None:
        self.accounts: dict[str, Account] = {}
        self.handoffs: dict[HandoffKey, Handoff] = {}  # live ones, and those of `_over`
        self.agreements: Counter[Agreement] = Counter()
        self.outcomes: Counter[tuple[int, int]] = Counter()  # (side, outcome) of ended sides
        self.num_malformed = 0
        self.num_events = 0
        self.confirmed_bytes = 0  # by sinks, at their end
        self.changed: dict[HandoffKey, Handoff] | None = None  # since somebody took them away; None: nobody wants to know
        self._observer = observer
        self._counts: dict[tuple[int, int], int] = {}
        self._over: dict[HandoffKey, float] = {}  # not live and not dropped, since when; oldest first

    @property
    def events(self) -> dict[tuple[int, int], int]:
        """Events booked, by (side, kind)."""
        return self._counts

    def live(self) -> list[Handoff]:
        """Handoffs of which a known side is not over; oldest first."""
        over = self._over
        return [handoff for key, handoff in self.handoffs.items() if key not in over]

    def open_account(self, incarnation: str, now_s: float) -> None:
        """A worker reports from now on; a snapshot follows. What was known of it before is dropped."""
        self.close_account(incarnation, now_s)
        self.accounts[incarnation] = Account()

    def close_account(self, incarnation: str, now_s: float) -> None:
        """Forget what a worker holds: it died, or starts anew with a snapshot."""
        account = self.accounts.pop(incarnation, None)
        if account is None:
            return
        for key in account.sources:
            handoff = self.handoffs[key]
            if handoff.source is not None and not handoff.source.is_ended:
                self._observer.ended(handoff, "unknown")
            handoff.source = None
            self._side_forgotten(handoff, now_s)
        for key in account.sinks:
            handoff = self.handoffs[key]
            handoff.sink = None
            self._side_forgotten(handoff, now_s)

    def apply(self, incarnation: str, events: Iterable[pb.HandoffEvent], now_s: float) -> int:
        """Events of a worker with an account, in order. Returns how many contradict themselves and were left out."""
        account = self.accounts[incarnation]
        counts, changed = self._counts, self.changed
        num_events = num_malformed = 0
        for event in events:
            num_events += 1
            told, side, kind = event.handoff, event.side, event.kind
            key = HandoffKey(told.request_id, told.attempt, told.decode_incarnation, told.is_fetch)
            handoff = self.handoffs.get(key)
            entry = None if handoff is None else handoff.source if side == _SOURCE else handoff.sink
            if entry is None:
                if not _is_sound(incarnation, key, side, kind):
                    num_malformed += 1
                    continue
                handoff, entry = self._new_side(account, key, event, incarnation, now_s)
            elif entry.incarnation != incarnation or (side != _SOURCE and side != _SINK) or not 1 <= kind <= _ENDED:
                num_malformed += 1  # somebody else spoke for this side before, or nonsense
                continue
            counts[side, kind] = counts.get((side, kind), 0) + 1
            held_bytes = event.held_bytes
            if side == _SOURCE:
                account.source_held_bytes += held_bytes - entry.held_bytes
            else:
                account.sink_held_bytes += held_bytes - entry.held_bytes
                if event.pulled_bytes:
                    entry.pulled_bytes, entry.pull_us = event.pulled_bytes, event.pull_us
                entry.transport = event.transport or entry.transport
            entry.held_bytes, entry.kind = held_bytes, kind
            confirmed_bytes = event.confirmed_bytes
            if confirmed_bytes > entry.confirmed_bytes:
                entry.confirmed_bytes = confirmed_bytes
            if changed is not None:
                changed[key] = handoff  # type: ignore[assignment]  # an entry has a handoff
            if kind == _ENDED:
                self._end(handoff, side, entry, event.outcome, now_s)  # type: ignore[arg-type]  # the same
        self.num_events += num_events - num_malformed
        self.num_malformed += num_malformed
        return num_malformed

    def expire(self, now_s: float) -> None:
        """Drop handoffs that ended long ago. Those of which a side still drains are kept: its last event must find them."""
        while self._over:
            key, since_s = next(iter(self._over.items()))
            if now_s - since_s < KEEP_ENDED_S and len(self._over) <= MAX_ENDED:
                return
            handoff = self.handoffs[key]
            if any(entry.held_bytes for entry in handoff.sides()):
                del self._over[key]
                self._over[key] = now_s
                if len(self._over) > MAX_ENDED:
                    return  # nothing but draining ones: their workers bound them
            else:
                self._drop(handoff)

    def _new_side(
        self, account: Account, key: HandoffKey, event: pb.HandoffEvent, incarnation: str, now_s: float
    ) -> tuple[Handoff, SideEntry]:
        handoff = self.handoffs.get(key)
        if handoff is None:
            handoff = self.handoffs[key] = Handoff(key, now_s - event.age_us / 1e6)
        entry = SideEntry(incarnation, event.peer_incarnation)
        if event.side == _SOURCE:
            handoff.source = entry
            account.sources.add(key)
            self._observer.begun(key, event, incarnation)
        else:
            handoff.sink = entry
            account.sinks.add(key)
        if event.kind != _ENDED:
            self._over.pop(key, None)
            handoff.over_s = None
        return handoff, entry

    def _end(self, handoff: Handoff, side: int, entry: SideEntry, outcome: int, now_s: float) -> None:
        """A second end of one side only says that a draining operation has let go of its blocks."""
        if not entry.is_ended:
            entry.is_ended, entry.outcome = True, outcome
            self.outcomes[side, outcome] += 1
            if side == _SOURCE:
                self._observer.ended(handoff, outcome_name(outcome))
            else:
                self.confirmed_bytes += entry.confirmed_bytes
            self._compare(handoff)
        source, sink = handoff.source, handoff.sink
        if (source is not None and not source.is_ended) or (sink is not None and not sink.is_ended):
            return
        if handoff.over_s is None:
            handoff.over_s = now_s
        if source is None or sink is None or source.held_bytes or sink.held_bytes:
            self._over.setdefault(handoff.key, now_s)
        else:
            self._drop(handoff)

    def _compare(self, handoff: Handoff) -> None:
        source, sink = handoff.source, handoff.sink
        if source is not None and sink is not None and source.is_ended and sink.is_ended:
            handoff.agreement = Agreement.AGREED if sink.confirmed_bytes <= source.confirmed_bytes else Agreement.DISAGREED
            self.agreements[handoff.agreement] += 1

    def _side_forgotten(self, handoff: Handoff, now_s: float) -> None:
        if self.changed is not None:
            self.changed[handoff.key] = handoff
        if handoff.source is None and handoff.sink is None:
            self._over.pop(handoff.key, None)
            del self.handoffs[handoff.key]
        elif not handoff.is_live:
            handoff.over_s = now_s
            self._over.setdefault(handoff.key, now_s)

    def _drop(self, handoff: Handoff) -> None:
        self._over.pop(handoff.key, None)
        del self.handoffs[handoff.key]
        if handoff.source is not None:
            self.accounts[handoff.source.incarnation].sources.discard(handoff.key)
        if handoff.sink is not None:
            self.accounts[handoff.sink.incarnation].sinks.discard(handoff.key)


_OUTCOME_NAMES = {
    number: value.name.removeprefix("HANDOFF_OUTCOME_").lower() for number, value in pb.HandoffOutcome.DESCRIPTOR.values_by_number.items()
}


def outcome_name(outcome: int) -> str:
    """Of pb.HandoffOutcome, e.g. "confirmed"; "unknown" for a number of a later version."""
    return _OUTCOME_NAMES.get(outcome, "unknown")


def _is_sound(incarnation: str, key: HandoffKey, side: int, kind: int) -> bool:
    """A sink speaks of its own handoffs, a source of its peer's; kinds and sides are those we know."""
    if not 1 <= kind <= _ENDED or not key.request_id or not key.decode_incarnation:
        return False
    if side == _SINK:
        return key.decode_incarnation == incarnation
    return side == _SOURCE and key.decode_incarnation != incarnation
