"""One WatchWorker stream per worker: cache events into the index, load into the fleet.

A worker is dropped only when its record is gone from discovery and its own stream fails too, or when another life of it
has registered. Losing the stream alone closes it for new work (`Worker.is_open`) and forgets what it had cached.
"""

import asyncio
import contextlib
import time

import grpc
from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_contracts.worker.v1 import worker_service_pb2_grpc as pb_grpc
from baton_runtime.discovery import View, ViewEvent, ViewEventKind
from baton_runtime.errors import from_rpc_error
from baton_runtime.log import get_logger
from baton_runtime.rpc import open_channel

from baton_router.config import RouterConfig
from baton_router.fleet import Fleet, Worker
from baton_router.index import BlockIndex
from baton_router.placement import HASH_BYTES

SILENT_LIMIT_S = 2.0  # docs/handoff.md, section 4
RETRY_S = 0.2

log = get_logger(__name__)


class Feeds:
    """Keeps a feed to every worker of a discovery view. Run in the service's TaskGroup."""

    def __init__(
        self, config: RouterConfig, instance_id: str, view: View, fleet: Fleet, index: BlockIndex, tasks: asyncio.TaskGroup
    ) -> None:
        self._config = config
        self._instance_id = instance_id
        self._view = view
        self._fleet = fleet
        self._index = index
        self._tasks = tasks
        self._feeds: dict[str, asyncio.Task[None]] = {}  # by incarnation
        self._vanished: set[str] = set()

    def start(self) -> None:
        """Follow the view from now on."""
        self._view.subscribe(self._on_event)

    def close(self) -> None:
        """End all feeds."""
        for task in self._feeds.values():
            task.cancel()

    def _on_event(self, event: ViewEvent) -> None:
        if event.kind is ViewEventKind.VANISHED:
            self._vanished.add(event.instance.incarnation)
        else:
            self._follow(event.instance)

    def _follow(self, instance: discovery.Instance) -> None:
        self._vanished.discard(instance.incarnation)
        if known := self._fleet.workers.get(instance.incarnation):
            known.record = instance
            return
        for other in list(self._fleet.workers.values()):
            if (other.record.service, other.record.instance_id) == (instance.service, instance.instance_id):
                self._feeds[other.incarnation].cancel()  # an earlier life; its feed's end removes it
        worker = self._fleet.add(instance, self._index.add_worker(), self._config.default_prefill_us_per_token)
        self._feeds[instance.incarnation] = self._tasks.create_task(self._keep(worker), name=f"feed {instance.instance_id}")

    async def _keep(self, worker: Worker) -> None:
        """Read the feed, again after every break, until the worker is gone."""
        try:
            while True:
                try:
                    await self._read(worker)
                except grpc.aio.AioRpcError as error:
                    log.info("feed_broken", worker=worker.record.instance_id, error=str(from_rpc_error(error)))
                except (TimeoutError, _WrongFeed) as error:
                    log.info("feed_broken", worker=worker.record.instance_id, error=str(error) or "silent")
                self._index.clear(worker.bit)
                worker.heard_at = float("-inf")
                if worker.incarnation in self._vanished:
                    self._view.forget(worker.record)
                    return
                await asyncio.sleep(RETRY_S)
        finally:
            self._vanished.discard(worker.incarnation)
            self._index.remove_worker(worker.bit)
            del self._fleet.workers[worker.incarnation]
            del self._feeds[worker.incarnation]

    async def _read(self, worker: Worker) -> None:
        """One stream, from its snapshot to its end. Raises: AioRpcError, TimeoutError after silence, _WrongFeed."""
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(open_channel(worker.record.grpc_address))
            call = pb_grpc.WorkerServiceStub(channel).WatchWorker(pb.WatchWorkerRequest(instance_id=self._instance_id))
            stack.callback(call.cancel)
            expected = 1
            while True:
                async with asyncio.timeout(SILENT_LIMIT_S):
                    message = await call.read()
                if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in grpc-stubs
                    raise _WrongFeed("ended by the worker")
                if message.incarnation != worker.incarnation:
                    raise _WrongFeed(f"incarnation {message.incarnation} answers at {worker.record.grpc_address}")
                if message.sequence_number != expected:
                    raise _WrongFeed(f"gap: message {message.sequence_number} instead of {expected}")
                expected += 1
                self._apply(worker, message, time.monotonic())

    def _apply(self, worker: Worker, message: pb.WatchWorkerResponse, now: float) -> None:
        if message.snapshot:
            self._index.clear(worker.bit)
        self._index.store(worker.bit, _hashes(message.stored))
        self._index.discard(worker.bit, _hashes(message.removed))
        worker.heard(message.beat, now)
        if message.HasField("load"):
            worker.reported(message.load, now)


class _WrongFeed(Exception):
    """The stream cannot be gone on with; the next one starts with a snapshot."""


def _hashes(column: bytes) -> list[bytes]:
    return [column[i : i + HASH_BYTES] for i in range(0, len(column), HASH_BYTES)]
