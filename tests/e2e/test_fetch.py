"""Cached prefix blocks are fetched, not computed again: by a prefill from its decode, after deaths from whoever survives.

Tokens are those of transformers (torch), or of an undisturbed run (sim, whose blocks carry a pattern that is verified when they are
attended to), so a fetched block with a wrong byte would show.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from baton_cli import up
from clients import Answer, received, stream
from cluster import Cluster, cluster, until

pytestmark = pytest.mark.timeout(120)

BLOCK_TOKENS = 16
PROMPT = [10 + (7 * i + i // 50) % 200 for i in range(500)]
TAIL = [10 + (11 * i) % 200 for i in range(20)]
WATCHED_WORKER = str(Path(__file__).parents[1] / "faults" / "watched_worker.py")


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """1 ms per prompt token, 5 ms per decode step."""
    file = tmp_path / "slow.toml"
    file.write_text('description = "slow"\n[prefill_ms]\nper_token = 1.0\n[decode_ms]\nconstant = 5.0\n')
    return str(file)


@pytest.fixture
def sim_model(tmp_path: Path) -> Path:
    """The demo model's folder with a longer context; the sim engine takes sizes and the tokenizer from it, not the weights."""
    folder = tmp_path / "roomy"
    shutil.copytree(up.demo_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


def settings(transports: str = "shm,tcp", limit_s: float = 5.0, **more: str) -> dict[str, str]:
    """Fetch from 32 tokens on. limit_s: long, so that a busy machine does not make a fetch give up."""
    each = {"TRANSPORTS": transports, "FETCH_MIN_TOKENS": "32", "FETCH_MIN_LIMIT_S": str(limit_s)}
    return {f"BATON_{service}_{name}": value for service in ("PREFILL", "DECODE") for name, value in each.items()} | more


async def ask(house: Cluster, prompt: list[int], max_tokens: int, answer: Answer | None = None) -> Answer:
    body = {
        "model": "test-model",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "min_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    return await stream(house.http, house.url, answer, **body)


async def computed(house: Cluster, name: str) -> int:
    """Prompt tokens an instance has computed since its start."""
    return int((await house.metrics(name)).get('baton_engine_tokens_total{phase="prefill"}', 0))


async def fetched(house: Cluster, name: str) -> int:
    """Tokens an instance has fetched since its start."""
    return int((await house.metrics(name))["baton_fetched_tokens_total"])


async def fetches(house: Cluster, name: str) -> dict[str, int]:
    """Fetches of an instance since its start, by how they ended."""
    prefix = 'baton_fetches_total{outcome="'
    metrics = (await house.metrics(name)).items()
    return {label.removeprefix(prefix)[:-2]: int(value) for label, value in metrics if label.startswith(prefix) and value}


async def busy_decode(house: Cluster) -> str:
    """The one decode instance that runs a sequence."""
    (name,) = [i.instance_id for i in (await house.report()).instances if i.service == "decode" and i.running_sequences]
    return name


async def second_turn(house: Cluster, num_answer: int) -> tuple[list[int], Answer]:
    """A first turn; prefill loses its memory; the prompt of the second turn, and its answer, for which decode's memory was fetched."""
    first = await ask(house, PROMPT, num_answer)
    await house.settled()
    await house.kill("prefill-0")
    await house.start("prefill-0")

    async def is_known() -> bool:
        await ask(house, [10, 11], 1)
        return bool((await house.metrics("prefill-0")).get('baton_handoffs_total{outcome="confirmed",role="source"}'))

    await until("the new prefill is used and introduced", is_known, 10)
    before = await computed(house, "prefill-0")
    prompt = [*PROMPT, *first.token_ids, *TAIL]
    answer = await ask(house, prompt, 24)
    in_decode = (len(PROMPT) + num_answer - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert await fetched(house, "prefill-0") == in_decode, "everything decode had"
    assert await computed(house, "prefill-0") - before == len(prompt) - 1 - in_decode, "and nothing of it was computed"
    assert await fetches(house, "prefill-0") == {"fetched": 1}
    await house.settled()
    return prompt, answer


@pytest.mark.parametrize("transports", ["shm", "tcp"])
async def test_prefill_fetches_the_first_turn_from_decode(tmp_path: Path, sim_model: Path, slow: str, transports: str) -> None:
    async with cluster(tmp_path, profile=slow, model=sim_model, environment=settings(transports)) as house:
        prompt, answer = await second_turn(house, 100)
        in_decode = (len(PROMPT) + 99) // BLOCK_TOKENS * BLOCK_TOKENS
        assert answer.usage is not None
        assert answer.usage["prompt_tokens_details"]["cached_tokens"] == in_decode
        await house.kill("decode-0")
        await house.start("decode-0")  # whatever was fetched goes back, and the tokens are the same
        assert (await ask(house, prompt, 24)).token_ids == answer.token_ids
        await house.settled()


# The sim verifies what came by either; torch is here for the tokens.
@pytest.mark.parametrize("transports", [pytest.param("shm", marks=pytest.mark.slow), "tcp"])
async def test_tokens_after_a_fetch_are_those_of_transformers(
    tmp_path: Path, model: Path, generate: Callable[..., list[int]], transports: str
) -> None:
    async with cluster(tmp_path, engine="torch", model=model, environment=settings(transports)) as house:
        prompt, answer = await second_turn(house, 40)
        assert answer.token_ids == generate(prompt)


@pytest.mark.parametrize("transports", ["shm", "tcp"])
async def test_decode_killed_in_mid_stream_resumes_on_what_prefill_still_has(
    tmp_path: Path, sim_model: Path, slow: str, transports: str
) -> None:
    async with cluster(tmp_path, profile=slow, model=sim_model, decode=2, environment=settings(transports)) as house:
        answer = Answer()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ask(house, PROMPT, 200, answer))
            await received(answer, 50)
            before = await computed(house, "prefill-0")
            dead = await busy_decode(house)
            other = f"decode-{1 - int(dead[-1])}"
            delivered = len(answer.token_ids)
            await house.kill(dead)
            await running
        assert answer.finish_reason == "length"
        assert answer.resumed
        surviving = (len(PROMPT) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert await fetches(house, other) == {"fetched": 1}
        assert await fetched(house, other) == surviving
        new = await computed(house, other) + await computed(house, "prefill-0") - before
        assert new < len(PROMPT) - surviving + delivered + 60, "the prompt was computed again"  # 60: delivered between the two reads
        await house.settled(without=(dead,))
        await house.start(dead)
        assert (await ask(house, PROMPT, 200)).token_ids == answer.token_ids
        await house.settled()


async def test_prefill_killed_in_the_middle_is_replaced_by_one_that_fetches_what_decode_confirmed(
    tmp_path: Path, sim_model: Path, slow: str
) -> None:
    environment = settings(BATON_PREFILL_MAX_CHUNK_TOKENS="64")
    async with cluster(tmp_path, profile=slow, model=sim_model, prefill=2, environment=environment) as house:

        async def partly() -> str | None:
            instances = (await house.report()).instances
            blocks = next(i for i in instances if i.instance_id == "decode-0").blocks
            if blocks is None or not blocks.used or not blocks.reserved:
                return None
            return next((i.instance_id for i in instances if i.service == "prefill" and i.running_sequences), None)

        answer = Answer()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ask(house, PROMPT, 20, answer))
            dead = await until("a handoff in the middle", partly, 10)
            await house.kill(dead)
            await running
        other = f"prefill-{1 - int(dead[-1])}"
        assert answer.finish_reason == "length"
        confirmed = await fetched(house, other)
        # Whichever the router found to be sooner: the other prefill fetched, or decode went on by itself; nobody began anew.
        assert confirmed > 0 or await computed(house, "decode-0") > 0
        assert await computed(house, other) + await computed(house, "decode-0") < len(PROMPT) - 1
        await house.settled(without=(dead,))
        await house.start(dead)
        assert (await ask(house, PROMPT, 20)).token_ids == answer.token_ids
        await house.settled()


@pytest.mark.parametrize("transports", ["shm", "tcp"])
async def test_source_killed_in_the_middle_of_a_fetch_is_not_seen_by_the_client(
    tmp_path: Path, sim_model: Path, slow: str, transports: str
) -> None:
    """After a decode instance died another one, whose pulls are slow, fetches from prefill, which dies in the middle of it."""
    watched = tmp_path / "watched"
    watched.mkdir()
    environment = settings(transports, limit_s=30.0, BATON_WATCHED_FOLDER=str(watched), BATON_WATCHED_PULL_DELAY_S="4.0")

    def slowly(name: str, command: list[str]) -> list[str]:
        watch = ["/usr/bin/env", f"BATON_WATCHED_NAME={name}", sys.executable, WATCHED_WORKER, "decode"]
        return watch if name.startswith("decode") else command

    async with cluster(tmp_path, profile=slow, model=sim_model, decode=2, environment=environment, change=slowly) as house:
        answer = Answer()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ask(house, PROMPT, 200, answer))
            await received(answer, 20, limit_s=40)  # its own handoff takes two slow pulls, or three
            dead = await busy_decode(house)
            other = f"decode-{1 - int(dead[-1])}"
            await house.kill(dead)

            async def is_fetching() -> bool:
                return bool((await house.metrics(other))["baton_kv_in_flight_bytes"])

            await until("a fetch in the middle", is_fetching, 20)
            await house.kill("prefill-0")
            await running
        assert answer.finish_reason == "length"
        assert await fetches(house, other) in ({"fenced": 1}, {"pull_failed": 1})
        await house.settled(without=(dead, "prefill-0"))
        assert (await house.metrics("kvtransfer-0"))["baton_ledger_mismatch_bytes"] == 0
        assert (await ask(house, PROMPT, 200)).token_ids == answer.token_ids, "all alone, the same tokens"
        await house.settled(without=(dead, "prefill-0"))
