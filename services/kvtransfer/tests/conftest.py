"""A kvtransfer in this process on a real port, and workers that speak to it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2_grpc as pb_grpc
from baton_kvtransfer.books import Books
from baton_kvtransfer.broker import Broker
from baton_kvtransfer.config import KvTransferConfig
from baton_kvtransfer.service import KvTransferServicer
from baton_kvtransfer.spans import BookSpans
from baton_kvtransfer.testing import worker_record
from baton_runtime.rpc import GrpcServer, open_channel
from opentelemetry.trace import NoOpTracer

LIMIT_S = 10.0


class WorkerClient:
    """A worker's end of Books. Reads into lists; requests are written at once."""

    def __init__(self, channel, record, clients) -> None:
        self.record = record
        self.introductions: list[pb.Introduction] = []
        self.deaths: list[tuple[str, str]] = []
        self.error: grpc.aio.AioRpcError | None = None
        self.is_over = False
        self.booked = 0
        self._changed = asyncio.Event()
        self._clients = clients
        self.call = pb_grpc.KvTransferServiceStub(channel).Books()

    async def hello(self, **kwargs) -> None:
        await self.send(hello=pb.BooksHello(instance=self.record), **kwargs)

    async def send(self, **kwargs) -> None:
        # A stream that is over already says why to its reader.
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self.call.write(pb.BooksRequest(**kwargs))

    async def read(self) -> None:
        try:
            async for response in self.call:
                self.introductions.extend(response.introductions)
                self.deaths.extend((down.incarnation, down.reason) for down in response.peers_down)
                self.booked = max(self.booked, response.booked_sequence)
                self._changed.set()
        except grpc.aio.AioRpcError as error:
            self.error = error
        finally:
            self.is_over = True
            self._changed.set()

    async def until(self, condition) -> None:
        """Wait until condition() holds, looking after each message."""
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


class Fleet:
    """A served broker and its clients."""

    def __init__(self, servicer, broker, server, address, group) -> None:
        self.servicer, self.broker, self.server = servicer, broker, server
        self._address, self._group = address, group
        self._closing = contextlib.AsyncExitStack()
        self._channels = {}

    async def stub(self):
        channel = await self._channel("observer")
        return pb_grpc.KvTransferServiceStub(channel)

    async def worker(self, instance_id, incarnation, *, is_silent=False, is_deaf=False, **kwargs) -> WorkerClient:
        channel = await self._channel(instance_id + incarnation)
        client = WorkerClient(channel, worker_record(instance_id, incarnation, **kwargs), self)
        if not is_silent:
            await client.hello()
        if not is_deaf:
            self._group.create_task(client.read())
        return client

    async def until(self, condition) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.01)

    async def _channel(self, name):
        if name not in self._channels:
            self._channels[name] = open_channel(self._address)
        return self._channels[name]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


@pytest.fixture
def config():
    return KvTransferConfig()


@pytest.fixture
async def fleet(config) -> AsyncIterator[Fleet]:
    # The tasks of a fixture live in one task of their own: a TaskGroup must not be left by another one.
    ready: asyncio.Future[Fleet] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def live() -> None:
        broker = Broker(Books(BookSpans(NoOpTracer(), str)))
        servicer = KvTransferServicer(config, broker)
        server = GrpcServer("127.0.0.1:0")
        pb_grpc.add_KvTransferServiceServicer_to_server(servicer, server.server)
        address = await server.start()
        async with asyncio.TaskGroup() as group:
            clock = group.create_task(servicer.run())
            made = Fleet(servicer, broker, server, address, group)
            ready.set_result(made)
            await done.wait()
            servicer.drain()
            await made.close()
            await server.close()
            clock.cancel()

    task = asyncio.get_running_loop().create_task(live())
    yield await ready
    done.set()
    await task
