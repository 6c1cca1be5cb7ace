"""Cancel a Route stream at each of its awaits: nothing stays counted, nothing runs on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.router.v1 import router_service_pb2 as pb
from baton_contracts.router.v1 import router_service_pb2_grpc as pb_grpc
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb
from baton_router.config import RouterConfig
from baton_router.fleet import Fleet, Worker
from baton_router.index import BlockIndex
from baton_router.metrics import RouterMetrics
from baton_router.placement import Placer
from baton_router.service import RouterServicer
from baton_runtime.rpc import GrpcServer, open_channel
from baton_runtime.telemetry import configure_telemetry
from prometheus_client import CollectorRegistry


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[pb_grpc.RouterServiceStub, Worker, GrpcServer]]:
    """A router over real gRPC with one decode worker that looks alive."""
    fleet, index = Fleet(), BlockIndex(10_000)
    record = discovery.Instance(instance_id="d0", incarnation="inc-d0", capabilities=[discovery.CAPABILITY_WHOLE])
    record.model.served_name, record.model.max_model_tokens, record.layout.block_tokens = "m", 4096, 16
    worker = fleet.add(record, index.add_worker(), 50.0)
    telemetry = configure_telemetry("router", "0", "router-0", "0" * 16, "", 0.0)
    server = GrpcServer("127.0.0.1:0")
    placer = Placer(RouterConfig(), fleet, index)
    metrics = RouterMetrics(CollectorRegistry(), fleet, index)
    pb_grpc.add_RouterServiceServicer_to_server(RouterServicer(placer, fleet, telemetry, metrics), server.server)
    address = await server.start()
    try:
        async with open_channel(address) as channel:
            yield pb_grpc.RouterServiceStub(channel), worker, server
    finally:
        await server.close()
        await telemetry.close()


def query(query_id: int) -> pb.Query:
    return pb.Query(query_id=query_id, request_id="r", attempt=1, model="m", num_tokens=10, priority=worker_pb.PRIORITY_INTERACTIVE)


async def until_uncounted(worker: Worker) -> None:
    async with asyncio.timeout(5):
        while worker.num_sequences:
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def open_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker was heard of just now, whenever that is."""
    monkeypatch.setattr(Worker, "is_open", lambda self, now: True)


async def test_answers_come_in_one_batch_per_message_and_once_each() -> None:
    async with serving() as (stub, _, _):
        call = stub.Route()
        await call.write(pb.RouteRequest(queries=[query(1), query(2)]))
        answers = list((await call.read()).answers)
        while len(answers) < 2:
            answers += (await call.read()).answers
        assert [a.query_id for a in answers] == [1, 2]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_a_frontend_that_leaves_takes_its_placements_out_of_the_load() -> None:
    async with serving() as (stub, worker, _):
        call = stub.Route()
        await call.write(pb.RouteRequest(queries=[query(1)]))
        await call.read()
        assert worker.num_sequences == 1
        call.cancel()
        await until_uncounted(worker)


async def test_withdrawn_and_ended_queries_no_longer_count() -> None:
    async with serving() as (stub, worker, _):
        call = stub.Route()
        await call.write(pb.RouteRequest(queries=[query(1), query(2)]))
        await call.read()
        await call.write(pb.RouteRequest(withdrawn_query_ids=[1, 99], ended_query_ids=[2]))
        await until_uncounted(worker)
        call.cancel()


async def test_a_server_that_stops_ends_idle_streams() -> None:
    async with serving() as (stub, worker, server):
        call = stub.Route()
        await call.write(pb.RouteRequest(queries=[query(1)]))
        await call.read()
        await server.close()
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        await until_uncounted(worker)
