"""The wiring: it serves without etcd on every address of its host, says under which name it is reached, and ends."""

from baton_router.config import RouterConfig
from baton_router.main import RouterService


async def test_listening_everywhere_both_addresses_are_told_by_the_advertised_host(monkeypatch):
    config = RouterConfig(listen="0.0.0.0:0", metrics_listen="0.0.0.0:0", advertise="localhost", etcd="127.0.0.1:1")
    service, told = RouterService(config), {}
    monkeypatch.setattr(service, "log_ready", lambda **addresses: told.update(addresses))
    async with service.tasks:
        try:
            await service.start()
            await service.drain()
        finally:
            await service.close()
    assert [address.partition(":")[0] for address in told.values()] == ["localhost", "localhost"]
