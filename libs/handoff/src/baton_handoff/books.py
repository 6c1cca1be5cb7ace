"""Reports to every kvtransfer, and hears introductions and news of deaths from each. Any of them may die at any moment.

Events leave in order, each message with the block manager's sums as of its last event. The first event after a pause leaves at
once; those after it wait until kvtransfer has echoed the message before (and GAP_S at least), so a busy worker sends few large
messages, and a busy kvtransfer gets larger ones. A stream that cannot keep up is dropped and opened again with a snapshot, so
nothing has to be remembered for one that is away.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping

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
from baton_handoff.ids import EventKind, HandoffKey, Side
from baton_handoff.link import STREAM_ENDED, is_eof, until_first
from baton_handoff.pulls import LinkStats
from baton_handoff.wire import key_to_proto

MAX_PENDING_EVENTS = 16_384
MAX_EVENTS_PER_MESSAGE = 1024
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 1.0
GAP_S = 0.005  # between two messages of one stream, but for news of deaths

log = get_logger(__name__)


class _Stream:
    """One stream's state: what kvtransfer has not been sent, and how far it says that its books are."""

    def __init__(self, snapshot: list[pb.HandoffEvent], hang_s: float) -> None:
        self.events: deque[pb.HandoffEvent] = deque(snapshot)
        self.peers_down: deque[pb.PeerDown] = deque()
        self.links: dict[str, int] = {}  # versions sent, by source incarnation
        self.wake = asyncio.Event()
        self.is_overrun = False
        self.sent_at = float("-inf")
        self._hang_s = hang_s
        self._sequence = 0
        self._unbooked_at: float | None = None  # when the oldest message without an echo was sent, or the last echo came
        self._booked = 0  # 0: no echo yet; a kvtransfer that knows none is never waited for

    def add(self, *, event: pb.HandoffEvent | None = None, peer_down: pb.PeerDown | None = None) -> None:
        """Queue one; too many end the stream."""
        if len(self.events) + len(self.peers_down) >= MAX_PENDING_EVENTS:
            self.is_overrun = True
        elif event is not None:
            self.events.append(event)
            if len(self.events) > 1:
                return  # the one before has set the time
        elif peer_down is not None:
            self.peers_down.append(peer_down)
        self.wake.set()

    def sent(self, now: float) -> int:
        """A message leaves. Returns: its number."""
        self._sequence += 1
        self.sent_at = now
        if self._unbooked_at is None:
            self._unbooked_at = now
        return self._sequence

    def booked(self, sequence: int, now: float) -> None:
        """kvtransfer says that this message and all before are in its books."""
        self._booked = sequence
        self._unbooked_at = None if sequence >= self._sequence else now
        self.wake.set()

    def hears(self, now: float) -> bool:
        """Whether kvtransfer is not known to hang."""
        return not self._booked or self._unbooked_at is None or now - self._unbooked_at < self._hang_s

    def due_at(self, sums_s: float) -> float:
        """When the next message should leave, as things stand; -inf: now."""
        if self.peers_down or self.is_overrun:
            return float("-inf")
        if self.events and (not self._booked or self._booked >= self._sequence):
            return self.sent_at + GAP_S
        return self.sent_at + sums_s


