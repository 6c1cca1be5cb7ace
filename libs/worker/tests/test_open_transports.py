"""Which transports a worker starts with when one of them cannot be opened."""

from contextlib import AsyncExitStack

import pytest
from baton_handoff.transports import TransportUnavailable
from baton_runtime.errors import ConfigError
from baton_worker.worker import open_transports


class FakeTransport:
    def __init__(self, name, problem=""):
        self.name = name
        self.problem = problem
        self.is_closed = False

    async def open(self):
        if self.problem:
            raise TransportUnavailable(self.name, self.problem)

    async def close(self):
        self.is_closed = True


async def opened(*transports):
    async with AsyncExitStack() as closing:
        return [transport.name for transport in await open_transports(transports, "decode", closing)]


async def test_all_are_opened_and_closed():
    transports = FakeTransport("nixl"), FakeTransport("tcp")
    assert await opened(*transports) == ["nixl", "tcp"]
    assert all(transport.is_closed for transport in transports)


async def test_nixl_without_its_hardware_is_left_out_beside_another(capsys):
    nixl = FakeTransport("nixl", "no RDMA device is present")
    assert await opened(FakeTransport("shm"), nixl, FakeTransport("tcp")) == ["shm", "tcp"]
    assert nixl.is_closed
    assert "no RDMA device is present" in capsys.readouterr().out


async def test_nixl_alone_without_its_hardware_names_the_setting_and_the_reason():
    with pytest.raises(ConfigError, match=r"decode\.transports: nixl: no RDMA device is present"):
        await opened(FakeTransport("nixl", "no RDMA device is present"))


async def test_port_in_use_names_transfer_listen():
    with pytest.raises(ConfigError, match=r"decode\.transfer_listen: tcp: cannot listen"):
        await opened(FakeTransport("shm"), FakeTransport("tcp", "cannot listen"))
