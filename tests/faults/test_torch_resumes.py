"""Law 3 (c): after a decode process died in mid-stream, torch in float32 on CPU goes on with the very tokens of an undisturbed run."""

import asyncio
from pathlib import Path

import pytest
from clients import Answer, received, stream
from cluster import Cluster, cluster

pytestmark = pytest.mark.timeout(120)
PROMPT = [1, *(20 + i % 150 for i in range(40))]
SETTINGS = [{"temperature": 0}, {"temperature": 1, "seed": 11}, {"temperature": 1.5, "seed": 12, "top_k": 40, "presence_penalty": 0.5}]


async def ask(house: Cluster, settings: dict, answer: Answer | None = None) -> Answer:
    body = {"model": "test-model", "prompt": PROMPT, "max_tokens": 600, "ignore_eos": True, "logprobs": 1, **settings}
    return await stream(house.http, house.url, answer, **body)


async def test_greedy_and_sampled_streams_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    async with cluster(tmp_path, engine="torch", decode=2) as house:
        undisturbed = [await ask(house, settings) for settings in SETTINGS]
        answers = [Answer() for _ in SETTINGS]
        async with asyncio.TaskGroup() as group:
            for settings, answer in zip(SETTINGS, answers, strict=True):
                group.create_task(ask(house, settings, answer))
            await asyncio.gather(*(received(answer, 50) for answer in answers))
            busy = [i.instance_id for i in (await house.report()).instances if i.service == "decode" and i.running_sequences]
            await house.kill(busy[0])
        assert [a.token_ids for a in answers] == [a.token_ids for a in undisturbed]
        assert any(a.resumed for a in answers)
        await house.settled(without=(busy[0],))
