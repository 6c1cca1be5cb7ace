"""Mutual TLS of all gRPC and of etcd, with real processes: who is refused, and that new files are taken under load."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import grpc
import psutil
import pytest
from baton_cli import certificates
from baton_contracts.discovery.v1 import instance_pb2
from baton_runtime import tls
from baton_runtime.rpc import open_channel
from clients import Answer, stream
from cluster import Cluster, cluster
from strangers import ask, secure, welcomed

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]
BODY = {"model": "test-model", "prompt": list(range(10, 40)), "max_tokens": 20, "ignore_eos": True, "temperature": 0}


@pytest.fixture(autouse=True)
def plain_again() -> Iterator[None]:
    """Even if a cluster did not come up."""
    yield
    tls.use(None)


def servers(house: Cluster) -> dict[str, str]:
    """Every gRPC address."""
    found = {i.instance_id: i.grpc_address for i in house.view.instances.values() if i.grpc_address}
    return found | {"etcd": house.etcd.endpoint}


async def test_whoever_has_no_certificate_of_our_ca_is_refused_on_every_grpc_port(tmp_path: Path) -> None:
    ours, foreign = tmp_path / "ours", tmp_path / "foreign"
    certificates.make(ours)
    certificates.make(foreign)
    async with cluster(tmp_path / "run", certificates=ours) as house:
        assert (await stream(house.http, house.url, Answer(), **BODY)).error is None
        assert {"frontend-0", "router-0", "prefill-0", "decode-0", "kvtransfer-0", "etcd"} <= set(servers(house))
        for name, address in servers(house).items():
            await ask(secure(address, ours, "cli", believed=ours), is_etcd=name == "etcd")
            assert await welcomed(address, ours, foreign, is_etcd=name == "etcd") == []
        for name in house.children:
            assert not unknown_ports(house, name)
            assert 80 * 86400 < (await house.metrics(name))["baton_certificate_expiry_seconds"] < 91 * 86400
        # A worker's address under the name of a router: whoever asks for a router does not believe it.
        await ask(open_channel(house.instance("decode-0").grpc_address))
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(open_channel(house.instance("decode-0").grpc_address, "router"))
        await house.settled()


def unknown_ports(house: Cluster, name: str) -> set[int]:
    """Ports on which a process listens and that are neither gRPC, nor HTTP, nor of a worker's byte transport."""
    process = house.children[name].process
    assert process is not None
    instance = house.instance(name)
    known = {int(a.rpartition(":")[2]) for a in (instance.grpc_address, instance.http_address, instance.metrics_address) if a}
    is_worker = instance.service in (instance_pb2.SERVICE_PREFILL, instance_pb2.SERVICE_DECODE)
    listening = {c.laddr.port for c in psutil.Process(process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    unknown = listening - known
    return set() if is_worker and len(unknown) <= 1 else unknown


async def test_a_new_ca_and_new_certificates_are_taken_under_load_without_a_failed_request(tmp_path: Path) -> None:
    ours, before = tmp_path / "ours", tmp_path / "before"
    certificates.make(ours)
    certificates.make(before, ca=ours / "ca", names=["cli"])
    async with cluster(tmp_path / "run", certificates=ours, decode=2) as house, aiohttp.ClientSession() as http:
        old_bundle = (ours / "ca" / "ca.pem").read_bytes()
        answers: list[Answer] = []
        is_over = False

        async def ask_on() -> None:
            while not is_over:
                answers.append(await stream(http, house.url, Answer(), **BODY))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(ask_on())
            certificates.new_ca(ours)
            await house.etcd.restart()  # it reads its CA file at its start alone
            certificates.renew(ours)
            await again(house, "decode-1")  # everybody connects to it, and it to everybody
            certificates.drop_old_ca(ours)
            await house.etcd.restart()
            await again(house, "decode-1")
            num_before = len(answers)
            while len(answers) < num_before + 20:
                await asyncio.sleep(0.02)
            is_over = True
        assert all(answer.error is None and len(answer.token_ids) == BODY["max_tokens"] for answer in answers)
        assert len({tuple(answer.token_ids) for answer in answers}) == 1

        # What the old CA signed is over, on processes that were never restarted too.
        assert (ours / "ca" / "ca.pem").read_bytes() != old_bundle
        for name, address in servers(house).items():
            await ask(secure(address, ours, "cli", believed=ours), is_etcd=name == "etcd")
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(secure(address, before, "cli", believed=ours), is_etcd=name == "etcd")
        await house.settled()


async def again(house: Cluster, name: str) -> None:
    """Drain a process, and start it again."""
    house.signal(name, signal.SIGTERM)
    process = house.children[name].process
    assert process is not None
    await process.wait()
    await house.start(name)


async def test_a_half_set_configuration_stops_the_start_and_names_the_field(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton_router.main"), env={**os.environ, "BATON_ROUTER_TLS_CA": "/x"}, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert "router.tls_certificate" in stderr.decode()


def test_nothing_but_the_one_place_makes_grpc_servers_and_channels() -> None:
    """Those that are allowed: tests and their stand-ins. The exporter of traces is told in docs/security.md."""
    pattern = re.compile(r"\b(in)?secure_channel\b|\badd_(in)?secure_port\b|\baio\.server\b|\bgrpc\.server\b")
    sources = [p for part in ("libs", "services", "cli", "proto") for p in (ROOT / part).rglob("src/**/*.py")]
    found = {str(p.relative_to(ROOT)) for p in sources if pattern.search(p.read_text()) and not p.name.startswith("testing")}
    # rpc.py makes the one server, and has tls.py bind it.
    assert found == {"libs/runtime/src/baton_runtime/tls.py", "libs/runtime/src/baton_runtime/rpc.py"}
