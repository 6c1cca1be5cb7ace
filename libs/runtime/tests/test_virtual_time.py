import asyncio
import time

import pytest
from baton_runtime.virtual_time import NothingScheduled, run_virtual


def test_an_hour_passes_at_once_and_exactly() -> None:
    async def main() -> float:
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time() - began

    began = time.monotonic()
    assert run_virtual(main()) == 3600
    assert time.monotonic() - began < 5


def test_timers_fire_in_their_order_and_at_their_times() -> None:
    fired: list[tuple[float, str]] = []

    async def one(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        fired.append((asyncio.get_running_loop().time(), name))

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name, delay_s in (("c", 0.3), ("a", 0.1), ("b", 0.2)):
                tasks.create_task(one(name, delay_s))

    run_virtual(main())
    assert fired == [(pytest.approx(100.1), "a"), (pytest.approx(100.2), "b"), (pytest.approx(100.3), "c")]


def test_timeout_ends_what_would_take_longer() -> None:
    async def main() -> None:
        async with asyncio.timeout(5):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        run_virtual(main())


def test_waiting_for_what_cannot_come_is_an_error_and_not_a_hang() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingScheduled):
        run_virtual(main())
