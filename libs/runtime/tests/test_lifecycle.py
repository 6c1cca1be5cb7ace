"""The life of a process, with a real process, and of its parts."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from baton_contracts.instance.v1 import instance_service_pb2 as pb
from baton_contracts.instance.v1 import instance_service_pb2_grpc as pb_grpc
from baton_runtime.lifecycle import LoopStallWatch, new_incarnation
from baton_runtime.rpc import open_channel
from baton_runtime.testing import wait_until
from google.protobuf.duration_pb2 import Duration

SCRIPT = Path(__file__).with_name("lifecycle_child.py")


class Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self, word: str) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(10):
            assert (await self.process.stdout.readline()).decode().strip() == word

    async def ends(self, code: int) -> str:
        """Returns: stderr."""
        async with asyncio.timeout(10):
            _, stderr = await self.process.communicate()
        assert self.process.returncode == code, stderr.decode()
        return stderr.decode()


@contextlib.asynccontextmanager
async def child(mode: str, *, limit_files: tuple[int, int] | None = None, **environ: str) -> AsyncIterator[Child]:
    """limit_files: soft and hard limit the process is started with."""
    pipe = asyncio.subprocess.PIPE
    prefix = ["prlimit", f"--nofile={limit_files[0]}:{limit_files[1]}"] if limit_files else []
    process = await asyncio.create_subprocess_exec(
        *prefix, sys.executable, str(SCRIPT), mode, stdout=pipe, stderr=pipe, env={**os.environ, **environ}
    )
    try:
        yield Child(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_sigterm_drains_then_closes_in_reverse_order() -> None:
    async with child("normal") as service:
        await service.says("ready")
        service.process.send_signal(signal.SIGTERM)
        for word in ("draining", "drained", "closed-last-started", "closed-first-started"):
            await service.says(word)
        events = [json.loads(line) for line in (await service.ends(0)).splitlines() if line.startswith("{")]
    ready = next(e for e in events if e["event"] == "service_ready")
    assert ready["grpc_address"].startswith("127.0.0.1:")
    assert ready["pid"] == service.process.pid
    assert ready["instance_id"] == f"decode-{ready['incarnation'][:6]}"
    assert {"http_address", "metrics_address"} <= ready.keys()
    assert events[0]["event"] == "config_effective"


async def test_what_the_start_made_is_not_collected_again_and_threads_take_short_turns() -> None:
    async with child("tells-interpreter") as service:
        await service.says("ready")
        service.process.send_signal(signal.SIGTERM)
        await service.says("True 0.0010")


async def test_a_service_may_open_as_many_files_as_the_hard_limit_allows() -> None:
    async with child("tells-open-files", limit_files=(256, 1000)) as service:
        await service.says("ready")
        service.process.send_signal(signal.SIGTERM)
        await service.says("1000")


async def test_second_signal_closes_at_once() -> None:
    async with child("drain-hangs") as service:
        await service.says("ready")
        service.process.send_signal(signal.SIGINT)
        await service.says("draining")
        service.process.send_signal(signal.SIGINT)
        await service.says("closed-last-started")
        await service.ends(0)


async def test_drain_is_bounded_by_the_grace() -> None:
    async with child("drain-hangs", BATON_DECODE_DRAIN_GRACE_S="0.1") as service:
        await service.says("ready")
        service.process.send_signal(signal.SIGTERM)
        await service.says("draining")
        await service.says("closed-last-started")
        await service.ends(0)


async def drain_call(stack: contextlib.AsyncExitStack, service: Child, grace_s: int | None = None) -> Any:
    """A call of Drain to a child that was started in a mode "called...", once it has begun."""
    assert service.process.stdout is not None
    word, address = (await service.process.stdout.readline()).decode().split()
    assert word == "ready"
    channel = await stack.enter_async_context(open_channel(address))
    request = pb.DrainRequest() if grace_s is None else pb.DrainRequest(grace=Duration(seconds=grace_s))
    call = pb_grpc.InstanceServiceStub(channel).Drain(request, timeout=15)
    await call.read()
    return call


async def test_a_call_of_drain_ends_the_process_and_hears_the_end_first() -> None:
    async with child("called") as service, contextlib.AsyncExitStack() as stack:
        assert service.process.stdout is not None
        _, address = (await service.process.stdout.readline()).decode().split()
        channel = await stack.enter_async_context(open_channel(address))
        call = pb_grpc.InstanceServiceStub(channel).Drain(pb.DrainRequest(), timeout=15)
        phases = []
        while isinstance(message := await call.read(), pb.DrainResponse):
            phases.append(message.phase)
            if message.phase != pb.DRAIN_PHASE_DRAINING:
                break
        assert phases[-1] == pb.DRAIN_PHASE_DRAINED
        for word in ("draining", "drained", "closed-last-started", "closed-first-started"):
            await service.says(word)
        await service.ends(0)


async def test_the_first_signal_after_a_call_is_no_second_one_but_shortens_the_grace() -> None:
    """Supervisors send SIGTERM to whom they drained: it must not cut off what is being finished."""
    async with child("called-drain-hangs", BATON_DECODE_DRAIN_GRACE_S="1") as service, contextlib.AsyncExitStack() as stack:
        call = await drain_call(stack, service, grace_s=3600)
        await service.says("draining")
        service.process.send_signal(signal.SIGTERM)
        last = pb.DrainResponse()
        while last.phase != pb.DRAIN_PHASE_CUT_OFF:
            last = await call.read()
        assert last.elapsed.ToMilliseconds() >= 1000  # the grace from the signal on, not at once and not the hour of the call
        await service.says("closed-last-started")
        await service.ends(0)


async def test_the_second_signal_after_a_call_closes_at_once() -> None:
    async with child("called-drain-hangs", BATON_DECODE_DRAIN_GRACE_S="3600") as service, contextlib.AsyncExitStack() as stack:
        await drain_call(stack, service)
        await service.says("draining")
        service.process.send_signal(signal.SIGTERM)
        service.process.send_signal(signal.SIGINT)
        await service.says("closed-last-started")
        await service.ends(0)


async def test_a_caller_that_leaves_does_not_stop_the_drain() -> None:
    async with child("called-drain-hangs", BATON_DECODE_DRAIN_GRACE_S="1") as service, contextlib.AsyncExitStack() as stack:
        (await drain_call(stack, service)).cancel()
        await stack.aclose()
        for word in ("draining", "closed-last-started", "closed-first-started"):
            await service.says(word)
        await service.ends(0)


async def test_signal_while_starting_ends_the_start() -> None:
    async with child("start-hangs") as service:
        await service.says("starting")
        service.process.send_signal(signal.SIGTERM)
        await service.says("closed-first-started")
        await service.ends(0)


async def test_failed_background_task_closes_and_exits_1() -> None:
    async with child("task-fails") as service:
        await service.says("ready")
        await service.says("closed-last-started")
        assert "service_failed" in await service.ends(1)


async def test_config_error_is_one_line_and_exit_2() -> None:
    async with child("normal", BATON_DECODE_LOG_LEVEL="loud") as service:
        (line,) = (await service.ends(2)).splitlines()
    assert line.startswith("baton: configuration error: decode.log_level: 'loud' (from environment BATON_DECODE_LOG_LEVEL)")


async def test_config_error_in_start_names_the_service_and_exits_2() -> None:
    async with child("config-error-in-start") as service:
        await service.says("closed-last-started")
        assert "baton: configuration error: decode.listen: cannot bind" in await service.ends(2)


@pytest.mark.parametrize("mode", ["thread-hangs", "look-up-hangs"])
async def test_thread_that_hangs_does_not_keep_the_process(mode: str) -> None:
    """Ours, or one of the loop's own, which look up names."""
    async with child(mode) as service:
        await service.says("ready")
        service.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        await service.ends(0)
        assert time.monotonic() - began < 6


def test_incarnation_is_16_hex_digits_and_new() -> None:
    first, second = new_incarnation(), new_incarnation()
    assert first != second
    assert len(bytes.fromhex(first)) == 8


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_stall_is_reported_once_with_its_length() -> None:
    clock, stalls = Clock(), list[float]()
    watch = LoopStallWatch(2.0, stalls.append, clock)
    assert not watch.check(), "before the first tick nothing is known"
    watch._last = clock.now
    clock.now += 1.9
    assert not watch.check()
    clock.now += 0.5
    assert watch.check()
    assert not watch.check()
    assert stalls == [pytest.approx(2.3)]


async def test_watch_notices_a_loop_that_stood_still() -> None:
    clock, stalls = Clock(), list[float]()
    watch = LoopStallWatch(2.0, stalls.append, clock)
    async with asyncio.TaskGroup() as tasks:
        ticking = tasks.create_task(watch.run())
        await asyncio.sleep(0)
        clock.now += 5
        await wait_until(lambda: stalls)
        clock.now += 0.1
        ticking.cancel()
    assert stalls == [pytest.approx(4.9)]
