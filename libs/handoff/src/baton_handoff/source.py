"""The source's side of every handoff of this worker: a plain state machine, events in, actions out.

States: queued -> offered -> (fetching) -> computing -> computed -> over (docs/handoff.md, section 2). In queued and offered a handoff
holds no block. While fetching it has its table, but nothing is computed: its leading blocks may come from another's cache.
The block manager is called directly: acquire when the sink has accepted, unpin when it has confirmed or anything went wrong.
Nothing here waits, and time comes in as an argument (time.monotonic()).
"""

from collections.abc import Callable, Collection
from dataclasses import replace

from baton_engine.api import BlocksReady, EngineRequest, SequenceEnd, SequenceKey, Work
from baton_engine.api import EndReason as EngineEnd
from baton_engine.blocks import BlockManager, Turn
from baton_engine.errors import CacheFull
from baton_engine.pool import BlockLayout
from baton_runtime.errors import BatonError, Internal, InvalidArgument, QueueFull, Unavailable

from baton_handoff.actions import Action, CancelEngine, CancelFetch, Ended, Report, Send, StartEngine, StartFetch
from baton_handoff.admission import OfferQueue, age_order, check_start
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import (
    ConfirmAnswer,
    EndReason,
    EventKind,
    FailureCause,
    FetchEnd,
    FetchHint,
    HandoffEnd,
    HandoffKey,
    Outcome,
    PeerRef,
    Side,
)
from baton_handoff.messages import Accepted, Announce, Begin, BeginReply, CancelHandoff, Confirm, ConfirmReply, FromSink, NotNow, Refused
from baton_handoff.offers import Offers
from baton_handoff.readers import may_announce
from baton_handoff.source_handoff import SourceHandoff, SourceState
from baton_handoff.tag import KvShape, TagChain
from baton_handoff.tombstones import Tombstone, Tombstones


