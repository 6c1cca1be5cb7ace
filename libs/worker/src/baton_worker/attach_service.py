"""The I/O of one Attach stream: a task that reads, one that starts sequences, one that writes frames.

Cancels and acknowledgements are acted on while a message is read; its starts go to a queue of the stream and are handed over
one by one, so that a burst of long prompts delays neither a later Cancel nor anybody else.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_runtime.errors import BatonError, Cancelled, InvalidArgument
from baton_runtime.log import get_logger
from baton_runtime.rpc import open_responses
from grpc.aio import EOF, BaseError  # type: ignore[attr-defined]  # missing in the stubs

from baton_worker.attach import FrontendSession
from baton_worker.frontends import Frontends

HELLO_LIMIT_S = 2.0
# The reader stops reading beyond either; gRPC's own flow control then holds the frontend up.
MAX_QUEUED_STARTS = 4096
MAX_QUEUED_BYTES = 64 << 20
# After a Start of this size, or so many small ones, others get a turn on the loop.
_LONG_START_BYTES = 16 << 10
_STARTS_PER_TURN = 16

log = get_logger(__name__)


class ClosedByFrontend(Cancelled):
    """The frontend ended the stream in an orderly way."""


class AttachStream:
    """One stream. Implements `attach.Stream`; lives on one event loop."""

    def __init__(self) -> None:
        self.error: BatonError | None = None
        self.over = asyncio.Event()
        self.starts_changed = asyncio.Event()
        self._starts: deque[pb.Start] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """See attach.Stream.wake."""
        self._wake.set()

    def end(self, error: BatonError) -> None:
        """See attach.Stream.end."""
        if self.error is None:
            self.error = error
        self.over.set()

    @property
    def has_starts(self) -> bool:
        """Whether a Start is queued."""
        return bool(self._starts)

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be read before some Starts were handed over."""
        return len(self._starts) > MAX_QUEUED_STARTS or self._queued_bytes > MAX_QUEUED_BYTES

    def put_starts(self, starts: Iterable[pb.Start]) -> None:
        """Queue Starts that were read."""
        for start in starts:
            self._starts.append(start)
            self._queued_bytes += len(start.token_ids)
        self.starts_changed.set()

    def take_start(self) -> pb.Start:
        """The oldest queued Start; there must be one."""
        start = self._starts.popleft()
        self._queued_bytes -= len(start.token_ids)
        self.starts_changed.set()
        return start

    def rearm(self) -> None:
        """Call before looking for something to write; a wake after it is not lost."""
        self._wake.clear()

    async def woken(self, timeout_s: float) -> None:
        """Until wake, or the time has passed."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return


class AttachHandler:
    """Serves Attach.

    check_stall: called before anything of a frontend is looked at; fences every session if this process's own loop stood still.
    """

    def __init__(
        self,
        frontends: Frontends,
        beat: Callable[[], pb.Beat],
        check_stall: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._frontends = frontends
        self._beat = beat
        self._check_stall = check_stall
        self._clock = clock

    async def run(self, context: Any) -> None:
        """One stream from hello to end. Being cancelled (the client left) leaves the sequences to be re-attached.

        Raises: the BatonError that ended the stream, unless the frontend closed it.
        """
        request = await self._first_message(context)
        self._check_stall()
        stream = AttachStream()
        session = self._frontends.attach(request.hello, stream, self._clock())
        log.info("frontend_attached", frontend=session.instance_id, session=request.hello.session, num_resumed=len(request.hello.resumes))
        try:
            self._take(session, stream, request)
            await open_responses(context)  # the writer may be cancelled in its first write
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._read(session, stream, context), name="attach-read"),
                    tasks.create_task(self._start(session, stream), name="attach-start"),
                    tasks.create_task(self._write(session, stream, context), name="attach-write"),
                ]
                await stream.over.wait()
                for task in running:
                    task.cancel()
        finally:
            session.detach_from(stream, self._clock(), Cancelled("the stream broke"))
            reason = stream.error.message if stream.error is not None else ""
            log.info("frontend_detached", frontend=session.instance_id, num_sequences=session.num_sequences, why=reason)
        if stream.error is not None and not isinstance(stream.error, ClosedByFrontend):
            raise stream.error

    async def _first_message(self, context: Any) -> pb.AttachRequest:
        try:
            async with asyncio.timeout(HELLO_LIMIT_S):
                request: pb.AttachRequest = await context.read()
        except TimeoutError:
            raise InvalidArgument("hello", f"did not come within {HELLO_LIMIT_S:g} s") from None
        if request is EOF or not request.HasField("hello"):
            raise InvalidArgument("hello", "must be in the first message")
        return request

    async def _read(self, session: FrontendSession, stream: AttachStream, context: Any) -> None:
        while True:
            try:
                request = await context.read()
            except BaseError as error:
                return session.detach_from(stream, self._clock(), Cancelled(f"the stream broke: {error}"))
            self._check_stall()
            if session.stream is not stream:
                return
            if request is EOF:
                return session.detach(self._clock(), ClosedByFrontend("closed by the frontend"))
            self._take(session, stream, request)
            while stream.is_full:
                stream.starts_changed.clear()
                await stream.starts_changed.wait()

    def _take(self, session: FrontendSession, stream: AttachStream, request: pb.AttachRequest) -> None:
        try:
            session.receive(request, self._clock())
        except InvalidArgument as error:
            return session.detach(self._clock(), error)
        if request.starts:
            stream.put_starts(request.starts)

    async def _start(self, session: FrontendSession, stream: AttachStream) -> None:
        """Hand over queued Starts. Those of a stream that broke are dropped: the frontend is told UNKNOWN when it re-attaches."""
        since_turn = 0
        while session.stream is stream:
            if not stream.has_starts:
                stream.starts_changed.clear()
                await stream.starts_changed.wait()
                continue
            start = stream.take_start()
            try:
                session.start(start, self._clock())
            except InvalidArgument as error:
                return session.detach(self._clock(), error)
            since_turn += 1
            if len(start.token_ids) >= _LONG_START_BYTES or since_turn >= _STARTS_PER_TURN:
                since_turn = 0
                await asyncio.sleep(0)

    async def _write(self, session: FrontendSession, stream: AttachStream, context: Any) -> None:
        while session.stream is stream:
            stream.rearm()
            now = self._clock()
            frame = session.next_frame(self._beat(), now)
            if frame is None:
                await stream.woken(session.beat_due_s(now))
                continue
            try:
                await context.write(frame)
            except BaseError as error:  # grpc.aio's own, when the call ended while we wrote
                return session.detach_from(stream, self._clock(), Cancelled(f"the stream broke: {error}"))
