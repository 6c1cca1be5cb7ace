"""The handoffs of one worker: performs what the books decide, and turns links, pulls, engine and clock into their events.

Everything here runs on the event loop. Awaits are only in `run`-like tasks at the edge (links, pulls, books, the clock); between
two awaits the state of the books, the block manager and what was said to peers are one.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as kv_pb
from baton_engine.api import Engine, EngineBeat, EngineRequest, NativeEngine, NativeHandoff, StepOutput
from baton_engine.paged_engine import check_request
from baton_engine.pool import BlockLayout
from baton_runtime.discovery import View
from baton_runtime.errors import BatonError, InvalidArgument, StaleAttempt, Unavailable
from baton_runtime.log import get_logger
from baton_runtime.telemetry import Telemetry
from prometheus_client import CollectorRegistry

from baton_handoff.actions import (
    Action,
    CancelEngine,
    CancelFetch,
    Completed,
    Ended,
    FetchEnded,
    Report,
    Send,
    StartEngine,
    StartFetch,
    StartPull,
)
from baton_handoff.audit import Audit, Start
from baton_handoff.books import BooksClient
from baton_handoff.callers import Callers
from baton_handoff.config import HandoffConfig
from baton_handoff.fetches import Fetches, FetchMetrics
from baton_handoff.handoff_metrics import HandoffMetrics
from baton_handoff.ids import (
    EndReason,
    EventKind,
    FailureCause,
    FetchEnd,
    FetchHint,
    FetchOutcome,
    HandoffComplete,
    HandoffEnd,
    HandoffKey,
    PeerRef,
    Side,
)
from baton_handoff.introductions import Introductions
from baton_handoff.messages import (
    BeginReply,
    CancelHandoff,
    Confirm,
    ConfirmReply,
    Fetch,
    FetchReply,
    FromSink,
    FromSource,
)
from baton_handoff.native import NativeReceiver, NativeTransport, room_of
from baton_handoff.pair_client import PairClient
from baton_handoff.peer_watch import FenceReason
from baton_handoff.peers import Peers
from baton_handoff.pulls import Puller, PullKey
from baton_handoff.sink import SinkBook
from baton_handoff.sink_handoff import SinkState
from baton_handoff.source import SourceBook
from baton_handoff.source_handoff import SourceState
from baton_handoff.tag import KvShape
from baton_handoff.transports.base import PullStats, Transport

MIN_SLEEP_S = 0.005
log = get_logger(__name__)


class HandoffManager:
    """All handoffs of one worker, on both sides.

    Open and close it in one task. Add `servicer` to the worker's gRPC server; pass every StepOutput to `on_output` first.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        instance: Callable[[], Instance],
        transports: Sequence[Transport],
        telemetry: Telemetry,
        registry: CollectorRegistry,
        config: HandoffConfig | None = None,
        view: View | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """instance: the worker's record, complete by the time of open(). view: of the kvtransfer instances to report to."""
        self._engine = engine
        self._own = instance
        self._transports = transports
        self._tracer = telemetry.tracer
        config = config or HandoffConfig()
        self._native = cast(NativeEngine, engine) if engine.info.handoff == "native" else None
        self._config = config.for_native_engine() if self._native is not None else config
        self._clock = clock
        self._layout: BlockLayout = engine.pool.layout
        self._metrics = HandoffMetrics(registry)
        self._fetch_metrics = FetchMetrics(registry)
        self._peers = Peers(self, instance, transports, self._metrics, self._config, clock, self._make_puller)
        self.servicer = self._peers.servicer
        block_bytes, times = engine.pool.block_bytes, self._config.times
        self.books = BooksClient(
            instance,
            self._sums,
            self._peers.introductions.add,
            self._peers.hinted,
            block_bytes,
            times,
            lambda: self._peers.puller.links,
            clock,
        )
        if view is not None:
            self.books.follow(view)
        self._callers = Callers(self._metrics, self._tracer, clock)
        self._starts: dict[Hashable, Start] = {}
        self._audit = Audit(engine.blocks, self._starts, self._peers.silent_s, times.stranded_s)
        self._todo: deque[Action] = deque()
        self._is_performing = False
        self._is_draining = False
        self._is_open = False
        self._last_tick = 0.0
        self._wake = asyncio.Event()
        self._sleeps_until = 0.0
        self._tasks = asyncio.TaskGroup()
        self._background: set[asyncio.Task[None]] = set()
        self._export()

    # Life.

    async def open(self) -> None:
        """Ready to take Starts. The record must be complete, the transports open."""
        own = self._own()
        hash_block_tokens = own.model.hash_block_tokens if self._native is None else 0
        shape = KvShape(own.incarnation, own.model.fingerprint, self._layout, hash_block_tokens)
        layout_of = self.introductions.layout_of
        self._fetches = Fetches(self._engine.blocks, shape, self._config, self._peers, self._fetch_metrics, self._tracer, self._clock)
        self._source = SourceBook(self._engine.blocks, shape, self._config, layout_of, self._fetches.is_wanted)
        self._sink = SinkBook(self._engine.blocks, shape, self._config, layout_of)
        self._last_tick = self._clock()
        self._is_open = True
        self.servicer.open()
        await self._tasks.__aenter__()
        self._spawn(self._run_clock(), "handoff clock")
        self.books.start(self._tasks)

    async def close(self) -> None:
        """Fence everybody, wait until no operation of ours writes any more, end all tasks. Idempotent."""
        if not self._is_open:
            return
        self.fence_all(FenceReason.CLOSING)
        self._is_open = False
        self.servicer.close()
        self.books.close()
        for task in list(self._background):
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    # What the worker asks for.

    def start_prefill(
        self,
        request: EngineRequest,
        decode: PeerRef,
        traceparent: str,
        on_end: Callable[[HandoffEnd], None],
        fetch_from: FetchHint | None = None,
    ) -> None:
        """Queue, offer, compute, hand over; then on_end, once (perhaps before this returns). Never raises for the request's sake.

        fetch_from: who is believed to have more of the prefix than we and decode.
        """
        if not self._is_open:
            return on_end(_refused(Unavailable("the worker does not serve handoffs now"), decode))
        now = self.notice()
        known = self.introductions.get(decode.incarnation)
        if known is not None and known.refusal:
            return on_end(_not_introduced(decode, known.refusal))
        key = HandoffKey(request.key.request_id, request.key.attempt, decode.incarnation)
        try:
            self._check(request)
            actions = self._source.start(request, decode, traceparent, now, fetch_from)
        except BatonError as error:
            return on_end(_refused(error, decode))
        self._callers.add(key, Side.SOURCE, traceparent, on_end)
        self._starts[key.sequence] = Start(decode.incarnation, is_source=True)
        self._perform(actions)

    def start_decode(
        self,
        request: EngineRequest,
        prefill: PeerRef,
        traceparent: str,
        on_complete: Callable[[HandoffComplete], None],
        on_end: Callable[[HandoffEnd], None],
    ) -> None:
        """Wait for the offer, pull, confirm; then either on_complete or on_end, once (perhaps before this returns).

        on_complete: the KV lies in the table that request.key owns in the block manager. The callee starts the engine, or
        releases the table: from then on it is its own. Never raises for the request's sake.
        """
        if not self._is_open:
            return on_end(_refused(Unavailable("the worker does not serve handoffs now"), prefill))
        now = self.notice()
        known = self.introductions.get(prefill.incarnation)
        if known is not None and known.refusal:
            return on_end(_not_introduced(prefill, known.refusal))
        if (known is None or not known.secrets) and not self.books.num_streams:
            return on_end(_not_introduced(prefill, "no kvtransfer can be reached, and none has introduced the pair before"))
        key = HandoffKey(request.key.request_id, request.key.attempt, self._own().incarnation)
        try:
            self._check(request)
            actions = self._sink.start(request, prefill, traceparent, now)
        except BatonError as error:
            return on_end(_refused(error, prefill))
        self._callers.add(key, Side.SINK, traceparent, on_end, on_complete)
        self._starts[key.sequence] = Start(prefill.incarnation, is_source=False)
        self._peers.use_source(prefill, now)
        self._perform(actions)

    def start_fetch(self, request: EngineRequest, hint: FetchHint, traceparent: str, on_end: Callable[[FetchEnd], None]) -> None:
        """Fetch leading blocks of a sequence into our prefix cache, before it is given to the engine; then on_end, once (perhaps before
        this returns), at the latest after the time that computing them would take. `cancel` ends it early. Never raises.
        """
        if not self._is_open:
            return on_end(FetchEnd(FetchOutcome.NO_SOURCE))
        now = self.notice()
        fetches = self._fetches
        plan = fetches.plan(request, hint.peer, fetches.hashes(request), hint.num_tokens)
        if not fetches.is_wanted(hint.peer.incarnation, fetches.missing_tokens(plan)):
            return on_end(FetchEnd(FetchOutcome.NO_SOURCE))
        self._perform(fetches.start(request, hint.peer, plan, traceparent, on_end, now))

    def cancel(self, request_id: str, attempt: int, reason: str) -> None:
        """This attempt and all lower ones are over; one that has not arrived will be STALE for 60 s. reason: UPPER_SNAKE; DEADLINE
        ends with EndReason.DEADLINE, all others with CANCELLED."""
        if not self._is_open:
            return
        now = self.notice()
        self._perform(self._source.cancel(request_id, attempt, reason, now))
        self._perform(self._sink.cancel(request_id, attempt, reason, now))
        self._perform(self._fetches.sink.cancel(request_id, attempt, reason))

    def on_output(self, output: StepOutput) -> None:
        """A step has ended: announce what it computed, unpin what nobody wants any more. To be called first."""
        if not self._is_open:
            return
        now = self.notice()
        self._fetches.policy.stepped(output.prefill_tokens, output.duration_s)
        for ready in output.ready:
            self._perform(self._source.blocks_ready(ready, now))
        for end in output.ends:
            self._perform(self._source.engine_ended(end, now))

    def fence_all(self, reason: str) -> None:
        """Our own loop stood still, or we stop: every peer has given us up or will. All handoffs end. reason: a FenceReason."""
        if not self._is_open:
            return
        why = FenceReason(reason)
        level = log.warning if self._peers.clients or self.servicer.peers or self.live_handoffs() else log.debug
        level("fencing_all_peers", reason=why, num_handoffs=self.live_handoffs())
        self._last_tick = self._clock()  # at once: fencing calls back
        sources = {*self._peers.clients, *(handoff.peer.incarnation for handoff in self._sink.live), *self._fetches.sources()}
        for incarnation in sources:
            self._peers.fence_source(incarnation, FailureCause.PEER_FENCED, why, is_news=False)
        sinks = {*self.servicer.peers, *(handoff.peer.incarnation for handoff in self._source.live), *self._fetches.sinks()}
        for incarnation in sinks:
            self._peers.fence_sink(incarnation, why, is_news=False)

    def set_draining(self) -> None:
        """Refuse new Starts, hand back what has not begun, finish the rest."""
        self._is_draining = True
        if not self._is_open:
            return
        now = self.notice()
        self._perform(self._source.set_draining(now))
        self._perform(self._sink.set_draining(now))
        self._fetches.source.set_draining()

    # What may be asked.

    def live_handoffs(self) -> int:
        """Handoffs that are not over, tickets and queued ones included, and fetches."""
        return len(self._source.live) + len(self._sink.live) + self._fetches.num_live() if self._is_open else 0

    def queued(self) -> int:
        """Handoffs that have not begun: queued prefills and tickets."""
        return self._source.num_queued() + self._sink.num_tickets() if self._is_open else 0

    def stranded_bytes(self) -> int:
        """Bytes pinned or reserved for nobody, or for a peer that is fenced or silent for over 5 s, by the audit; and those that an engine
        which keeps the KV itself cannot explain."""
        unexplained = self._native.unexplained_bytes() if self._native is not None else 0
        return self._audit.stranded_blocks(self._clock()) * self._engine.pool.block_bytes + unexplained

    def safe_to_stop(self) -> bool:
        """Draining, nothing live, nothing pinned or reserved."""
        is_over = not self._is_open or (
            self._is_draining and not self.live_handoffs() and not self._sink.draining and not self._fetches.sink.draining
        )
        return is_over and not self._engine.blocks.pinned_owners()

    @property
    def introductions(self) -> Introductions:
        """Whom this worker may form pairs with."""
        return self._peers.introductions

    # PeersOwner and LinkOwner: what peers and links say.

    def engine_beat(self) -> EngineBeat:
        """See LinkOwner."""
        return self._engine.beat()

    def notice(self) -> float:
        """See LinkOwner. After a stall everything else would be judged by times that mean nothing."""
        now = self._clock()
        if self._is_open and now - self._last_tick > self._config.times.stall_s:
            self.fence_all(FenceReason.LOOP_STALL)
        return now

    def source_link_opened(self, incarnation: str) -> None:
        """See LinkOwner."""
        self._perform(self._sink.link_up(incarnation, self._clock()))
        self._perform(self._fetches.sink.link_up(incarnation))

    def heard_source(self, incarnation: str, message: FromSource) -> None:
        """See LinkOwner."""
        self._metrics.heard(message)
        if isinstance(message, FetchReply) or (message.key.is_fetch and isinstance(message, ConfirmReply | CancelHandoff)):
            return self._perform(self._fetches.sink.receive(incarnation, message))
        self._perform(self._sink.receive(incarnation, message, self._clock()))

    def source_failed(self, incarnation: str, cause: FailureCause, reason: FenceReason) -> None:
        """See LinkOwner."""
        self._peers.fence_source(incarnation, cause, reason)

    def sink_linked(self, incarnation: str, secret: bytes, listed: list[HandoffKey]) -> None:
        """See LinkOwner."""
        self._peers.allow_sink(incarnation, secret)
        now = self._clock()
        self._perform(self._source.link_up(incarnation, [key for key in listed if not key.is_fetch], now))
        self._perform(self._fetches.source.link_up(incarnation, [key for key in listed if key.is_fetch], now))

    def heard_sink(self, incarnation: str, message: FromSink) -> None:
        """See LinkOwner."""
        self._metrics.heard(message)
        if isinstance(message, Fetch) or (message.key.is_fetch and isinstance(message, Confirm | CancelHandoff)):
            return self._perform(self._fetches.source.receive(incarnation, message, self._clock()))
        if isinstance(message, BeginReply):
            self._callers.heard(message)
        self._perform(self._source.receive(incarnation, message, self._clock()))

    def is_sink_in_use(self, incarnation: str) -> bool:
        """See LinkOwner."""
        return self._source.is_begun_with(incarnation) or bool(self._fetches.source.live_with(incarnation))

    def sink_lost(self, incarnation: str, *, is_closed: bool) -> None:
        """See LinkOwner."""
        if not self._is_open:
            return
        now = self._clock()
        book = self._source
        self._perform(book.link_closed(incarnation, now) if is_closed else book.link_down(incarnation, now))
        if is_closed:
            self._perform(self._fetches.source.fence(incarnation, now))

    def run_link(self, client: PairClient) -> None:
        """See PeersOwner."""
        self._spawn(client.run(), f"pair {client.peer.instance_id}")

    def source_over(self, incarnation: str, cause: FailureCause) -> None:
        """See PeersOwner."""
        self._perform(self._sink.fence(incarnation, cause, self._clock()))
        self._perform(self._fetches.sink.fence(incarnation))
        self._fetches.policy.forget(incarnation)

    def sink_over(self, incarnation: str, cause: FailureCause) -> None:
        """See PeersOwner."""
        self._perform(self._source.fence(incarnation, self._clock(), cause))
        self._perform(self._fetches.source.fence(incarnation, self._clock()))

    def sink_suspect(self, incarnation: str, is_suspect: bool) -> None:
        """See PeersOwner."""
        self._perform(self._source.suspect(incarnation, is_suspect, self._clock()))

    def begun_with(self, incarnation: str) -> list[HandoffKey]:
        """See PeersOwner."""
        return self._sink.begun_with(incarnation) + self._fetches.sink.begun_with(incarnation)

    def is_source_in_use(self, incarnation: str) -> bool:
        """See PeersOwner."""
        return bool(self._sink.live_with(incarnation)) or bool(self._fetches.sink.live_with(incarnation))

    def peer_down(self, incarnation: str, reason: str) -> None:
        """See PeersOwner."""
        self.books.peer_down(incarnation, reason)

    def _check(self, request: EngineRequest) -> None:
        """What our engine would refuse is refused before anything is offered or moved. Raises: InvalidArgument, SequenceTooLong."""
        check_request(request, self._engine.info, self._engine.pool.num_blocks * self._layout.block_tokens)

    # Performing.

    def _perform(self, actions: list[Action]) -> None:
        """In order. What an action causes (a callback may start or cancel something) is performed after those before it."""
        self._todo.extend(actions)
        if self._is_performing:
            return
        self._is_performing = True
        try:
            while self._todo:
                self._perform_one(self._todo.popleft())
        finally:
            self._is_performing = False
        if self._next_due(self._clock()) < self._sleeps_until:
            self._wake.set()

    def _perform_one(self, action: Action) -> None:
        match action:
            case Send():
                self._send(action)
            case StartPull():
                self._spawn(self._pull(action), f"pull {action.key.request_id}")
            case Report():
                self._report(action)
            case StartEngine():
                self._start_engine(action)
            case CancelEngine():
                self._engine.cancel(action.sequence)
            case StartFetch():
                self._start_fetch(action)
            case CancelFetch():
                key = action.key
                self._perform(self._fetches.sink.cancel(key.request_id, key.attempt, "CANCELLED"))
            case FetchEnded():
                self._fetches.ended(action)
            case Completed():
                self._completed(action)
            case Ended():
                self._ended(action)

    def _send(self, action: Send) -> None:
        message = action.message
        self._callers.sent(message)
        if message.key.decode_incarnation == self._own().incarnation:
            self._peers.send_to_source(action.peer_incarnation, message)
        else:
            self.servicer.send(action.peer_incarnation, message)

    def _start_fetch(self, action: StartFetch) -> None:
        def on_end(end: FetchEnd) -> None:
            self._perform(self._source.fetch_ended(action.key, end, self._clock()))

        fetches = self._fetches
        plan = fetches.plan(action.request, action.peer, action.hashes, action.num_tokens)
        self._perform(fetches.start(action.request, action.peer, plan, action.traceparent, on_end, self._clock()))

    def _make_puller(self, introductions: Introductions) -> Puller | NativeReceiver:
        if self._native is not None:
            return NativeReceiver(self._native, self._transports[0].name, introductions, self._clock)
        return Puller(self._transports, introductions, self._own, self._config.times.first_link_s)

    def _start_engine(self, action: StartEngine) -> None:
        request = action.request
        if self._native is not None:
            own = cast(NativeTransport, self._transports[0])
            request = replace(request, native=NativeHandoff(own.address, room_of(action.key)))
        try:
            self._engine.start(request)
        except BatonError as error:
            self._perform(self._source.engine_refused(action.key, error, self._clock()))

    async def _pull(self, start: StartPull) -> None:
        """One operation. Whatever ends it, the book hears of it exactly once, when nothing writes any more."""
        self._callers.pulling(start.key)
        failure: FailureCause | None = FailureCause.PATH_DOWN
        try:
            result = await self._peers.puller.run(start)
            failure = result.failure
            if result.stats is not None:
                self._pulled(start, result.stats, is_retry=result.is_retry)
        finally:
            now = self.notice()
            if start.key.is_fetch:
                self._perform(self._fetches.sink.pull_returned(start.operation, failure))
            else:
                self._perform(self._sink.pull_returned(start.operation, failure, now))

    def _unwanted_pulls(self) -> list[PullKey]:
        handoffs = [PullKey(handoff.operation, is_fetch=False) for handoff in self._sink.draining]
        return handoffs + [PullKey(fetch.operation, is_fetch=True) for fetch in self._fetches.sink.draining]

    def _pulled(self, start: StartPull, stats: PullStats, *, is_retry: bool) -> None:
        incarnation, puller = start.peer_incarnation, self._peers.puller
        client = self._peers.clients.get(incarnation)
        if client is not None:  # else it was fenced meanwhile, and its labels are gone
            self._metrics.pulled(incarnation, client.peer.instance_id, puller.transport_of(incarnation), stats, is_retry=is_retry)
        transport, why = puller.transport_of(incarnation), puller.why_of(incarnation)
        self._callers.pulled(start.key, transport, why, stats, is_retry=is_retry)
        self._fetches.pulled(start.key, incarnation, stats, transport, why, is_retry=is_retry)

    def _report(self, report: Report) -> None:
        if report.key.is_fetch:
            self._note_fetch(report)
        if report.side is Side.SOURCE:
            return self.books.report(report)
        self._callers.confirmed(report, report.confirmed_block_bytes or self._engine.pool.block_bytes)
        pulled = self._callers.totals(report.key) or self._fetches.totals(report.key)
        transport = self._peers.puller.transport_of(report.peer_incarnation)
        self.books.report(report, transport, pulled.num_bytes, pulled.busy_s)

    def _note_fetch(self, report: Report) -> None:
        """For the audit: a fetch has no Start of its own; it is known from the first block it holds until it is over."""
        if report.kind is EventKind.BEGUN:
            self._starts[report.key.owner] = Start(report.peer_incarnation, is_source=report.side is Side.SOURCE)
        elif report.kind is EventKind.ENDED:
            self._starts.pop(report.key.owner, None)

    def _completed(self, action: Completed) -> None:
        self._starts.pop(action.key.sequence, None)
        if action.tail_tokens and self._native is None:
            zero_tail(self._engine.pool.data[action.tail_block], self._layout, action.tail_tokens)
        self._callers.completed(action)

    def _ended(self, action: Ended) -> None:
        self._starts.pop(action.key.sequence, None)
        self._callers.ended(action)

    # Clock, tasks, sums.

    async def _run_clock(self) -> None:
        """Judge peers, tick the books; at least every tick_s, and when an offer that was told not now is due."""
        while True:
            now = self.notice()
            self._last_tick = now
            self._peers.judge(now)
            self._perform(self._source.tick(now))
            self._perform(self._sink.tick(now))
            self._perform(self._fetches.source.tick(now))
            self._perform(self._fetches.sink.tick(now))
            self._peers.puller.end_unwanted(self._unwanted_pulls(), now)
            self.stranded_bytes()
            self._wake.clear()
            link_due = max(self._peers.next_due(), now + MIN_SLEEP_S)
            self._sleeps_until = min(now + self._config.times.tick_s, self._next_due(now), link_due)
            try:
                async with asyncio.timeout(self._sleeps_until - now):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _next_due(self, now: float) -> float:
        return max(min(self._source.next_retry_at(now), self._fetches.sink.next_deadline()), now + MIN_SLEEP_S)

    def _spawn(self, work: "asyncio._CoroutineLike[None]", name: str) -> None:
        task: asyncio.Task[None] = self._tasks.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _sums(self) -> kv_pb.BooksSums:
        """By the block manager alone; a block pinned for two owners counts twice, as it does in their reports."""
        blocks, block_bytes = self._engine.blocks, self._engine.pool.block_bytes
        reserved = blocks.counts().reserved
        pinned = max(0, sum(blocks.pinned_owners().values()) - reserved)
        return kv_pb.BooksSums(
            pinned_bytes=pinned * block_bytes, reserved_bytes=reserved * block_bytes, stranded_bytes=self.stranded_bytes()
        )

    def _export(self) -> None:
        blocks, block_bytes = self._engine.blocks, self._engine.pool.block_bytes
        watch = self._metrics.watch
        watch("baton_kv_stranded_bytes", "Pinned or reserved for nobody, or for a side that is fenced or silent.", self.stranded_bytes)
        watch("baton_kv_pinned_bytes", "Held only for a handoff that is not confirmed.", lambda: blocks.counts().pinned * block_bytes)
        watch("baton_kv_reserved_bytes", "Set aside for incoming handoffs.", lambda: blocks.counts().reserved * block_bytes)
        watch(
            "baton_kv_quarantined_bytes",
            "Of reserved bytes, those of handoffs that are over, kept until an operation of ours returns.",
            lambda: self._sink.quarantined_bytes() + self._fetches.sink.quarantined_bytes() if self._is_open else 0,
        )
        watch(
            "baton_kv_in_flight_bytes",
            "Of running pulls.",
            lambda: self._sink.in_flight_bytes() + self._fetches.sink.in_flight_bytes() if self._is_open else 0,
        )
        watch("baton_handoffs_read", "As source: announced and not confirmed.", lambda: self._source.num_read() if self._is_open else 0)
        watch(
            "baton_handoffs_held_back",
            "As source: computed, pinned, and waiting for their turn to be announced.",
            lambda: self._source.num_held_back() if self._is_open else 0,
        )
        watch("baton_handoffs_in_flight", "Handoffs that are not over.", self.live_handoffs)
        watch("baton_handoffs_queued", "Of them, those that have not begun.", self.queued)
        sink_states = [state.value for state in SinkState if state is not SinkState.OVER]
        self._metrics.watch_states({Side.SOURCE: [state.value for state in SourceState], Side.SINK: sink_states}, self._count_in_state)
        watch("baton_books_streams", "kvtransfer instances that hear our reports.", lambda: self.books.num_streams)

    def _count_in_state(self, side: Side, state: str) -> int:
        if not self._is_open:
            return 0
        handoffs = self._source.live if side is Side.SOURCE else (*self._sink.live, *self._sink.draining)
        return sum(handoff.state.value == state for handoff in handoffs)


def zero_tail(block: npt.NDArray[np.uint8], layout: BlockLayout, num_tokens: int) -> None:
    """Zero the slots of one block at or beyond num_tokens: an engine may read them, masked, so they must be finite.

    block: shape (block_bytes,), a view of the pool.
    """
    block.reshape(layout.num_planes, layout.block_tokens, layout.slot_bytes)[:, num_tokens:] = 0


def _refused(error: BatonError, peer: PeerRef) -> HandoffEnd:
    if isinstance(error, StaleAttempt):
        return HandoffEnd(EndReason.STALE, peer_incarnation=peer.incarnation)
    reason = EndReason.INVALID if isinstance(error, InvalidArgument) else EndReason.REFUSED
    return HandoffEnd(reason, peer_incarnation=peer.incarnation, error=error)


def _not_introduced(peer: PeerRef, why: str) -> HandoffEnd:
    log.warning("pair_not_introduced", peer=peer.incarnation, why=why)
    error = Unavailable(f"{peer.instance_id}: {why}")
    return HandoffEnd(EndReason.HANDOFF_FAILED, FailureCause.NO_INTRODUCTION, peer.incarnation, error=error)