class BooksClient:
    """One Books stream per kvtransfer instance of a view.

    All its state: `_current` (the newest event of every side that is not over, and when it began), `_streams` per open stream,
    `_reporters` per instance of the view.
    """

    def __init__(
        self,
        own: Callable[[], Instance],
        sums: Callable[[], pb.BooksSums],
        on_introduction: Callable[[pb.Introduction], None],
        on_peer_down: Callable[[str, str], None],
        block_bytes: int,
        times: Times,
        links: Callable[[], Mapping[str, LinkStats]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """links: whom this worker pulls from, by the source's incarnation."""
        self._own = own
        self._sums = sums
        self._on_introduction = on_introduction
        self._on_peer_down = on_peer_down
        self._block_bytes = block_bytes
        self._times = times
        self._links = links
        self._clock = clock
        self._current: dict[tuple[HandoffKey, Side], tuple[float, pb.HandoffEvent]] = {}
        self._streams: dict[InstanceKey, _Stream] = {}
        self._reporters: dict[InstanceKey, tuple[Instance, asyncio.Task[None]]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._views: list[View] = []
        self._unsubscribe: list[Callable[[], None]] = []

    @property
    def num_streams(self) -> int:
        """Open streams to kvtransfer instances that hear us, as far as we know."""
        now = self._clock()
        return sum(stream.hears(now) for stream in self._streams.values())

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

    def report(self, report: Report, transport: str = "", pulled_bytes: int = 0, pull_s: float = 0.0) -> None:
        """An event of one of our handoffs. pulled_bytes, pull_s: of a sink, so far."""
        event = pb.HandoffEvent(
            handoff=key_to_proto(report.key),
            side=pb.SIDE_SOURCE if report.side is Side.SOURCE else pb.SIDE_SINK,
            kind=report.kind.value,  # type: ignore[arg-type]  # same numbers
            peer_incarnation=report.peer_incarnation,
            held_bytes=report.held_blocks * self._block_bytes,
            confirmed_bytes=report.confirmed_blocks * (report.confirmed_block_bytes or self._block_bytes),
            traceparent=report.traceparent,
            outcome=report.outcome.value if report.outcome is not None else 0,  # type: ignore[arg-type]  # same numbers
            transport=transport,
            pulled_bytes=pulled_bytes,
            pull_us=int(pull_s * 1e6),
        )
        place = (report.key, report.side)
        known = self._current.get(place)
        if report.kind is EventKind.ENDED and not report.held_blocks:
            self._current.pop(place, None)
        else:
            self._current[place] = (known[0] if known is not None else self._clock(), event)
        for stream in self._streams.values():
            stream.add(event=event)

    def peer_down(self, incarnation: str, reason: str) -> None:
        """We have fenced a peer: news for the others."""
        for stream in self._streams.values():
            stream.add(peer_down=pb.PeerDown(incarnation=incarnation, reason=reason))

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
        channel = open_channel(to.grpc_address, "kvtransfer")
        try:
            call = KvTransferServiceStub(channel).Books()
            key, stream = instance_key(to), _Stream(self._snapshot(), self._times.fenced_s)
            self._streams[key] = stream
            try:
                await until_first(self._read(call, stream), self._write(call, stream))
            finally:
                if self._streams.get(key) is stream:
                    del self._streams[key]
                call.cancel()
        finally:
            await channel.close(None)

    def _snapshot(self) -> list[pb.HandoffEvent]:
        """The newest event of every side that is not over, with its age; oldest first."""
        now = self._clock()
        events = []
        for begun_at, newest in self._current.values():
            event = pb.HandoffEvent()
            event.CopyFrom(newest)
            event.age_us = max(1, int((now - begun_at) * 1e6))
            events.append(event)
        return events

    async def _read(self, call: "grpc.aio.StreamStreamCall[pb.BooksRequest, pb.BooksResponse]", stream: _Stream) -> None:
        while True:
            response = await call.read()
            if is_eof(response):
                raise Unavailable("kvtransfer has ended the stream")
            assert isinstance(response, pb.BooksResponse)
            if response.booked_sequence:
                stream.booked(response.booked_sequence, self._clock())
            for introduction in response.introductions:
                self._on_introduction(introduction)
            for down in response.peers_down:
                self._on_peer_down(down.incarnation, down.reason)

    async def _write(self, call: "grpc.aio.StreamStreamCall[pb.BooksRequest, pb.BooksResponse]", stream: _Stream) -> None:
        first = self._next_request(stream)
        first.hello.instance.CopyFrom(self._own())
        try:
            await call.write(first)
            while True:
                await self._until_due(stream)
                await call.write(self._next_request(stream))
        except STREAM_ENDED:
            await asyncio.get_running_loop().create_future()  # the reader learns why, and ends this

    def _next_request(self, stream: _Stream) -> pb.BooksRequest:
        """Events in order; the sums with the message that has the last of them, so that both are of one moment."""
        if stream.is_overrun:
            raise QueueFull(len(stream.events), MAX_PENDING_EVENTS)
        request = pb.BooksRequest(sequence=stream.sent(self._clock()))
        num_events = min(len(stream.events), MAX_EVENTS_PER_MESSAGE)
        request.events.extend([stream.events.popleft() for _ in range(num_events)])
        request.peers_down.extend(stream.peers_down)
        stream.peers_down.clear()
        if not stream.events:
            request.sums.CopyFrom(self._sums())
            self._add_links(stream, request)
        return request

    def _add_links(self, stream: _Stream, request: pb.BooksRequest) -> None:
        """Those that have changed since this stream was told."""
        links = self._links()
        for incarnation in [known for known in stream.links if known not in links]:
            del stream.links[incarnation]
            request.links.add(source_incarnation=incarnation, is_closed=True)
        for incarnation, link in links.items():
            if stream.links.get(incarnation) != link.version:
                stream.links[incarnation] = link.version
                request.links.add(
                    source_incarnation=incarnation,
                    transport=link.transport,
                    reason=link.reason,
                    pulled_bytes=link.pulled_bytes,
                    bytes_per_s=int(link.bytes_per_s),
                )

    async def _until_due(self, stream: _Stream) -> None:
        """Something may leave, or it is time to tell the sums."""
        while (left_s := stream.due_at(self._times.sums_s) - self._clock()) > 0:
            stream.wake.clear()
            try:
                async with asyncio.timeout(left_s):
                    await stream.wake.wait()
            except TimeoutError:
                pass
