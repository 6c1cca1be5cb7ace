"""A cluster is shared by the tests that leave it whole. Clusters without processes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from shared_house import SharedHouse


class Houses:
    """Opens houses of one child each, and counts."""

    def __init__(self) -> None:
        self.num_opened = self.num_closed = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[SimpleNamespace]:
        self.num_opened += 1
        try:
            yield SimpleNamespace(children={"decode-0": SimpleNamespace(is_running=True)}, number=self.num_opened)
        finally:
            self.num_closed += 1


async def test_a_house_that_is_left_whole_is_lent_again_and_closed_once() -> None:
    houses = Houses()
    shared = SharedHouse(houses.open)  # type: ignore[arg-type]
    for _ in range(3):
        async with shared.lent():
            pass
    assert (houses.num_opened, houses.num_closed) == (1, 0)
    await shared.close()
    assert (houses.num_opened, houses.num_closed) == (1, 1)


async def test_a_test_that_fails_or_leaves_a_dead_process_ends_the_house() -> None:
    houses = Houses()
    shared = SharedHouse(houses.open)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        async with shared.lent():
            raise AssertionError
    async with shared.lent() as house:
        house.children["decode-0"].is_running = False
    assert (houses.num_opened, houses.num_closed) == (2, 2)


async def test_a_test_that_was_given_up_keeps_the_old_house_and_spoils_no_new_one() -> None:
    houses = Houses()
    shared = SharedHouse(houses.open)  # type: ignore[arg-type]
    given_up = shared.lent()
    await given_up.__aenter__()
    async with shared.lent() as house:
        assert (house.number, houses.num_closed) == (2, 1)
        await given_up.__aexit__(None, None, None)
        assert houses.num_closed == 1
    async with shared.lent() as house:
        assert house.number == 2
    await shared.close()
