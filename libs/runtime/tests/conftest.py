from collections.abc import AsyncIterator

import pytest
import uvloop
from baton_runtime.testing import EtcdProcess


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(config: object, item: object) -> dict[str, object]:
    """Tests run on the loop services run on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def etcd() -> AsyncIterator[EtcdProcess]:
    async with EtcdProcess() as process:
        yield process
