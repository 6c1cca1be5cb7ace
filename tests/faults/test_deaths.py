"""Whatever dies or hangs: no token repeated or missing, no byte wrong, every block back within 5 s.

The sim engine's tokens are a pure function of the sequence so far and its blocks carry a pattern that decode verifies, so
"the same tokens as an undisturbed run" also says that every byte was right.
"""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from clients import Answer, received, stream
from cluster import Cluster, cluster, until
from shared_house import SharedHouse

pytestmark = [pytest.mark.timeout(90), pytest.mark.asyncio(loop_scope="module")]

LONG_PROMPT = [10 + i % 150 for i in range(2000)]
_other_seeds = itertools.count(40)  # of prompts that nobody has cached


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_decode(tmp_path_factory: pytest.TempPathFactory, slow: str, roomy_model: Path) -> AsyncIterator[SharedHouse]:
    made = SharedHouse(lambda: cluster(tmp_path_factory.mktemp("one"), profile=slow, model=roomy_model))
    yield made
    await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two_decodes(tmp_path_factory: pytest.TempPathFactory, slow: str, roomy_model: Path) -> AsyncIterator[SharedHouse]:
    made = SharedHouse(lambda: cluster(tmp_path_factory.mktemp("two"), profile=slow, model=roomy_model, decode=2))
    yield made
    await made.close()


def other_prompt(seed: int, length: int = 40) -> list[int]:
    """Every test has seeds of its own: the clusters are shared."""
    return [10 + (seed * 37 + i * 11) % 150 for i in range(length)]


async def ask(house: Cluster, prompt: list[int], max_tokens: int, answer: Answer | None = None) -> Answer:
    return await stream(house.http, house.url, answer, model="test-model", prompt=prompt, max_tokens=max_tokens, ignore_eos=True)


async def in_mid_pull(house: Cluster, decode: str = "decode-0") -> None:
    """Wait until decode has confirmed some blocks of a handoff and waits for others."""

    async def partly() -> bool:
        blocks = next(i for i in (await house.report()).instances if i.instance_id == decode).blocks
        return blocks is not None and blocks.used > 0 and blocks.reserved > 0

    await until("a handoff in mid-pull", partly, 10)


async def handing_over(house: Cluster) -> None:
    """Wait until requests go over the pair: an earlier test may have left a prefill that nobody was introduced to."""

    async def handed() -> bool:
        before = (await house.metrics("decode-0")).get("baton_handoff_bytes_total", 0)
        await ask(house, other_prompt(next(_other_seeds), 100), 2)
        return (await house.metrics("decode-0")).get("baton_handoff_bytes_total", 0) > before

    await until("a handoff", handed, 20)


async def disturbed(
    house: Cluster, prompt: list[int], max_tokens: int, reached: Callable[[Answer], Awaitable[None]], *faults: Callable
) -> Answer:
    """Run one request; when it has reached a point, do the faults; its answer."""
    answer = Answer()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(ask(house, prompt, max_tokens, answer))
        await reached(answer)
        for fault in faults:
            await fault()
        await running
    return answer


async def test_prefill_killed_in_mid_pull_is_not_seen_by_the_client(one_decode: SharedHouse) -> None:
    async with one_decode.lent() as house:
        await handing_over(house)
        answer = await disturbed(house, LONG_PROMPT, 30, lambda _: in_mid_pull(house), lambda: house.kill("prefill-0"))
        await house.settled(without=("prefill-0",))
        assert answer.finish_reason == "length"
        await house.start("prefill-0")
        assert (await ask(house, LONG_PROMPT, 30)).token_ids == answer.token_ids
        await house.settled()


async def test_decode_killed_in_mid_stream_goes_on_without_gap_or_repeat(two_decodes: SharedHouse) -> None:
    async with two_decodes.lent() as house:
        prompt = other_prompt(1, 100)
        undisturbed = await ask(house, prompt, 200)
        used = [i.instance_id for i in (await house.report()).instances if i.blocks and i.blocks.cached and i.service == "decode"]

        async def kill_the_one() -> None:
            busy = [i.instance_id for i in (await house.report()).instances if i.service == "decode" and i.running_sequences]
            assert len(busy) == 1, (busy, used)
            await house.kill(busy[0])

        answer = await disturbed(house, prompt, 200, lambda a: received(a, 50), kill_the_one)
        assert answer.token_ids == undisturbed.token_ids
        assert answer.usage == undisturbed.usage | {"prompt_tokens_details": answer.usage["prompt_tokens_details"]}
        assert answer.resumed
        (dead,) = (name for name, child in house.children.items() if not child.is_running)
        await house.settled(without=(dead,))
        await house.start(dead)
        await house.settled()


