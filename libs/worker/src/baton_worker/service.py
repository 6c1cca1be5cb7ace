"""baton.worker.v1.WorkerService: translate and delegate."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_contracts.worker.v1 import worker_service_pb2_grpc as rpc
from baton_runtime.errors import Unavailable
from baton_runtime.log import get_logger
from grpc.aio import BaseError

from baton_worker.attach_service import AttachHandler
from baton_worker.cache_feed import CacheFeed
from baton_worker.load import WorkerState

# Every subscriber costs a copy of all changes; routers are few.
MAX_SUBSCRIBERS = 64

log = get_logger(__name__)


class WorkerServicer(rpc.WorkerServiceServicer):
    """Served by every prefill and every decode instance. Attach: see `attach_service`."""

    def __init__(self, attach: AttachHandler, feed: CacheFeed, state: WorkerState, clock: Callable[[], float] = time.monotonic) -> None:
        self._attach = attach
        self._feed = feed
        self._state = state
        self._clock = clock
        self._is_open = False
        self._closing = asyncio.Event()

    def open(self) -> None:
        """Take frontends and routers from now on; before, the server may be up while what is behind it is not."""
        self._is_open = True

    def close(self) -> None:
        """End the feeds; the sessions of Attach are ended by their owner. Idempotent."""
        self._closing.set()

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        """One frontend process."""
        self._require_open()
        await self._attach.run(context)

    async def WatchWorker(self, request: pb.WatchWorkerRequest, context: Any) -> None:
        """Snapshot, then deltas and load, until the router leaves or the worker closes."""
        self._require_open()
        if self._feed.num_subscribers >= MAX_SUBSCRIBERS:
            raise Unavailable("too many feeds are open")
        changed = asyncio.Event()
        subscriber = self._feed.subscribe(changed.set)
        log.info("feed_opened", router=request.instance_id)
        try:
            while not self._closing.is_set():
                changed.clear()
                due_in_s = subscriber.due_in_s(self._clock())
                if due_in_s <= 0:
                    await context.write(self._completed(self._feed.next_message(subscriber, self._clock())))
                elif subscriber.has_news:
                    await asyncio.sleep(due_in_s)  # changes gather meanwhile
                else:
                    await self._wait(changed, due_in_s)
        except BaseError as error:  # grpc.aio's own, when the call ended while we wrote
            log.info("feed_broke", router=request.instance_id, error=str(error))
        finally:
            self._feed.unsubscribe(subscriber)
            log.info("feed_closed", router=request.instance_id)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """What the worker holds now."""
        return self._state.status(await asyncio.to_thread(self._state.integrity_error))

    def _require_open(self) -> None:
        if not self._is_open or self._closing.is_set():
            raise Unavailable("the worker is closing" if self._is_open else "the worker is starting")

    def _completed(self, message: pb.WatchWorkerResponse) -> pb.WatchWorkerResponse:
        message.incarnation = self._state.incarnation
        message.beat.CopyFrom(self._state.beat())
        self._state.fill_load(message.load)
        return message

    @staticmethod
    async def _wait(changed: asyncio.Event, timeout_s: float) -> None:
        """Until there may be something to say sooner than was planned, or the time has come."""
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return
