"""Bytes on the socket: keep-alive, pipelining, HTTP/1.0, HEAD, slow readers; on uvloop, as in production."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from baton_frontend.openai_http import HttpSettings

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
SMALL_BUFFER_BYTES = 4096  # the kernel's: so that little is enough to make a reader slow
Serve = Any


def request(body: dict[str, Any] | None = None, *, version: str = "1.1", headers: str = "") -> bytes:
    data = json.dumps(body or CHAT).encode()
    head = f"POST /v1/chat/completions HTTP/{version}\r\nHost: x\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def read_head(reader: asyncio.StreamReader) -> tuple[bytes, dict[bytes, bytes]]:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
    return status, {name.lower(): value.strip() for name, value in (line.split(b":", 1) for line in lines)}


async def read_chunks(reader: asyncio.StreamReader) -> bytes:
    """The body of one chunked response; checks the framing."""
    body = b""
    while True:
        size = int(await reader.readline(), 16)
        chunk = await reader.readexactly(size + 2)
        assert chunk.endswith(b"\r\n")
        if size == 0:
            return body
        body += chunk[:-2]


async def read_response(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    status, headers = await read_head(reader)
    if headers.get(b"transfer-encoding") == b"chunked":
        return status, await read_chunks(reader)
    return status, await reader.readexactly(int(headers[b"content-length"]))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def test_the_loop_is_uvloop() -> None:
    assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")


async def test_a_connection_is_kept_through_streams_and_answers(serve: Serve) -> None:
    async with serve() as served, connect(served.address) as (reader, writer):
        for is_stream in (True, False, True, True):
            writer.write(request({**CHAT, "stream": is_stream}))
            status, body = await read_response(reader)
            assert status == b"HTTP/1.1 200 OK"
            assert body.endswith(b"data: [DONE]\n\n") == is_stream


async def test_pipelined_requests_are_answered_in_order(serve: Serve) -> None:
    async with serve(tokens_of=lambda g: [70] * g.max_tokens) as served, connect(served.address) as (reader, writer):
        bodies = [{**CHAT, "max_tokens": n, "stream": n % 2 == 0} for n in range(1, 7)]
        writer.write(b"".join(map(request, bodies)) + request({**CHAT, "temperature": 9}))
        for body in bodies:
            _, answer = await read_response(reader)
            assert answer.count(b'"content"') == (body["max_tokens"] + 1 if body["stream"] else 1)
        assert (await read_response(reader))[0].startswith(b"HTTP/1.1 400")


async def test_http_1_0_gets_a_plain_body_and_a_closed_connection(serve: Serve) -> None:
    async with serve() as served, connect(served.address) as (reader, writer):
        writer.write(request(version="1.0", headers="Connection: keep-alive\r\n"))
        status, headers = await read_head(reader)
        body = await reader.read()  # to the end of the connection
    assert status == b"HTTP/1.0 200 OK"
    assert headers[b"connection"] == b"close"
    assert b"transfer-encoding" not in headers
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


async def test_connection_close_is_honoured(serve: Serve) -> None:
    async with serve() as served, connect(served.address) as (reader, writer):
        writer.write(request(headers="Connection: close\r\n"))
        status, headers = await read_head(reader)
        assert (status, headers[b"connection"]) == (b"HTTP/1.1 200 OK", b"close")
        assert (await read_chunks(reader)).endswith(b"data: [DONE]\n\n")
        assert await reader.read() == b""


async def test_head_has_no_body_and_keeps_the_connection(serve: Serve) -> None:
    async with serve() as served, connect(served.address) as (reader, writer):
        writer.write(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\nHEAD /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read_head(reader))[0] == b"HTTP/1.1 200 OK"
        assert (await read_head(reader))[0].startswith(b"HTTP/1.1 405")
        writer.write(request())
        assert (await read_response(reader))[0] == b"HTTP/1.1 200 OK"


async def test_the_head_leaves_with_the_first_token_in_one_piece(serve: Serve) -> None:
    async with serve(is_manual=True) as served, connect(served.address) as (reader, writer):
        writer.write(request())
        await until(lambda: bool(served.generator.live))
        served.generator.live[0].push(70)
        data = await reader.read(65536)
        assert data.startswith(b"HTTP/1.1 200 OK\r\n")
        assert data.count(b"data: ") == 2  # role, then the token


async def test_answers_nobody_reads_hold_back_the_requests_behind_them(serve: Serve) -> None:
    body = {**CHAT, "stream": False, "max_tokens": 50_000, "return_token_ids": True}
    async with serve(max_model_tokens=100_000, tokens_per_step=100_000) as served, connect(served.address) as (_, writer):
        writer.write(request(body) * 60)
        await until(lambda: bool(served.generator.started))
        num_started = 0
        while num_started != len(served.generator.started):
            num_started = len(served.generator.started)
            for _ in range(500):  # turns in which the next one would be answered
                await asyncio.sleep(0)
        assert num_started < 60


async def push_until_slow(started: Any, is_slow: Callable[[], bool]) -> int:
    """Push until the reader's buffers are full; returns the number of tokens."""
    async with asyncio.timeout(10):
        while not is_slow():
            started.push(70)
            await asyncio.sleep(0)
    return int(started.num_delivered)


