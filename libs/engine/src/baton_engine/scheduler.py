"""Which sequences run in the next step, and how much of each.

Order of service is by rank, the smaller the sooner:

    rank = arrival + (batch_delay_s if BATCH) + 2 x predicted time of what is to prefill

so interactive goes before batch, a short prompt overtakes a long one at the next chunk, and as rank is a point in time,
everything is first at some time: nothing is starved. A step with the end of a prompt is not filled up with a piece of one that it cannot
finish: the short prompt would wait for as long as the piece takes.
"""

import heapq
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from baton_engine.api import Priority, SequenceKey
from baton_engine.blocks import BlockManager, Turn
from baton_engine.errors import CacheFull
from baton_engine.runner import ChunkItem, StepLoad
from baton_engine.sequence import SequenceState

# A prompt lets shorter ones go before it for so many times as long as it takes itself. Not what is left of it counts, or in its second half
# it would keep them waiting to its end.
_YIELDS = 2.0

_Ranked: TypeAlias = tuple[float, int, SequenceState]  # rank, number (unique, so states are never compared)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes of a step. Times are predictions of the runner."""

    block_tokens: int = 16
    max_batch_sequences: int = 64  # sequences in one step
    max_chunk_tokens: int = 2048  # prompt tokens in one step, over all sequences
    max_step_s: float = 0.25  # design.md, table of times
    max_mixed_step_s: float = 0.25  # while sequences decode along: bounds the gap between their tokens
    batch_delay_s: float = 10.0  # a batch sequence yields to interactive ones that arrive up to this much later


@dataclass(slots=True)
class Plan:
    """What the next step runs, and what had to make room for it (blocks released already). states[i] is the sequence of items[i]."""

    states: list[SequenceState] = field(default_factory=list)
    items: list[ChunkItem] = field(default_factory=list)
    preempted: list[SequenceState] = field(default_factory=list)
    load: StepLoad = field(default_factory=StepLoad)
    predicted_s: float = 0.0


