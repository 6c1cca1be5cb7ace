"""The books: what each side of each handoff says it holds, against what each worker's block manager counts.

Two counts of the same memory that share no code: a leak in either shows as a mismatch. The books decide nothing about a block.
Plain and synchronous; times are given in seconds of any one clock.
"""

import enum
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb

# As long as the workers' tombstones: until then an event may be told twice.
KEEP_ENDED_S = 60.0
# A difference of sums counts once it has stood for so long; sums come at least once a second.
MISMATCH_WINDOW_S = 1.0
# Ended handoffs kept at most, whatever the rate; the oldest go first.
MAX_ENDED = 100_000


class HandoffKey(NamedTuple):
    """Identity of a handoff, as baton.worker.v1.HandoffId."""

    request_id: str
    attempt: int
    decode_incarnation: str


class Agreement(enum.Enum):
    """What two ended sides say about the bytes confirmed."""

    AGREED = "agreed"  # the sink counts no more than the source: a Cancel may overtake the last answer
    DISAGREED = "disagreed"


@dataclass(slots=True)
class SideEntry:
    """One side of a handoff, as its worker told it last."""

    incarnation: str
    peer_incarnation: str
    held_bytes: int = 0
    confirmed_bytes: int = 0
    is_ended: bool = False
    outcome: int = pb.HANDOFF_OUTCOME_UNSPECIFIED
    transport: str = ""


@dataclass(slots=True)
class Handoff:
    """Both sides of a handoff, as far as they are known."""

    key: HandoffKey
    sides: dict[int, SideEntry] = field(default_factory=dict)  # by pb.Side
    agreement: Agreement | None = None

    @property
    def is_live(self) -> bool:
        """Whether a known side is not over."""
        return any(not side.is_ended for side in self.sides.values())


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
    handoffs: set[tuple[HandoffKey, int]] = field(default_factory=set)  # sides of this worker, live or not

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


class Observer(Protocol):
    """Told about the source side of handoffs, for traces."""

    def begun(self, key: HandoffKey, event: pb.HandoffEvent, incarnation: str) -> None:
        """The source side appeared."""

    def ended(self, key: HandoffKey, entry: SideEntry, outcome: str) -> None:
        """The source side is over, or will not be heard of any more. outcome: lower case, for people."""