@asynccontextmanager
async def paused_stream(served: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, Any, Any]]:
    """A stream whose client does not read."""
    async with connect(served.address) as (reader, writer):
        writer.transport.pause_reading()
        writer.write(request())
        await until(lambda: bool(served.generator.live))
        started = served.generator.live[0]
        started.push(70)
        connection = started._sink._writer._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER_BYTES)
        yield reader, writer, started, started._sink._writer


async def test_a_slow_reader_gets_everything_in_fewer_events(serve: Serve) -> None:
    async with serve(is_manual=True) as served, paused_stream(served) as (reader, writer, started, out):
        num_before = await push_until_slow(started, lambda: out.is_slow)
        for _ in range(5000):
            started.push(71)
        started.push(72)
        writer.transport.resume_reading()
        await read_head(reader)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(read_chunks(reader))
            await until(lambda: not out.is_slow)
            started.push(73)
            started.end("length")
        body = reading.result()
    events = [json.loads(event[6:]) for event in body.split(b"\n\n")[:-2]]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    one, two, three, four = (served_text(token) for token in (70, 71, 72, 73))
    assert text == one * num_before + two * 5000 + three + four
    assert len(events) < num_before + 100


def served_text(token_id: int) -> str:
    from baton_frontend.testing_models import byte_level_tokenizer

    text: str = byte_level_tokenizer().decode([token_id])
    return text


async def test_a_slow_reader_gets_the_end_too(serve: Serve) -> None:
    async with serve(is_manual=True) as served, paused_stream(served) as (reader, writer, started, out):
        await push_until_slow(started, lambda: out.is_slow)
        started.push(71)
        started.end("length")
        writer.transport.resume_reading()
        await read_head(reader)
        assert (await read_chunks(reader)).endswith(b"data: [DONE]\n\n")


async def test_a_reader_too_far_behind_is_cut_off(serve: Serve) -> None:
    async with (
        serve(is_manual=True, settings=HttpSettings(slow_reader_limit_bytes=1000)) as served,
        paused_stream(served) as (_, _, started, out),
    ):
        await push_until_slow(started, lambda: out.is_slow)
        for _ in range(2000):
            started.push(71)
        assert started.is_cancelled
        await until(lambda: len(served.records) == 1)


async def test_a_reader_that_stands_still_is_cut_off_after_a_while(serve: Serve) -> None:
    async with (
        serve(is_manual=True, settings=HttpSettings(slow_reader_timeout_s=0.05)) as served,
        paused_stream(served) as (_, _, started, out),
    ):
        await push_until_slow(started, lambda: out.is_slow)
        await until(lambda: started.is_cancelled)
        await until(lambda: len(served.records) == 1)


async def test_a_token_for_a_closed_connection_is_no_error(serve: Serve) -> None:
    async with serve(is_manual=True) as served, connect(served.address) as (_, writer):
        writer.write(request())
        await until(lambda: bool(served.generator.live))
        started = served.generator.live[0]
        started.push(70)
        started._sink._writer._transport.abort()
        async with asyncio.timeout(5):
            while not started.is_cancelled:
                started._sink.on_tokens((70,), None)  # also between the close and the handler's cancellation
                await asyncio.sleep(0)
        started._sink.on_tokens((70,), None)
        await until(lambda: len(served.records) == 1)