class SourceBook:
    """All handoffs for which this worker is the source.

    All its mutable state: `_live` by request_id (one attempt at a time), of them `_queue` (queued or offered) and `_begun` (hold
    blocks), `_tombstones`, `_engine_runs` (sequences the engine has not ended), `_linked` (peers, and whether offers may go out).
    """

    def __init__(
        self,
        blocks: BlockManager,
        shape: KvShape,
        config: HandoffConfig,
        layout_of: Callable[[str], BlockLayout | None] = lambda incarnation: None,
        wants_fetch: Callable[[str, int], bool] = lambda incarnation, num_tokens: False,
    ) -> None:
        """layout_of: layout of an introduced sink, by incarnation; None: as our own. wants_fetch: whether that many tokens should be
        fetched from that instance rather than computed."""
        self._wants_fetch = wants_fetch
        self._layout_of = layout_of
        self._blocks = blocks
        self._shape = shape
        self._config = config
        self._times = config.times
        self._total_blocks = blocks.counts().total
        self._live: dict[str, SourceHandoff] = {}
        self._queue: OfferQueue[SourceHandoff] = OfferQueue(config.times)
        self._begun: dict[HandoffKey, SourceHandoff] = {}
        self._offers = Offers(self._queue, self._begun, config, self._total_blocks, shape.block_tokens)
        self._tombstones = Tombstones(config.times.tombstone_s)
        self._engine_runs: set[SequenceKey] = set()
        self._linked: dict[str, bool] = {}
        self._is_draining = False
        self._out: list[Action] = []

    # What may be asked.

    @property
    def live(self) -> Collection[SourceHandoff]:
        """Handoffs that are not over."""
        return self._live.values()

    def num_queued(self) -> int:
        """Handoffs the sink has not accepted."""
        return len(self._queue)

    def num_read(self) -> int:
        """Handoffs with announced and unconfirmed blocks."""
        return sum(handoff.is_read for handoff in self._begun.values())

    def num_held_back(self) -> int:
        """Handoffs whose computed blocks wait for their turn to be announced."""
        return sum(handoff.is_held_back for handoff in self._begun.values())

    def live_with(self, incarnation: str) -> list[SourceHandoff]:
        """Handoffs with that sink."""
        return [handoff for handoff in self._live.values() if handoff.peer.incarnation == incarnation]

    def is_begun_with(self, incarnation: str) -> bool:
        """Whether we hold blocks for that sink."""
        return any(handoff.peer.incarnation == incarnation for handoff in self._begun.values())

    def next_retry_at(self, now: float) -> float:
        """When, after now, the next offer that was told not now is due; infinity if none is."""
        return self._queue.next_retry_at(now)

    # Events. Each returns what is to be done, in order.

    def start(self, request: EngineRequest, decode: PeerRef, traceparent: str, now: float, hint: FetchHint | None = None) -> list[Action]:
        """Queue a prefill for a decode instance. hint: where more of the prefix may be cached than here or at decode.

        Raises: Draining, QueueFull, InvalidArgument, StaleAttempt; nothing was kept then, and no end will come.
        """
        key = HandoffKey(request.key.request_id, request.key.attempt, decode.incarnation)
        num_blocks = self._shape.num_blocks(request.num_kv_tokens)
        check_start(self._tombstones, request, num_blocks, self._total_blocks, is_draining=self._is_draining)
        if len(self._queue) >= self._config.max_queued:
            raise QueueFull(len(self._queue), self._config.max_queued, retry_after_ms=250)
        hashes = self._shape.hashes(request)
        self._supersede(key, now)
        self._tombstones.saw(key.request_id, key.attempt)
        handoff = SourceHandoff(
            key=key,
            peer=decode,
            priority=request.priority,
            started_at=now,
            num_blocks=num_blocks,
            num_tokens=request.num_kv_tokens,
            request=replace(request, work=Work.PREFILL_ONLY),
            traceparent=traceparent,
            hashes=hashes,
            tags=TagChain(self._shape, request.cache_root, request.token_ids, request.num_kv_tokens),
            hint=hint,
        )
        self._live[key.request_id] = handoff
        self._queue.add(handoff)
        return self._done(now)

    def receive(self, peer_incarnation: str, message: FromSink, now: float) -> list[Action]:
        """A message from a sink, in the order in which it was sent."""
        handoff = self._find(message.key)
        if message.key.decode_incarnation != peer_incarnation:
            return []  # a sink speaks for its own handoffs only
        if isinstance(message, Confirm):
            place = len(self._out)  # before what the answer causes here: a decode waits for it
            self._out.insert(place, Send(peer_incarnation, self._confirm_reply(handoff, message, now)))
        elif isinstance(message, BeginReply):
            self._begin_reply(handoff, message, now)
        elif handoff is not None and isinstance(message, CancelHandoff):
            self._fail(handoff, FailureCause.PEER_CANCELLED, now)
        return self._done(now)

    def blocks_ready(self, ready: BlocksReady, now: float) -> list[Action]:
        """The engine has computed and pinned blocks."""
        handoff = self._find_sequence(ready.key)
        if handoff is None or handoff.state is not SourceState.COMPUTING:
            self._blocks.unpin(ready.key)  # the handoff ended while the step ran
            return self._done(now)
        assert ready.first_block == handoff.computed, "an engine reports blocks in order, from first_announced_block on"
        handoff.block_ids += ready.block_ids
        handoff.cached_tokens = ready.cached_tokens
        handoff.ready_at = ready.ready_at
        if handoff.computed == handoff.num_blocks:
            handoff.state = SourceState.COMPUTED
        self._announce_next(now)
        self._report(handoff, EventKind.PROGRESS)
        return self._done(now)

    def engine_ended(self, end: SequenceEnd, now: float) -> list[Action]:
        """The engine ended a sequence and released its table. Sequences that are no handoff's are ignored."""
        if end.key not in self._engine_runs:
            return []
        self._engine_runs.discard(end.key)
        handoff = self._find_sequence(end.key)
        if handoff is None:
            self._blocks.unpin(end.key)
        elif end.reason is not EngineEnd.PREFILLED or handoff.state is not SourceState.COMPUTED:
            self._fail_computing(handoff, end, now)
        return self._done(now)

    def engine_refused(self, key: HandoffKey, error: BatonError, now: float) -> list[Action]:
        """The engine did not take the sequence of a StartEngine; the table is still ours."""
        self._engine_runs.discard(key.sequence)
        self._blocks.release(key.sequence)
        handoff = self._find(key)
        if handoff is not None:
            handoff.state = SourceState.COMPUTED  # nothing runs that would have to be cancelled
            reason = EndReason.INVALID if isinstance(error, InvalidArgument) else EndReason.REFUSED
            self._end(handoff, reason, Outcome.FAILED, now, tell="ENGINE_REFUSED", error=error)
        return self._done(now)

    def fetch_ended(self, key: HandoffKey, end: FetchEnd, now: float) -> list[Action]:
        """The fetch of a StartFetch is over, whatever came of it: compute what our cache still lacks."""
        handoff = self._find_sequence(key.sequence)
        if handoff is not None and handoff.state is SourceState.FETCHING:
            handoff.fetched_tokens = end.num_tokens
            self._blocks.rematch(handoff.key.sequence, handoff.hashes)
            self._compute(handoff)
        return self._done(now)

    def cancel(self, request_id: str, attempt: int, reason: str, now: float) -> list[Action]:
        """This attempt and all lower ones are over, whether their Start has arrived or not."""
        self._tombstones.cancel(request_id, attempt, now)
        handoff = self._live.get(request_id)
        if handoff is not None and handoff.key.attempt <= attempt:
            end = EndReason.DEADLINE if reason == "DEADLINE" else EndReason.CANCELLED
            self._end(handoff, end, Outcome.CANCELLED, now, tell=reason)
        return self._done(now)

    def link_up(self, incarnation: str, listed: Collection[HandoffKey], now: float) -> list[Action]:
        """A sink has opened or re-opened its link; listed: handoffs it has begun and not ended."""
        self._linked[incarnation] = True
        for handoff in self.live_with(incarnation):
            if handoff.is_begun and handoff.key not in listed:
                self._fail(handoff, FailureCause.PEER_CANCELLED, now)
            elif handoff.is_begun and handoff.is_read:
                self._announce(handoff, handoff.confirmed, now)
            elif handoff.state is SourceState.OFFERED or (handoff.state is SourceState.QUEUED and handoff.key in listed):
                self._offer(handoff, now)
        self._out += [
            Send(incarnation, CancelHandoff(key, "UNKNOWN")) for key in listed if self._find(key) is None and not self._was_confirmed(key)
        ]
        return self._done(now)

    def link_down(self, incarnation: str, now: float) -> list[Action]:
        """The link broke; handoffs go on, no new offers until it is back."""
        if incarnation in self._linked:
            self._linked[incarnation] = False
        return self._done(now)

    def link_closed(self, incarnation: str, now: float) -> list[Action]:
        """The sink has closed the link because it has no handoff with us: what we offered, it has not taken."""
        self._linked.pop(incarnation, None)
        for handoff in self.live_with(incarnation):
            if handoff.is_begun:
                self._fail(handoff, FailureCause.PEER_CANCELLED, now)
            elif handoff.state is SourceState.OFFERED:
                self._back_to_queue(handoff, now, retry_at=now)
        return self._done(now)

    def suspect(self, incarnation: str, is_suspect: bool, now: float) -> list[Action]:
        """Whether new offers may go to a linked sink."""
        if incarnation in self._linked:
            self._linked[incarnation] = not is_suspect
        return self._done(now)

    def fence(self, incarnation: str, now: float, cause: FailureCause = FailureCause.PEER_FENCED) -> list[Action]:
        """A sink is taken for dead, or may not be paired with: everything with it ends here, nothing is said to it."""
        self._linked.pop(incarnation, None)
        for handoff in self.live_with(incarnation):
            self._fail(handoff, cause, now)
        return self._done(now)

    def set_draining(self, now: float) -> list[Action]:
        """Refuse new starts, hand back what no sink has been offered, finish the rest."""
        self._is_draining = True
        for handoff in list(self._live.values()):
            if handoff.state is SourceState.QUEUED:
                self._hand_back(handoff, now)
        return self._done(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed, or blocks have become free."""
        self._tombstones.expire(now)
        return self._done(now)

    # Everything below changes state and appends to _out.

    def _done(self, now: float) -> list[Action]:
        self._announce_next(now)
        self._offer_next(now)
        out, self._out = self._out, []
        return out

    def _offer_next(self, now: float) -> None:
        if self._is_draining:
            return
        for handoff in self._offers.may_offer(self._linked, now):
            if not self._promise(handoff, now):
                return  # no other offer of ours overtakes; those of others wait in line with it
            self._offer(handoff, now)

    def _promise(self, handoff: SourceHandoff, now: float) -> bool:
        """Keep our own room for an offer as a number, until it is taken, or the sink does not take it."""
        try:
            self._blocks.promise(handoff.key.sequence, handoff.num_blocks, Turn(age_order(handoff, self._times), now))
        except CacheFull:
            return False
        return True

    def _offer(self, handoff: SourceHandoff, now: float) -> None:
        handoff.state = SourceState.OFFERED
        self._queue.offered(handoff, now)
        self._send(handoff, Begin(handoff.key, handoff.num_tokens, handoff.num_blocks, handoff.traceparent))

    def _back_to_queue(self, handoff: SourceHandoff, now: float, *, retry_at: float) -> None:
        """The sink has not taken it. While draining nothing is offered any more, so it is placed elsewhere."""
        handoff.state = SourceState.QUEUED
        self._blocks.withdraw(handoff.key.sequence)
        self._queue.offer_answered(handoff, retry_at)
        if self._is_draining:
            self._hand_back(handoff, now)

    def _begin_reply(self, handoff: SourceHandoff | None, reply: BeginReply, now: float) -> None:
        answer = reply.answer
        if handoff is None:
            if isinstance(answer, Accepted) and not self._was_confirmed(reply.key):  # it has reserved; our CancelHandoff was lost
                self._out.append(Send(reply.key.decode_incarnation, CancelHandoff(reply.key, "UNKNOWN")))
            return
        if handoff.state is not SourceState.OFFERED:
            return
        if isinstance(answer, Refused):
            self._fail(handoff, FailureCause.PEER_CANCELLED, now)
        elif isinstance(answer, NotNow):
            self._back_to_queue(handoff, now, retry_at=now + answer.retry_after_ms / 1e3)
        else:
            self._accepted(handoff, answer, now)

    def _accepted(self, handoff: SourceHandoff, answer: Accepted, now: float) -> None:
        if not self._may_be_cached(handoff, answer.first_block):
            self._fail(handoff, FailureCause.DATA_LOSS, now, tell="UNKNOWN_BLOCKS")
            return
        self._queue.remove(handoff)
        handoff.first = handoff.confirmed = handoff.announced = answer.first_block
        if handoff.first == handoff.num_blocks:
            handoff.state = SourceState.COMPUTED
            self._report(handoff, EventKind.BEGUN)
            self._end(handoff, EndReason.PREFILLED, Outcome.CONFIRMED, now)
            return
        try:
            num_cached = self._blocks.acquire(handoff.key.sequence, handoff.hashes, handoff.num_blocks)
        except CacheFull as error:
            # Only if it was offered without a promise (link_up): the sink gives its blocks back, the frontend places again.
            facts = Unavailable(f"no room after the offer: {error}", needed=error.needed, available=error.available)
            self._end(handoff, EndReason.REFUSED, Outcome.FAILED, now, tell="NO_ROOM", error=facts)
            return
        self._begun[handoff.key] = handoff
        self._report(handoff, EventKind.BEGUN)
        source = self._fetch_source(handoff, num_cached)
        if source is None:
            return self._compute(handoff)
        peer, num_blocks = source
        handoff.state = SourceState.FETCHING
        key = self._fetch_key(handoff)
        num_tokens = num_blocks * self._shape.block_tokens
        self._out.append(StartFetch(key, peer, handoff.request, handoff.hashes, num_tokens, handoff.traceparent))

    def _compute(self, handoff: SourceHandoff) -> None:
        handoff.state = SourceState.COMPUTING
        self._engine_runs.add(handoff.key.sequence)
        self._out.append(StartEngine(handoff.key, replace(handoff.request, first_announced_block=handoff.first)))

    def _fetch_source(self, handoff: SourceHandoff, num_cached: int) -> tuple[PeerRef, int] | None:
        """Who has most of the prefix, and how many blocks, if it is worth fetching what we lack of it.

        The sink has [0, first), and has it in its table: that is sure. The hint is a belief, and must promise more than that.
        """
        block_tokens, hint = self._shape.block_tokens, handoff.hint
        sources = [(handoff.peer, min(handoff.first, len(handoff.hashes)))]
        if hint is not None:
            hinted = min(hint.num_tokens // block_tokens, len(handoff.hashes))
            if (hinted - handoff.first) * block_tokens >= self._config.fetch_min_tokens:
                sources.insert(0, (hint.peer, hinted))
        for peer, num_blocks in sources:
            if num_blocks > num_cached and self._wants_fetch(peer.incarnation, (num_blocks - num_cached) * block_tokens):
                return peer, num_blocks
        return None

    def _fetch_key(self, handoff: SourceHandoff) -> HandoffKey:
        return HandoffKey(*handoff.key.sequence, self._shape.incarnation, is_fetch=True)

    def _confirm_reply(self, handoff: SourceHandoff | None, asked: Confirm, now: float) -> ConfirmReply:
        answer = self._confirm(handoff, asked, now)
        if answer is not ConfirmAnswer.CONFIRMED:
            return ConfirmReply(asked.key, asked.end_block, answer)
        of = handoff or self._tombstones.get(asked.key)
        ready_at = of.ready_at if of is not None else 0.0
        return ConfirmReply(asked.key, asked.end_block, answer, max(0.0, now - ready_at) if ready_at else 0.0)

    def _confirm(self, handoff: SourceHandoff | None, asked: Confirm, now: float) -> ConfirmAnswer:
        if handoff is None:
            return self._confirm_over(asked)
        if asked.end_block <= handoff.confirmed and handoff.is_begun:
            return ConfirmAnswer.CONFIRMED
        if not handoff.is_begun or asked.end_block > handoff.announced:
            return ConfirmAnswer.NOT_PINNED
        if handoff.tags.at(asked.end_block) != asked.tag:
            self._fail(handoff, FailureCause.DATA_LOSS, now)
            return ConfirmAnswer.TAG_MISMATCH
        handoff.confirmed = asked.end_block
        self._blocks.unpin(handoff.key.sequence, asked.end_block)
        if handoff.confirmed == handoff.num_blocks:
            self._end(handoff, EndReason.PREFILLED, Outcome.CONFIRMED, now)
        else:
            self._report(handoff, EventKind.PROGRESS)
        return ConfirmAnswer.CONFIRMED

    def _confirm_over(self, asked: Confirm) -> ConfirmAnswer:
        stone = self._tombstones.get(asked.key)
        if stone is not None and asked.end_block <= stone.confirmed_blocks:
            return ConfirmAnswer.CONFIRMED
        return ConfirmAnswer.STALE if self._tombstones.is_older(asked.key) else ConfirmAnswer.NOT_PINNED

    def _supersede(self, key: HandoffKey, now: float) -> None:
        older = self._live.get(key.request_id)
        if older is not None:
            self._end(older, EndReason.STALE, Outcome.CANCELLED, now, tell="STALE")

    def _fail_computing(self, handoff: SourceHandoff, end: SequenceEnd, now: float) -> None:
        if end.reason is EngineEnd.PREEMPTED:
            self._end(handoff, EndReason.PREEMPTED, Outcome.CANCELLED, now, tell="PREEMPTED")
        elif end.reason is EngineEnd.CANCELLED:
            self._end(handoff, EndReason.CANCELLED, Outcome.CANCELLED, now, tell="CANCELLED")
        else:
            error = Internal(handoff.key.request_id)
            self._end(handoff, EndReason.ENGINE_ERROR, Outcome.FAILED, now, tell="ENGINE_ERROR", error=error)

    def _hand_back(self, handoff: SourceHandoff, now: float) -> None:
        self._end(handoff, EndReason.REFUSED, Outcome.CANCELLED, now, tell="DRAINING", error=Unavailable("the instance is draining"))

    def _fail(self, handoff: SourceHandoff, cause: FailureCause, now: float, tell: str = "") -> None:
        outcome = _OUTCOME_OF_CAUSE.get(cause, Outcome.CANCELLED)
        self._end(handoff, EndReason.HANDOFF_FAILED, outcome, now, tell=tell, cause=cause)

    def _end(
        self,
        handoff: SourceHandoff,
        reason: EndReason,
        outcome: Outcome,
        now: float,
        *,
        tell: str = "",
        cause: FailureCause | None = None,
        error: BatonError | None = None,
    ) -> None:
        """The one way out. After it nothing is held but what the engine's running step still uses."""
        was_begun = handoff.is_begun
        self._queue.remove(handoff)
        self._blocks.withdraw(handoff.key.sequence)
        self._begun.pop(handoff.key, None)
        del self._live[handoff.key.request_id]
        confirmed = handoff.confirmed if was_begun else 0
        self._tombstones.bury(handoff.key, Tombstone(outcome, handoff.num_blocks, confirmed, ready_at=handoff.ready_at), now)
        if was_begun:
            self._blocks.unpin(handoff.key.sequence)
        if handoff.state is SourceState.COMPUTING:
            self._out.append(CancelEngine(handoff.key.sequence))
        elif handoff.state is SourceState.FETCHING:
            self._blocks.release(handoff.key.sequence)  # the engine has never heard of it
            self._out.append(CancelFetch(self._fetch_key(handoff)))
        if tell:
            self._send(handoff, CancelHandoff(handoff.key, tell))
        if was_begun:
            self._report(handoff, EventKind.ENDED, outcome)
        end = HandoffEnd(
            reason=reason,
            cause=cause,
            peer_incarnation=handoff.peer.incarnation,
            confirmed_tokens=min(handoff.confirmed * self._shape.block_tokens, handoff.num_tokens),
            error=error,
            num_bytes=(handoff.confirmed - handoff.first) * self._shape.block_bytes,
            cached_tokens=handoff.cached_tokens,
            fetched_tokens=handoff.fetched_tokens,
            exposed_s=max(0.0, now - handoff.ready_at) if reason is EndReason.PREFILLED and handoff.block_ids else 0.0,
        )
        self._out.append(Ended(handoff.key, Side.SOURCE, end))

    def _announce_next(self, now: float) -> None:
        """Announce what was held back, if it is its turn. Nothing is said to a sink that is suspect or whose link is down."""
        reachable = (handoff for handoff in self._begun.values() if handoff.is_read or self._linked.get(handoff.peer.incarnation))
        for handoff in may_announce(reachable, self._config):
            if self._linked.get(handoff.peer.incarnation):
                first_block, handoff.announced = handoff.announced, handoff.computed
                self._announce(handoff, first_block, now)

    def _announce(self, handoff: SourceHandoff, first_block: int, now: float) -> None:
        ids = tuple(handoff.block_ids[first_block - handoff.first : handoff.announced - handoff.first])
        self._send(handoff, Announce(handoff.key, first_block, ids, handoff.cached_tokens, max(0.0, now - handoff.ready_at)))

    def _send(self, handoff: SourceHandoff, message: Begin | Announce | CancelHandoff) -> None:
        self._out.append(Send(handoff.peer.incarnation, message))

    def _report(self, handoff: SourceHandoff, kind: EventKind, outcome: Outcome | None = None) -> None:
        held = 0 if kind is EventKind.ENDED else handoff.computed - handoff.confirmed
        confirmed = handoff.confirmed - handoff.first
        self._out.append(Report(handoff.key, Side.SOURCE, kind, handoff.peer.incarnation, held, confirmed, handoff.traceparent, outcome))

    def _find(self, key: HandoffKey) -> SourceHandoff | None:
        handoff = self._live.get(key.request_id)
        return handoff if handoff is not None and handoff.key == key else None

    def _find_sequence(self, sequence: SequenceKey) -> SourceHandoff | None:
        handoff = self._live.get(sequence.request_id)
        return handoff if handoff is not None and handoff.key.attempt == sequence.attempt else None

    def _may_be_cached(self, handoff: SourceHandoff, first_block: int) -> bool:
        """Whether any cache of the sink can hold all before that block: only full blocks have hashes, full ones of the sink's."""
        if first_block <= len(handoff.hashes):
            return True
        sink = self._layout_of(handoff.peer.incarnation) or self._shape.layout
        return first_block == handoff.num_blocks and handoff.num_tokens % sink.block_tokens == 0

    def _was_confirmed(self, key: HandoffKey) -> bool:
        stone = self._tombstones.get(key)
        return stone is not None and stone.is_confirmed


_OUTCOME_OF_CAUSE = {
    FailureCause.PEER_FENCED: Outcome.FENCED,
    FailureCause.DATA_LOSS: Outcome.DATA_LOSS,
    FailureCause.NO_INTRODUCTION: Outcome.FAILED,
}
