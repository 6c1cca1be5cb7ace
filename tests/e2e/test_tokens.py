"""Law 3: tokens of a disaggregated run are those of transformers generate() on the same weights (float32, greedy)."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from clients import stream
from cluster import Cluster, cluster

LENGTHS = (2, 15, 16, 17, 18, 33, 47, 100, 200)  # around the borders of 16-token blocks: all but the last token are handed over
NEW_TOKENS = 24  # as many as the generate fixture draws
VOCABULARY = range(10, 250)


def prompts(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    source = random.Random(seed)
    return [source.choices(VOCABULARY, k=length) for length in lengths]


async def answers(house: Cluster, batch: list[list[int]]) -> list[list[int]]:
    """All prompts at once, so that they share batches."""
    body = {"model": "test-model", "max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0}
    found = await asyncio.gather(*(stream(house.http, house.url, prompt=prompt, **body) for prompt in batch))
    return [answer.token_ids for answer in found]


async def confirmed(house: Cluster, *decodes: str) -> tuple[float, float]:
    """Confirmed handoffs and their bytes over these decode instances."""
    samples = [await house.metrics(name) for name in decodes]
    handoffs = sum(v for s in samples for k, v in s.items() if k.startswith("baton_handoffs_total{") and 'outcome="confirmed"' in k)
    return handoffs, sum(s["baton_handoff_bytes_total"] for s in samples)


@pytest.fixture(params=["shm 1+1", "tcp 1+1", "shm,tcp 2+2"])
async def house(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> AsyncIterator[Cluster]:
    transports, shape = request.param.split()
    prefill, decode = map(int, shape.split("+"))
    environment = {f"BATON_{service}_TRANSPORTS": transports for service in ("PREFILL", "DECODE")}
    async with cluster(tmp_path, engine="torch", model=model, prefill=prefill, decode=decode, environment=environment) as made:
        yield made


@pytest.mark.timeout(120)
async def test_tokens_equal_generate_with_and_without_prefix_hits(house: Cluster, generate: Callable[[list[int]], list[int]]) -> None:
    """Mixed batch; then the same prompts extended, when both sides have their prefixes; one confirmed handoff per request."""
    decodes = [name for name in house.children if name.startswith("decode")]
    first = prompts(seed=1)
    assert await answers(house, first) == [generate(prompt) for prompt in first]
    handoffs, num_bytes = await confirmed(house, *decodes)
    assert handoffs == len(first)
    assert num_bytes > 0
    second = [prompt + tail for prompt, tail in zip(first, prompts(seed=2), strict=True)]
    assert await answers(house, second) == [generate(prompt) for prompt in second]
    await house.settled()


@pytest.mark.timeout(120)
async def test_tokens_equal_generate_when_only_one_side_has_the_prefix(
    model: Path, tmp_path: Path, generate: Callable[[list[int]], list[int]]
) -> None:
    """A decode that lost its cache gets everything from prefill's; a prefill that lost its own computes what decode has."""
    async with cluster(tmp_path, engine="torch", model=model) as house:
        prompt, tail, more = prompts(seed=3, lengths=(100, 20, 40))
        assert await answers(house, [prompt]) == [generate(prompt)]
        await house.kill("decode-0")
        await house.start("decode-0")
        assert await answers(house, [prompt + tail]) == [generate(prompt + tail)]
        await house.kill("prefill-0")
        await house.start("prefill-0")
        assert await answers(house, [prompt + tail + more]) == [generate(prompt + tail + more)]
        await house.settled()
