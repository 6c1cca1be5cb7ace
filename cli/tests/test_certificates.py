"""Certificates as `baton certificates` makes them, and what the runtime's servers and channels do with them."""

import asyncio
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import click
import grpc
import pytest
from baton_cli import certificates
from baton_cli.main import main
from baton_runtime import tls
from baton_runtime.errors import ConfigError
from baton_runtime.etcd import etcd_pb2
from baton_runtime.etcd.client import EtcdClient
from baton_runtime.metrics import MetricsServer
from baton_runtime.rpc import GrpcServer, open_channel
from baton_runtime.testing import EtcdProcess
from click.testing import CliRunner
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

NAMES = ("router", "decode", "etcd", "cli")


@pytest.fixture(autouse=True)
def plain_again() -> Iterator[None]:
    yield
    tls.use(None)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    certificates.make(tmp_path / "ours", names=NAMES)
    return tmp_path / "ours"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    certificates.make(tmp_path / "foreign", names=NAMES)
    return tmp_path / "foreign"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The log of the runtime's tls."""
    found = Mock()
    monkeypatch.setattr(tls, "log", found)
    return found


def be(folder: Path, name: str) -> None:
    tls.use(certificates.files_in(folder, name))


@asynccontextmanager
async def listening(folder: Path, name: str) -> AsyncIterator[str]:
    """A server that has the identity of name; who connects in this process may have another."""
    be(folder, name)
    server = GrpcServer("127.0.0.1:0")
    try:
        yield await server.start()
    finally:
        await server.close()


async def ask(channel: grpc.aio.Channel) -> None:
    async with channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)


async def assert_refused(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(channel)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_health_check_shows_the_service_s_own_certificate(ours: Path, foreign: Path) -> None:
    async def probe(address: str, *options: str) -> tuple[int | None, str]:
        command = (sys.executable, "-m", "baton_runtime.probe", address, *options)
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, said = await process.communicate()
        return process.returncode, said.decode()

    async with listening(ours, "router") as address:
        assert await probe(address, "--tls", str(ours / "router")) == (0, "")
        for options in ((), ("--tls", str(foreign / "router"))):
            code, said = await probe(address, *options)
            assert code == 1
            assert said.startswith(f"{address}: UNAVAILABLE")
        assert await probe(address, "--tls", str(ours)) == (1, f"tls_ca: cannot read {ours}/ca.pem: No such file or directory\n")


def test_files_are_for_their_owner_alone_and_nothing_is_overwritten(ours: Path) -> None:
    files = [p for p in ours.rglob("*") if p.is_file()]
    assert len(files) == 2 + 3 * len(NAMES)
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}
    before = {p: p.read_bytes() for p in files}
    with pytest.raises(click.ClickException, match="exists; nothing was written"):
        certificates.make(ours, names=["frontend", "router"])
    assert {p: p.read_bytes() for p in ours.rglob("*") if p.is_file()} == before


def test_the_command_makes_renews_and_keeps_the_hosts(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    run = CliRunner().invoke
    assert run(main, ["certificates", str(folder), "--services", "router,etcd", "--hosts", "etcd.example,10.0.0.5"]).exit_code == 0
    first = certificates.files_in(folder, "etcd").certificate.read_bytes()
    assert run(main, ["certificates", str(folder)]).exit_code == 1
    assert run(main, ["certificates", str(folder), "--renew", "--days", "7"]).exit_code == 0
    second = certificates.files_in(folder, "etcd").certificate.read_bytes()
    assert first != second
    names = x509.load_pem_x509_certificate(second).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["etcd.baton.internal", "localhost", "etcd.example"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1", "10.0.0.5"]
    assert not (folder / "frontend").exists()
    unknown = run(main, ["certificates", str(tmp_path / "other"), "--services", "router,nobody"])
    assert unknown.exit_code == 1
    assert "nobody" in unknown.output


def test_an_old_ca_is_not_dropped_while_a_certificate_is_from_it(ours: Path) -> None:
    certificates.new_ca(ours)
    with pytest.raises(click.ClickException, match="--renew first"):
        certificates.drop_old_ca(ours)
    certificates.renew(ours)
    certificates.drop_old_ca(ours)
    assert len(certificates.load(ours / "ca").bundle) == 1


@pytest.mark.parametrize("missing", ["tls_ca", "tls_certificate", "tls_key"])
def test_a_half_set_configuration_names_what_is_missing(missing: str) -> None:
    given = {"tls_ca": "a", "tls_certificate": "b", "tls_key": "c"} | {missing: ""}
    with pytest.raises(ConfigError, match=f"router.{missing}"):
        tls.files_of("router", *given.values())


def test_files_that_do_not_fit_are_refused_by_field(ours: Path, foreign: Path) -> None:
    good = certificates.files_in(ours, "router")
    strange = certificates.files_in(foreign, "router")
    for field, files in {
        "tls_key": tls.TlsFiles(good.ca, good.certificate, strange.key),
        "tls_certificate": tls.TlsFiles(good.ca, good.key, good.key),
        "tls_ca": tls.TlsFiles(ours / "nothing", good.certificate, good.key),
    }.items():
        with pytest.raises(ConfigError, match=field):
            tls.use(files)


async def test_only_certificates_of_our_ca_are_served_and_believed(ours: Path, foreign: Path) -> None:
    async with listening(ours, "router") as address:
        be(ours, "cli")
        await ask(open_channel(address))
        await ask(open_channel(address, "router"))
        await assert_refused(open_channel(address, "decode"))
        await assert_refused(grpc.aio.insecure_channel(address))
        root = (ours / "ca" / "ca.pem").read_bytes()
        await assert_refused(grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root)))
        strange = certificates.files_in(foreign, "router")
        shown = grpc.ssl_channel_credentials(root, strange.key.read_bytes(), strange.certificate.read_bytes())
        await assert_refused(grpc.aio.secure_channel(address, shown))
        be(foreign, "cli")  # believes other servers
        await assert_refused(open_channel(address))


