"""Drains of real processes: amid a handoff, asked twice, of the dead, of the last one; and every kind restarted under load."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from baton_cli import drain
from baton_cli.drain import Ending
from baton_contracts.instance.v1 import instance_service_pb2 as pb
from baton_runtime.rpc import open_channel
from clients import Answer, received, stream
from cluster import Cluster, cluster, roomy_model, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from load import Oracle
from shared_house import SharedHouse

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

ROLLING = Path(__file__).parents[1] / "load" / "rolling.py"
DRAIN_LIMIT_S = 60.0
# 1 ms per prompt token: a prompt of 1,000 is on its way for 1 s. Decode reads none: each request is a handoff.
PROFILE = """
description = "slow enough to be drained in the middle"
[prefill_ms]
per_token = 1.0
[decode_ms]
constant = 10.0
"""
SERVICES = ("frontend", "router", "prefill", "decode", "kvtransfer")
ENVIRONMENT = {f"BATON_{service.upper()}_DRAIN_GRACE_S": "60" for service in SERVICES} | {"BATON_DECODE_CAN_PREFILL": "false"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SharedHouse]:
    folder = tmp_path_factory.mktemp("drain")
    (folder / "profile.toml").write_text(PROFILE)
    model = roomy_model(folder / "model")
    options = {"profile": str(folder / "profile.toml"), "model": model, "environment": ENVIRONMENT}
    made = SharedHouse(lambda: cluster(tmp_path_factory.mktemp("house"), prefill=2, decode=2, **options))
    yield made
    await made.close()


def is_exact(house: Cluster, prompt: list[int], answer: Answer, num_tokens: int) -> bool:
    oracle = Oracle(house.options.profile, house.options.model)
    return len(answer.token_ids) == num_tokens and answer.error is None and oracle.first_wrong(prompt, answer.token_ids) is None


async def ask(house: Cluster, answer: Answer, prompt: list[int], num_tokens: int) -> None:
    await stream(house.http, house.url, answer, model="test-model", prompt=prompt, max_tokens=num_tokens, ignore_eos=True)


async def drained(house: Cluster, name: str, grace_s: float | None = None) -> tuple[Ending, list[pb.DrainResponse]]:
    """What `baton drain NAME --wait` does once it has found it."""
    heard: list[pb.DrainResponse] = []
    instance = house.instance(name)
    ending = await drain.follow(instance, grace_s=grace_s, timeout_s=DRAIN_LIMIT_S, is_wait=True, heard=heard.append)
    return ending, heard


async def exit_code(house: Cluster, name: str) -> int:
    process = house.children[name].process
    assert process is not None
    async with asyncio.timeout(DRAIN_LIMIT_S):
        return await process.wait()


async def baton(house: Cluster, *arguments: str) -> tuple[int, str, str]:
    """The command as a user runs it: exit code, stdout, stderr."""
    command = [sys.executable, "-m", "baton_cli.main", *arguments, "--etcd", house.options.etcd]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def busy(house: Cluster, service: str, what: str) -> str:
    """The instance of that service that has a handoff in flight ("live_handoffs") or runs something ("running_sequences")."""

    async def found() -> str | None:
        report = await house.report()
        return next((i.instance_id for i in report.instances if i.service == service and getattr(i, what)), None)

    return await until(f"a {service} with {what}", found, DRAIN_LIMIT_S)


@pytest.mark.parametrize("service", ["prefill", "decode"])
async def test_a_drain_in_the_middle_of_a_handoff_returns_only_when_it_is_over(shared: SharedHouse, service: str) -> None:
    async with shared.lent() as house:
        prompt, answer = [10 + (7 * i + len(service)) % 150 for i in range(2000)], Answer()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask(house, answer, prompt, 30))
            name = await busy(house, service, "live_handoffs")
            ending, heard = await drained(house, name)
        assert ending is Ending.DRAINED
        assert heard[0].holdings.live_handoffs, "the drain met the handoff"
        assert heard[-1].holdings == pb.Holdings()
        assert is_exact(house, prompt, answer, 30)
        assert await exit_code(house, name) == 0
        await house.start(name)
        await house.settled()


async def test_a_drain_asked_for_twice_is_one_drain_that_both_see_end(shared: SharedHouse) -> None:
    async with shared.lent() as house:
        prompt, answer = [11, 12, 13, 14], Answer()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask(house, answer, prompt, 400))  # 4 s
            await received(answer, 5)
            name = await busy(house, "decode", "running_sequences")
            both = [tasks.create_task(drained(house, name, grace_s)) for grace_s in (60.0, 1.0)]
        for asked in both:
            ending, heard = asked.result()
            assert ending is Ending.DRAINED
            assert heard[-1].holdings == pb.Holdings()
        assert is_exact(house, prompt, answer, 400)
        assert await exit_code(house, name) == 0
        await house.start(name)
        await house.settled()


async def test_a_drain_of_the_dead_says_so_and_of_one_that_dies_meanwhile_too(shared: SharedHouse) -> None:
    async with shared.lent() as house:
        prompt, answer = [31, 32, 33, 34], Answer()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask(house, answer, prompt, 400))
            await received(answer, 3)
            name = await busy(house, "decode", "running_sequences")
            begun = asyncio.Event()
            instance = house.instance(name)
            dying = drain.follow(instance, grace_s=None, timeout_s=DRAIN_LIMIT_S, is_wait=True, heard=lambda _: begun.set())
            following = tasks.create_task(dying)
            await begun.wait()
            house.signal(name, signal.SIGKILL)
            assert await following is Ending.LOST
            with pytest.raises(drain.Refused, match=rf"{name} does not answer at .* If it is dead"):
                await drained(house, name)
        assert is_exact(house, prompt, answer, 400)
        await house.start(name)
        await house.settled()


async def test_the_last_frontend_is_not_drained_unless_forced_and_then_ends_with_its_answer_given(shared: SharedHouse) -> None:
    async with shared.lent() as house:
        code, _, err = await baton(house, "drain", "front", "--wait")
        assert code == 1
        assert "frontend-0 is not drained: it is the last ready frontend. Start another one first, or use --force" in err
        async with open_channel(house.instance("frontend-0").grpc_address) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        prompt, answer = [21, 22, 23, 24], Answer()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask(house, answer, prompt, 100))
            await received(answer, 3)
            code, _, err = await baton(house, "drain", "frontend-0", "--wait", "--force")
        assert code == 0, err
        assert is_exact(house, prompt, answer, 100)
        assert await exit_code(house, "frontend-0") == 0


async def test_one_instance_of_each_service_restarted_under_load_fails_nothing(tmp_path: Path) -> None:
    """The short form of `make test-rolling`."""
    result = tmp_path / "rolling.json"
    log = tmp_path / "rolling.log"
    with log.open("wb") as output:
        options = ["--rounds", "1", "--per-service", "1", "--json", str(result)]
        process = await asyncio.create_subprocess_exec(sys.executable, str(ROLLING), *options, stdout=output, stderr=output)
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
    assert code == 0, log.read_text()[-5000:]
    found = json.loads(result.read_text())
    assert found["problems"] == []
    assert found["num_restarts"] == len(SERVICES)
    assert found["answered"] == found["requests"] > 0
    assert found["stranded_bytes"] == found["mismatch_bytes"] == found["disagreed_handoffs"] == 0
