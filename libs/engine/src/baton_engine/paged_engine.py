"""The step engine of sim and torch: scheduler, block manager and a model runner put together."""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from baton_runtime.errors import InvalidArgument
from baton_runtime.hashing import block_hashes

from baton_engine.api import (
    BlocksReady,
    EndReason,
    EngineInfo,
    EngineRequest,
    EngineStats,
    SequenceEnd,
    SequenceKey,
    StepOutput,
    Work,
)
from baton_engine.blocks import BlockManager
from baton_engine.errors import SequenceTooLong, StepFailed
from baton_engine.pool import KvPool
from baton_engine.runner import Draw, ModelRunner
from baton_engine.scheduler import Plan, Scheduler, SchedulerLimits
from baton_engine.sequence import SequenceState


class PagedEngine:
    """StepEngine over a paged pool. All methods but stats are for one thread.

    Who frees blocks: every end releases the sequence's table here, before it is reported; pins of announced blocks stay
    until the handoff unpins them.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: KvPool,
        blocks: BlockManager | None = None,
        *,
        limits: SchedulerLimits | None = None,
        hash_block_tokens: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """hash_block_tokens: granularity of the hash chain, divides the block size; 0: the block size."""
        self.info: EngineInfo = runner.info
        self.pool = pool
        self.blocks = blocks if blocks is not None else BlockManager(pool.num_blocks)
        self._block_tokens = pool.layout.block_tokens
        self._hash_block_tokens = hash_block_tokens or self._block_tokens
        if self._block_tokens % self._hash_block_tokens:
            raise InvalidArgument("hash_block_tokens", f"{hash_block_tokens} does not divide the block size {self._block_tokens}")
        limits = limits or SchedulerLimits(block_tokens=self._block_tokens)
        if limits.block_tokens != self._block_tokens:
            raise InvalidArgument("limits.block_tokens", f"{limits.block_tokens} is not the pool's {self._block_tokens}")
        self._runner = runner
        self._clock = clock
        self._scheduler = Scheduler(self.blocks, limits, runner.predict_s, clock, tokens_per_step=runner.tokens_per_step)
        self._plan = Plan()
        self._output = StepOutput(step=0)
        self._cancels: set[SequenceKey] = set()
        self._arrivals: dict[SequenceKey, SequenceState] = {}  # added since the last plan, in that order
        self._num_added = 0
        self._step = 0
        self._computed_at = 0.0  # end of the compute of the running step; 0: it computes nothing
        self._stats = EngineStats(0, 0, 0, 0)
        runner.bind(pool)

    def add(self, request: EngineRequest) -> None:
        """See StepEngine.add.

        Raises: SequenceTooLong, InvalidArgument; nothing was kept then, and a table the caller made is still the caller's.
        """
        check_request(request, self.info, self.pool.num_blocks * self._block_tokens)
        if self._scheduler.get(request.key) or request.key in self._arrivals:
            raise InvalidArgument("key", "this attempt is in the engine already")
        state = SequenceState(request, self._num_added, self._clock(), array("I", request.token_ids))
        longest = min(self.info.max_model_tokens, self.pool.num_blocks * self._block_tokens + 1)
        sampling = request.sampling
        state.max_length = min(longest, request.num_prompt_tokens + sampling.max_tokens)
        state.stops = sampling.stop_token_ids if sampling.ignore_eos else sampling.stop_token_ids | self.info.eos_token_ids
        num_kv = request.num_kv_tokens
        state.hashes = block_hashes(request.cache_root, request.token_ids[:num_kv], self._hash_block_tokens, self._block_tokens)
        if request.work is not Work.WHOLE or self.blocks.has_table(request.key):
            self._adopt_table(state)
        self._num_added += 1
        self._arrivals[request.key] = state
        before = self._stats
        self._stats = replace(
            before,
            waiting_sequences=before.waiting_sequences + 1,
            waiting_prefill_tokens=before.waiting_prefill_tokens + state.remaining,
        )

    def cancel(self, key: SequenceKey) -> None:
        """See StepEngine.cancel."""
        if self._scheduler.get(key) or key in self._arrivals:
            self._cancels.add(key)

    def pause(self, key: SequenceKey) -> None:
        """See StepEngine.pause."""
        self._admit_arrivals()
        if (state := self._scheduler.get(key)) is not None:
            self._scheduler.pause(state)

    def resume(self, key: SequenceKey) -> None:
        """See StepEngine.resume."""
        self._admit_arrivals()
        if (state := self._scheduler.get(key)) is not None:
            self._scheduler.resume(state)

    def has_work(self) -> bool:
        """See StepEngine.has_work."""
        return bool(self._cancels or self._arrivals or self._has_output() or self._scheduler.has_work())

    def plan(self) -> float:
        """See StepEngine.plan."""
        self._admit_arrivals()
        for key in self._cancels:
            if (state := self._scheduler.get(key)) is not None:
                self._end(state, EndReason.CANCELLED)
        self._cancels.clear()
        self._plan = self._scheduler.plan()
        for state in self._plan.preempted:
            self._end(state, EndReason.PREEMPTED)
        return self._plan.predicted_s

    def step(self) -> StepOutput:
        """See StepEngine.step."""
        self._step += 1
        started_at = self._clock()
        if self._plan.items:
            self._run(self._plan)
        output, self._output = self._output, StepOutput(step=0)
        output.step = self._step
        output.duration_s = self._clock() - started_at
        self._plan = Plan()
        self._computed_at = 0.0
        self._update_stats()
        return output

    def stats(self) -> EngineStats:
        """See StepEngine.stats."""
        return self._stats

    def _adopt_table(self, state: SequenceState) -> None:
        """Take over the table the worker made, and what is in it already."""
        request = state.request
        if not self.blocks.has_table(request.key):
            raise InvalidArgument("key", f"{request.work.value} needs a table in the block manager")
        prefix = self.blocks.prefix(request.key)
        state.table = list(self.blocks.table(request.key))
        state.owns_table = True
        num_kv, block_tokens = request.num_kv_tokens, self._block_tokens
        state.computed = min(prefix.ready * block_tokens, num_kv)
        state.cached_tokens = min(prefix.shared * block_tokens, num_kv)
        state.published = min(prefix.ready, num_kv // block_tokens)
        state.announced = request.first_announced_block
        if request.work is Work.DECODE_ONLY and state.computed < num_kv:
            raise InvalidArgument("work", f"decode_only with {state.computed} of {num_kv} tokens committed")
        if len(state.table) * block_tokens < num_kv:
            raise InvalidArgument("key", f"table of {len(state.table)} blocks for {num_kv} tokens")

    def _admit_arrivals(self) -> None:
        """Queue what was added; what has nothing to compute ends here."""
        for state in self._arrivals.values():
            self._scheduler.add(state)
            if state.is_prefill_only:
                self._announce(state)
                if state.remaining == 0:
                    self._end(state, EndReason.PREFILLED)
            elif len(state.tokens) >= state.max_length:
                self._end(state, EndReason.LENGTH)
        self._arrivals.clear()

    def _run(self, plan: Plan) -> None:
        output = self._output
        self._clear_unwritten(plan)
        try:
            draws = self._runner.run(plan.items)
            self._computed_at = self._clock()
        except StepFailed as failure:
            self._end_guilty(plan.states, failure)
            return
        output.prefill_tokens = plan.load.prefill_tokens
        output.decode_sequences = plan.load.decode_sequences
        output.kv_tokens = sum([item.end for item in plan.items])
        for state, item, draw in zip(plan.states, plan.items, draws, strict=True):
            self._advance(state, item.end, draw)

    def _clear_unwritten(self, plan: Plan) -> None:
        """Zero what a runner may read but nobody has written: it must be finite (see ModelRunner)."""
        block_tokens = self._block_tokens
        for state, (_, _, start, end, table, draws, _, _) in zip(plan.states, plan.items, strict=True):
            kv_end = end + draws - 1 if draws > 1 else end
            first_slot = start % block_tokens
            if state.started and first_slot and kv_end <= start - first_slot + block_tokens:
                continue  # within a block it has entered before: nearly every step of a decoding sequence
            if not state.started and first_slot:  # a partial block that came by a pull: its tail is whatever was there
                self._zero_slots(table[start // block_tokens], first_slot)
            # Blocks the step enters and does not fill for certain: how many tokens are drawn is not known yet.
            for index in range(max(-(-start // block_tokens), end // block_tokens), -(-kv_end // block_tokens)):
                self._zero_slots(table[index], 0)

    def _zero_slots(self, block: int, first_slot: int) -> None:
        layout = self.pool.layout
        self.pool.data[block].reshape(layout.num_planes, layout.block_tokens, layout.slot_bytes)[:, first_slot:] = 0

    def _advance(self, state: SequenceState, end: int, draw: Draw | None) -> None:
        """A step has computed the sequence's tokens up to `end` and drawn."""
        state.computed = end
        state.last_step = self._step
        if not state.started:
            state.started = True
            self._output.started.append(state.key)
        if draw is not None:
            self._append(state, draw)
            return
        self._publish(state)
        if state.is_prefill_only:
            self._announce(state)
            if state.remaining == 0:
                self._end(state, EndReason.PREFILLED)

    def _publish(self, state: SequenceState) -> None:
        for index in range(state.published, state.computed // self._block_tokens):
            self.blocks.publish(state.key, index, state.hash_of(index, self._block_tokens, self._hash_block_tokens))
            state.published = index + 1

    def _announce(self, state: SequenceState) -> None:
        """Pin and report blocks that are complete since the last time; the partial last block counts when all is computed."""
        num_kv, block_tokens = state.goal, self._block_tokens
        end_block = -(-num_kv // block_tokens) if state.computed == num_kv else state.computed // block_tokens
        if end_block > state.announced:
            block_ids = self.blocks.pin(state.key, state.announced, end_block - state.announced)
            ready_at = self._computed_at or self._clock()
            ready = BlocksReady(state.key, state.announced, block_ids, state.cached_tokens, ready_at)
            self._output.ready.append(ready)
            state.announced = end_block

    def _append(self, state: SequenceState, draw: Draw) -> None:
        output, tokens, token_ids = self._output, state.tokens, draw.token_ids
        position = len(tokens) - state.num_prompt_tokens
        stop_token_id = None
        if not state.stops.isdisjoint(token_ids):
            token_ids, stop_token_id = self._until_stop(state, position, token_ids)
        count = len(token_ids)
        tokens.extend(token_ids)
        state.drawn += count
        state.computed += count - 1
        if state.computed >= (state.published + 1) * self._block_tokens:
            self._publish(state)
        if count == 1:  # the common case
            output.keys.append(state.key)
            output.positions.append(position)
        else:
            output.keys += [state.key] * count
            output.positions += range(position, position + count)
        output.token_ids += token_ids
        if draw.logprobs:
            output.logprobs += draw.logprobs[:count]
        if stop_token_id is not None:
            self._end(state, EndReason.STOP, stop_token_id=stop_token_id)
        elif len(tokens) >= state.max_length:
            self._end(state, EndReason.LENGTH)

    def _until_stop(self, state: SequenceState, position: int, token_ids: Sequence[int]) -> tuple[Sequence[int], int | None]:
        """The tokens up to and with the first that ends the sequence, and that one. position: of the first of them."""
        for index, token_id in enumerate(token_ids):
            if token_id in state.stops and position + index >= state.sampling.min_tokens:
                return token_ids[: index + 1], token_id
        return token_ids, None

    def _end_guilty(self, states: list[SequenceState], failure: StepFailed) -> None:
        """End the sequences a failed step names; nothing of the others was advanced, so they run again from where they were.

        Raises: the failure, if it names none of the step.
        """
        guilty = [state for state in states if state.key in failure.keys]
        if not guilty:
            raise failure
        for state in guilty:
            self.blocks.unpublish(state.key)  # what failed it may lie in a block: the next request must compute, not hit
            self._end(state, EndReason.ENGINE_ERROR, message=str(failure))

    def _end(self, state: SequenceState, reason: EndReason, *, stop_token_id: int | None = None, message: str = "") -> None:
        self._scheduler.remove(state.key)
        self.blocks.release(state.key)
        self._runner.forget(state.key)
        self._output.ends.append(SequenceEnd(state.key, reason, state.drawn, state.cached_tokens, stop_token_id, message))

    def _has_output(self) -> bool:
        return bool(self._output.ends or self._output.ready)

    def _update_stats(self) -> None:
        scheduler = self._scheduler
        self._stats = EngineStats(
            running_sequences=len(scheduler.running),
            waiting_sequences=len(scheduler.waiting),
            waiting_prefill_tokens=scheduler.waiting_prefill_tokens(),
            active_kv_tokens=sum(state.computed for state in scheduler.running.values()),
        )


def check_request(request: EngineRequest, info: EngineInfo, pool_tokens: int) -> None:
    """Refuse what can never run, or would take the engine down.

    Raises: SequenceTooLong, InvalidArgument.
    """
    num_tokens = len(request.token_ids)
    if not 1 <= request.num_prompt_tokens <= num_tokens:
        raise InvalidArgument("num_prompt_tokens", f"{request.num_prompt_tokens} of {num_tokens} tokens")
    num_needed = request.num_kv_tokens if request.work is Work.PREFILL_ONLY else num_tokens
    limit = min(info.max_model_tokens - 1, pool_tokens)
    if num_tokens >= info.max_model_tokens or num_needed > pool_tokens:
        raise SequenceTooLong(num_tokens, limit)
    largest = int(np.maximum.reduce(np.frombuffer(request.token_ids, dtype=np.uint32)))
    if largest >= info.vocab_size:
        raise InvalidArgument("token_ids", f"{largest} is not below the vocabulary's {info.vocab_size}")