async def test_a_client_certificate_cannot_serve(ours: Path) -> None:
    async with listening(ours, "cli") as address:
        be(ours, "router")
        await assert_refused(open_channel(address))


async def test_a_running_server_takes_new_files_and_ends_no_call(ours: Path, tmp_path: Path) -> None:
    certificates.make(tmp_path / "before", ca=ours / "ca", names=["cli"])
    async with listening(ours, "router") as address:
        held = open_channel(address)
        watch = health_pb2_grpc.HealthStub(held).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        await watch.read()
        num_asked = 0
        is_over = False

        async def ask_on() -> None:
            nonlocal num_asked
            while not is_over:
                await ask(open_channel(address, "router"))  # a handshake each
                num_asked += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(ask_on())
            for step in (certificates.new_ca, certificates.renew, certificates.drop_old_ca):
                await asyncio.to_thread(step, ours)
                goal = num_asked + 10
                while num_asked < goal:
                    await asyncio.sleep(0.01)
            is_over = True
        assert not watch.done()
        watch.cancel()
        await held.close()
        be(tmp_path / "before", "cli")  # signed by the CA that is no longer believed, and believes it
        await assert_refused(open_channel(address))


async def test_files_that_do_not_fit_later_are_not_taken(ours: Path, foreign: Path, log: Mock) -> None:
    async with listening(ours, "router") as address:
        (ours / "router" / "key.pem").write_bytes((foreign / "router" / "key.pem").read_bytes())
        await ask(open_channel(address))
        await ask(open_channel(address))
    assert [call.args for call in log.warning.call_args_list] == [("certificate_refused",)]


async def test_etcd_and_its_client_speak_tls_and_go_on_with_new_files(ours: Path, foreign: Path) -> None:
    be(ours, "router")
    async with EtcdProcess(tls=certificates.files_in(ours, "etcd")) as etcd:
        client = EtcdClient(etcd.endpoint)
        request = etcd_pb2.RangeRequest(key=b"x")
        try:
            await client.range(request)
            async with client.watch(b"y", 0) as watch:
                await asyncio.to_thread(certificates.renew, ours)
                await client.range(request)  # over a new connection, with the new certificate
                await client.put(b"y", b"1", 0)
                assert [event.kv.value for event in await watch.events()] == [b"1"]  # over the old one
        finally:
            await client.close()
        for channel in (grpc.aio.insecure_channel(etcd.endpoint), foreign_channel(etcd.endpoint, ours, foreign)):
            await assert_refused(channel)


def foreign_channel(address: str, ours: Path, foreign: Path) -> grpc.aio.Channel:
    files = certificates.files_in(foreign, "cli")
    root = (ours / "ca" / "ca.pem").read_bytes()
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root, files.key.read_bytes(), files.certificate.read_bytes()))


def test_the_expiry_is_a_metric_and_a_warning_once_a_day(ours: Path, log: Mock) -> None:
    be(ours, "router")
    registry = CollectorRegistry()
    MetricsServer(registry)
    left_s = registry.get_sample_value("baton_certificate_expiry_seconds")
    assert left_s is not None
    assert 89 * 86400 < left_s <= 90 * 86400
    now = time.time()
    identity = tls.Identity(certificates.files_in(ours, "router"), lambda: now)
    assert not log.warning.called
    now += 80 * 86400
    identity.material()
    identity.material()
    now += 2 * 86400
    identity.material()
    assert [call.args for call in log.warning.call_args_list] == [("certificate_expires_soon",)] * 2
