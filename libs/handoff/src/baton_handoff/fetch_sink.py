"""The sink's side of every fetch of this worker: a plain state machine, events in, actions out.

States: waiting (for the link) -> asked -> pulling -> over, by way of draining if an operation of ours still runs (docs/handoff.md,
section 9). A waiting one holds no block; an asked one has reserved its blocks before it asks. They belong to the fetch, not to the
sequence it is for: what is confirmed is published, and found by the sequence in the prefix cache; the rest is free again. So a
fetch may end at any time, for any reason, and leave the sequence no worse than before.
"""

import enum
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeAlias

from baton_engine.api import Priority
from baton_engine.blocks import BlockManager
from baton_engine.errors import CacheFull

from baton_handoff.actions import Action, FetchEnded, Report, Send, StartPull
from baton_handoff.config import HandoffConfig
from baton_handoff.cut import Cut
from baton_handoff.fetch_plan import FetchPlan
from baton_handoff.ids import ConfirmAnswer, EventKind, FailureCause, FetchEnd, FetchOutcome, HandoffKey, Outcome, PeerRef, Side
from baton_handoff.messages import CancelHandoff, Confirm, ConfirmReply, Fetch, FetchReply
from baton_handoff.tag import KvShape, fetch_tag

FetchFromSource: TypeAlias = FetchReply | ConfirmReply | CancelHandoff


class FetchState(enum.Enum):
    """States of a fetch at the sink."""

    WAITING = "waiting"
    ASKED = "asked"
    PULLING = "pulling"
    DRAINING = "draining"
    OVER = "over"


@dataclass(slots=True, eq=False, kw_only=True)
class SinkFetch:
    """One fetch. In the source's blocks of the sequence:

    first <= confirmed <= asked <= pulled <= found
    [0, first)           our own cached prefix; the head of block first may be in it, too
    [first, confirmed)   confirmed by the source
    [confirmed, pulled)  bytes read; asked is the end of the Confirm in flight (= confirmed: none is)
    [pulled, found)      may be pulled

    In our own, [0, plan.num_blocks) of the sequence and the fetch's table: [0, committed) cached or filled by what is confirmed,
    [committed, plan.num_blocks) reserved.
    """

    key: HandoffKey
    peer: PeerRef
    priority: Priority
    plan: FetchPlan
    deadline: float
    traceparent: str
    state: FetchState = FetchState.WAITING
    num_cached: int = 0  # own blocks that were cached when it began
    committed: int = 0
    first: int = 0
    confirmed: int = 0
    asked: int = 0
    pulled: int = 0
    source_ids: tuple[int, ...] = ()  # of [first, found)
    pull_end: int = 0  # of the running operation, exclusive
    operation: int = 0  # number of the running operation; 0: none runs
    outcome: FetchOutcome = field(default=FetchOutcome.CANCELLED)

    @property
    def found(self) -> int:
        """End of what the source has."""
        return self.first + len(self.source_ids)

    @property
    def is_begun(self) -> bool:
        """Whether it has reserved blocks and asked."""
        return self.state in (FetchState.ASKED, FetchState.PULLING)

    @property
    def cut(self) -> Cut:
        """How source and own blocks lie on each other."""
        return self.plan.cut(self.num_cached)

    @property
    def num_reserved(self) -> int:
        """Own blocks reserved while it is begun or draining."""
        return self.plan.num_blocks - self.committed


