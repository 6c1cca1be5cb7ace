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
from baton_engine.sim_pattern import Bytes, next_tokens, slot_bytes, states, token_terms
from baton_engine.sim_profile import SimProfile

KV_CORRUPT = "kv_corrupt"
_SURE = 0.9  # probability the sim reports for the token it draws; the rest is shared by the others it names
_NOTHING = (0, 0)  # of a sequence that is new here: no token known, state 0
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
        self._allowed = folder.allowed_token_ids
        self._profile = profile
        self._sleep = sleep
        self._clock = clock
        self._pool_tokens = 0
        self._slots: Bytes = np.empty((0, 0, 0, 0), dtype=np.uint8)
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
        known = self._known.get
        corrupt = [item.key for item in items if known(item.key, _NOTHING)[0] != item.start and not self._is_sound(item)]
        if corrupt:
            raise StepFailed(corrupt, KV_CORRUPT)
        last_states = self._write(items)
        drawn = next_tokens(last_states, self._allowed).tolist()
        for item, state in zip(items, last_states.tolist(), strict=True):
            self._known[item.key] = (item.end, state)
        load = StepLoad.of([(item.start, item.end) for item in items])
        # Sleeping even for 0 s lets the event loop run between steps, as a device would: one thread must not keep the interpreter.
        self._sleep(max(0.0, self.predict_s(load) - (self._clock() - started_at)))
        return [
            None if not item.draws else Draw(token_id) if item.sampling.top_logprobs is None else self._draw(item, token_id)
            for item, token_id in zip(items, drawn, strict=True)
        ]

    def forget(self, key: SequenceKey) -> None:
        """See ModelRunner.forget."""
        self._known.pop(key, None)

    def _is_sound(self, item: ChunkItem) -> bool:
        """Verify what the item attends to, which this runner has neither written nor verified."""
        token_states = states(item.token_ids[: item.start])
        table, block_tokens = np.asarray(item.table), self.layout.block_tokens
        for start in range(0, item.start, _VERIFY_TOKENS):
            positions = np.arange(start, min(start + _VERIFY_TOKENS, item.start))
            found = self._slots[table[positions // block_tokens], :, positions % block_tokens]
            if not np.array_equal(found, slot_bytes(self.layout, token_states[positions])):
                return False
        self._known[item.key] = (item.start, int(token_states[-1]))
        return True

    def _write(self, items: Sequence[ChunkItem]) -> npt.NDArray[np.uint64]:
        """Write the slots of all items at once; the state of each item's last token, shape (len(items),)."""
        block_tokens = self.layout.block_tokens
        known = self._known.get
        # Lists: most items are one token, for which an array each would cost more than all of the arithmetic.
        tokens: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        block_ids: list[int] = []
        for _, token_ids, start, end, table, _, _, _ in items:
            lengths.append(end - start)
            if end - start == 1:
                tokens.append(token_ids[start])
                positions.append(start)
                block_ids.append(table[start // block_tokens])
            else:
                tokens += token_ids[start:end]
                positions += range(start, end)
                block_ids += [table[position // block_tokens] for position in range(start, end)]
        at = np.array(positions, dtype=np.uint64)
        sums = np.cumsum(token_terms(np.array(tokens, dtype=np.uint32), at), dtype=np.uint64)
        ends = np.cumsum(lengths) - 1
        before = np.array([known(item.key, _NOTHING)[1] for item in items], dtype=np.uint64)
        before -= np.concatenate([np.zeros(1, dtype=np.uint64), sums[ends[:-1]]])
        token_states = sums + np.repeat(before, lengths)
        slots = (at % np.uint64(block_tokens)).astype(np.int64)
        self._slots[block_ids, :, slots] = slot_bytes(self.layout, token_states)
        last: npt.NDArray[np.uint64] = token_states[ends]
        return last

    def _draw(self, item: ChunkItem, token_id: int) -> Draw:
        """A token with the log probabilities its sequence asks for."""
        wanted = item.sampling.top_logprobs
        assert wanted is not None
        others = [int(other) for other in self._allowed[: wanted + 1] if other != token_id][: max(0, wanted - 1)]
        top_ids = [token_id, *others][:wanted]
        rest = log((1 - _SURE) / max(1, len(others)))
        top = [log(_SURE), *[rest] * len(others)][:wanted]
        return Draw(token_id, TokenLogprobs(item.key, item.position, log(_SURE), top_ids, top))


def expected_next_token(runner: SimRunner, token_ids: "array[int]") -> int:
    """The token the sim draws after token_ids. For tests."""
    return int(next_tokens(states(token_ids)[-1:], runner._allowed)[0])
