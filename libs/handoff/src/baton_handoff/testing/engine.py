"""An engine without a model: real block manager, contents written by a function, one step at a time."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from baton_engine.api import (
    BlocksReady,
    EndReason,
    EngineBeat,
    EngineInfo,
    EngineRequest,
    EngineStats,
    SequenceEnd,
    SequenceKey,
    StepOutput,
    Work,
)
from baton_engine.blocks import BlockManager
from baton_engine.pool import BlockLayout, KvPool
from baton_runtime.hashing import block_hashes

# Writes KV of block `index` of a sequence into block `block_id`: (block_id, request, index).
WriteBlock = Callable[[int, EngineRequest, int], None]


@dataclass(slots=True)
class _Run:
    request: EngineRequest
    hashes: list[bytes]
    num_blocks: int
    done_blocks: int = 0
    is_cancelled: bool = False


class MiniEngine:
    """Prefills PREFILL_ONLY sequences a few blocks per step, in the order in which they came, as `baton_engine.api` asks.

    DECODE_ONLY sequences draw one token per step (their number of tokens so far) without touching blocks, until max_tokens.
    """

    def __init__(
        self, blocks: BlockManager, block_tokens: int, write: WriteBlock, chunk_blocks: int = 2, hash_block_tokens: int = 0
    ) -> None:
        """hash_block_tokens: granularity of the hash chain; 0: block_tokens."""
        self._hash_block_tokens = hash_block_tokens or block_tokens
        self._blocks = blocks
        self._block_tokens = block_tokens
        self._write = write
        self._chunk_blocks = chunk_blocks
        self._prefills: deque[_Run] = deque()
        self._decodes: dict[SequenceKey, _Run] = {}
        self._step = 0
        self.fail_next: set[SequenceKey] = set()

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._prefills or self._decodes)

    def holds(self, key: SequenceKey) -> bool:
        """Whether the sequence has not ended."""
        return key in self._decodes or any(run.request.key == key for run in self._prefills)

    def start(self, request: EngineRequest) -> None:
        """Take a sequence whose table is acquired (PREFILL_ONLY) or reserved and committed (DECODE_ONLY)."""
        handed_over = request.token_ids[: request.num_kv_tokens]
        hashes = block_hashes(request.cache_root, handed_over, self._hash_block_tokens, self._block_tokens)
        run = _Run(request, hashes, len(self._blocks.table(request.key)))
        if request.work is Work.PREFILL_ONLY:
            run.done_blocks = self._blocks.prefix(request.key).ready
            self._prefills.append(run)
        else:
            self._decodes[request.key] = run

    def cancel(self, key: SequenceKey) -> None:
        """End it in the next step."""
        for run in [*self._prefills, *self._decodes.values()]:
            if run.request.key == key:
                run.is_cancelled = True

    def step(self) -> StepOutput:
        """One chunk of the oldest prefill, one token of every decode."""
        self._step += 1
        output = StepOutput(step=self._step)
        self._end_cancelled(output)
        if self._prefills:
            self._prefill(self._prefills[0], output)
        for run in list(self._decodes.values()):
            self._decode(run, output)
        return output

    def _end_cancelled(self, output: StepOutput) -> None:
        for run in [run for run in [*self._prefills, *self._decodes.values()] if run.is_cancelled]:
            self._end(run, EndReason.CANCELLED, output)

    def _prefill(self, run: _Run, output: StepOutput) -> None:
        request, table = run.request, self._blocks.table(run.request.key)
        cached = self._blocks.prefix(request.key).shared
        if request.key in self.fail_next:
            self._end(run, EndReason.ENGINE_ERROR, output)
            return
        start = 0 if run.done_blocks == cached else run.done_blocks
        end = min(run.num_blocks, run.done_blocks + self._chunk_blocks)
        for index in range(run.done_blocks, end):
            self._write(table[index], request, index)
            if index < len(run.hashes):
                self._blocks.publish(request.key, index, run.hashes[index])
        run.done_blocks = end
        first = max(start, request.first_announced_block)
        if first < end:
            ids = self._blocks.pin(request.key, first, end - first)
            output.ready.append(BlocksReady(request.key, first, ids, cached * self._block_tokens, time.monotonic()))
        if end == run.num_blocks:
            self._end(run, EndReason.PREFILLED, output)

    def _decode(self, run: _Run, output: StepOutput) -> None:
        output.keys.append(run.request.key)
        output.positions.append(run.done_blocks)
        output.token_ids.append(len(run.request.token_ids) + run.done_blocks)
        run.done_blocks += 1
        if run.done_blocks >= run.request.sampling.max_tokens:
            self._end(run, EndReason.LENGTH, output)

    def _end(self, run: _Run, reason: EndReason, output: StepOutput) -> None:
        key = run.request.key
        if self._decodes.pop(key, None) is None:
            self._prefills.remove(run)
        self._blocks.release(key)
        output.ends.append(SequenceEnd(key, reason, run.done_blocks, 0))


class FakeEngine:
    """`baton_engine.api.Engine` over a MiniEngine; steps run on the loop, when outputs() is consumed and `is_paused` is not set.

    Contents: byte 0 of block i of a sequence is `fill(request, i)`, and so are all others.
    """

    def __init__(
        self,
        num_blocks: int,
        layout: BlockLayout,
        pool: KvPool,
        chunk_blocks: int = 2,
        fingerprint: str = "f" * 16,
        hash_block_tokens: int = 0,
    ) -> None:
        self.info = EngineInfo(max_model_tokens=1 << 20, vocab_size=1 << 16, eos_token_ids=frozenset(), fingerprint=fingerprint)
        self.pool = pool
        self.blocks = self.cache = BlockManager(num_blocks)
        self.is_paused = False
        self.beat_age_s = 0.0
        self._mini = MiniEngine(self.blocks, layout.block_tokens, self._fill, chunk_blocks, hash_block_tokens)
        self._wake = asyncio.Event()
        self._is_closed = False
        self._step = 0

    @staticmethod
    def fill(request: EngineRequest, index: int) -> int:
        """Content of every byte of one block: depends on the request's first token and the index."""
        return (request.token_ids[0] * 31 + index) % 251 + 1

    async def open(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """End outputs()."""
        self._is_closed = True
        self._wake.set()

    def start(self, request: EngineRequest) -> None:
        """As Engine.start."""
        self._mini.start(request)
        self._wake.set()

    def cancel(self, key: SequenceKey) -> None:
        """As Engine.cancel."""
        self._mini.cancel(key)
        self._wake.set()

    def fail(self, key: SequenceKey) -> None:
        """Its next step ends it with ENGINE_ERROR."""
        self._mini.fail_next.add(key)

    def pause(self, key: SequenceKey) -> None:
        """Ignored."""

    def resume(self, key: SequenceKey) -> None:
        """Ignored."""

    def go_on(self) -> None:
        """Step again after is_paused."""
        self.is_paused = False
        self._wake.set()

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """One step per item while there is work."""
        while not self._is_closed:
            if self.is_paused or not self._mini.has_work():
                self._wake.clear()
                await self._wake.wait()
                continue
            self._step += 1
            yield self._mini.step()
            await asyncio.sleep(0)

    def beat(self) -> EngineBeat:
        """beat_age_s as the age of the running step."""
        return EngineBeat(self._step, self.beat_age_s, 0.0)

    def stats(self) -> EngineStats:
        """Zeros."""
        return EngineStats(0, 0, 0, 0)

    def _fill(self, block_id: int, request: EngineRequest, index: int) -> None:
        self.pool.data[block_id] = self.fill(request, index)
