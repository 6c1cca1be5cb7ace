"""A WorkerCore over the real sim engine and fake handoffs, served over gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from baton_contracts.discovery.v1.instance_pb2 import Capability
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_contracts.worker.v1 import worker_service_pb2_grpc as rpc
from baton_engine.api import SequenceKey
from baton_engine.driver import DrivenEngine
from baton_engine.errors import EngineFailed
from baton_engine.factory import build_engine
from baton_engine.pool import KvPool
from baton_runtime.rpc import GrpcServer, open_channel
from baton_runtime.telemetry import configure_telemetry
from baton_worker.core import WorkerCore
from baton_worker.testing import FakeHandoffs, FrontendModel
from prometheus_client import CollectorRegistry

EVERYTHING = (Capability.CAPABILITY_WHOLE, Capability.CAPABILITY_PREFILL_FOR, Capability.CAPABILITY_DECODE_FROM)
# Steps of 2 ms: slow enough that sequences are caught in the middle, fast enough for tests.
PROFILE = """
[prefill_ms]
constant = 2.0
[decode_ms]
constant = 2.0
"""


class House:
    """What a test talks to."""

    def __init__(self, core: WorkerCore, engine: DrivenEngine, handoffs: FakeHandoffs, registry: CollectorRegistry) -> None:
        self.core = core
        self.engine = engine
        self.handoffs = handoffs
        self.registry = registry
        self.stub: Any = None
        self.engine_task: asyncio.Task[None] | None = None
        self.engine_error: EngineFailed | None = None

    async def run_engine(self) -> None:
        """As the service does, but an engine that dies must not take the test down."""
        try:
            await self.core.run_engine()
        except EngineFailed as error:
            self.engine_error = error

    @asynccontextmanager
    async def attached(self, model: FrontendModel, *starts: pb.Start) -> AsyncIterator["Attached"]:
        call = self.stub.Attach()
        try:
            async with asyncio.TaskGroup() as tasks:
                attached = Attached(call, model)
                await attached.say(hello=model.hello(), starts=[model.started(start) for start in starts])
                reader = tasks.create_task(attached.read())
                yield attached
                reader.cancel()
        finally:
            call.cancel()

    @property
    def is_empty(self) -> bool:
        """Nothing runs and every block is free or cached."""
        counts = self.engine.blocks.counts()
        self.engine.blocks.check()
        return self.core.dispatcher.num_live == 0 and counts.free + counts.cached == counts.total


class Attached:
    """A frontend that reads, checks and acknowledges."""

    def __init__(self, call: Any, model: FrontendModel) -> None:
        self.call = call
        self.model = model
        self.acknowledges = True
        self._write_lock = asyncio.Lock()

    async def say(self, **fields: Any) -> None:
        async with self._write_lock:
            await self.call.write(pb.AttachRequest(ack_frame=self.model.processed_frame, **fields))

    async def start(self, start: pb.Start) -> None:
        await self.say(starts=[self.model.started(start)])

    async def cancel(self, request_id: str, attempt: int = 1) -> None:
        await self.say(cancels=[pb.Cancel(request_id=request_id, attempt=attempt)])

    async def read(self) -> None:
        try:
            while isinstance(frame := await self.call.read(), pb.AttachResponse):
                self.model.process(frame)
                if self.acknowledges:
                    await self.say()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call is over; tests that care look at its code

    def num_tokens(self, request_id: str, attempt: int = 1) -> int:
        return len(self.model.tokens[SequenceKey(request_id, attempt)])

    def reason(self, request_id: str, attempt: int = 1) -> "pb.FinishReason | None":
        finished = self.model.finished.get(SequenceKey(request_id, attempt))
        return finished.reason if finished is not None else None


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[House]:
    """A house in the caller's task."""
    profile = folder / "quick.toml"
    profile.write_text(PROFILE)
    loaded = build_engine("sim", None, str(profile), block_tokens=4, max_batch_sequences=64, max_waiting=64)
    pool = KvPool(np.zeros((4096, loaded.layout.block_bytes), np.uint8), loaded.layout)
    engine = loaded.bind(pool)
    await engine.open()
    handoffs, registry = FakeHandoffs(), CollectorRegistry()
    telemetry = configure_telemetry("decode", "0", "decode-0", "d1", "", 0.0)
    core = WorkerCore(
        instance_id="decode-0",
        incarnation="d1",
        engine=engine,
        handoffs=handoffs,
        capabilities=EVERYTHING,
        tracer=telemetry.tracer,
        registry=registry,
    )
    made = House(core, engine, handoffs, registry)
    server = GrpcServer("127.0.0.1:0")
    rpc.add_WorkerServiceServicer_to_server(core.servicer, server.server)
    address = await server.start()
    core.servicer.open()
    async with asyncio.TaskGroup() as tasks:
        made.engine_task = tasks.create_task(made.run_engine())
        clock = tasks.create_task(core.run_clock())
        async with open_channel(address) as channel:
            made.stub = rpc.WorkerServiceStub(channel)
            yield made
        core.close()
        await server.close()
        clock.cancel()
        await engine.close()
    await telemetry.close()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """A running house. One task from start to end: a TaskGroup may not be left by another task than entered it."""
    ready: asyncio.Future[House] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def live() -> None:
        async with running(tmp_path) as made:
            ready.set_result(made)
            await done.wait()

    life = asyncio.create_task(live())
    await asyncio.wait([life, ready], return_when=asyncio.FIRST_COMPLETED)
    if life.done():
        life.result()
    yield ready.result()
    done.set()
    await life
