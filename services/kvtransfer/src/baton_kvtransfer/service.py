"""The gRPC edge: one Books stream per worker, in natural batches; watches for people; the clock that drives the broker."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2_grpc as pb_grpc
from baton_runtime.errors import Draining, InvalidArgument, QueueFull, Unavailable
from baton_runtime.lifecycle import LoopStallWatch
from baton_runtime.log import get_logger
from baton_runtime.rpc import open_responses
from baton_runtime.streams import Outbox

from baton_kvtransfer.books import Agreement
from baton_kvtransfer.broker import Broker, Outgoing
from baton_kvtransfer.config import KvTransferConfig

log = get_logger(__name__)

HELLO_LIMIT_S = 5.0
TICK_S = 0.05
MIN_SLEEP_S = 0.002
# A watcher hears at least this often.
WATCH_BEAT_S = 1.0
# News become one message per write; more would only make a slow reader slower.
BATCH_MESSAGES = 256

_ECHO = pb.BooksResponse()

_Context = grpc.aio.ServicerContext[pb.BooksRequest, pb.BooksResponse]


@dataclass(slots=True)
class _Stream:
    """A worker's open stream, as the others see it."""

    incarnation: str
    outbox: Outbox[pb.BooksResponse]
    booked_sequence: int = 0
    is_echo_queued: bool = False
    why_closed: str = ""
    closed: asyncio.Event = field(default_factory=asyncio.Event)