class FetchSinkBook:
    """All fetches into this worker's cache.

    All its mutable state: `_live` by identity, `_running` by operation number, of them `_draining`, whose fetches are over. The table of
    a fetch belongs to `key.owner` until it is over and nothing of ours writes to it any more.
    """

    def __init__(self, blocks: BlockManager, shape: KvShape, config: HandoffConfig) -> None:
        self._blocks = blocks
        self._shape = shape
        self._config = config
        self._live: dict[HandoffKey, SinkFetch] = {}
        self._running: dict[int, SinkFetch] = {}
        self._draining: dict[int, SinkFetch] = {}
        self._last_operation = 0
        self._out: list[Action] = []

    # What may be asked.

    @property
    def live(self) -> Collection[SinkFetch]:
        """Fetches that are not over."""
        return self._live.values()

    @property
    def draining(self) -> Collection[SinkFetch]:
        """Fetches that are over but for an operation of ours that has not returned."""
        return self._draining.values()

    def live_with(self, incarnation: str) -> list[SinkFetch]:
        """Fetches from that source."""
        return [fetch for fetch in self._live.values() if fetch.peer.incarnation == incarnation]

    def begun_with(self, incarnation: str) -> list[HandoffKey]:
        """What a hello to that source lists."""
        return [fetch.key for fetch in self.live_with(incarnation) if fetch.is_begun]

    def quarantined_bytes(self) -> int:
        """As SinkBook.quarantined_bytes."""
        return sum(fetch.num_reserved for fetch in self._draining.values()) * self._shape.block_bytes

    def in_flight_bytes(self) -> int:
        """Bytes of running operations."""
        return sum((fetch.pull_end - fetch.pulled) * fetch.plan.source.block_bytes for fetch in self._running.values())

    def next_deadline(self) -> float:
        """When the next fetch has had its time; infinity if there is none."""
        return min((fetch.deadline for fetch in self._live.values()), default=float("inf"))

    # Events. Each returns what is to be done, in order.

    def start(self, fetch: SinkFetch, *, is_linked: bool) -> list[Action]:
        """Take a fetch that is waiting. is_linked: whether the link to its source was up before, so that it may be asked now; else it
        is with link_up. One FetchEnded will come."""
        assert fetch.key not in self._live, "one fetch per attempt"
        is_full = len(self._live) + len(self._draining) >= self._config.max_fetches
        self._live[fetch.key] = fetch
        if is_full:
            self._end(fetch, FetchOutcome.NO_ROOM)
        elif is_linked:
            self._ask(fetch)
        return self._done()

    def receive(self, peer_incarnation: str, message: FetchFromSource) -> list[Action]:
        """A message about a fetch from a source, in the order in which it was sent."""
        fetch = self._live.get(message.key)
        if fetch is not None and fetch.peer.incarnation != peer_incarnation:
            fetch = None
        if isinstance(message, FetchReply):
            self._fetch_reply(fetch, peer_incarnation, message)
        elif fetch is not None and isinstance(message, ConfirmReply):
            self._confirm_reply(fetch, message)
        elif fetch is not None:
            self._end(fetch, FetchOutcome.CANCELLED)
        return self._done()

    def pull_returned(self, operation: int, failure: FailureCause | None) -> list[Action]:
        """The operation of a StartPull is over: nothing writes to its destination any more. failure: None if all bytes came."""
        fetch = self._running.pop(operation)
        fetch.operation = 0
        if self._draining.pop(operation, None) is not None:
            self._release(fetch)
        elif failure is not None:
            outcome = FetchOutcome.DATA_LOSS if failure is FailureCause.DATA_LOSS else FetchOutcome.PULL_FAILED
            self._end(fetch, outcome, tell="PULL_FAILED")
        else:
            fetch.pulled = fetch.pull_end
            self._confirm(fetch)
        return self._done()

    def cancel(self, request_id: str, attempt: int, reason: str) -> list[Action]:
        """Nobody waits for the fetches of these attempts any more."""
        for key, fetch in list(self._live.items()):
            if key.request_id == request_id and key.attempt <= attempt:
                self._end(fetch, FetchOutcome.CANCELLED, tell=reason)
        return self._done()

    def link_up(self, incarnation: str) -> list[Action]:
        """The link to a source is up (again), its hello has listed `begun_with`: ask, repeat what has no answer."""
        for fetch in self.live_with(incarnation):
            if fetch.state is FetchState.WAITING:
                self._ask(fetch)
            elif fetch.state is FetchState.ASKED:
                self._send_fetch(fetch)
            elif fetch.asked > fetch.confirmed:
                self._send_confirm(fetch)
        return self._done()

    def fence(self, incarnation: str) -> list[Action]:
        """A source is taken for dead, or cannot be reached: everything from it ends here, nothing is said to it."""
        for fetch in self.live_with(incarnation):
            self._end(fetch, FetchOutcome.FENCED)
        return self._done()

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        for fetch in [fetch for fetch in self._live.values() if fetch.deadline <= now]:
            self._end(fetch, FetchOutcome.TIMEOUT, tell="TIMEOUT")
        return self._done()

    # Everything below changes state and appends to _out.

    def _done(self) -> list[Action]:
        self._start_pulls()
        out, self._out = self._out, []
        return out

    def _ask(self, fetch: SinkFetch) -> None:
        """Take our own blocks, then ask."""
        try:
            fetch.num_cached = fetch.committed = self._reserve(fetch)
        except CacheFull:
            return self._end(fetch, FetchOutcome.NO_ROOM)
        fetch.first = fetch.confirmed = fetch.asked = fetch.pulled = fetch.cut.first_block
        fetch.state = FetchState.ASKED
        self._report(fetch, EventKind.BEGUN)
        if not fetch.num_reserved:
            return self._end(fetch, FetchOutcome.FETCHED)  # computed, or fetched for another one, meanwhile
        self._send_fetch(fetch)

    def _reserve(self, fetch: SinkFetch) -> int:
        """Only what is to spare: what growth needs stays free. If it is too little for all, the first part is fetched.

        Raises: CacheFull.
        """
        keep_free = self._blocks.growth_headroom
        plan = fetch.plan
        try:
            return self._blocks.reserve(fetch.key.owner, plan.hashes, plan.num_blocks, keep_free=keep_free)
        except CacheFull as error:
            fetch.plan = plan.shortened(plan.num_blocks - (error.needed - error.available))
            if error.available * self._shape.block_tokens < max(1, self._config.fetch_min_tokens) or not fetch.plan.num_blocks:
                raise
        return self._blocks.reserve(fetch.key.owner, fetch.plan.hashes, fetch.plan.num_blocks, keep_free=keep_free)

    def _fetch_reply(self, fetch: SinkFetch | None, peer_incarnation: str, reply: FetchReply) -> None:
        if fetch is None:
            if reply.block_ids:  # pinned for nobody
                self._out.append(Send(peer_incarnation, CancelHandoff(reply.key, "UNKNOWN")))
            return
        if fetch.state is not FetchState.ASKED:
            return  # said again
        if not reply.block_ids:
            self._end(fetch, FetchOutcome.NOT_FOUND)
        elif reply.first_block != fetch.first or len(reply.block_ids) > len(fetch.plan.source_hashes) - fetch.first:
            self._end(fetch, FetchOutcome.DATA_LOSS, tell="UNKNOWN_BLOCKS")
        else:
            fetch.source_ids = reply.block_ids
            fetch.state = FetchState.PULLING

    def _start_pulls(self) -> None:
        """Start what may run, those first whose class is higher and whose time is over sooner."""
        free = self._config.max_fetch_pulls - len(self._running)
        if free <= 0:
            return
        waiting = [f for f in self._live.values() if f.state is FetchState.PULLING and not f.operation and f.pulled < f.found]
        for fetch in sorted(waiting, key=lambda f: (f.priority, f.deadline))[:free]:
            self._start_pull(fetch)

    def _start_pull(self, fetch: SinkFetch) -> None:
        operation_blocks = max(1, self._config.operation_bytes // fetch.plan.source.block_bytes)
        start, end = fetch.pulled, min(fetch.found, fetch.pulled + operation_blocks)
        self._last_operation += 1
        fetch.operation, fetch.pull_end = self._last_operation, end
        self._running[fetch.operation] = fetch
        block_ids = fetch.source_ids[start - fetch.first : end - fetch.first]
        source_ids, dest_ids = fetch.cut.units(start, block_ids, self._blocks.table(fetch.key.owner))
        self._out.append(StartPull(fetch.key, fetch.operation, fetch.peer.incarnation, fetch.priority, source_ids, dest_ids))

    def _confirm(self, fetch: SinkFetch) -> None:
        if fetch.asked > fetch.confirmed or fetch.pulled == fetch.confirmed:
            return  # one Confirm is in flight, or there is nothing to ask
        fetch.asked = fetch.pulled
        self._send_confirm(fetch)

    def _confirm_reply(self, fetch: SinkFetch, reply: ConfirmReply) -> None:
        if fetch.state is not FetchState.PULLING or reply.end_block != fetch.asked or fetch.asked == fetch.confirmed:
            return
        if reply.answer is not ConfirmAnswer.CONFIRMED:
            is_other = reply.answer is ConfirmAnswer.TAG_MISMATCH
            return self._end(fetch, FetchOutcome.DATA_LOSS if is_other else FetchOutcome.NOT_PINNED, tell=reply.answer.name)
        fetch.confirmed = fetch.asked
        fetch.committed = fetch.cut.own_blocks(fetch.confirmed)
        self._blocks.commit(fetch.key.owner, fetch.committed, fetch.plan.hashes)
        if fetch.confirmed == fetch.found:
            self._end(fetch, FetchOutcome.PARTIAL if fetch.num_reserved else FetchOutcome.FETCHED)
        else:
            self._report(fetch, EventKind.PROGRESS)
            self._confirm(fetch)

    def _end(self, fetch: SinkFetch, outcome: FetchOutcome, *, tell: str = "") -> None:
        """The one way out. What was confirmed stays in the prefix cache; the rest is free at once, or when the running operation
        returns."""
        was_begun = fetch.is_begun
        del self._live[fetch.key]
        fetch.outcome = outcome
        if tell and was_begun:
            self._send(fetch, CancelHandoff(fetch.key, tell))
        if fetch.operation:
            fetch.state = FetchState.DRAINING
            self._draining[fetch.operation] = fetch
            self._report(fetch, EventKind.ENDED)
        elif was_begun:
            self._release(fetch)
        num_tokens = (fetch.committed - fetch.num_cached) * self._shape.block_tokens
        end = FetchEnd(outcome, num_tokens, (fetch.confirmed - fetch.first) * fetch.plan.source.block_bytes)
        self._out.append(FetchEnded(fetch.key, end))

    def _release(self, fetch: SinkFetch) -> None:
        self._blocks.release(fetch.key.owner)
        fetch.state = FetchState.OVER
        self._report(fetch, EventKind.ENDED)

    def _send_fetch(self, fetch: SinkFetch) -> None:
        self._send(fetch, Fetch(fetch.key, fetch.first, tuple(fetch.plan.source_hashes[fetch.first :]), fetch.traceparent))

    def _send_confirm(self, fetch: SinkFetch) -> None:
        self._send(fetch, Confirm(fetch.key, fetch.asked, fetch_tag(self._shape, fetch.plan.source_hashes[fetch.asked - 1])))

    def _send(self, fetch: SinkFetch, message: Fetch | Confirm | CancelHandoff) -> None:
        self._out.append(Send(fetch.peer.incarnation, message))

    def _report(self, fetch: SinkFetch, kind: EventKind) -> None:
        outcome = _OUTCOMES[fetch.outcome] if kind is EventKind.ENDED else None
        held = 0 if fetch.state is FetchState.OVER else fetch.num_reserved
        confirmed, block_bytes = fetch.confirmed - fetch.first, fetch.plan.source.block_bytes
        peer = fetch.peer.incarnation
        self._out.append(Report(fetch.key, Side.SINK, kind, peer, held, confirmed, fetch.traceparent, outcome, block_bytes))


_OUTCOMES = {
    FetchOutcome.FETCHED: Outcome.CONFIRMED,
    FetchOutcome.PARTIAL: Outcome.CONFIRMED,
    FetchOutcome.NOT_FOUND: Outcome.CANCELLED,
    FetchOutcome.TIMEOUT: Outcome.CANCELLED,
    FetchOutcome.CANCELLED: Outcome.CANCELLED,
    FetchOutcome.FENCED: Outcome.FENCED,
    FetchOutcome.PULL_FAILED: Outcome.FAILED,
    FetchOutcome.NOT_PINNED: Outcome.NOT_PINNED,
    FetchOutcome.DATA_LOSS: Outcome.DATA_LOSS,
    FetchOutcome.NO_ROOM: Outcome.FAILED,
    FetchOutcome.NO_SOURCE: Outcome.FAILED,
}
