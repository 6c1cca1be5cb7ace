import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest
import uvloop
from baton_runtime.rpc import open_channel
from baton_runtime.testing import EtcdProcess

SERVICE = "baton.probe.v1.Probe"


STARTS_PROCESSES = ("test_discovery_etcd", "test_lifecycle", "test_testing")


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(config: object, item: pytest.Item) -> dict[str, object]:
    """Tests run on the loop services run on, but for those that start processes: uvloop forks where subprocess uses vfork, and the
    fork of a process with gRPC threads crashes or hangs in the child now and then. No service starts one."""
    return {"asyncio": asyncio.new_event_loop} if item.path.stem in STARTS_PROCESSES else {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def etcd() -> AsyncIterator[EtcdProcess]:
    async with EtcdProcess() as process:
        yield process


class Probe:
    """A channel to a server whose methods are the given functions, by name."""

    def __init__(self, channel: grpc.aio.Channel, server: grpc.aio.Server) -> None:
        self.channel = channel
        self.server = server

    def unary(self, name: str) -> Any:
        return self.channel.unary_unary(f"/{SERVICE}/{name}")

    def stream(self, name: str) -> Any:
        return self.channel.unary_stream(f"/{SERVICE}/{name}")

    def both(self, name: str) -> Any:
        return self.channel.stream_stream(f"/{SERVICE}/{name}")

    def up(self, name: str) -> Any:
        return self.channel.stream_unary(f"/{SERVICE}/{name}")


@contextlib.asynccontextmanager
async def serving(
    unary: Sequence[Callable[..., Any]] = (),
    stream: Sequence[Callable[..., Any]] = (),
    both: Sequence[Callable[..., Any]] = (),
    up: Sequence[Callable[..., Any]] = (),
    interceptors: Sequence[Any] = (),
) -> AsyncIterator[Probe]:
    server = grpc.aio.server(interceptors=interceptors)
    handlers = {f.__name__: grpc.unary_unary_rpc_method_handler(f) for f in unary}
    handlers |= {f.__name__: grpc.unary_stream_rpc_method_handler(f) for f in stream}
    handlers |= {f.__name__: grpc.stream_stream_rpc_method_handler(f) for f in both}
    handlers |= {f.__name__: grpc.stream_unary_rpc_method_handler(f) for f in up}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = open_channel(f"127.0.0.1:{port}")
    try:
        yield Probe(channel, server)
    finally:
        await channel.close()
        await server.stop(0)
        await asyncio.sleep(0)


@pytest.fixture
def probe() -> Callable[..., contextlib.AbstractAsyncContextManager[Probe]]:
    """A server with hand-made methods and a channel to it, for tests of how grpc.aio behaves."""
    return serving
