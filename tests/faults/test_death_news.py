"""Whoever dies or hangs, everybody it was introduced to knows in time, detection included: 300 ms after a kill, 2.5 s after a stop."""

from pathlib import Path

import pytest
from cluster import cluster
from news import DEBUG, LIMIT_S, Heard, handoff_under_way, reporting_again, revive, strike
from test_deaths import LONG_PROMPT

pytestmark = pytest.mark.timeout(90)


def check(heard: Heard) -> None:
    limit_s = LIMIT_S[heard.way]
    assert heard.unlinked, "a worker without a link to the victim was told"
    assert all(after_s <= limit_s for after_s in (*heard.news.values(), *heard.fences.values(), *heard.ends)), heard


async def test_news_of_a_death_reach_everybody_and_end_its_handoffs_in_time(tmp_path: Path, slow: str, roomy_model: Path) -> None:
    async with cluster(tmp_path, profile=slow, model=roomy_model, decode=2, kvtransfer=2, environment=DEBUG) as house:
        async with handoff_under_way(house, LONG_PROMPT) as (source, _):
            killed = await strike(house, source, "kill")
        check(killed)
        await revive(house, killed)
        await reporting_again(house, 3)
        async with handoff_under_way(house, LONG_PROMPT[::-1]) as (source, _):
            stopped = await strike(house, source, "stop")
            await revive(house, stopped)
        check(stopped)
        await reporting_again(house, 3)
        await house.settled()
