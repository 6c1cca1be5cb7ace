"""The sink's side of every handoff of this worker: a plain state machine, events in, actions out.

States: ticket -> pulling -> complete or failed, by way of draining if an operation of ours still runs (docs/handoff.md,
section 2). A ticket holds no block. The block manager is called directly: reserve at an accepted Begin, commit at a
confirm that was answered yes, release when anything went wrong and nothing of ours writes any more. Nothing here waits,
and time comes in as an argument (time.monotonic()).

What is said to a source, and so the state of a handoff, counts in the source's blocks; what is held here counts in our own. The two
may have other sizes (`cut`): a block of ours that the source's have only partly filled stays reserved until they have filled it.
"""

from collections.abc import Callable, Collection

from baton_engine.api import EngineRequest
from baton_engine.blocks import BlockManager, Turn
from baton_engine.errors import CacheFull
from baton_engine.pool import BlockLayout
from baton_runtime.errors import BatonError, Draining, QueueFull

from baton_handoff.actions import Action, Completed, Ended, Report, Send, StartPull
from baton_handoff.admission import age_order, check_start
from baton_handoff.config import HandoffConfig
from baton_handoff.cut import Cut, Ids, num_blocks
from baton_handoff.ids import (
    ConfirmAnswer,
    EndReason,
    EventKind,
    FailureCause,
    HandoffComplete,
    HandoffEnd,
    HandoffKey,
    Outcome,
    PeerRef,
    Side,
)
from baton_handoff.messages import Accepted, Announce, Begin, BeginReply, CancelHandoff, Confirm, ConfirmReply, FromSource, NotNow, Refused
from baton_handoff.sink_handoff import SinkHandoff, SinkState
from baton_handoff.tag import KvShape, TagChain
from baton_handoff.tombstones import Tombstone, Tombstones