class Scheduler:
    """Continuous batching with chunked prefill. Single-threaded; only the block manager is shared with others."""

    def __init__(
        self,
        blocks: BlockManager,
        limits: SchedulerLimits,
        predict_s: Callable[[StepLoad], float],
        clock: Callable[[], float] = time.monotonic,
        *,
        tokens_per_step: int = 1,
    ) -> None:
        """tokens_per_step: tokens that a sequence may draw in one step."""
        self.limits = limits
        self._tokens_per_step = tokens_per_step
        self._clock = clock
        self.running: dict[SequenceKey, SequenceState] = {}
        self.waiting: dict[SequenceKey, SequenceState] = {}
        self._blocks = blocks
        self._predict_s = predict_s
        self._with_table: list[_Ranked] = []  # heaps; entries not in `waiting` are stale
        self._without_table: list[_Ranked] = []
        self._available_version = 0  # changes whenever blocks may have become available
        self._blocked_at = -1  # the version at which the first of _without_table did not fit
        self._prefilling: list[SequenceState] = []  # running ones that were not decoding when the last step was planned
        self._num_active = 0  # running ones that were not paused then
        blocks.subscribe_available(self._on_available)

    def get(self, key: SequenceKey) -> SequenceState | None:
        """The sequence, waiting or running."""
        return self.running.get(key) or self.waiting.get(key)

    def add(self, state: SequenceState) -> None:
        """Queue. state.table is filled if the sequence owns blocks already."""
        state.rank = self._rank(state)
        self.waiting[state.key] = state
        self._push(state)

    def remove(self, key: SequenceKey) -> None:
        """Forget a sequence; its blocks are the caller's to release."""
        self.running.pop(key, None)
        if self.waiting.pop(key, None) is not None:
            self._blocks.withdraw(key)
        self._blocked_at = -1

    def pause(self, state: SequenceState) -> None:
        """Leave out of steps until resumed; keeps its blocks and its place, but keeps nobody from blocks."""
        state.paused = True
        if state.key in self.waiting:
            self._blocks.withdraw(state.key)
        self._blocked_at = -1

    def resume(self, state: SequenceState) -> None:
        """Undo pause."""
        if state.paused:
            state.paused = False
            if state.key in self.waiting:
                self._push(state)

    def has_work(self) -> bool:
        """Whether plan would find something to run now."""
        if any(not state.paused for state in self.running.values()) or self._first(self._with_table):
            return True
        return self._first(self._without_table) is not None and not self._is_blocked()

    def waiting_prefill_tokens(self) -> int:
        """Tokens still to prefill, over all sequences."""
        prefilling = [state for state in self._prefilling if state.key in self.running]
        return sum(state.remaining for state in (*prefilling, *self.waiting.values()) if not state.is_decoding)

    def plan(self) -> Plan:
        """Choose the next step: all decoding sequences, then chunks of prompts by rank."""
        plan = Plan()
        self._add_decodes(plan)
        self._settle(plan)
        num_preempted = len(plan.preempted)
        self._add_prefills(plan)
        if len(plan.preempted) > num_preempted:
            self._settle(plan)
        plan.predicted_s = self._predict_s(plan.load) if plan.items else 0.0
        return plan

    def _on_available(self) -> None:
        # Not atomic, and need not be: the blocks were there before this call, so a plan that missed the change of the
        # number has seen the blocks.
        self._available_version += 1

    def _rank(self, state: SequenceState) -> float:
        full = self.limits.max_chunk_tokens
        token_s = (self._predict_s(StepLoad().plus(0, full)) - self._predict_s(StepLoad())) / full
        return state.arrived_at + self._delay_s(state) + _YIELDS * state.remaining * token_s

    def _delay_s(self, state: SequenceState) -> float:
        return self.limits.batch_delay_s if state.request.priority is Priority.BATCH else 0.0

    def _push(self, state: SequenceState) -> None:
        heap = self._with_table if state.owns_table else self._without_table
        heapq.heappush(heap, (state.rank, state.number, state))
        if heap is self._without_table and heap[0][2] is state:
            self._blocked_at = -1  # another one is first now, and may fit

    def _first(self, heap: list[_Ranked]) -> SequenceState | None:
        """First waiting sequence that is not paused; drops stale entries (resume pushes paused ones again)."""
        while heap:
            state = heap[0][2]
            if state.key in self.waiting and not state.paused:
                return state
            heapq.heappop(heap)
        return None

    def _next_without_table(self) -> SequenceState | None:
        """Who asks for blocks next: the one whose room is kept in the pool, if it is one of ours, else the first by rank."""
        first = self._first(self._without_table)
        if first is None:
            return None
        kept = self.waiting.get(cast(SequenceKey, self._blocks.first_in_line()))
        return first if kept is None or kept.paused or kept.owns_table else kept

    def _decoding(self) -> list[SequenceState]:
        """Who decodes in this step. The one pass over all that run: with thousands of them each pass counts."""
        states: list[SequenceState] = []
        self._prefilling = []
        self._num_active = 0
        for state in self.running.values():
            is_decoding = state.is_decoding
            if not is_decoding:
                self._prefilling.append(state)
            if not state.paused:
                self._num_active += 1
                if is_decoding:
                    states.append(state)
        if len(states) > self.limits.max_batch_sequences:  # possible after resumes: take turns
            states.sort(key=lambda state: state.last_step)
        return states[: self.limits.max_batch_sequences]

    def _add_decodes(self, plan: Plan) -> None:
        """One chunk for everyone who decodes. Nearly all have room for it, and are not worth a call each."""
        tokens_per_step, block_tokens = self._tokens_per_step, self.limits.block_tokens
        add_state, add_item = plan.states.append, plan.items.append
        for state in self._decoding():
            tokens = state.tokens
            end = len(tokens)
            draws = min(tokens_per_step, state.max_length - end)
            if plan.preempted or end + max(0, draws - 1) > len(state.table) * block_tokens:
                self._add_chunk(state, end, plan)
            else:
                add_state(state)
                add_item(ChunkItem(state.key, tokens, state.computed, end, state.table, draws, state.sampling, state.num_prompt_tokens))

    def _add_chunk(self, state: SequenceState, end: int, plan: Plan) -> bool:
        """Compute up to token `end`, and draw if that is the last one; False if there was no room and state itself had to go."""
        tokens = state.tokens
        draws = 0
        if end == len(tokens) and not state.is_prefill_only:
            draws = min(self._tokens_per_step, state.max_length - end)
        if draws > 1 and not self._grow(state, end + draws - 1):
            draws = 1  # nobody has to go for tokens that can come with the next step
        if not self._make_room(state, end + max(0, draws - 1), plan):
            return False
        plan.states.append(state)
        plan.items.append(ChunkItem(state.key, tokens, state.computed, end, state.table, draws, state.sampling, state.num_prompt_tokens))
        return True

    def _grow(self, state: SequenceState, end: int) -> bool:
        """Grow state's table to hold `end` tokens; False if there are too few blocks for it. One that was preempted stays as it is."""
        missing = -(-end // self.limits.block_tokens) - len(state.table)
        if missing > 0 and state.key in self.running:
            try:
                state.table += self._blocks.grow(state.key, missing)
            except CacheFull:
                return False
        return True

    def _make_room(self, state: SequenceState, end: int, plan: Plan) -> bool:
        """Grow state's table to hold `end` tokens, preempting the youngest if need be; False if state itself had to go."""
        if plan.preempted and state.key not in self.running:
            return False  # preempted for another one of this step
        while not self._grow(state, end):
            victim = self._victim()
            self.remove(victim.key)
            self._blocks.release(victim.key)
            plan.preempted.append(victim)
            if victim is state:
                return False
        return True

    def _victim(self) -> SequenceState:
        """Batch before interactive, the youngest first. Blocks of PREFILL_ONLY are promised; they end soon by themselves."""
        candidates = [state for state in self.running.values() if not state.is_prefill_only]
        return max(candidates, key=lambda state: (state.request.priority, state.number))

    def _settle(self, plan: Plan) -> None:
        """Drop items of sequences that were preempted after they had been chosen, and add up the rest."""
        if plan.preempted:
            kept = [index for index, state in enumerate(plan.states) if state.key in self.running]
            plan.states = [plan.states[index] for index in kept]
            plan.items = [plan.items[index] for index in kept]
        plan.load = StepLoad.of_items(plan.items)

    def _add_prefills(self, plan: Plan) -> None:
        limits = self.limits
        states = [state for state in self._prefilling if not state.paused and state.key in self.running]
        started = deque(sorted((state.rank, state.number, state) for state in states))
        slots = limits.max_batch_sequences - self._num_active + sum(not state.paused for state in plan.preempted)
        # Where decoding alone is over the limit, a prompt may still come along if it makes the step no longer.
        limit_s = max(limits.max_mixed_step_s, self._predict_s(plan.load)) if plan.items else limits.max_step_s
        budget = limits.max_chunk_tokens
        finishes_one = False  # whether the step computes the end of a prompt
        while budget > 0 and len(plan.items) < limits.max_batch_sequences:
            state = self._best(started, has_slot=slots > 0)
            is_first = budget == limits.max_chunk_tokens
            if state is None:
                return
            fitting = 0 if is_first else self._chunk_tokens(plan.load, state, budget, limit_s)
            if not is_first and (not fitting or (finishes_one and fitting < state.remaining)):
                return
            if state.key in self.waiting:
                if not self._admit(state):
                    continue
                slots -= 1
            else:
                started.popleft()
            # The first chunk always gets a little: a full batch of decoding sequences must not starve prompts.
            length = self._chunk_tokens(plan.load, state, budget, limit_s) or min(limits.block_tokens, state.remaining, budget)
            end = state.computed + length
            is_end = length == state.remaining
            if self._add_chunk(state, end, plan):
                finishes_one |= is_end
                plan.load = plan.load.plus(state.computed, end)
            budget -= length

    def _best(self, started: deque[_Ranked], *, has_slot: bool) -> SequenceState | None:
        """The sequence with the smallest rank that could be given a chunk now."""
        candidates: list[_Ranked] = [started[0]] if started else []
        if has_slot:
            states = [self._first(self._with_table), None if self._is_blocked() else self._next_without_table()]
            candidates += [(state.rank, state.number, state) for state in states if state is not None]
        return min(candidates)[2] if candidates else None

    def _is_blocked(self) -> bool:
        return self._blocked_at == self._available_version

    def _admit(self, state: SequenceState) -> bool:
        """Move from waiting to running, with a table; False if there are too few blocks now."""
        if not state.owns_table:
            version = self._available_version
            try:
                self._acquire(state)
            except CacheFull:
                self._blocked_at = version
                return False
            state.rank = self._rank(state)  # now it is known what is cached
        del self.waiting[state.key]
        self.running[state.key] = state
        self._prefilling.append(state)
        return True

    def _acquire(self, state: SequenceState) -> None:
        block_tokens = self.limits.block_tokens
        num_blocks = -(-len(state.tokens) // block_tokens)
        turn = Turn(state.arrived_at + self._delay_s(state), self._clock(), stays=True)
        shared = self._blocks.acquire(state.key, state.hashes, num_blocks, keep_free=self._blocks.growth_headroom, turn=turn)
        state.table = list(self._blocks.table(state.key))
        state.owns_table = True
        state.computed = state.cached_tokens = shared * block_tokens
        state.published = shared

    def _chunk_tokens(self, load: StepLoad, state: SequenceState, budget: int, limit_s: float) -> int:
        """Longest chunk of at most budget tokens that keeps the step within limit_s; ends on a block border if it can."""
        start, block_tokens = state.computed, self.limits.block_tokens
        length = min(state.remaining, budget)
        if self._predict_s(load.plus(start, start + length)) > limit_s:
            length = bisect_right(range(1, length), limit_s, key=lambda n: self._predict_s(load.plus(start, start + n)))
        aligned = (start + length) // block_tokens * block_tokens - start
        return aligned if length < state.remaining and aligned > 0 else length
