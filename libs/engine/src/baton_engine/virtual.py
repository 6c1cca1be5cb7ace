"""A sim engine on a virtual clock, stepped by hand: for tests of the engine and of whatever sits on it. Never sleeps."""

from array import array
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from baton_runtime.hashing import block_hashes, cache_root

from baton_engine.api import EngineRequest, Priority, SamplingParams, SequenceEnd, SequenceKey, StepOutput, Work
from baton_engine.blocks import BlockManager
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
