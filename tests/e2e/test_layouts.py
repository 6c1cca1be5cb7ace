"""Prefill and decode with other block sizes and other tensor-parallel shards: the sim verifies every byte it attends to, torch gives the
tokens of generate()."""

import asyncio
import random
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from baton_cli import up
from baton_engine.sim_profile import load_profile
from baton_engine.sim_runner import SimRunner, expected_next_token
from clients import Answer, stream
from cluster import Cluster, cluster, until

pytestmark = pytest.mark.timeout(60)
LENGTHS = (2, 16, 17, 40, 64, 65, 80, 81, 129, 150, 200, 257)  # around the borders of blocks of 16 and 64 tokens
NEW_TOKENS = 8
HAS_NIXL = any(find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
Cut = tuple[int, int]  # tokens per block, shards


def prompts(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    source = random.Random(seed)
    return [source.choices(range(10, 200), k=length) for length in lengths]


def settings(service: str, cut: Cut, transports: str) -> dict[str, str]:
    values = {"BLOCK_TOKENS": cut[0], "NUM_SHARDS": cut[1], "HASH_BLOCK_TOKENS": 8, "TRANSPORTS": transports}
    return {f"BATON_{service}_{name}": str(value) for name, value in values.items()}


@asynccontextmanager
async def house_of(folder: Path, prefill: Cut, decodes: dict[str, tuple[Cut, str]], **options: object) -> AsyncIterator[Cluster]:
    """One prefill; every decode has its own cut and one transport, so that one house tests several pairs."""

    def change(name: str, command: list[str]) -> list[str]:
        if name not in decodes:
            return command
        return ["/usr/bin/env", *(f"{key}={value}" for key, value in settings("DECODE", *decodes[name]).items()), *command]

    environment = settings("PREFILL", prefill, "shm,nixl,tcp" if any(way == "nixl" for _, way in decodes.values()) else "shm,tcp")
    async with cluster(folder, decode=len(decodes), environment=environment, change=change, **options) as house:  # type: ignore[arg-type]
        yield house


def sim_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    """What the sim draws after a prompt, wherever its KV was computed."""
    runner = SimRunner(load_profile("instant"), 16, up.demo_model())
    tokens = array("I", prompt)
    for _ in range(num_tokens):
        tokens.append(expected_next_token(runner, tokens))
    return tokens[len(prompt) :].tolist()


async def ask(house: Cluster, batch: list[list[int]], num_tokens: int) -> list[Answer]:
    """All prompts at once."""
    body = {"model": "test-model", "max_tokens": num_tokens, "min_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
    return await asyncio.gather(*(stream(house.http, house.url, prompt=prompt, **body) for prompt in batch))


async def outcomes(house: Cluster, *names: str) -> dict[str, dict[str, float]]:
    """Handoffs that have ended at these instances, by outcome."""
    found = {}
    for name in names:
        samples = await house.metrics(name)
        of = [(key, value) for key, value in samples.items() if key.startswith("baton_handoffs_total{") and value]
        found[name] = {outcome: sum(v for k, v in of if f'outcome="{outcome}"' in k) for outcome in ("confirmed", "failed", "data_loss")}
        found[name]["other"] = sum(value for _, value in of) - sum(found[name].values())
    return found


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [((16, 1), [(16, 2), (64, 1)]), ((16, 2), [(16, 1), (16, 4)]), ((64, 1), [(16, 1)])],
    ids=["from 16x1 to 16x2 and 64x1", "from 16x2 to 16x1 and 16x4", "from 64x1 to 16x1"],
)
async def test_sim_finds_every_byte_right_in_other_blocks_and_shards(prefill: Cut, decode: list[Cut], tmp_path: Path) -> None:
    ways = [(cut, transport) for cut in decode for transport in ("shm", "tcp")] + [(decode[-1], "nixl")] * HAS_NIXL
    decodes = {f"decode-{index}": way for index, way in enumerate(ways)}
    async with house_of(tmp_path, prefill, decodes) as house:
        num_asked = 0

        async def asked_all() -> bool:
            """Prompts, then the same ones extended, whose prefixes are cached somewhere; until every pair had its share."""
            nonlocal num_asked
            first = prompts(seed=num_asked)
            for batch in (first, [prompt + tail for prompt, tail in zip(first, prompts(seed=num_asked + 1), strict=True)]):
                answers = await ask(house, batch, NEW_TOKENS)
                assert [answer.token_ids for answer in answers] == [sim_tokens(prompt, NEW_TOKENS) for prompt in batch]
                assert not any(answer.resumed for answer in answers), "an attempt whose KV was wrong is done again elsewhere"
                num_asked += len(batch)
            return all(of["confirmed"] for of in (await outcomes(house, *decodes)).values())

        await until("every pair has handed over", asked_all, 20.0)
        await house.settled()
        ended = await outcomes(house, *decodes)
        assert sum(of["confirmed"] for of in ended.values()) == num_asked
        assert not any(of[why] for of in ended.values() for why in ("failed", "data_loss", "other")), ended


@pytest.mark.timeout(120)
async def test_torch_tokens_equal_generate_between_blocks_of_16_and_64_tokens(
    model: Path, tmp_path: Path, generate: Callable[[list[int], int], list[int]]
) -> None:
    decodes = {"decode-0": ((64, 1), "tcp")}
    async with house_of(tmp_path, (16, 1), decodes, engine="torch", model=model) as house:
        batch = prompts(seed=3, lengths=(17, 64, 65, 100, 150))
        answers = await ask(house, batch, NEW_TOKENS)
        assert [answer.token_ids for answer in answers] == [generate(prompt, NEW_TOKENS) for prompt in batch]
        await house.settled()
        ended = await outcomes(house, *decodes)
        assert sum(of["confirmed"] for of in ended.values()) == len(batch)


async def test_layouts_that_cannot_be_matched_are_refused_by_name_and_nothing_is_prefilled(tmp_path: Path) -> None:
    async with house_of(tmp_path, (24, 1), {"decode-0": ((16, 1), "shm")}) as house:

        async def refused() -> str | None:
            log = house.children["kvtransfer-0"].log.read_text(errors="replace")
            return next((line for line in log.splitlines() if "pair_refused" in line), None)

        line = await until("kvtransfer refuses the pair", refused, 10.0)
        assert "block_tokens 24 against 16" in line or "block_tokens 16 against 24" in line
        assert line.count("layers=2") == 2
        (answer,) = await ask(house, prompts(seed=4, lengths=(100,)), NEW_TOKENS)
        assert answer.token_ids == sim_tokens(prompts(seed=4, lengths=(100,))[0], NEW_TOKENS)
        assert not answer.resumed
        samples = await house.metrics("prefill-0")
        assert not any(value for name, value in samples.items() if name.startswith("baton_engine_tokens_total"))
        await house.settled()
