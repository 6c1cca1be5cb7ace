"""Several frontend processes on one port."""

import asyncio
from pathlib import Path

import aiohttp
import pytest
from clients import Answer, stream
from cluster import Cluster, cluster, until

pytestmark = pytest.mark.timeout(90)
PROMPT = list(range(10, 40))
NUM_TOKENS = 200
SLOW_STEPS = 'description = "slow enough to be killed in mid-stream"\n[decode_ms]\nconstant = 20.0\n'


async def inflight(house: Cluster, name: str) -> int:
    return int((await house.metrics(name))["baton_inflight_requests"])


async def test_a_frontend_that_dies_takes_only_its_own_connections_with_it(tmp_path: Path) -> None:
    profile = tmp_path / "slow.toml"
    profile.write_text(SLOW_STEPS)
    async with cluster(tmp_path / "run", profile=str(profile), frontend=2) as house:
        instances = [i for i in (await house.report()).instances if i.service == "frontend"]
        assert len({i.pid for i in instances}) == 2
        assert {i.address for i in instances} == {house.url.removeprefix("http://")}

        answers: list[Answer] = []
        running: list[asyncio.Task[Answer]] = []
        # A connection each, so that the kernel spreads them.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:

            async def more() -> bool | None:
                for _ in range(4):
                    answers.append(Answer())
                    body = {"model": "test-model", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
                    running.append(asyncio.create_task(stream(http, house.url, answers[-1], **body)))
                await asyncio.gather(*(answer.progressed.wait() for answer in answers))
                return all([await inflight(house, i.instance_id) for i in instances]) or None

            await until("both frontends have streams", more, 30)
            num_lost = await inflight(house, "frontend-0")
            await house.kill("frontend-0")
            results = await asyncio.gather(*running, return_exceptions=True)
            whole = [answer for answer in results if isinstance(answer, Answer)]
            assert len(results) - len(whole) == num_lost
            assert all(isinstance(result, Answer | aiohttp.ClientError) for result in results)
            assert all(len(answer.token_ids) == NUM_TOKENS and answer.error is None for answer in whole)
            assert len({tuple(answer.token_ids) for answer in whole}) == 1

            # The port goes on without it, and with it again.
            again = await asyncio.gather(*(stream(http, house.url, model="test-model", prompt=PROMPT, max_tokens=3) for _ in range(8)))
            assert all(len(answer.token_ids) == 3 for answer in again)
            await house.start("frontend-0")
            assert house.instance("frontend-0").http_address == house.url.removeprefix("http://")
        await house.settled()
