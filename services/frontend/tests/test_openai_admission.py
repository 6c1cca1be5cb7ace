"""Bounds of the HTTP side: what is refused before it costs anything, and that everything held is given back."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from baton_frontend.admission import AdmissionLimits
from baton_frontend.openai_http import HttpSettings

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
PATH = "/v1/chat/completions"
BODY = json.dumps(CHAT).encode()
Serve = Any


async def parts(*, size: int, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


async def until_held(served: Any, num_bytes: int) -> None:
    async with asyncio.timeout(5):
        while served.admission.num_bytes != num_bytes:
            await asyncio.sleep(0.001)


async def test_a_full_frontend_answers_before_it_reads_the_body(serve: Serve) -> None:
    async with serve(limits=AdmissionLimits(max_inflight=1, retry_after_ms=1500)) as served:
        served.admission.admit(10)
        reader, writer = await asyncio.open_connection(*served.address.split(":"))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        writer.close()
    assert head.startswith("HTTP/1.1 429")
    assert "\r\nRetry-After: 2\r\n" in head
    assert not served.generator.started


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_that_does_not_fit_beside_others_is_429_and_names_the_setting(serve: Serve, is_chunked: bool) -> None:
    settings, limits = HttpSettings(max_body_bytes=4000), AdmissionLimits(max_held_bytes=5000)
    async with serve(settings=settings, limits=limits) as served, aiohttp.ClientSession(served.url) as session:
        _, uploading = await asyncio.open_connection(*served.address.split(":"))
        uploading.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n")
        await until_held(served, 3000)
        data = parts(size=500, count=6) if is_chunked else b"x" * 3000
        async with session.post(PATH, data=data) as response:
            answer = await response.json()
            assert (response.status, response.headers["Retry-After"]) == (429, "1")
        async with session.post(PATH, data=BODY) as small:
            assert small.status == 200
        uploading.close()
        await until_held(served, 0)
    assert "frontend.max_held_bytes" in answer["error"]["message"]
    assert answer["error"]["type"] == "rate_limit_error"


async def test_the_body_is_held_until_the_answer_is_out(serve: Serve) -> None:
    async with serve(is_manual=True) as served, aiohttp.ClientSession(served.url) as session:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(_post(session, BODY))
            await until_held(served, len(BODY))
            async with asyncio.timeout(5):
                while not served.generator.started:
                    await asyncio.sleep(0.001)
            served.generator.started[0].push(5)
            served.generator.started[0].end("stop")
        assert task.result() == 200
        assert served.admission.num_bytes == 0


@pytest.mark.parametrize("data", [b"{", b"x" * 300, parts(size=100, count=3)])
async def test_refused_bodies_are_given_back(serve: Serve, data: Any) -> None:
    async with serve(settings=HttpSettings(max_body_bytes=200)) as served, aiohttp.ClientSession(served.url) as session:
        assert await _post(session, data) in (400, 413)
        assert served.admission.num_bytes == 0


async def test_text_held_for_slow_readers_counts_and_the_one_past_the_bound_is_cut(serve: Serve) -> None:
    settings, limits = HttpSettings(max_body_bytes=2000), AdmissionLimits(max_held_bytes=4000)
    async with serve(is_manual=True, settings=settings, limits=limits) as served:
        _, writer = await asyncio.open_connection(*served.address.split(":"), limit=1024)
        body = json.dumps({**CHAT, "stream": True, "max_tokens": 200}).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        async with asyncio.timeout(10):
            while not served.generator.started:
                await asyncio.sleep(0.001)
            generation = served.generator.started[0]
            while not generation.is_cancelled:
                generation.push(*[70] * 200)
                assert served.admission.num_bytes <= 4000
                await asyncio.sleep(0)
        await until_held(served, 0)
        writer.close()


async def _post(session: aiohttp.ClientSession, data: Any) -> int:
    async with session.post(PATH, data=data) as response:
        await response.read()
        return response.status
