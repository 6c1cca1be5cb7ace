import asyncio

import pytest
from baton_runtime import metrics
from baton_runtime.errors import ConfigError
from baton_runtime.metrics import HotHistogram, MetricsServer
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest


async def get(address: str, request: str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> str:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request.encode())
    answer = (await asyncio.wait_for(reader.read(), 5)).decode()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_metrics_of_the_process_are_served() -> None:
    server = MetricsServer()
    Counter("baton_handoff_bytes", "Bytes.", registry=server.registry).inc(5)
    address = await server.start("127.0.0.1:0")
    answer = await get(address)
    assert answer.startswith("HTTP/1.1 200 OK\r\n")
    assert "baton_handoff_bytes_total 5.0" in answer
    assert "process_resident_memory_bytes" in answer
    await server.close()
    await server.close()


async def test_openmetrics_is_served_to_those_who_ask() -> None:
    server = MetricsServer(CollectorRegistry())
    address = await server.start("127.0.0.1:0")
    answer = await get(address, "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n")
    assert "# EOF" in answer
    await server.close()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GET /health HTTP/1.1", "200"), ("GET /x HTTP/1.1", "404"), ("POST /metrics HTTP/1.1", "405"), ("x", "405")],
)
async def test_other_requests(request_line: str, status: str) -> None:
    server = MetricsServer(CollectorRegistry())
    address = await server.start("127.0.0.1:0")
    assert (await get(address, f"{request_line}\r\n\r\n")).split(" ")[1] == status
    await server.close()


async def test_slow_client_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REQUEST_LIMIT_S", 0.05)
    server = MetricsServer(CollectorRegistry())
    assert await get(await server.start("127.0.0.1:0"), "GET /metr") == ""
    await server.close()


async def test_endless_head_is_cut_off() -> None:
    server = MetricsServer(CollectorRegistry())
    assert await get(await server.start("127.0.0.1:0"), "GET /metrics HTTP/1.1\r\n" + "a: b\r\n" * 10_000) == ""
    await server.close()


async def test_address_that_cannot_be_bound_is_a_config_error() -> None:
    server = MetricsServer(CollectorRegistry())
    address = await server.start("127.0.0.1:0")
    with pytest.raises(ConfigError, match="metrics_listen"):
        await MetricsServer(CollectorRegistry()).start(address)
    with pytest.raises(ConfigError, match="advertise"):
        await MetricsServer(CollectorRegistry()).start("0.0.0.0:0")
    await server.close()


async def test_advertised_host_is_used_with_our_own_port() -> None:
    server = MetricsServer(CollectorRegistry(), advertise="localhost:1234")
    address = await server.start("127.0.0.1:0")
    assert address.startswith("localhost:")
    assert address != "localhost:1234"
    await server.close()


async def test_connected_client_does_not_keep_the_server_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CLOSE_LIMIT_S", 0.05)
    server = MetricsServer(CollectorRegistry())
    host, _, port = (await server.start("127.0.0.1:0")).rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(2):
        await server.close()
    writer.close()
    await writer.wait_closed()


def test_a_hot_histogram_says_what_the_librarys_own_would() -> None:
    bounds, values = (0.1, 0.5, 1.0), (0.05, 0.1, 0.3, 0.5, 0.7, 2.0, 2.0)
    own, registry = CollectorRegistry(), CollectorRegistry()
    theirs = Histogram("baton_gap_seconds", "Gaps.", ["model"], buckets=bounds, registry=own).labels("m")
    ours = HotHistogram("baton_gap_seconds", "Gaps.", ["model"], bounds, registry).series("m")
    for value in values[:-1]:
        theirs.observe(value)
    theirs.observe(values[-1])
    for value in values[:-2]:
        ours.observe(value)
    ours.observe(2.0, times=2)

    def samples(registry: CollectorRegistry) -> dict[str, float]:
        lines = generate_latest(registry).decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#") if "_created" not in name}

    assert samples(registry) == pytest.approx(samples(own))
