"""Prompts are encoded in place or in a bounded pool."""

import asyncio
import threading
from array import array

import pytest
from baton_frontend.tokenizer import INLINE_LIMIT_CHARS, PromptTokenizer, WorkPool
from baton_runtime.errors import Draining, QueueFull
from tokenizers import Tokenizer


@pytest.mark.parametrize("text", ["hello", "hello world " * INLINE_LIMIT_CHARS])
async def test_short_and_long_texts_give_the_tokenizers_ids(tokenizer: Tokenizer, text: str) -> None:
    with WorkPool(num_threads=1) as pool:
        encoded = await PromptTokenizer(tokenizer, pool).encode([text, "x"], add_special_tokens=True)
    assert encoded == [array("I", tokenizer.encode(t).ids) for t in (text, "x")]


async def test_texts_of_one_turn_are_encoded_together_and_a_caller_may_leave(tokenizer: Tokenizer) -> None:
    texts = [f"hello world {number} " * 20 for number in range(40)]
    with WorkPool(num_threads=1, limit=1) as pool:  # one job, or most would be refused
        prompts = PromptTokenizer(tokenizer, pool)
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(prompts.encode([text], add_special_tokens=False)) for text in texts]
            await asyncio.sleep(0)
            calls[3].cancel()
        assert calls[3].cancelled()
        for number, text in enumerate(texts):
            if number != 3:
                assert calls[number].result() == [array("I", tokenizer.encode(text, add_special_tokens=False).ids)]


async def test_a_full_pool_refuses_what_came_together(tokenizer: Tokenizer) -> None:
    release = threading.Event()
    with WorkPool(num_threads=1, limit=1) as pool:
        prompts = PromptTokenizer(tokenizer, pool)
        running = asyncio.ensure_future(pool.run(lambda: release.wait(10)))
        await asyncio.sleep(0)
        calls = [prompts.encode(["hello world " * 40], add_special_tokens=False) for _ in range(4)]
        assert all(isinstance(result, QueueFull) for result in await asyncio.gather(*calls, return_exceptions=True))
        release.set()
        assert await running


async def test_stored_truncation_does_not_cut_a_prompt(tokenizer: Tokenizer) -> None:
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(3)
    cutting.enable_padding(length=50)
    with WorkPool(num_threads=1) as pool:
        (ids,) = await PromptTokenizer(cutting, pool).encode(["hello world and more"], add_special_tokens=False)
    assert ids.tolist() == tokenizer.encode("hello world and more").ids


async def test_a_full_pool_refuses_at_once_and_recovers() -> None:
    release = threading.Event()
    with WorkPool(num_threads=1, limit=2) as pool:
        async with asyncio.TaskGroup() as group:
            jobs = [group.create_task(pool.run(lambda: release.wait(10))) for _ in range(2)]
            await asyncio.sleep(0)
            assert pool.stats() == {"depth": 2, "limit": 2}
            with pytest.raises(QueueFull) as refused:
                await pool.run(lambda: True)
            assert refused.value.retry_after_ms > 0
            release.set()
        assert [job.result() for job in jobs] == [True, True]
        assert await pool.run(lambda: 5) == 5


async def test_a_closed_pool_is_draining() -> None:
    pool = WorkPool(num_threads=1)
    pool.close()
    with pytest.raises(Draining):
        await pool.run(lambda: 1)
    assert pool.stats()["depth"] == 0


async def test_a_cancelled_caller_gives_its_place_back() -> None:
    release = threading.Event()
    with WorkPool(num_threads=1, limit=2) as pool:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(pool.run(lambda: release.wait(10)))
            waiting = group.create_task(pool.run(lambda: True))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert pool.stats()["depth"] == 1
            release.set()
        assert running.result()
    assert pool.stats()["depth"] == 0
