"""A client that leaves ends its call at every await of a handler: nothing runs on, nothing is submitted late."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

Serve = Any
PATH = "/v1/chat/completions"


def body(**fields: object) -> bytes:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **fields}).encode()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def call(served: Any, data: bytes, length: int | None = None) -> AsyncIterator[Callable[[], None]]:
    """Sends a request; gives a function with which its client leaves."""
    host, port = served.address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(data)}\r\n\r\n".encode() + data)
    try:
        yield writer.transport.abort
    finally:
        writer.transport.abort()


async def ended(served: Any) -> Any:
    """The record of the one call."""
    await until(lambda: bool(served.records))
    return served.records[0]


async def test_while_the_body_is_read(serve: Serve) -> None:
    async with serve() as served, call(served, b"{", length=100) as leave:
        await asyncio.sleep(0)
        leave()
        assert (await ended(served)).status in (400, 499)  # the handler sees its cancellation or the broken body first
    assert served.generator.started == []


@pytest.mark.parametrize("is_loaded", [False, True])
async def test_while_the_model_is_loaded_or_the_prompt_tokenized(serve: Serve, is_loaded: bool) -> None:
    release = threading.Event()
    async with serve() as served:
        if is_loaded:
            async with call(served, body()):
                await until(lambda: len(served.records) == 1)
            served.records.clear()
            served.generator.started.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(served.pool.run(lambda: release.wait(10)))  # the only thread
            async with call(served, body(messages=[{"role": "user", "content": "long " * 1000}], stream=True)) as leave:
                await until(lambda: served.pool.stats()["depth"] == 2)
                leave()
                assert (await ended(served)).status == 499
            assert served.pool.stats()["depth"] == 1
            release.set()
    assert served.generator.started == []


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_before_and_after_the_first_token(serve: Serve, is_stream: bool, num_tokens: int) -> None:
    async with serve(is_manual=True) as served, call(served, body(stream=is_stream, n=2)) as leave:
        await until(lambda: len(served.generator.live) == 2)
        for started in served.generator.started:
            for _ in range(num_tokens):
                started.push(70)
        leave()
        record = await ended(served)
    assert [started.is_cancelled for started in served.generator.started] == [True, True]
    assert (record.status, record.output_tokens) == (499, 2 * num_tokens)


async def test_after_a_stop_string_before_the_end_is_reported(serve: Serve) -> None:
    async with serve(is_manual=True) as served, call(served, body(stream=True, stop="a")) as leave:
        await until(lambda: bool(served.generator.live))
        started = served.generator.live[0]
        started.ends_on_cancel = False
        for token_id in range(60, 120):
            started.push(token_id)
        assert started.is_cancelled
        leave()
        assert (await ended(served)).status == 499
        started.end("cancelled")


async def test_close_of_the_server_ends_what_runs(serve: Serve) -> None:
    async with serve(is_manual=True) as served, call(served, body(stream=True)):
        await until(lambda: bool(served.generator.live))
    assert served.generator.started[0].is_cancelled
    assert served.records[0].status == 499
