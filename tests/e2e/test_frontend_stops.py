"""SIGTERM to a frontend under load: what it has accepted is answered whole, what comes later is told so or finds nobody."""

import asyncio
import json
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from cluster import Cluster, cluster

NUM_CLIENTS, NUM_TOKENS = 24, 30


@dataclass
class Load:
    """Clients that ask again and again, each on a connection of its own, until nobody listens."""

    url: str
    outcomes: Counter[str] = field(default_factory=Counter)

    async def client(self, number: int) -> None:
        is_stream = number % 2 == 0
        async with aiohttp.ClientSession() as http:
            while not self.outcomes["nobody listens"]:
                try:
                    self.outcomes[await self._ask(http, is_stream)] += 1
                except aiohttp.ClientConnectorError:
                    self.outcomes["nobody listens"] += 1

    async def _ask(self, http: aiohttp.ClientSession, is_stream: bool) -> str:
        body = {"model": "test-model", "prompt": [5, 6, 7, 8], "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": is_stream}
        async with http.post(f"{self.url}/v1/completions", json={**body, "return_token_ids": True}) as response:
            data = await response.read()  # raises if the answer is cut short
            if response.status == 503:
                assert response.headers["Retry-After"]
                return "refused"
            assert response.status == 200, data
        if is_stream:
            events = data.decode().split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        else:
            chunks = [json.loads(data)]
        assert "error" not in chunks[-1], chunks[-1]
        assert sum(len(choice.get("token_ids") or ()) for chunk in chunks for choice in chunk["choices"]) == NUM_TOKENS
        return "answered"


@pytest.mark.timeout(90)
async def test_no_accepted_request_is_lost_by_a_stop(tmp_path: Path) -> None:
    async with cluster(tmp_path, environment={"BATON_FRONTEND_DRAIN_GRACE_S": "60"}) as house:
        load = Load(house.url)
        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_CLIENTS):
                tasks.create_task(load.client(number))
            async with asyncio.timeout(30):
                while load.outcomes["answered"] < 2 * NUM_CLIENTS:
                    await asyncio.sleep(0.01)
            at_signal = load.outcomes["answered"]
            house.signal("frontend-0", signal.SIGTERM)
        assert await _exit_code(house) == 0
        assert load.outcomes["answered"] > at_signal  # those under way at the signal
        await house.settled(without=("frontend-0",))


async def _exit_code(house: Cluster) -> int:
    process = house.children["frontend-0"].process
    assert process is not None
    return await process.wait()
