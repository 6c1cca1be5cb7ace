"""What arrives is what was sent, and of the sequence that was meant: else it is discarded, counted and prefilled again."""

import sys
from pathlib import Path

import pytest
from cluster import Cluster, cluster
from corrupting_worker import FILE

pytestmark = pytest.mark.timeout(90)
CORRUPTING = str(Path(__file__).parent / "corrupting_worker.py")
PROMPT = [10 + i % 150 for i in range(600)]
TOKENS = 20


async def ask(house: Cluster, first: int) -> list[int]:
    """Tokens of the answer to a prompt of its own."""
    body = {"prompt": [first, *PROMPT], "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    answer = await house.complete(**body)
    tokens: list[int] = answer["choices"][0]["token_ids"]
    assert len(tokens) == TOKENS
    return tokens


async def outcomes(house: Cluster, role: str) -> dict[str, float]:
    """Handoffs that are over at all workers of that role, by outcome."""
    found: dict[str, float] = {}
    for name in house.children:
        if name.startswith(("prefill", "decode")):
            for sample, value in (await house.metrics(name)).items():
                if sample.startswith("baton_handoffs_total{") and f'role="{role}"' in sample:
                    outcome = sample.split('outcome="')[1].split('"')[0]
                    found[outcome] = found.get(outcome, 0.0) + value
    return found


@pytest.mark.parametrize(("service", "what"), [("prefill", "byte"), ("decode", "tag"), ("prefill", "tag")])
async def test_what_is_corrupt_is_discarded_counted_and_prefilled_again(tmp_path: Path, service: str, what: str) -> None:
    armed = tmp_path / "armed"

    def change(name: str, command: list[str]) -> list[str]:
        return [sys.executable, CORRUPTING, service, what] if name.startswith(service) else command

    over_tcp = {"BATON_PREFILL_TRANSPORTS": "tcp", "BATON_DECODE_TRANSPORTS": "tcp", FILE: str(armed)}
    async with cluster(tmp_path, prefill=2, environment=over_tcp, change=change) as house:
        await ask(house, 1)
        assert await outcomes(house, "sink") == {"confirmed": 1}
        armed.touch()
        tokens = await ask(house, 2)
        assert not armed.exists()  # it was done
        assert await outcomes(house, "sink") == {"confirmed": 2, "data_loss": 1}
        assert (await house.metrics("decode-0"))["baton_handoff_data_loss_total"] == 1
        told = await outcomes(house, "source")
        assert told == {"confirmed": 2, "data_loss" if what == "tag" else "peer_cancelled": 1}
        await house.settled()
        # The sim engine verifies every byte before its first step: what it would not have accepted has not become anyone's cache.
        assert await ask(house, 2) == tokens
        await house.settled()
