"""Reports to every kvtransfer, and hears introductions and news of deaths from each. Any of them may die at any moment.

Events leave in order, each message with the block manager's sums as of its last event. A stream that cannot keep up is dropped
and opened again with a snapshot, so nothing has to be remembered for one that is away.
"""

import asyncio
from collections import deque
from collections.abc import Callable

import grpc
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_contracts.kvtransfer.v1.kvtransfer_service_pb2_grpc import KvTransferServiceStub
from baton_runtime.discovery import InstanceKey, View, ViewEvent, instance_key
from baton_runtime.errors import BatonError, QueueFull, Unavailable, from_rpc_error
from baton_runtime.log import get_logger
from baton_runtime.rpc import open_channel

from baton_handoff.actions import Report
from baton_handoff.config import Times
from baton_handoff.ids import HandoffKey, Side
from baton_handoff.link import STREAM_ENDED, is_eof, until_first
from baton_handoff.wire import key_to_proto

MAX_PENDING_EVENTS = 16_384
MAX_EVENTS_PER_MESSAGE = 1024
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 1.0

log = get_logger(__name__)


class _Pending:
    """What one kvtransfer has not been sent."""

    def __init__(self, snapshot: list[pb.HandoffEvent]) -> None:
        self.events: deque[pb.HandoffEvent] = deque(snapshot)
        self.peers_down: deque[pb.PeerDown] = deque()
        self.wake = asyncio.Event()
        self.is_overrun = False

    def add(self, *, event: pb.HandoffEvent | None = None, peer_down: pb.PeerDown | None = None) -> None:
        """Queue one; too many end the stream."""
        if len(self.events) + len(self.peers_down) >= MAX_PENDING_EVENTS:
            self.is_overrun = True
        elif event is not None:
            self.events.append(event)
        elif peer_down is not None:
            self.peers_down.append(peer_down)
        self.wake.set()


