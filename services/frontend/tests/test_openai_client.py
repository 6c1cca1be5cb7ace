"""The openai package against the server."""

import asyncio
import warnings
from collections.abc import Callable
from typing import Any

import openai
import pytest
from baton_frontend.request_errors import EngineCrash
from baton_runtime.errors import QueueFull

Serve = Any
MESSAGES: Any = [{"role": "user", "content": "hello world"}]


@pytest.fixture
async def client(serve: Serve) -> Any:
    async with serve() as served, openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer.usage.prompt_tokens_details is not None


async def test_streamed_chat_with_usage(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=6)
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_completion_tokens=6, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


async def test_completions(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, logprobs=2)
    chunks = [c async for c in await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, stream=True)]
    for index in (0, 1):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == whole.choices[index].text
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.tokens is not None
    assert len(whole.choices[0].logprobs.tokens) == 4


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert [len(token.top_logprobs) for token in answer.choices[0].logprobs.content] == [3, 3]


async def test_errors_become_the_clients_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=7)


async def test_the_client_tries_again_after_429(serve: Serve) -> None:
    async with serve() as served, openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=1) as client:
        served.generator.refusal = QueueFull(1, 1, retry_after_ms=20)
        task = asyncio.create_task(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1))
        await until(lambda: bool(served.records))
        served.generator.refusal = None
        assert (await task).choices[0].finish_reason == "length"


async def test_the_client_does_not_send_again_what_workers_died_of(serve: Serve) -> None:
    async with serve() as served, openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=2) as client:
        served.generator.refusal = EngineCrash(2)
        with pytest.raises(openai.InternalServerError, match="2 workers failed"):
            await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert len(served.records) == 1


async def test_a_stream_left_midway_is_cancelled(serve: Serve) -> None:
    async with serve(is_manual=True) as served, openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
        create = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        task = asyncio.create_task(create)
        await until(lambda: bool(served.generator.live))
        started = served.generator.live[0]
        started.push(70)
        stream = await task
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
        await until(lambda: started.is_cancelled)


async def test_an_error_in_mid_stream_raises(serve: Serve) -> None:
    async with serve(is_manual=True) as served, openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
        task = asyncio.create_task(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        await until(lambda: bool(served.generator.live))
        started = served.generator.live[0]
        started.push(70)
        stream = await task
        started.end("failed", error=QueueFull(1, 1))
        with pytest.raises(openai.APIError, match="queue is full"):
            _ = [chunk async for chunk in stream]