async def test_decode_stopped_in_mid_stream_is_replaced_and_woken_without_harm(two_decodes: SharedHouse) -> None:
    async with two_decodes.lent() as house:
        prompt = other_prompt(2, 100)
        undisturbed = await ask(house, prompt, 300)
        stopped: list[str] = []

        async def stop_the_one() -> None:
            stopped.extend(i.instance_id for i in (await house.report()).instances if i.service == "decode" and i.running_sequences)
            house.signal(stopped[0], signal.SIGSTOP)

        answer = await disturbed(house, prompt, 300, lambda a: received(a, 50), stop_the_one)
        assert answer.token_ids == undisturbed.token_ids
        house.signal(stopped[0], signal.SIGCONT)
        await house.settled()


async def test_kvtransfer_killed_and_back_disturbs_nothing(one_decode: SharedHouse) -> None:
    async with one_decode.lent() as house:
        await handing_over(house)
        before = (await house.metrics("decode-0")).get("baton_handoffs_total", 0)
        undisturbed = await ask(house, other_prompt(23), 100)
        answer = await disturbed(house, other_prompt(23), 100, lambda a: received(a, 10), lambda: house.kill("kvtransfer-0"))
        assert answer.token_ids == undisturbed.token_ids
        assert len((await ask(house, other_prompt(24), 10)).token_ids) == 10  # a new handoff without the broker
        assert (await house.metrics("decode-0"))["baton_handoffs_total"] - before >= 3
        await house.start("kvtransfer-0")
        assert len((await ask(house, other_prompt(25), 10)).token_ids) == 10
        await house.settled()


async def test_router_killed_leaves_new_requests_served_on_decode(one_decode: SharedHouse) -> None:
    async with one_decode.lent() as house:
        undisturbed = await ask(house, other_prompt(26), 100)
        answer = await disturbed(house, other_prompt(26), 100, lambda a: received(a, 10), lambda: house.kill("router-0"))
        assert answer.token_ids == undisturbed.token_ids
        assert len((await ask(house, other_prompt(27), 10)).token_ids) == 10
        await house.start("router-0")
        await house.settled()


@pytest.mark.parametrize("wiped", [False, True], ids=["restarted", "wiped"])
async def test_etcd_killed_and_back_disturbs_nothing(one_decode: SharedHouse, wiped: bool) -> None:
    seed = 33 if wiped else 30
    async with one_decode.lent() as house:

        async def fault() -> None:
            await house.etcd.kill()
            assert len((await ask(house, other_prompt(seed), 10)).token_ids) == 10  # last-known-good
            if wiped:
                await house.etcd.wipe()
            await house.etcd.restart()

        undisturbed = await ask(house, other_prompt(seed + 1), 300)
        answer = await disturbed(house, other_prompt(seed + 1), 300, lambda a: received(a, 10), fault)
        assert answer.token_ids == undisturbed.token_ids

        async def all_registered() -> bool:
            return len((await house.report()).instances) == len(house.children)

        await until("everybody is registered again", all_registered, 20)
        assert len((await ask(house, other_prompt(seed + 2), 10)).token_ids) == 10
        await house.settled()


async def test_prefill_stopped_reclaimed_and_woken_changes_nobodys_bytes(one_decode: SharedHouse) -> None:
    async with one_decode.lent() as house:
        await handing_over(house)

        async def stop() -> None:
            house.signal("prefill-0", signal.SIGSTOP)

        answer = await disturbed(house, LONG_PROMPT[::-1], 30, lambda _: in_mid_pull(house), stop)
        await house.settled(without=("prefill-0",))
        others = [ask(house, other_prompt(seed), 100) for seed in range(20)]  # they take the reclaimed blocks
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(other) for other in others]
            await asyncio.sleep(0)
            house.signal("prefill-0", signal.SIGCONT)
        found = [task.result().token_ids for task in running]
        assert all(len(tokens) == 100 for tokens in found)
        await house.settled()
        assert [(await ask(house, other_prompt(seed), 100)).token_ids for seed in range(3)] == found[:3]
        assert (await ask(house, LONG_PROMPT[::-1], 30)).token_ids == answer.token_ids
        await house.settled()