class BooksClient:
    """One Books stream per kvtransfer instance of a view.

    All its state: `_current` (the newest event of every side that is not over), `_pending` per open stream, `_reporters` per
    instance of the view, `_introduced_by` (streams that were open at least once).
    """

    def __init__(
        self,
        own: Callable[[], Instance],
        sums: Callable[[], pb.BooksSums],
        on_introduction: Callable[[pb.Introduction], None],
        on_peer_down: Callable[[str, str], None],
        block_bytes: int,
        times: Times,
    ) -> None:
        self._own = own
        self._sums = sums
        self._on_introduction = on_introduction
        self._on_peer_down = on_peer_down
        self._block_bytes = block_bytes
        self._times = times
        self._current: dict[tuple[HandoffKey, Side], pb.HandoffEvent] = {}
        self._pending: dict[InstanceKey, _Pending] = {}
        self._reporters: dict[InstanceKey, tuple[Instance, asyncio.Task[None]]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._views: list[View] = []
        self._unsubscribe: list[Callable[[], None]] = []

    @property
    def num_streams(self) -> int:
        """Open streams: kvtransfer instances that hear us."""
        return len(self._pending)

    def follow(self, view: View) -> None:
        """Report to every kvtransfer instance of this view, those that come later included. Before or after start."""
        self._views.append(view)
        if self._tasks is not None:
            self._unsubscribe.append(view.subscribe(self._changed))

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin; tasks live in the group until close."""
        self._tasks = tasks
        self._unsubscribe = [view.subscribe(self._changed) for view in self._views]

    def close(self) -> None:
        """End every stream. Idempotent."""
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._unsubscribe.clear()
        for _, task in self._reporters.values():
            task.cancel()
        self._reporters.clear()
        self._tasks = None

    def report(self, report: Report, transport: str) -> None:
        """An event of one of our handoffs."""
        event = pb.HandoffEvent(
            handoff=key_to_proto(report.key),
            side=pb.SIDE_SOURCE if report.side is Side.SOURCE else pb.SIDE_SINK,
            kind=report.kind.value,  # type: ignore[arg-type]  # same numbers
            peer_incarnation=report.peer_incarnation,
            held_bytes=report.held_blocks * self._block_bytes,
            confirmed_bytes=report.confirmed_blocks * self._block_bytes,
            traceparent=report.traceparent,
            outcome=report.outcome.value if report.outcome is not None else 0,  # type: ignore[arg-type]  # same numbers
            transport=transport,
        )
        place = (report.key, report.side)
        if event.kind == pb.HANDOFF_EVENT_KIND_ENDED and not event.held_bytes:
            self._current.pop(place, None)
        else:
            self._current[place] = event
        for pending in self._pending.values():
            pending.add(event=event)

    def peer_down(self, incarnation: str, reason: str) -> None:
        """We have fenced a peer: news for the others."""
        for pending in self._pending.values():
            pending.add(peer_down=pb.PeerDown(incarnation=incarnation, reason=reason))

    def _changed(self, event: ViewEvent) -> None:
        """A kvtransfer came, or came back with another life. One that vanished is kept: only its own stream's failure counts."""
        key = instance_key(event.instance)
        known = self._reporters.get(key)
        if known is not None:
            if known[0].incarnation == event.instance.incarnation and not known[1].done():
                return
            known[1].cancel()
        if self._tasks is not None and event.instance.grpc_address:
            task = self._tasks.create_task(self._keep_reporting(event.instance), name=f"books {event.instance.instance_id}")
            self._reporters[key] = (event.instance, task)

    async def _keep_reporting(self, to: Instance) -> None:
        """Report to one life of one kvtransfer, for as long as discovery or its own stream knows it."""
        pause_s = RETRY_FIRST_S
        while True:
            started = asyncio.get_running_loop().time()
            try:
                await self._one_stream(to)
            except grpc.aio.AioRpcError as error:
                why = from_rpc_error(error).message
            except BatonError as error:
                why = error.message
            else:
                why = "ended"
            log.debug("books_stream_ended", kvtransfer=to.instance_id, why=why)
            forgotten = [view.forget(to) for view in self._views]
            if any(forgotten):
                return  # gone from discovery, and its stream has failed too
            pause_s = RETRY_FIRST_S if asyncio.get_running_loop().time() - started > RETRY_MAX_S else min(2 * pause_s, RETRY_MAX_S)
            await asyncio.sleep(pause_s)

    async def _one_stream(self, to: Instance) -> None:
        channel = open_channel(to.grpc_address)
        try:
            call = KvTransferServiceStub(channel).Books()
            key, pending = instance_key(to), _Pending(list(self._current.values()))
            self._pending[key] = pending
            try:
                await until_first(self._read(call), self._write(call, pending))
            finally:
                if self._pending.get(key) is pending:
                    del self._pending[key]
                call.cancel()
        finally:
            await channel.close(None)

    async def _read(self, call: "grpc.aio.StreamStreamCall[pb.BooksRequest, pb.BooksResponse]") -> None:
        while True:
            response = await call.read()
            if is_eof(response):
                raise Unavailable("kvtransfer has ended the stream")
            assert isinstance(response, pb.BooksResponse)
            for introduction in response.introductions:
                self._on_introduction(introduction)
            for down in response.peers_down:
                self._on_peer_down(down.incarnation, down.reason)

    async def _write(self, call: "grpc.aio.StreamStreamCall[pb.BooksRequest, pb.BooksResponse]", pending: _Pending) -> None:
        first = self._next_request(pending)
        first.hello.instance.CopyFrom(self._own())
        try:
            await call.write(first)
            while True:
                await self._until_due(pending)
                await call.write(self._next_request(pending))
        except STREAM_ENDED:
            await asyncio.get_running_loop().create_future()  # the reader learns why, and ends this

    def _next_request(self, pending: _Pending) -> pb.BooksRequest:
        """Events in order; the sums with the message that has the last of them, so that both are of one moment."""
        if pending.is_overrun:
            raise QueueFull(len(pending.events), MAX_PENDING_EVENTS)
        request = pb.BooksRequest()
        while pending.events and len(request.events) < MAX_EVENTS_PER_MESSAGE:
            request.events.append(pending.events.popleft())
        request.peers_down.extend(pending.peers_down)
        pending.peers_down.clear()
        if not pending.events:
            pending.wake.clear()
            request.sums.CopyFrom(self._sums())
        return request

    async def _until_due(self, pending: _Pending) -> None:
        """Something is pending, or it is time to tell the sums."""
        try:
            async with asyncio.timeout(self._times.sums_s):
                await pending.wake.wait()
        except TimeoutError:
            pass
