"""The feature as users meet it: a real OpenAI client, the demo model, five processes."""

from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio
from cluster import Cluster, cluster

# Asked with temperature 0: at OpenAI's default of 1 the demo model says something else once in some 2,000 tokens, as it should.
QUESTION = "red = 4 7 1 ; blue = 2 2 8 ; red ?"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path_factory.mktemp("cluster"), engine="torch") as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def client(house: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0) as made:
        yield made


pytestmark = [pytest.mark.timeout(90), pytest.mark.asyncio(loop_scope="module")]


async def test_a_chat_is_answered_from_facts_in_the_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="test-model", temperature=0, messages=[{"role": "user", "content": QUESTION}])
    assert answer.choices[0].message.content == "4 7 1"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 4


async def test_a_repeated_prefix_is_reported_as_cached(client: openai.AsyncOpenAI) -> None:
    facts = " ; ".join(f"{word} = 4 7 {digit}" for digit, word in enumerate(("red", "blue", "green", "black", "white")))

    async def ask(word: str) -> tuple[str, int]:
        messages = [{"role": "user", "content": f"{facts} ; {word} ?"}]
        answer = await client.chat.completions.create(model="test-model", temperature=0, messages=messages)
        return answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens

    assert await ask("red") == ("4 7 0", 0)
    assert await ask("white") == ("4 7 4", 16)


async def test_a_streamed_chat_gives_the_same_text_and_its_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="test-model",
        temperature=0,
        messages=[{"role": "user", "content": QUESTION.replace("red ?", "blue ?")}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "2 2 8"
    assert chunks[-1].usage.prompt_tokens > 10


async def test_every_request_is_one_confirmed_handoff_with_bytes(house: Cluster, client: openai.AsyncOpenAI) -> None:
    def outcomes(samples: dict[str, float]) -> tuple[float, float]:
        confirmed = sum(v for k, v in samples.items() if k.startswith("baton_handoffs_total{") and 'outcome="confirmed"' in k)
        return confirmed, samples.get("baton_handoff_bytes_total", 0.0)

    before = outcomes(await house.metrics("decode-0"))
    for number in range(5):
        text = f"green = {number} 2 3 ; {QUESTION.replace('red ?', 'green ?')}"
        answer = await client.chat.completions.create(model="test-model", temperature=0, messages=[{"role": "user", "content": text}])
        assert answer.choices[0].message.content == f"{number} 2 3"
        after = outcomes(await house.metrics("decode-0"))
        assert after[0] == before[0] + 1
        assert after[1] > before[1]
        before = after
    await house.settled()


async def test_sampling_repeats_with_its_seed_and_varies_without(client: openai.AsyncOpenAI) -> None:
    async def draw(**settings: object) -> str:
        extra = {"ignore_eos": True}
        answer = await client.completions.create(
            model="test-model", prompt="red = 4 7 1", max_tokens=24, temperature=2, extra_body=extra, **settings
        )
        return answer.choices[0].text

    assert await draw(seed=7) == await draw(seed=7)
    assert len({await draw() for _ in range(4)}) > 1


async def test_logprobs_stop_strings_and_token_prompts_work(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="test-model", temperature=0, messages=[{"role": "user", "content": QUESTION}], logprobs=True, top_logprobs=3
    )
    first = chat.choices[0].logprobs.content[0]
    assert first.logprob <= 0
    assert first.logprob == first.top_logprobs[0].logprob
    assert len(first.top_logprobs) == 3
    messages = [{"role": "user", "content": QUESTION}]
    stopped = await client.chat.completions.create(model="test-model", temperature=0, messages=messages, stop=[" 1"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("4 7", "stop")
    ids = await client.completions.create(
        model="test-model", prompt=[1, 20, 21, 22], max_tokens=6, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    assert ids.usage.prompt_tokens == 4
    assert len(ids.choices[0].model_extra["token_ids"]) == 6


async def test_the_model_list_and_the_errors_are_openais(client: openai.AsyncOpenAI) -> None:
    assert [m.id for m in (await client.models.list()).data] == ["test-model"]
    with pytest.raises(openai.NotFoundError, match="unknown-model"):
        await client.chat.completions.create(model="unknown-model", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.chat.completions.create(model="test-model", messages=[{"role": "user", "content": "x"}], temperature=9)
    with pytest.raises(openai.BadRequestError, match="4096"):
        await client.completions.create(model="test-model", prompt=[20] * 5000, max_tokens=1)