class Books:
    """Accounts by incarnation, handoffs by identity."""

    def __init__(self, observer: Observer) -> None:
        self.accounts: dict[str, Account] = {}
        self.handoffs: dict[HandoffKey, Handoff] = {}
        self.live: set[HandoffKey] = set()  # of handoffs not over on a known side: few, while ended ones stay for a minute
        self.agreements: Counter[Agreement] = Counter()
        self.events: Counter[tuple[int, int]] = Counter()  # (side, kind)
        self.outcomes: Counter[tuple[int, int]] = Counter()  # (side, outcome) of ended sides
        self.num_malformed = 0
        self.confirmed_bytes = 0  # by sinks, at their end
        self._observer = observer
        self._ended: deque[tuple[float, HandoffKey]] = deque()

    def open_account(self, incarnation: str) -> None:
        """A worker reports from now on; a snapshot follows. What was known of it before is dropped."""
        self.close_account(incarnation)
        self.accounts[incarnation] = Account()

    def close_account(self, incarnation: str) -> None:
        """Forget what a worker holds: it died, or starts anew with a snapshot."""
        account = self.accounts.pop(incarnation, None)
        for key, side in account.handoffs if account is not None else ():
            handoff = self.handoffs[key]
            entry = handoff.sides.pop(side)
            self._note_if_over(handoff)
            if side == pb.SIDE_SOURCE and not entry.is_ended:
                self._observer.ended(key, entry, "unknown")
            if not handoff.sides:
                del self.handoffs[key]

    def apply(self, incarnation: str, event: pb.HandoffEvent, now_s: float) -> bool:
        """One event of a worker with an account. False: it contradicts itself and was left out."""
        key = HandoffKey(event.handoff.request_id, event.handoff.attempt, event.handoff.decode_incarnation)
        if not _is_sound(incarnation, key, event) or not self._may_speak(incarnation, key, event.side):
            self.num_malformed += 1
            return False
        account = self.accounts[incarnation]
        self.events[event.side, event.kind] += 1
        entry = self._entry(account, key, event, incarnation)
        delta = event.held_bytes - entry.held_bytes
        if event.side == pb.SIDE_SOURCE:
            account.source_held_bytes += delta
        else:
            account.sink_held_bytes += delta
        entry.held_bytes, entry.confirmed_bytes = event.held_bytes, max(entry.confirmed_bytes, event.confirmed_bytes)
        entry.transport = event.transport or entry.transport
        # A second ENDED only says that a draining operation has let go of its blocks.
        if event.kind == pb.HANDOFF_EVENT_KIND_ENDED and not entry.is_ended:
            self._end(key, event, entry, now_s)
        return True

    def expire(self, now_s: float) -> None:
        """Drop handoffs that ended long ago."""
        for _ in range(len(self._ended)):
            if now_s - self._ended[0][0] < KEEP_ENDED_S and len(self._ended) <= MAX_ENDED:
                return
            _, key = self._ended.popleft()
            handoff = self.handoffs.get(key)
            if handoff is None or handoff.is_live:
                continue  # live on the other side: its end puts it here again
            if any(side.held_bytes for side in handoff.sides.values()):
                self._ended.append((now_s, key))  # still draining: its last event must find it
            else:
                self._drop(handoff)

    def _may_speak(self, incarnation: str, key: HandoffKey, side: int) -> bool:
        """Whether nobody else spoke for this side before."""
        handoff = self.handoffs.get(key)
        entry = handoff.sides.get(side) if handoff is not None else None
        return entry is None or entry.incarnation == incarnation

    def _entry(self, account: Account, key: HandoffKey, event: pb.HandoffEvent, incarnation: str) -> SideEntry:
        handoff = self.handoffs.setdefault(key, Handoff(key))
        entry = handoff.sides.get(event.side)
        if entry is None:
            entry = handoff.sides[event.side] = SideEntry(incarnation, event.peer_incarnation)
            account.handoffs.add((key, event.side))
            self.live.add(key)
            if event.side == pb.SIDE_SOURCE:
                self._observer.begun(key, event, incarnation)
        return entry

    def _end(self, key: HandoffKey, event: pb.HandoffEvent, entry: SideEntry, now_s: float) -> None:
        entry.is_ended, entry.outcome = True, event.outcome
        self.outcomes[event.side, event.outcome] += 1
        if event.side == pb.SIDE_SOURCE:
            self._observer.ended(key, entry, outcome_name(event.outcome))
        else:
            self.confirmed_bytes += entry.confirmed_bytes
        handoff = self.handoffs[key]
        source, sink = handoff.sides.get(pb.SIDE_SOURCE), handoff.sides.get(pb.SIDE_SINK)
        if source is not None and sink is not None and source.is_ended and sink.is_ended:
            handoff.agreement = Agreement.AGREED if sink.confirmed_bytes <= source.confirmed_bytes else Agreement.DISAGREED
            self.agreements[handoff.agreement] += 1
        self._note_if_over(handoff)
        self._ended.append((now_s, key))

    def _note_if_over(self, handoff: Handoff) -> None:
        if not handoff.is_live:
            self.live.discard(handoff.key)

    def _drop(self, handoff: Handoff) -> None:
        del self.handoffs[handoff.key]
        for side, entry in handoff.sides.items():
            self.accounts[entry.incarnation].handoffs.discard((handoff.key, side))


def outcome_name(outcome: int) -> str:
    """Of pb.HandoffOutcome, e.g. "confirmed"; "unknown" for a number of a later version."""
    names = pb.HandoffOutcome.DESCRIPTOR.values_by_number
    return names[outcome].name.removeprefix("HANDOFF_OUTCOME_").lower() if outcome in names else "unknown"


def _is_sound(incarnation: str, key: HandoffKey, event: pb.HandoffEvent) -> bool:
    """A sink speaks of its own handoffs, a source of its peer's; kinds and sides are those we know."""
    if event.kind not in (pb.HANDOFF_EVENT_KIND_BEGUN, pb.HANDOFF_EVENT_KIND_PROGRESS, pb.HANDOFF_EVENT_KIND_ENDED):
        return False
    if not key.request_id or not key.decode_incarnation:
        return False
    if event.side == pb.SIDE_SINK:
        return key.decode_incarnation == incarnation
    return event.side == pb.SIDE_SOURCE and key.decode_incarnation != incarnation
