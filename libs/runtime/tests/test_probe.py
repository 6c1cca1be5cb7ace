"""The probe says whether a server serves, and never raises."""

import asyncio

import pytest
from baton_runtime.metrics import MetricsServer
from baton_runtime.probe import why_not
from baton_runtime.rpc import GrpcServer

LIMIT_S = 10.0


async def test_a_serving_grpc_server_is_well_and_a_draining_one_is_not():
    server = GrpcServer("127.0.0.1:0")
    address = await server.start()
    assert await asyncio.to_thread(why_not, address, LIMIT_S) == ""
    server.set_serving(False)
    assert await asyncio.to_thread(why_not, address, LIMIT_S) == "NOT_SERVING"
    await server.close()
    assert (await asyncio.to_thread(why_not, address, LIMIT_S)).startswith("UNAVAILABLE: ")


@pytest.mark.parametrize(("path", "expected"), [("health", ""), ("nowhere", "status 404")])
async def test_http_is_judged_by_the_status(path: str, expected: str):
    server = MetricsServer()
    address = await server.start("127.0.0.1:0")
    assert await asyncio.to_thread(why_not, f"http://{address}/{path}", LIMIT_S) == expected
    await server.close()
    assert "refused" in await asyncio.to_thread(why_not, f"http://{address}/{path}", LIMIT_S)
