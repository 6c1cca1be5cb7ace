import asyncio

import pytest
from baton_runtime.errors import QueueFull, Unavailable
from baton_runtime.streams import Outbox
from baton_runtime.testing import wait_until


async def test_items_leave_in_order_and_at_most_so_many_at_once() -> None:
    outbox: Outbox[int] = Outbox(limit=10)
    for item in range(5):
        outbox.put(item)
    assert await outbox.get_batch(3) == [0, 1, 2]
    assert await outbox.get_batch(3) == [3, 4]


async def test_what_queues_up_during_a_write_is_one_batch() -> None:
    outbox: Outbox[int] = Outbox(limit=10)
    batches: list[list[int]] = []
    may_write = asyncio.Event()

    async def write() -> None:
        while batch := await outbox.get_batch(100):
            batches.append(batch)
            await may_write.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        outbox.put(0)
        await wait_until(lambda: batches)
        outbox.put(1)
        outbox.put(2)
        may_write.set()
        await wait_until(lambda: len(batches) == 2)
        outbox.close()
    assert batches == [[0], [1, 2]]


async def test_full_outbox_refuses_and_keeps_what_it_has() -> None:
    outbox: Outbox[int] = Outbox(limit=2)
    outbox.put(0)
    outbox.put(1)
    with pytest.raises(QueueFull) as error:
        outbox.put(2)
    assert error.value.facts == {"depth": "2", "limit": "2"}
    assert await outbox.get_batch(10) == [0, 1]
    assert outbox.stats().refused == 1


async def test_urgent_items_overtake() -> None:
    outbox: Outbox[str] = Outbox(limit=10)
    outbox.put("start")
    outbox.put("cancel 1", urgent=True)
    outbox.put("cancel 2", urgent=True)
    assert await outbox.get_batch(10) == ["cancel 1", "cancel 2", "start"]


async def test_closed_outbox_is_drained_then_empty() -> None:
    outbox: Outbox[int] = Outbox(limit=10)
    outbox.put(0)
    outbox.close()
    with pytest.raises(Unavailable):
        outbox.put(1)
    assert await outbox.get_batch(10) == [0]
    assert await outbox.get_batch(10) == []


async def test_close_wakes_a_waiting_writer() -> None:
    outbox: Outbox[int] = Outbox(limit=1)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(outbox.get_batch(1))
        await asyncio.sleep(0)
        outbox.close()
    assert waiting.result() == []


async def test_cancelled_wait_loses_nothing() -> None:
    outbox: Outbox[int] = Outbox(limit=10)
    waiting = asyncio.ensure_future(outbox.get_batch(10))
    await asyncio.sleep(0)
    outbox.put(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert await outbox.get_batch(10) == [0]


async def test_stats_count_batches_and_items() -> None:
    outbox: Outbox[int] = Outbox(limit=10)
    outbox.put(0)
    outbox.put(1)
    await outbox.get_batch(1)
    assert (outbox.stats().depth, outbox.stats().limit, outbox.stats().batches, outbox.stats().items) == (1, 10, 1, 1)


def test_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit"):
        Outbox(limit=0)
