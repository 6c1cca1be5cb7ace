import asyncio
import signal
import sys
from pathlib import Path

import pytest
from baton_cli.processes import Backoff, Child, Supervisor, describe_exit

FOREVER = "import time\nprint('up', flush=True)\nwhile True: time.sleep(1)"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER


def child(tmp_path: Path, code: str, name: str = "x") -> Child:
    return Child(name, [sys.executable, "-c", code], {"BATON_TEST": "1"}, tmp_path / "logs" / f"{name}.log")


async def until_up(made: Child, times: int = 1) -> None:
    async with asyncio.timeout(10):
        while made.last_lines().count("up") < times:
            await asyncio.sleep(0.01)


def test_back_off_doubles_up_to_its_limit() -> None:
    assert [Backoff(0.5, 4.0).delay_s(n) for n in range(1, 6)] == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_exits_are_described_in_words() -> None:
    assert (describe_exit(3), describe_exit(-9)) == ("exit code 3", "killed by SIGKILL")


async def test_a_child_that_dies_is_started_again_and_its_log_goes_on(tmp_path: Path) -> None:
    made = child(tmp_path, FOREVER)
    supervisor = Supervisor(Backoff(first_s=0.01, limit_s=0.01), [made])
    await made.start()
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.keep(made))
        await until_up(made)
        made.send(signal.SIGKILL)
        await until_up(made, times=2)
        assert made.restarts == 1
        await supervisor.stop(4.0)
    assert not made.is_running


async def test_a_restart_that_waits_is_given_up_when_everything_stops(tmp_path: Path) -> None:
    made = child(tmp_path, "raise SystemExit(3)")
    supervisor = Supervisor(Backoff(first_s=60, limit_s=60), [made])
    await made.start()
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.keep(made))
        async with asyncio.timeout(10):
            while made.is_running or not made.failures:
                await asyncio.sleep(0.01)
        await supervisor.stop(4.0)
    assert (made.restarts, made.exit_text()) == (0, "exit code 3")


@pytest.mark.parametrize("stopped", [False, True], ids=["ignores SIGTERM", "is stopped as well"])
async def test_a_child_that_does_not_end_is_killed_in_time(tmp_path: Path, stopped: bool) -> None:
    made = child(tmp_path, STUBBORN)
    await made.start()
    await until_up(made)
    if stopped:
        made.send(signal.SIGSTOP)
    async with asyncio.timeout(5):
        await Supervisor(children=[made]).stop(1.0)
    assert made.exit_text() == "killed by SIGKILL"
