import asyncio
import time
from typing import Any

import grpc
import pytest
from baton_runtime import rpc
from baton_runtime.errors import ConfigError, ErrorInterceptor, NotFound
from baton_runtime.rpc import MESSAGE_LIMIT_BYTES, GrpcServer, advertised_address, deadline_of, open_channel, open_responses, split_address
from baton_runtime.testing import SwallowingProxy, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

KEEPALIVE = ("grpc.keepalive_time", "grpc.keepalive_timeout", "grpc.http2.ping_timeout")


def add(server: GrpcServer, **methods: Any) -> None:
    handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
    server.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("baton.test", handlers),))


@pytest.mark.parametrize(
    ("listen", "advertise", "expected"),
    [
        ("127.0.0.1:0", "", "127.0.0.1:50"),
        ("0.0.0.0:0", "worker-1", "worker-1:50"),
        ("0.0.0.0:0", "worker-1:7000", "worker-1:7000"),
        ("[::1]:0", "", "[::1]:50"),
        ("[::]:0", "[fd00::1]", "[fd00::1]:50"),
        ("0.0.0.0:0", "worker-1:0", "worker-1:50"),
    ],
)
def test_advertised_address(listen: str, advertise: str, expected: str) -> None:
    assert advertised_address(listen, 50, advertise) == expected


@pytest.mark.parametrize(("listen", "advertise"), [("0.0.0.0:0", ""), ("[::]:0", ""), (":0", ""), ("h:0", "0.0.0.0"), ("h:0", "h:port")])
def test_address_nobody_can_dial_is_refused(listen: str, advertise: str) -> None:
    with pytest.raises(ConfigError):
        advertised_address(listen, 50, advertise)


def test_split_address() -> None:
    assert split_address("host:1") == ("host", 1)
    assert split_address("host") == ("host", None)
    assert split_address("[::1]:2") == ("[::1]", 2)
    assert split_address("::1") == ("::1", None)
    with pytest.raises(ValueError, match="port"):
        split_address("host:99999")


async def test_server_serves_big_messages_and_health() -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    server = GrpcServer("127.0.0.1:0")
    add(server, Echo=echo)
    channel = open_channel(await server.start())
    health = health_pb2_grpc.HealthStub(channel)
    try:
        big = bytes(MESSAGE_LIMIT_BYTES - 1024)
        assert len(await channel.unary_unary("/baton.test/Echo")(big, timeout=10)) == len(big)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError):
            await health.Check(health_pb2.HealthCheckRequest(service="x"), timeout=5)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert (await watch.read()).status == SERVING
        server.set_serving(False)
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
    finally:
        await channel.close()
        await server.close()
        await server.close()


async def test_close_waits_for_the_cleanup_of_handlers() -> None:
    running, cleaned = asyncio.Event(), []

    async def waits(request: bytes, context: Any) -> bytes:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(True)
        return b""

    server = GrpcServer("127.0.0.1:0")
    add(server, Waits=waits)
    channel = open_channel(await server.start())
    call = channel.unary_unary("/baton.test/Waits")(b"", timeout=10)
    await running.wait()
    await server.close()
    assert cleaned
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    await channel.close()


async def test_port_in_use_is_a_config_error() -> None:
    first, second = GrpcServer("127.0.0.1:0"), None
    address = await first.start()
    try:
        second = GrpcServer(address)
        with pytest.raises(ConfigError, match="cannot bind"):
            await second.start()
    finally:
        await first.close()


async def test_wildcard_without_advertised_host_is_refused_before_it_serves() -> None:
    with pytest.raises(ConfigError, match="advertise"):
        await GrpcServer("0.0.0.0:0").start()


async def test_channel_finds_a_restarted_server_within_a_second() -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    first = GrpcServer("127.0.0.1:0")
    add(first, Echo=echo)
    address = await first.start()
    channel = open_channel(address)
    method = channel.unary_unary("/baton.test/Echo")
    await method(b"x", timeout=5)
    await first.close()
    with pytest.raises(grpc.aio.AioRpcError):
        await method(b"x", timeout=5)
    second = GrpcServer(address)
    add(second, Echo=echo)
    await second.start()
    assert await method(b"y", timeout=3, wait_for_ready=True) == b"y"
    await channel.close()
    await second.close()


async def test_registry_is_empty_after_calls() -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    server = GrpcServer("127.0.0.1:0")
    add(server, Echo=echo)
    channel = open_channel(await server.start())
    await asyncio.gather(*(channel.unary_unary("/baton.test/Echo")(b"x", timeout=5) for _ in range(50)))
    await wait_until(lambda: server._registry.running == 0)
    await channel.close()
    await server.close()


async def test_health_watch_does_not_keep_the_server_from_closing() -> None:
    server = GrpcServer("127.0.0.1:0")
    channel = open_channel(await server.start())
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
    assert (await watch.read()).status == SERVING
    async with asyncio.timeout(5):
        await server.close(grace_s=60)
    # On a busy machine the stream may be over before its last word has left.
    if (last := await watch.read()) is not grpc.aio.EOF:
        assert last.status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
    await channel.close()


async def test_deadline_of_a_call_is_what_is_left_less_a_margin() -> None:
    seen: list[float | None] = []

    async def looks(request: bytes, context: Any) -> bytes:
        deadline = deadline_of(context, margin_s=1.0)
        seen.append(None if deadline is None else deadline - time.monotonic())
        return b""

    server = GrpcServer("127.0.0.1:0")
    add(server, Looks=looks)
    channel = open_channel(await server.start())
    method = channel.unary_unary("/baton.test/Looks")
    await method(b"", timeout=5)
    await method(b"")
    assert seen[0] is not None
    assert 3 < seen[0] < 4.5
    assert seen[1] is None
    await channel.close()
    await server.close()


async def test_connection_that_swallows_everything_ends_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-open, with the keepalive shortened from 10 s + 3 s: the stream fails and a new connection is made."""
    quick = [(name, value // 10 if name.startswith(KEEPALIVE) else value) for name, value in rpc.CHANNEL_OPTIONS]
    monkeypatch.setattr(rpc, "CHANNEL_OPTIONS", quick)
    server = GrpcServer("127.0.0.1:0")
    async with SwallowingProxy(await server.start()) as network:
        channel = open_channel(network.address)
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert (await watch.read()).status == SERVING
        network.swallow()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asyncio.wait_for(watch.read(), 8)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await serving_again(health)
        await channel.close()
    await server.close()


async def serving_again(health: health_pb2_grpc.HealthStub) -> bool:
    """Asked until answered: a call may still be put on the connection that is being given up, and falls with it."""
    async with asyncio.timeout(8):
        while True:
            try:
                return (await health.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)).status == SERVING
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.05)


async def test_error_after_a_first_write_that_was_cancelled_under_way_is_answered(probe: Any) -> None:
    async def hasty(request: bytes, context: Any) -> None:
        assert await open_responses(context)
        first = asyncio.create_task(context.write(b"x" * 100_000))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        raise NotFound("a", "b")

    async with probe(stream=[hasty], interceptors=[ErrorInterceptor()]) as p:
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError) as seen:
                async for _ in p.stream("hasty")(b"", timeout=5):
                    pass
            assert seen.value.code() is grpc.StatusCode.NOT_FOUND
