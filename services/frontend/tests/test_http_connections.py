"""What a client may take its time for, and what of a connection is left at the end; on uvloop, as in production."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from baton_frontend import connections
from baton_frontend.connections import ConnectionLimits
from baton_runtime.testing import wait_until

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = b"x" * (16 << 20)  # more than the kernel's buffers take
Serve = Any


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
    headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
    return int(status.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def rest(reader: asyncio.StreamReader) -> int:
    """Bytes that still come until the connection is closed, be it by a reset: what we sent meanwhile was not read."""
    num_bytes = 0
    try:
        while data := await reader.read(65536):
            num_bytes += len(data)
    except ConnectionError:
        pass
    return num_bytes


@pytest.mark.parametrize("start", [b"", b"G", GET[:-2], GET[:-2] + b"X-A: 1\r\n"])
async def test_a_head_that_is_never_finished_ends_the_connection(serve: Serve, start: bytes) -> None:
    async with serve(connections=ConnectionLimits(head_timeout_s=0.05)) as served, connect(served.address) as (reader, writer):
        writer.write(start)
        assert await reader.read() == b""


async def test_a_head_that_drips_has_no_more_time_than_one_that_stops(serve: Serve) -> None:
    async with serve(connections=ConnectionLimits(head_timeout_s=0.1)) as served, connect(served.address) as (reader, writer):
        async with asyncio.TaskGroup() as tasks:
            closed = tasks.create_task(rest(reader))
            writer.write(GET[:-2])
            while not closed.done():
                writer.write(b"X-A: 1\r\n")
                await asyncio.sleep(0.01)
        assert closed.result() == 0


async def test_a_later_head_has_the_same_limit(serve: Serve) -> None:
    async with serve(connections=ConnectionLimits(head_timeout_s=0.05)) as served, connect(served.address) as (reader, writer):
        writer.write(GET)
        assert (await answer(reader))[0] == 200
        writer.write(GET[:10])
        assert await reader.read() == b""


async def test_a_connection_is_kept_for_the_idle_time_and_the_head_limit_does_not_count_then(serve: Serve) -> None:
    limits = ConnectionLimits(head_timeout_s=0.02, idle_timeout_s=0.5)
    async with serve(connections=limits) as served, connect(served.address) as (reader, writer):
        for _ in range(3):
            writer.write(GET)
            assert (await answer(reader))[0] == 200
            await asyncio.sleep(0.05)  # longer than the limit on a head, shorter than the idle time
        began = asyncio.get_running_loop().time()
        assert await reader.read() == b""
        assert asyncio.get_running_loop().time() - began > 0.3


async def test_a_slow_body_is_not_taken_for_a_slow_head(serve: Serve) -> None:
    async with serve(connections=ConnectionLimits(head_timeout_s=0.02)) as served, connect(served.address) as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{")
        await asyncio.sleep(0.1)  # several times the limit
        writer.write(b"}")
        assert (await answer(reader))[0] == 400


@pytest.mark.parametrize("head", [b"GET /" + b"a" * 600 + b" HTTP/1.1\r\nHost: x\r\n\r\n", GET[:-2] + b"X-A: " + b"a" * 600 + b"\r\n\r\n"])
async def test_a_long_line_is_431_and_names_the_setting(serve: Serve, head: bytes) -> None:
    async with serve(connections=ConnectionLimits(max_header_bytes=512)) as served, connect(served.address) as (reader, writer):
        writer.write(head)
        status, headers, body = await answer(reader)
        assert await reader.read() == b""
    assert status == 431
    assert headers["x-request-id"]
    assert "512 bytes (frontend.max_header_bytes)" in json.loads(body)["error"]["message"]


async def test_what_is_not_http_is_400_in_openais_form_without_a_traceback(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async with serve() as served, connect(served.address) as (reader, writer):
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        status, _, body = await answer(reader)
        assert await reader.read() == b""
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_head")
    assert not caplog.records


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/none", "/nothing", "/v1/completions"])
async def test_every_answer_has_a_request_id(serve: Serve, path: str) -> None:
    async with serve() as served, connect(served.address) as (reader, writer):
        writer.write(GET.replace(b"/health", path.encode()))
        assert (await answer(reader))[1]["x-request-id"]


async def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(serve: Serve) -> None:
    limits = ConnectionLimits(slow_reader_timeout_s=0.05)
    async with serve(connections=limits, exposition=LARGE) as served, connect(served.address) as (reader, writer):
        writer.write(GET.replace(b"health", b"metrics"))
        await reader.readuntil(b"\r\n\r\n")
        await served.server.wait_idle()
        assert await rest(reader) < len(LARGE)


async def test_waiting_for_idle_waits_for_the_last_byte_of_an_answer(serve: Serve) -> None:
    async with serve(exposition=LARGE) as served, connect(served.address) as (reader, writer):
        await served.server.wait_idle()
        writer.write(GET.replace(b"health", b"metrics"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        async with asyncio.TaskGroup() as tasks:
            idle = tasks.create_task(served.server.wait_idle())
            await reader.readexactly(len(LARGE) // 2)
            assert not idle.done()
            await reader.readexactly(len(LARGE) - len(LARGE) // 2)


async def test_a_client_that_has_just_connected_is_heard_by_a_server_that_stops(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first request may be under way already."""
    monkeypatch.setattr(connections, "FIRST_REQUEST_S", 3.0)
    async with serve() as served, connect(served.address) as (reader, writer), asyncio.TaskGroup() as tasks:
        await wait_until(lambda: served.server._connections())
        await served.server.stop_listening()
        idle = tasks.create_task(served.server.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
        writer.write(GET)
        assert (await answer(reader))[0] == 200
        await idle


async def test_a_client_that_connects_and_says_nothing_keeps_a_server_that_stops_only_for_a_moment(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FIRST_REQUEST_S", 0.05)
    async with serve() as served, connect(served.address):
        await wait_until(lambda: served.server._connections())
        await served.server.stop_listening()
        await served.server.wait_idle()