class KvTransferServicer(pb_grpc.KvTransferServiceServicer):
    """Feeds reports to the broker and delivers what it decides."""

    def __init__(self, config: KvTransferConfig, broker: Broker) -> None:
        self._config = config
        self._broker = broker
        self._streams: dict[int, _Stream] = {}  # by session
        self._is_draining = False
        self.stall_watch = LoopStallWatch(on_stall=lambda _: broker.excuse(time.monotonic()))

    async def run(self) -> None:
        """Tick until cancelled. Cancelling loses nothing: workers say hello to the next one."""
        while True:
            self.stall_watch.check()
            now_s = time.monotonic()
            self._deliver(self._broker.tick(now_s))
            self._broker.watches.spread()
            await asyncio.sleep(max(MIN_SLEEP_S, min(TICK_S, self._broker.next_due() - now_s)))

    def drain(self) -> None:
        """Refuse new streams and end those that run; the workers go on without us."""
        self._is_draining = True
        self._broker.watches.wake_all()
        for stream in self._streams.values():
            _close(stream, "draining")

    async def Books(self, requests: AsyncIterator[pb.BooksRequest], context: _Context) -> None:
        """Serve one worker until either side ends the stream."""
        if self._is_draining:
            raise Draining("kvtransfer")
        first = await self._first(requests)
        if len(self._streams) >= self._config.max_workers:
            raise QueueFull(depth=len(self._streams), limit=self._config.max_workers)
        incarnation = first.hello.instance.incarnation
        session, out = self._broker.hello(first.hello.instance, time.monotonic())
        stream = _Stream(incarnation, Outbox(self._config.max_unsent_messages))
        self._streams[session] = stream
        try:
            self._deliver(out)
            self._report(stream, session, first)
            await self._serve(stream, session, requests, context)
        finally:
            del self._streams[session]
            self._broker.stream_ended(incarnation, session, time.monotonic())
        if stream.why_closed:
            raise Unavailable(f"stream ended: {stream.why_closed}")

    async def GetBooks(
        self, request: pb.GetBooksRequest, context: grpc.aio.ServicerContext[pb.GetBooksRequest, pb.GetBooksResponse]
    ) -> pb.GetBooksResponse:
        """The sums now."""
        broker = self._broker
        return pb.GetBooksResponse(
            live_handoffs=broker.num_live(),
            held_bytes=sum(broker.held_bytes()),
            mismatch_bytes=broker.mismatch_bytes(time.monotonic()),
            agreed_handoffs=broker.books.agreements[Agreement.AGREED],
            disagreed_handoffs=broker.books.agreements[Agreement.DISAGREED],
            reporting_incarnations=broker.reporting(),
            links=broker.links(),
        )

    async def WatchHandoffs(
        self,
        request: pb.WatchHandoffsRequest,
        context: grpc.aio.ServicerContext[pb.WatchHandoffsRequest, pb.WatchHandoffsResponse],
    ) -> AsyncIterator[pb.WatchHandoffsResponse]:
        """Handoffs as they happen, until the client leaves or we do."""
        if self._is_draining:
            raise Draining("kvtransfer")
        watches = self._broker.watches
        if len(watches) >= self._config.max_watchers:
            raise QueueFull(depth=len(watches), limit=self._config.max_watchers)
        changed = asyncio.Event()
        watcher = watches.open(request, changed.set)
        try:
            while not self._is_draining:
                changed.clear()
                message = watches.next_message(watcher, time.monotonic())
                yield message if message is not None else watches.beat()
                if not watcher.has_news and not self._is_draining:
                    await _until(changed, WATCH_BEAT_S)
            yield pb.WatchHandoffsResponse(revision=self._broker.books.num_events, end=pb.WatchEnd(reason="DRAINING"))
        finally:
            watches.close(watcher)

    async def _first(self, requests: AsyncIterator[pb.BooksRequest]) -> pb.BooksRequest:
        try:
            async with asyncio.timeout(HELLO_LIMIT_S):
                async for request in requests:
                    if not request.HasField("hello"):
                        raise InvalidArgument("hello", "must be in the first message")
                    return request
        except TimeoutError:
            raise InvalidArgument("hello", f"did not come within {HELLO_LIMIT_S} s") from None
        raise InvalidArgument("hello", "the stream ended before it")

    async def _serve(self, stream: _Stream, session: int, requests: AsyncIterator[pb.BooksRequest], context: _Context) -> None:
        """Read and write until one of them is done or the stream is closed; a write may block as long as the worker does not read."""
        if not await open_responses(context):
            return
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read(stream, session, requests), name="books reader")
            writer = group.create_task(_write(stream, context), name="books writer")
            closed = group.create_task(stream.closed.wait(), name="books closed")
            await asyncio.wait({reader, writer, closed}, return_when=asyncio.FIRST_COMPLETED)
            for task in (reader, writer, closed):
                task.cancel()

    async def _read(self, stream: _Stream, session: int, requests: AsyncIterator[pb.BooksRequest]) -> None:
        async for request in requests:
            self._report(stream, session, request)

    def _report(self, stream: _Stream, session: int, request: pb.BooksRequest) -> None:
        self.stall_watch.check()
        self._deliver(self._broker.report(stream.incarnation, session, request, time.monotonic()))
        if request.sequence:
            self._echo(stream, request.sequence)

    def _echo(self, stream: _Stream, sequence: int) -> None:
        """Tell the worker how far its reports are booked; with what is queued, or by itself."""
        stream.booked_sequence = sequence
        if stream.is_echo_queued:
            return
        try:
            stream.outbox.put(_ECHO)
        except QueueFull:
            _close(stream, "it does not read")
        except Unavailable:
            pass
        else:
            stream.is_echo_queued = True

    def _deliver(self, out: Outgoing) -> None:
        for session, why in out.closed.items():
            if session in self._streams:
                _close(self._streams[session], why)
        if not out.messages:
            return
        for stream in self._streams.values():
            message = out.messages.get(stream.incarnation)
            if message is None:
                continue
            try:
                stream.outbox.put(message)
            except QueueFull:
                _close(stream, "it does not read")
            except Unavailable:
                pass  # closed a moment ago; its next hello brings everything


async def _until(event: asyncio.Event, limit_s: float) -> None:
    """Wait for the event, or limit_s."""
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        pass


async def _write(stream: _Stream, context: _Context) -> None:
    while batch := await stream.outbox.get_batch(BATCH_MESSAGES):
        message = pb.BooksResponse()
        for part in batch:
            if part is _ECHO:
                stream.is_echo_queued = False
                message.booked_sequence = stream.booked_sequence
            else:
                message.MergeFrom(part)
        try:
            await context.write(message)
        except grpc.aio.InternalError:
            return  # the worker has left in the middle of the write; its next hello brings everything


def _close(stream: _Stream, why: str) -> None:
    stream.why_closed = stream.why_closed or why
    stream.outbox.close()
    stream.closed.set()