class SinkBook:
    """All handoffs for which this worker is the sink.

    All its mutable state: `_live` by request_id (one attempt at a time), `_begun`, those of them that hold blocks, `_draining`
    and `_running` by operation number, `_tombstones`. The table of a live handoff belongs to it; with Completed it
    goes over to the engine.
    """

    def __init__(
        self,
        blocks: BlockManager,
        shape: KvShape,
        config: HandoffConfig,
        layout_of: Callable[[str], BlockLayout | None] = lambda incarnation: None,
    ) -> None:
        """layout_of: layout of an introduced source, by incarnation; None: as our own."""
        self._layout_of = layout_of
        self._blocks = blocks
        self._shape = shape
        self._config = config
        self._total_blocks = blocks.counts().total
        self._live: dict[str, SinkHandoff] = {}
        self._begun: dict[HandoffKey, SinkHandoff] = {}
        self._draining: dict[int, SinkHandoff] = {}
        self._running: dict[int, SinkHandoff] = {}
        self._last_operation = 0
        self._tombstones = Tombstones(config.times.tombstone_s)
        self._is_draining = False
        self._out: list[Action] = []

    # What may be asked.

    @property
    def live(self) -> Collection[SinkHandoff]:
        """Handoffs that are not over."""
        return self._live.values()

    @property
    def draining(self) -> Collection[SinkHandoff]:
        """Handoffs that are over but for an operation of ours that has not returned."""
        return self._draining.values()

    def quarantined_bytes(self) -> int:
        """Bytes of handoffs that are over and still reserved, because an operation of ours may write to them."""
        return sum(handoff.num_blocks - handoff.committed for handoff in self._draining.values()) * self._shape.block_bytes

    def in_flight_bytes(self) -> int:
        """Bytes of running operations."""
        return sum((handoff.pull_end - handoff.pulled) * handoff.cut.source.block_bytes for handoff in self._running.values())

    def num_tickets(self) -> int:
        """Handoffs that hold nothing yet."""
        return len(self._live) - len(self._begun)

    def live_with(self, incarnation: str) -> list[SinkHandoff]:
        """Handoffs with that source."""
        return [handoff for handoff in self._live.values() if handoff.peer.incarnation == incarnation]

    def begun_with(self, incarnation: str) -> list[HandoffKey]:
        """What a hello to that source lists. Tickets are left out: the source may not have their Start yet."""
        return [key for key, handoff in self._begun.items() if handoff.peer.incarnation == incarnation]

    # Events. Each returns what is to be done, in order.

    def start(self, request: EngineRequest, prefill: PeerRef, traceparent: str, now: float) -> list[Action]:
        """Take a ticket for KV from a prefill instance.

        Raises: Draining, QueueFull, InvalidArgument, StaleAttempt; nothing was kept then, and no end will come.
        """
        key = HandoffKey(request.key.request_id, request.key.attempt, self._shape.incarnation)
        num_own_blocks = self._shape.num_blocks(request.num_kv_tokens)
        check_start(self._tombstones, request, num_own_blocks, self._total_blocks, is_draining=self._is_draining)
        if len(self._live) >= self._config.max_tickets:
            raise QueueFull(len(self._live), self._config.max_tickets, retry_after_ms=250)
        hashes = self._shape.hashes(request)
        older = self._live.get(key.request_id)
        if older is not None:
            self._end(older, EndReason.STALE, Outcome.CANCELLED, now, tell="STALE")
        self._tombstones.saw(key.request_id, key.attempt)
        self._live[key.request_id] = SinkHandoff(
            key=key,
            peer=prefill,
            priority=request.priority,
            started_at=now,
            num_blocks=num_own_blocks,
            num_tokens=request.num_kv_tokens,
            request=request,
            traceparent=traceparent,
            hashes=hashes,
            cut=Cut(self._shape.layout, self._shape.layout, request.num_kv_tokens, num_cached=0),
        )
        return self._done()

    def receive(self, peer_incarnation: str, message: FromSource, now: float) -> list[Action]:
        """A message from a source, in the order in which it was sent."""
        handoff = self._live.get(message.key.request_id)
        if handoff is not None and (handoff.key != message.key or handoff.peer.incarnation != peer_incarnation):
            handoff = None
        if isinstance(message, Begin):
            self._out.append(Send(peer_incarnation, BeginReply(message.key, self._begin(handoff, message, now))))
            if handoff is not None and handoff.committed == handoff.num_blocks:
                self._complete(handoff, now)
        elif isinstance(message, Announce):
            self._announced(handoff, peer_incarnation, message)
        elif handoff is not None and isinstance(message, ConfirmReply):
            self._confirm_reply(handoff, message, now)
        elif handoff is not None and isinstance(message, CancelHandoff):
            self._fail(handoff, FailureCause.PEER_CANCELLED, now)
        return self._done()

    def pull_returned(self, operation: int, failure: FailureCause | None, now: float) -> list[Action]:
        """The operation of a StartPull is over: nothing writes to its destination any more. failure: None if all bytes came."""
        handoff = self._running.pop(operation)
        handoff.operation = 0
        if self._draining.pop(operation, None) is not None:
            self._release(handoff)
        elif failure is not None:
            self._fail(handoff, failure, now, tell="PULL_FAILED")
        else:
            handoff.pulled = handoff.pull_end
            self._ask(handoff)
        return self._done()

    def cancel(self, request_id: str, attempt: int, reason: str, now: float) -> list[Action]:
        """This attempt and all lower ones are over, whether their Start has arrived or not."""
        self._tombstones.cancel(request_id, attempt, now)
        handoff = self._live.get(request_id)
        if handoff is not None and handoff.key.attempt <= attempt:
            end = EndReason.DEADLINE if reason == "DEADLINE" else EndReason.CANCELLED
            self._end(handoff, end, Outcome.CANCELLED, now, tell=reason)
        return self._done()

    def link_up(self, incarnation: str, now: float) -> list[Action]:
        """The link to a source is up again, its hello has listed `begun_with`: repeat the Confirms that are open."""
        for handoff in self._begun.values():
            if handoff.peer.incarnation == incarnation and handoff.asked > handoff.confirmed:
                self._send(handoff, Confirm(handoff.key, handoff.asked, handoff.asked_tag))
        return self._done()

    def fence(self, incarnation: str, cause: FailureCause, now: float) -> list[Action]:
        """A source is taken for dead, or cannot be reached: everything with it ends here, nothing is said to it."""
        for handoff in self.live_with(incarnation):
            self._fail(handoff, cause, now)
        return self._done()

    def set_draining(self, now: float) -> list[Action]:
        """Refuse new starts, hand tickets back, finish what has begun."""
        self._is_draining = True
        for handoff in list(self._live.values()):
            if handoff.state is SinkState.TICKET:
                self._end(handoff, EndReason.REFUSED, Outcome.CANCELLED, now, tell="DRAINING", error=Draining())
        return self._done()

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        self._tombstones.expire(now)
        self._blocks.expire_waiting(now)  # of all kinds, offers of our own as a source too
        return self._done()

    # Everything below changes state and appends to _out.

    def _done(self) -> list[Action]:
        self._start_pulls()
        out, self._out = self._out, []
        return out

    def _begin(self, handoff: SinkHandoff | None, begin: Begin, now: float) -> Accepted | NotNow | Refused:
        if handoff is None:
            return self._begin_unknown(begin)
        if handoff.state is SinkState.PULLING:
            return Accepted(handoff.first)
        source = self._layout_of(handoff.peer.incarnation) or self._shape.layout
        if (begin.num_tokens, begin.num_blocks) != (handoff.num_tokens, num_blocks(source, handoff.num_tokens)):
            self._fail(handoff, FailureCause.DATA_LOSS, now)  # the two Starts are not of the same sequence
            return Refused("CANCELLED")
        return self._reserve(handoff, source, now)

    def _begin_unknown(self, begin: Begin) -> Accepted | NotNow | Refused:
        stone = self._tombstones.get(begin.key)
        if stone is not None and stone.is_confirmed:
            return Accepted(stone.num_blocks)  # all was cached here, and the answer was lost
        if begin.key.decode_incarnation != self._shape.incarnation or self._tombstones.is_older(begin.key):
            return Refused("STALE")
        if stone is not None:
            return Refused(stone.refusal)
        if self._tombstones.is_over(begin.key):
            return Refused("CANCELLED")
        if self._shape.num_blocks(begin.num_tokens) > self._total_blocks:
            return Refused("TOO_LARGE")
        if self._is_draining:
            return Refused("DRAINING")
        return NotNow(round(self._config.times.retry_min_s * 1e3))  # its Start may be on its way

    def _reserve(self, handoff: SinkHandoff, source: BlockLayout, now: float) -> Accepted | NotNow:
        turn, keep_free = Turn(age_order(handoff, self._config.times), now), self._blocks.growth_headroom
        try:
            handoff.committed = self._blocks.reserve(
                handoff.key.sequence, handoff.hashes, handoff.num_blocks, keep_free=keep_free, turn=turn
            )
        except CacheFull:
            return self._not_now(handoff)
        handoff.cut = Cut(source, self._shape.layout, handoff.num_tokens, handoff.committed)
        request = handoff.request
        handoff.tags = TagChain(self._shape, request.cache_root, request.token_ids, handoff.num_tokens, source)
        handoff.first = handoff.confirmed = handoff.asked = handoff.pulled = handoff.cut.first_block
        handoff.state = SinkState.PULLING
        self._begun[handoff.key] = handoff
        self._report(handoff, EventKind.BEGUN)
        return Accepted(handoff.first)

    def _not_now(self, handoff: SinkHandoff) -> NotNow:
        """It waits in line for blocks, as long as it is offered again and again."""
        times = self._config.times
        handoff.retry_s = min(2 * handoff.retry_s or times.retry_min_s, times.retry_max_s)
        return NotNow(round(handoff.retry_s * 1e3))

    def _announced(self, handoff: SinkHandoff | None, peer_incarnation: str, message: Announce) -> None:
        if handoff is None or handoff.state is not SinkState.PULLING:
            self._out.append(Send(peer_incarnation, CancelHandoff(message.key, "UNKNOWN")))
            return
        known = handoff.announced - message.first_block  # repeated blocks; negative would be a gap, which a FIFO cannot make
        if 0 <= known < len(message.block_ids) and message.first_block + len(message.block_ids) <= handoff.cut.num_source_blocks:
            handoff.source_ids += message.block_ids[known:]
            handoff.last_chunk_blocks = len(message.block_ids) - known
            handoff.cached_tokens = message.cached_tokens
            self._ask(handoff)  # with a native engine the KV may have been here before

    def _start_pulls(self) -> None:
        """Start what may run, oldest first, batch ones as if younger, within the limits in all and per peer."""
        free = self._config.max_pulls - len(self._running)
        if free <= 0:
            return
        waiting = sorted((h for h in self._begun.values() if self._is_pullable(h)), key=lambda h: age_order(h, self._config.times))
        busy: dict[str, int] = {}
        for handoff in self._running.values():
            busy[handoff.peer.incarnation] = busy.get(handoff.peer.incarnation, 0) + 1
        for handoff in waiting:
            peer = handoff.peer.incarnation
            if free > 0 and busy.get(peer, 0) < self._config.max_pulls_per_peer:
                busy[peer] = busy.get(peer, 0) + 1
                free -= 1
                self._start_pull(handoff)

    def _is_pullable(self, handoff: SinkHandoff) -> bool:
        """Engines with a handoff of their own meet as soon as both may begin, before anything is computed."""
        end = handoff.cut.num_source_blocks if self._config.is_native else handoff.announced
        return handoff.state is SinkState.PULLING and not handoff.operation and handoff.pulled < end

    def _start_pull(self, handoff: SinkHandoff) -> None:
        if self._config.is_native:
            return self._start_operation(handoff, handoff.cut.num_source_blocks, (), (), handoff.request)
        operation_blocks = max(1, self._config.operation_bytes // handoff.cut.source.block_bytes)
        start, end = handoff.pulled, min(handoff.announced, handoff.pulled + operation_blocks)
        blocks = handoff.source_ids[start - handoff.first : end - handoff.first]
        source_ids, dest_ids = handoff.cut.units(start, blocks, self._blocks.table(handoff.key.sequence))
        self._start_operation(handoff, end, source_ids, dest_ids)

    def _start_operation(
        self, handoff: SinkHandoff, end: int, source_ids: Ids, dest_ids: Ids, request: EngineRequest | None = None
    ) -> None:
        self._last_operation += 1
        handoff.operation, handoff.pull_end = self._last_operation, end
        self._running[handoff.operation] = handoff
        peer = handoff.peer.incarnation
        self._out.append(StartPull(handoff.key, handoff.operation, peer, handoff.priority, source_ids, dest_ids, request))

    def _ask(self, handoff: SinkHandoff) -> None:
        if handoff.asked > handoff.confirmed or handoff.pulled == handoff.confirmed or handoff.pulled > handoff.announced:
            return  # one Confirm is in flight, or there is nothing to ask, or the source does not know yet that it is done
        assert handoff.tags is not None, "a ticket asks nothing"
        handoff.asked, handoff.asked_tag = handoff.pulled, handoff.tags.at(handoff.pulled)
        self._send(handoff, Confirm(handoff.key, handoff.asked, handoff.asked_tag))

    def _confirm_reply(self, handoff: SinkHandoff, reply: ConfirmReply, now: float) -> None:
        if handoff.state is not SinkState.PULLING or reply.end_block != handoff.asked or handoff.asked == handoff.confirmed:
            return
        if reply.answer is not ConfirmAnswer.CONFIRMED:
            self._fail(handoff, _CAUSE_OF_ANSWER[reply.answer], now, tell=reply.answer.name)
            return
        handoff.confirmed = handoff.asked
        handoff.committed = handoff.cut.own_blocks(handoff.confirmed)
        self._blocks.commit(handoff.key.sequence, handoff.committed, handoff.hashes)
        if handoff.committed == handoff.num_blocks:
            self._complete(handoff, now, exposed_s=reply.age_s)
        else:
            self._report(handoff, EventKind.PROGRESS)
            self._ask(handoff)

    def _complete(self, handoff: SinkHandoff, now: float, exposed_s: float = 0.0) -> None:
        """From here on the table is the sequence's; the receiver of Completed starts the engine or releases it."""
        del self._live[handoff.key.request_id], self._begun[handoff.key]
        handoff.state = SinkState.OVER
        self._tombstones.bury(handoff.key, Tombstone(Outcome.CONFIRMED, handoff.cut.num_source_blocks, handoff.confirmed), now)
        self._report(handoff, EventKind.ENDED, Outcome.CONFIRMED)
        tail_tokens = handoff.num_tokens % self._shape.block_tokens
        tail_block = self._blocks.table(handoff.key.sequence)[handoff.num_blocks - 1] if tail_tokens else -1
        cached_tokens = max(handoff.cut.num_cached * self._shape.block_tokens, handoff.cached_tokens)
        last_chunk_bytes = handoff.last_chunk_blocks * handoff.cut.source.block_bytes
        complete = HandoffComplete(cached_tokens, handoff.confirmed_bytes, exposed_s, last_chunk_bytes)
        self._out.append(Completed(handoff.key, complete, tail_block, tail_tokens))

    def _fail(self, handoff: SinkHandoff, cause: FailureCause, now: float, tell: str = "") -> None:
        self._end(handoff, EndReason.HANDOFF_FAILED, _OUTCOME_OF_CAUSE[cause], now, tell=tell, cause=cause)

    def _end(
        self,
        handoff: SinkHandoff,
        reason: EndReason,
        outcome: Outcome,
        now: float,
        *,
        tell: str = "",
        cause: FailureCause | None = None,
        error: BatonError | None = None,
    ) -> None:
        """The one way out without the KV. What was confirmed stays in the prefix cache; the rest is free at once, or when the
        running operation returns."""
        was_begun = self._begun.pop(handoff.key, None) is not None
        del self._live[handoff.key.request_id]
        self._blocks.withdraw(handoff.key.sequence)
        refusal = "DRAINING" if tell == "DRAINING" else "CANCELLED"
        self._tombstones.bury(handoff.key, Tombstone(outcome, handoff.cut.num_source_blocks, handoff.confirmed, refusal), now)
        handoff.outcome = outcome
        if tell:
            self._send(handoff, CancelHandoff(handoff.key, tell))
        if handoff.operation:
            handoff.state = SinkState.DRAINING
            self._draining[handoff.operation] = handoff
            self._report(handoff, EventKind.ENDED, outcome)
        elif was_begun:
            self._release(handoff)
        end = HandoffEnd(
            reason=reason,
            cause=cause,
            peer_incarnation=handoff.peer.incarnation,
            confirmed_tokens=handoff.committed_tokens,
            error=error,
            num_bytes=handoff.confirmed_bytes,
        )
        self._out.append(Ended(handoff.key, Side.SINK, end))

    def _release(self, handoff: SinkHandoff) -> None:
        self._blocks.release(handoff.key.sequence)
        handoff.state = SinkState.OVER
        self._report(handoff, EventKind.ENDED, handoff.outcome)

    def _send(self, handoff: SinkHandoff, message: Confirm | CancelHandoff) -> None:
        self._out.append(Send(handoff.peer.incarnation, message))

    def _report(self, handoff: SinkHandoff, kind: EventKind, outcome: Outcome | None = None) -> None:
        held = 0 if handoff.state is SinkState.OVER else handoff.num_blocks - handoff.committed
        confirmed, block_bytes, peer = handoff.confirmed - handoff.first, handoff.cut.source.block_bytes, handoff.peer.incarnation
        self._out.append(Report(handoff.key, Side.SINK, kind, peer, held, confirmed, handoff.traceparent, outcome, block_bytes))


_CAUSE_OF_ANSWER = {
    ConfirmAnswer.NOT_PINNED: FailureCause.NOT_PINNED,
    ConfirmAnswer.TAG_MISMATCH: FailureCause.DATA_LOSS,
    ConfirmAnswer.STALE: FailureCause.PEER_CANCELLED,
}
_OUTCOME_OF_CAUSE = {
    FailureCause.PEER_FENCED: Outcome.FENCED,
    FailureCause.PATH_DOWN: Outcome.FAILED,
    FailureCause.PEER_CANCELLED: Outcome.CANCELLED,
    FailureCause.NOT_PINNED: Outcome.NOT_PINNED,
    FailureCause.DATA_LOSS: Outcome.DATA_LOSS,
    FailureCause.NO_INTRODUCTION: Outcome.FAILED,
}
