"""Who watches handoffs, and what each of them is told next. Plain and synchronous; the service awaits and writes.

A change is remembered per handoff, not per event: a watcher is told how a handoff is when its message is made, so a slow one costs
memory for the handoffs that changed and nothing for how often. Beyond a bound it is told to start afresh, with a count.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb

from baton_kvtransfer.books import Books, Handoff, HandoffKey, SideEntry

# Changed handoffs that a watcher may have untold; more, and it gets a snapshot instead.
MAX_PENDING = 4096
# Handoffs in one message.
MAX_ROWS = 4096


class Directory(Protocol):
    """What the views need to know about workers."""

    def instance_id(self, incarnation: str) -> str:
        """The stable name of a life; the incarnation itself if it is not known."""

    def is_down(self, incarnation: str) -> bool:
        """Whether a life is known to be dead."""


@dataclass(slots=True, eq=False)
class Watcher:
    """One open watch. wake: called when there is something to tell after there was nothing."""

    instance_id: str
    request_id: str
    wake: Callable[[], None]
    pending: dict[HandoffKey, Handoff] = field(default_factory=dict)
    told: set[HandoffKey] = field(default_factory=set)  # live ones this watcher knows of
    needs_snapshot: bool = True
    has_begun: bool = False  # the first message was made
    dropped: int = 0  # changes not told since the last message

    @property
    def has_news(self) -> bool:
        """Whether the next message says more than a beat."""
        return self.needs_snapshot or bool(self.pending)

    def wants(self, handoff: Handoff, name: Callable[[str], str]) -> bool:
        """Whether the filter lets a handoff through."""
        if self.request_id and handoff.key.request_id != self.request_id:
            return False
        return not self.instance_id or any(name(incarnation) == self.instance_id for incarnation in _incarnations(handoff))


class Watches:
    """All open watches over the books. `spread` takes the changes away from the books; call it every some 50 ms."""

    def __init__(self, books: Books, directory: Directory) -> None:
        self._books = books
        self._directory = directory
        self._watchers: set[Watcher] = set()
        self.num_dropped = 0  # changes that slow watchers were not told

    def __len__(self) -> int:
        return len(self._watchers)

    def open(self, request: pb.WatchHandoffsRequest, wake: Callable[[], None]) -> Watcher:
        """A new watch; its first message is a snapshot."""
        watcher = Watcher(request.instance_id, request.request_id, wake)
        self._watchers.add(watcher)
        if self._books.changed is None:
            self._books.changed = {}
        return watcher

    def close(self, watcher: Watcher) -> None:
        """The watch is over. Idempotent."""
        self._watchers.discard(watcher)
        if not self._watchers:
            self._books.changed = None

    def wake_all(self) -> None:
        """Every watch is about to end."""
        for watcher in self._watchers:
            watcher.wake()

    def worker_down(self, incarnation: str) -> None:
        """A worker is known to be dead: its handoffs look different now."""
        account = self._books.accounts.get(incarnation)
        if self._books.changed is None or account is None:
            return
        for key in account.sources | account.sinks:
            self._books.changed[key] = self._books.handoffs[key]

    def spread(self) -> None:
        """Give what has changed since the last call to all watchers."""
        changed = self._books.changed
        if not changed:
            return
        self._books.changed = {}
        for watcher in self._watchers:
            self._give(watcher, changed)

    def next_message(self, watcher: Watcher, now_s: float) -> pb.WatchHandoffsResponse | None:
        """What to tell a watcher now; None if nothing has changed for it."""
        message = pb.WatchHandoffsResponse(revision=self._books.num_events)
        if watcher.needs_snapshot:
            self._fill_snapshot(watcher, message.snapshot, now_s)
        elif watcher.pending:
            for key in list(watcher.pending)[:MAX_ROWS]:
                handoff = watcher.pending.pop(key)
                view = self.view(handoff, now_s)
                if view.is_live:
                    watcher.told.add(key)
                else:
                    watcher.told.discard(key)
                message.delta.handoffs.append(view)
        else:
            return None
        return message

    def beat(self) -> pb.WatchHandoffsResponse:
        """Nothing has changed, and we are alive."""
        return pb.WatchHandoffsResponse(revision=self._books.num_events, delta=pb.HandoffDelta())

    def view(self, handoff: Handoff, now_s: float) -> pb.HandoffView:
        """A handoff as it is now."""
        key, sink = handoff.key, handoff.sink
        view = pb.HandoffView(age_us=int(max(0.0, (handoff.over_s or now_s) - handoff.begun_s) * 1e6))
        id_ = view.handoff
        id_.request_id, id_.attempt, id_.decode_incarnation, id_.is_fetch = key
        if handoff.source is not None:
            self._fill_side(view.source, handoff.source)
        elif sink is not None:
            self._name_side(view.source, sink.peer_incarnation)
        if sink is None and handoff.source is not None:
            self._name_side(view.sink, handoff.source.peer_incarnation)
        elif sink is not None:
            self._fill_side(view.sink, sink)
            view.transport, view.pulled_bytes, view.pull_us = sink.transport, sink.pulled_bytes, sink.pull_us
            view.transport_reason = self._transport_reason(sink)
        view.is_live = any(not side.is_ended and not self._directory.is_down(side.incarnation) for side in handoff.sides())
        return view

    def _give(self, watcher: Watcher, changed: dict[HandoffKey, Handoff]) -> None:
        was_idle = not watcher.has_news
        name = self._directory.instance_id
        for key, handoff in changed.items():
            if key not in watcher.told and not watcher.wants(handoff, name):
                continue
            if watcher.needs_snapshot:
                watcher.dropped += watcher.has_begun  # before the first message nothing can be missed
            elif key not in watcher.pending and len(watcher.pending) >= MAX_PENDING:
                watcher.dropped += len(watcher.pending) + 1
                watcher.pending.clear()
                watcher.needs_snapshot = True
            else:
                watcher.pending[key] = handoff
        if was_idle and watcher.has_news:
            watcher.wake()

    def _fill_snapshot(self, watcher: Watcher, snapshot: pb.HandoffSnapshot, now_s: float) -> None:
        name = self._directory.instance_id
        wanted = [handoff for handoff in self._books.live() if watcher.wants(handoff, name)]
        live = [(handoff.key, view) for handoff in wanted if (view := self.view(handoff, now_s)).is_live]
        snapshot.handoffs.extend(view for _, view in live[:MAX_ROWS])
        snapshot.left_out = max(0, len(live) - MAX_ROWS)
        snapshot.dropped_changes, watcher.dropped = watcher.dropped, 0
        self.num_dropped += snapshot.dropped_changes
        watcher.told = {key for key, _ in live[:MAX_ROWS]}
        watcher.pending.clear()
        watcher.needs_snapshot, watcher.has_begun = False, True

    def _fill_side(self, side: pb.HandoffSide, entry: SideEntry) -> None:
        self._name_side(side, entry.incarnation)
        side.kind, side.outcome = entry.kind, entry.outcome  # type: ignore[assignment]  # numbers of these enums
        side.held_bytes, side.confirmed_bytes = entry.held_bytes, entry.confirmed_bytes

    def _name_side(self, side: pb.HandoffSide, incarnation: str) -> None:
        side.instance_id, side.incarnation = self._directory.instance_id(incarnation), incarnation
        side.is_down = self._directory.is_down(incarnation)

    def _transport_reason(self, sink: SideEntry) -> str:
        account = self._books.accounts.get(sink.incarnation)
        link = account.links.get(sink.peer_incarnation) if account is not None else None
        return link.reason if link is not None and link.transport == sink.transport else ""


def _incarnations(handoff: Handoff) -> set[str]:
    """Of both workers, as far as either side has named them."""
    found = {handoff.key.decode_incarnation}
    for side in handoff.sides():
        found |= {side.incarnation, side.peer_incarnation}
    return found
