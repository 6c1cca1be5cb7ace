"""A sim engine on a virtual clock, stepped by hand or by an event loop: for tests of it and of whatever sits on it. Never sleeps."""

import asyncio
import threading
from array import array
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from baton_runtime.hashing import block_hashes, cache_root

from baton_engine.api import EndReason, EngineRequest, Priority, SamplingParams, SequenceEnd, SequenceKey, StepOutput, Work
from baton_engine.blocks import BlockManager
from baton_engine.driver import DrivenEngine
from baton_engine.paged_engine import PagedEngine
from baton_engine.pool import KvPool
from baton_engine.scheduler import SchedulerLimits
from baton_engine.sim_profile import SimProfile, load_profile
from baton_engine.sim_runner import SimRunner

ROOT = cache_root("virtual")
SMALL = SchedulerLimits(block_tokens=4, max_batch_sequences=8, max_chunk_tokens=16)


@dataclass
class VirtualClock:
    """A clock that moves only when somebody sleeps on it."""

    now: float = 100.0

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass
class VirtualEngine:
    """A PagedEngine over the sim; everything it put out is kept in outputs."""

    engine: PagedEngine
    runner: SimRunner
    clock: VirtualClock
    outputs: list[StepOutput] = field(default_factory=list)

    @property
    def blocks(self) -> BlockManager:
        """The engine's block manager."""
        return self.engine.blocks

    def step(self) -> StepOutput:
        """Plan and run one step; checks the blocks after it."""
        self.engine.plan()
        output = self.engine.step()
        self.outputs.append(output)
        self.blocks.check()
        return output

    def run(self, max_steps: int = 5000) -> None:
        """Step until there is nothing to do."""
        for _ in range(max_steps):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError(f"still work after {max_steps} steps")

    def tokens(self, request_id: str) -> list[int]:
        """What was drawn for a request; checks that positions are contiguous."""
        rows = [
            (position, token_id)
            for output in self.outputs
            for key, position, token_id in zip(output.keys, output.positions, output.token_ids, strict=True)
            if key.request_id == request_id
        ]
        assert all(after[0] == before[0] + 1 for before, after in pairwise(rows)), "positions have gaps"
        return [token_id for _, token_id in rows]

    def end(self, request_id: str) -> SequenceEnd:
        """The one end of a request."""
        (end,) = [end for output in self.outputs for end in output.ends if end.key.request_id == request_id]
        return end

    def ready_blocks(self, request_id: str) -> list[int]:
        """Announced block ids in order; checks that the ranges are contiguous."""
        ready = [ready for output in self.outputs for ready in output.ready if ready.key.request_id == request_id]
        for before, after in pairwise(ready):
            assert after.first_block == before.first_block + len(before.block_ids), "announced ranges have gaps"
        return [block for entry in ready for block in entry.block_ids]


def virtual_engine(
    num_blocks: int = 64,
    profile: SimProfile | str = "instant",
    *,
    limits: SchedulerLimits = SMALL,
    hash_block_tokens: int = 0,
    model_path: Path | None = None,
) -> VirtualEngine:
    """A small engine; block size as in limits."""
    clock = VirtualClock()
    loaded = load_profile(profile) if isinstance(profile, str) else profile
    runner = SimRunner(loaded, limits.block_tokens, model_path, sleep=clock.sleep, clock=clock)
    pool = KvPool(np.zeros((num_blocks, runner.layout.block_bytes), dtype=np.uint8), runner.layout)
    engine = PagedEngine(runner, pool, limits=limits, hash_block_tokens=hash_block_tokens, clock=clock)
    return VirtualEngine(engine, runner, clock)


class LoopDrivenEngine(DrivenEngine):
    """A DrivenEngine whose steps take their predicted time on the running loop instead of a thread's.

    Made for baton_runtime.virtual_time: commands come in the middle of steps as they do from a loop beside a thread, and every
    time is exact. Run `run()` in a task from open() to close().
    """

    def __init__(self, engine: PagedEngine) -> None:
        super().__init__(engine, clock=asyncio.get_running_loop().time)
        self._condition = self._changed = _LoopCondition()
        self._took_s = 0.0

    async def open(self) -> None:
        """See Engine.open."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.current_thread()

    async def close(self) -> None:
        """See Engine.close."""
        self._is_stopping = True
        self._changed.notify_all()

    async def run(self) -> None:
        """What the thread does."""
        while not self._is_stopping:
            self._changed.event.clear()
            if not (self._commands or self._engine.has_work()):
                await self._changed.event.wait()
                continue
            predicted_s = self._plan_step(self._take_commands())
            if predicted_s is not None:
                self._took_s = predicted_s
                await asyncio.sleep(predicted_s)
                self._run_step()
        self._end_all()
        self._finish(EndReason.CANCELLED, "engine closed")

    def _emit(self, output: StepOutput) -> None:
        output.duration_s = self._took_s  # the step itself ran at one instant
        super()._emit(output)


class _LoopCondition(threading.Condition):
    """A condition that tells a loop as well."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()

    def notify_all(self) -> None:
        super().notify_all()
        self.event.set()


def loop_driven_engine(num_blocks: int, profile: SimProfile | str, *, limits: SchedulerLimits = SMALL) -> LoopDrivenEngine:
    """A small engine on the running loop's time; block size as in limits."""
    loaded = load_profile(profile) if isinstance(profile, str) else profile
    clock = asyncio.get_running_loop().time
    runner = SimRunner(loaded, limits.block_tokens, None, sleep=lambda _: None, clock=clock)
    pool = KvPool(np.zeros((num_blocks, runner.layout.block_bytes), dtype=np.uint8), runner.layout)
    return LoopDrivenEngine(PagedEngine(runner, pool, limits=limits, clock=clock))


def tokens_of(length: int, seed: int = 0) -> "array[int]":
    """A prompt; equal seeds give equal beginnings."""
    return array("I", np.random.default_rng(seed).integers(3, 1000, length).tolist())


def request_of(
    request_id: str,
    token_ids: "array[int]",
    *,
    work: Work = Work.WHOLE,
    priority: Priority = Priority.INTERACTIVE,
    attempt: int = 1,
    num_prompt_tokens: int | None = None,
    first_announced_block: int = 0,
    max_tokens: int = 4,
    sampling: SamplingParams | None = None,
) -> EngineRequest:
    """A request with defaults for tests; num_prompt_tokens None: all of token_ids."""
    params = replace(sampling or SamplingParams(), max_tokens=max_tokens)
    num_prompt = len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
    return EngineRequest(SequenceKey(request_id, attempt), token_ids, num_prompt, ROOT, work, priority, params, first_announced_block)


def hashes_of(token_ids: "array[int]", block_tokens: int = SMALL.block_tokens) -> list[bytes]:
    """Hashes of the full blocks of all tokens but the last: what a prefill computes."""
    return block_hashes(ROOT, token_ids[:-1], block_tokens, block_tokens)
