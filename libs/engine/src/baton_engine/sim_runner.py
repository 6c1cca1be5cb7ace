"""The sim engine's model: takes the time a profile says, writes real bytes, and notices KV that is not what it should be."""

import time
from array import array
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path

import numpy as np
import numpy.typing as npt

from baton_engine.api import EngineInfo, SequenceKey, TokenLogprobs
from baton_engine.errors import StepFailed
from baton_engine.pool import BlockLayout, KvPool
from baton_engine.runner import ChunkItem, Draw, StepLoad
from baton_engine.sim_folder import read_sim_folder
from baton_engine.sim_pattern import U64, Bytes, next_tokens, slot_bytes, states, token_terms
from baton_engine.sim_profile import SimProfile

KV_CORRUPT = "kv_corrupt"
_SURE = 0.9  # probability the sim reports for the token it draws; the rest is shared by the others it names
_NOTHING = (0, 0)  # known of a sequence that is new
_VERIFY_TOKENS = 4096  # at a time: bounds the memory of a check


class SimRunner:
    """ModelRunner without a model. A sequence's tokens are a pure function of the tokens so far; it never draws an
    end-of-sequence or special token, so sequences end by max_tokens, stop_token_ids or cancel.

    At a sequence's first step it verifies every slot the step attends to, and fails the sequence with ENGINE_ERROR
    "kv_corrupt" where the bytes are not those of these tokens. Later it trusts what it wrote itself.
    """

    def __init__(
        self,
        profile: SimProfile,
        block_tokens: int,
        model_path: Path | None = None,
        *,
        num_shards: int = 1,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """num_shards: pretend that so many tensor-parallel ranks hold the heads; all of them are this process.

        Raises: ProfileError if the model folder's config.json or tokenizer.json is missing or wrong; ValueError if num_shards does
        not divide the model's KV heads.
        """
        model = profile.model
        folder = read_sim_folder(model_path, model)
        self.info = EngineInfo(folder.max_model_tokens, folder.vocab_size, folder.eos_token_ids, folder.fingerprint)
        self.layout = BlockLayout(model.num_layers, block_tokens, model.num_kv_heads, model.head_dim, model.dtype, num_shards)
        self.tokens_per_step = min(profile.tokens_per_step, block_tokens)  # so that a step enters two blocks at most
        self._allowed = folder.allowed_token_ids
        self._profile = profile
        self._sleep = sleep
        self._clock = clock
        self._pool_tokens = 0
        self._slots: Bytes = np.empty((0, 0, 0, 0), dtype=np.uint8)
        self._first_key: SequenceKey | None = None  # of the last step
        self._ended_at = 0.0
        self._known: dict[SequenceKey, tuple[int, int]] = {}  # tokens whose KV is known to be right, state of the last one

    def bind(self, pool: KvPool) -> None:
        """See ModelRunner.bind."""
        layout = self.layout
        self._pool_tokens = pool.num_blocks * layout.block_tokens
        self._slots = pool.data.reshape(pool.num_blocks, layout.num_planes, layout.block_tokens, layout.slot_bytes)

    def predict_s(self, load: StepLoad) -> float:
        """See ModelRunner.predict_s."""
        return self._profile.step_s(load, self._pool_tokens)

    def run(self, items: Sequence[ChunkItem]) -> list[Draw | None]:
        """See ModelRunner.run."""
        started_at = self._clock()
        # What it wrote or verified itself it trusts.
        unknown = [item for item in items if self._known.get(item.key, _NOTHING)[0] != item.start]
        corrupt = [item.key for item in unknown if not self._is_sound(item)]
        if corrupt:
            raise StepFailed(corrupt, KV_CORRUPT)
        drawn = self._draw_on(items, self._write(items))
        load = StepLoad.of_items(items)
        # A device goes on while the next step is planned: a step that continues the last one begins where that ended.
        began_at = self._ended_at if items[0].key == self._first_key else started_at
        due_at = began_at + self.predict_s(load)
        # Sleeping even for 0 s lets the event loop run between steps, as a device would: one thread must not keep the interpreter.
        self._sleep(max(0.0, due_at - self._clock()))
        woken_at = self._clock()
        # That the host wakes up a little late is not the device's doing; but nothing is made up for once it was late by a step.
        self._first_key, self._ended_at = items[0].key, due_at if woken_at - due_at < due_at - began_at else woken_at
        return [self._draw(item, token_ids) if item.draws else None for item, token_ids in zip(items, drawn, strict=True)]

    def forget(self, key: SequenceKey) -> None:
        """See ModelRunner.forget."""
        self._known.pop(key, None)

    def _is_sound(self, item: ChunkItem) -> bool:
        """Verify what the item attends to."""
        token_states = states(item.token_ids[: item.start])
        table, block_tokens = np.asarray(item.table), self.layout.block_tokens
        for start in range(0, item.start, _VERIFY_TOKENS):
            positions = np.arange(start, min(start + _VERIFY_TOKENS, item.start))
            found = self._slots[table[positions // block_tokens], :, positions % block_tokens]
            if not np.array_equal(found, slot_bytes(self.layout, token_states[positions])):
                return False
        self._known[item.key] = (item.start, int(token_states[-1]))
        return True

    def _write(self, items: Sequence[ChunkItem]) -> U64:
        """Write the slots of all items; the state of each item's last token, shape (len(items),)."""
        prompts = [index for index, item in enumerate(items) if item.end - item.start > 1]
        if not prompts:
            return self._write_decodes(items)
        last = np.empty(len(items), dtype=np.uint64)
        last[prompts] = self._write_prompts([items[index] for index in prompts])
        if len(prompts) < len(items):
            decodes = [index for index, item in enumerate(items) if item.is_decode]
            last[decodes] = self._write_decodes([items[index] for index in decodes])
        return last

    def _write_decodes(self, items: Sequence[ChunkItem]) -> U64:
        """As `_write`, for items of one token."""
        block_tokens = self.layout.block_tokens
        positions = np.array([item.start for item in items], dtype=np.uint64)
        tokens = np.array([item.token_ids[item.start] for item in items], dtype=np.uint32)
        block_ids = np.array([item.table[item.start // block_tokens] for item in items])
        token_states = self._states_before(items) + token_terms(tokens, positions)
        self._store(block_ids, positions, token_states)
        return token_states

    def _write_prompts(self, items: Sequence[ChunkItem]) -> U64:
        """As `_write`, for items of several tokens."""
        block_tokens = self.layout.block_tokens
        lengths = np.array([item.num_tokens for item in items])
        tokens = np.concatenate([np.asarray(item.token_ids[item.start : item.end], dtype=np.uint32) for item in items])
        positions = np.concatenate([np.arange(item.start, item.end, dtype=np.uint64) for item in items])
        block_ids = np.concatenate([_block_ids(item, block_tokens) for item in items])
        sums = np.cumsum(token_terms(tokens, positions), dtype=np.uint64)
        ends = np.cumsum(lengths) - 1
        before = self._states_before(items) - np.concatenate([np.zeros(1, dtype=np.uint64), sums[ends[:-1]]])
        token_states = sums + np.repeat(before, lengths)
        self._store(block_ids, positions, token_states)
        last: U64 = token_states[ends]
        return last

    def _states_before(self, items: Sequence[ChunkItem]) -> U64:
        return np.array([self._known.get(item.key, _NOTHING)[1] for item in items], dtype=np.uint64)

    def _store(self, block_ids: npt.NDArray[np.int64], positions: U64, token_states: U64) -> None:
        slots = (positions % np.uint64(self.layout.block_tokens)).astype(np.int64)
        self._slots[block_ids, :, slots] = slot_bytes(self.layout, token_states)

    def _draw_on(self, items: Sequence[ChunkItem], last_states: U64) -> list[list[int]]:
        """Tokens of each item, one after another, and the KV of all but the last. Notes what is known of each item's KV then.

        All items go the same number of rounds, so that a round is a few operations on arrays; what an item draws too much is dropped.
        """
        rows: list[list[int]] = []
        num_rounds = max([item.draws for item in items])
        drawn, states_after = [next_tokens(last_states, self._allowed)], [last_states]
        if num_rounds <= 1:
            for item, state, token_id in zip(items, last_states.tolist(), drawn[0].tolist(), strict=True):
                self._known[item.key] = (item.end, state)
                rows.append([token_id])
            return rows
        ends = np.array([item.end for item in items], dtype=np.uint64)
        for step in range(num_rounds - 1):
            states_after.append(states_after[-1] + token_terms(drawn[-1], ends + np.uint64(step)))
            drawn.append(next_tokens(states_after[-1], self._allowed))
        self._store_drawn(items, ends, np.stack(states_after[1:], axis=1))
        after = np.stack(states_after, axis=1).tolist()
        for item, states_of_item in zip(items, after, strict=True):
            self._known[item.key] = (item.kv_end, states_of_item[item.kv_end - item.end])
        return [row[: item.draws] for item, row in zip(items, np.stack(drawn, axis=1).tolist(), strict=True)]

    def _store_drawn(self, items: Sequence[ChunkItem], ends: U64, token_states: U64) -> None:
        """Write the slots of drawn tokens. token_states: shape (len(items), rounds - 1), rounds <= block_tokens."""
        block_tokens = np.uint64(self.layout.block_tokens)
        is_wanted = np.arange(token_states.shape[1]) < np.array([item.draws - 1 for item in items])[:, None]
        positions: U64 = np.add(ends[:, None], np.arange(token_states.shape[1], dtype=np.uint64), dtype=np.uint64)
        first = np.array([item.table[min(item.end // int(block_tokens), len(item.table) - 1)] for item in items])
        last = np.array([item.table[(item.kv_end - 1) // int(block_tokens)] for item in items])
        is_in_first = positions // block_tokens == (ends // block_tokens)[:, None]
        block_ids = np.where(is_in_first, first[:, None], last[:, None])
        self._store(block_ids[is_wanted], positions[is_wanted], token_states[is_wanted])

    def _draw(self, item: ChunkItem, token_ids: list[int]) -> Draw:
        if item.sampling.top_logprobs is None:
            return Draw(token_ids)
        return Draw(token_ids, [self._logprobs(item, index, token_id) for index, token_id in enumerate(token_ids)])

    def _logprobs(self, item: ChunkItem, index: int, token_id: int) -> TokenLogprobs:
        wanted = item.sampling.top_logprobs or 0
        others = [int(other) for other in self._allowed[: wanted + 1] if other != token_id][: max(0, wanted - 1)]
        top_ids = [token_id, *others][:wanted]
        rest = log((1 - _SURE) / max(1, len(others)))
        top = [log(_SURE), *[rest] * len(others)][:wanted]
        return TokenLogprobs(item.key, item.position + index, log(_SURE), top_ids, top)


def _block_ids(item: ChunkItem, block_tokens: int) -> npt.NDArray[np.int64]:
    """Block id of every token of the item."""
    first, last = item.start // block_tokens, -(-item.end // block_tokens)
    per_token = np.repeat(np.asarray(item.table[first:last], dtype=np.int64), block_tokens)
    return per_token[item.start - first * block_tokens :][: item.num_tokens]


def expected_next_token(runner: SimRunner, token_ids: "array[int]") -> int:
    """The token the sim draws after token_ids. For tests."""
    return int(next_tokens(states(token_ids)[-1:], runner._allowed)[0])
