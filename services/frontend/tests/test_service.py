"""The whole process but for its sockets to the world: discovery in, HTTP out."""

import asyncio
from array import array
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_contracts.instance.v1.instance_service_pb2 import DRAIN_PHASE_DRAINED, DRAIN_PHASE_DRAINING, DrainRequest, Holdings
from baton_contracts.instance.v1.instance_service_pb2_grpc import InstanceServiceStub
from baton_frontend.config import FrontendConfig
from baton_frontend.service import FrontendService
from baton_frontend.testing_models import byte_level_tokenizer, write_model
from baton_frontend.testing_workers import FakeWorker, expected_output
from baton_runtime.config import load
from baton_runtime.discovery import InMemoryDiscovery
from baton_runtime.errors import ConfigError
from baton_runtime.rpc import open_channel
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub


class Process:
    """A started service, held by a task of its own."""

    def __init__(self, config: FrontendConfig) -> None:
        self.discovery = InMemoryDiscovery()
        self.service = FrontendService(config, self.discovery)
        self.view = self.discovery.view(pb.SERVICE_FRONTEND)
        self._ready = asyncio.Event()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        async with self.service.tasks:
            await self.service.start()
            self._ready.set()
            await self._stop.wait()
            await self.service.close()
            raise StopAsyncIteration

    async def __aenter__(self) -> "Process":
        self._task = asyncio.get_running_loop().create_task(self.run())
        await self._ready.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.wait([self._task])
        error = self._task.exception()
        assert isinstance(error, ExceptionGroup)
        assert [type(e) for e in error.exceptions] == [StopAsyncIteration]


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[FakeWorker]:
    folder = write_model(tmp_path / "model", byte_level_tokenizer(), eos_token="<|end|>")
    model = pb.Model(
        served_name="demo", fingerprint="f" * 16, path=str(folder), hash_block_tokens=16, max_model_tokens=1024, vocab_size=400
    )
    worker = await FakeWorker("decode-0", "d0", model=model).open()
    yield worker
    await worker.close()


def config() -> FrontendConfig:
    return FrontendConfig(http_listen="127.0.0.1:0")


async def start_and_close(service: FrontendService) -> None:
    async with service.tasks:
        try:
            await service.start()
        finally:
            await service.close()


async def complete(process: Process, **fields: object) -> tuple[int, dict[str, object]]:
    body = {"model": "demo", "prompt": [1, 2, 3], "max_tokens": 4, "return_token_ids": True, **fields}
    url = f"http://{process.service.http_address}/v1/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.json()


async def test_answers_a_completion_and_registers(worker: FakeWorker) -> None:
    async with Process(config()) as process:
        process.discovery.put(worker.instance)
        status, answer = await complete(process)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 4  # type: ignore[index]
        assert array("I", worker.starts[0].token_ids).tolist() == [1, 2, 3]
        assert answer["choices"][0]["token_ids"] == expected_output(array("I", [1, 2, 3]), 4)  # type: ignore[index]
        (record,) = process.view.instances.values()
        assert (record.http_address, record.incarnation) == (process.service.http_address, process.service.incarnation)
        assert record.metrics_address
        assert record.version


async def test_without_workers_it_says_503() -> None:
    async with Process(config()) as process:
        status, answer = await complete(process)
        assert status == 503
        assert answer["error"]["code"] == "no_model"  # type: ignore[index]


async def test_drain_leaves_discovery_finishes_and_refuses(worker: FakeWorker) -> None:
    async with Process(config()) as process:
        process.discovery.put(worker.instance)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(complete(process, max_tokens=60))
            await worker.until(lambda: bool(worker.starts))
            await process.service.drain()
            assert (await running)[0] == 200
        assert all(process.view.is_gone(record) for record in process.view.instances.values())
        with pytest.raises(aiohttp.ClientConnectorError):
            await complete(process)


async def test_its_grpc_server_tells_health_and_what_a_drain_waits_for(worker: FakeWorker) -> None:
    async with Process(config()) as process, asyncio.TaskGroup() as tasks:
        process.discovery.put(worker.instance)
        (record,) = process.view.instances.values()
        worker.step_s = 0.05  # 2 s for what follows up to the first message
        running = tasks.create_task(complete(process, max_tokens=40))
        await worker.until(lambda: bool(worker.starts))
        async with open_channel(record.grpc_address) as channel:
            health = HealthStub(channel)
            assert (await health.Check(HealthCheckRequest(), timeout=10)).status == HealthCheckResponse.SERVING
            call = InstanceServiceStub(channel).Drain(DrainRequest(incarnation=record.incarnation), timeout=15)
            progress = await call.read()
            assert (progress.phase, progress.holdings.running) == (DRAIN_PHASE_DRAINING, 1)
            await process.service.drain()
            assert (await health.Check(HealthCheckRequest(), timeout=10)).status == HealthCheckResponse.NOT_SERVING
            process.service.drain_state.end(is_complete=True)
            while progress.phase == DRAIN_PHASE_DRAINING:
                progress = await call.read()
            assert (progress.phase, progress.holdings) == (DRAIN_PHASE_DRAINED, Holdings())
        assert (await running)[0] == 200


async def test_close_with_a_request_in_flight_ends_it_with_an_error(worker: FakeWorker) -> None:
    async with asyncio.TaskGroup() as tasks:
        async with Process(config()) as process:
            process.discovery.put(worker.instance)
            running = tasks.create_task(complete(process, max_tokens=500))
            await worker.until(lambda: bool(worker.starts))
        assert (await running)[0] == 503
    await worker.until(lambda: not worker.sequences)


async def test_port_in_use_names_the_setting() -> None:
    async with Process(config()) as process:
        second = FrontendService(FrontendConfig(http_listen=process.service.http_address), InMemoryDiscovery())
        with pytest.raises(ExceptionGroup) as failed:
            await start_and_close(second)
        assert failed.group_contains(ConfigError, match=r"frontend\.http_listen")


def test_settings_come_from_the_environment_and_are_checked() -> None:
    assert load(FrontendConfig, "frontend", environ={"BATON_FRONTEND_MAX_INFLIGHT": "7"}).max_inflight == 7
    with pytest.raises(ConfigError, match=r"frontend\.max_inflight"):
        load(FrontendConfig, "frontend", environ={"BATON_FRONTEND_MAX_INFLIGHT": "0"})
