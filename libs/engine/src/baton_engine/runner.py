"""What a model has to do for the paged engine: compute KV into blocks and draw tokens. No scheduling, no block accounting.

Implemented by `sim_runner.SimRunner` and `torch_runner.TorchRunner`; called only from the engine's thread.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from baton_engine.api import EngineInfo, SamplingParams, SequenceKey, TokenLogprobs
from baton_engine.pool import BlockLayout, KvPool


class ChunkItem(NamedTuple):
    """One sequence's part of a step: compute KV of tokens [start, end), then draw up to `draws` tokens.

    KV of tokens [0, start) lies in the blocks already. Token t lives in block table[t // block_tokens], slot
    t % block_tokens; the table has at least ceil(kv_end / block_tokens) entries, possibly more.
    """

    key: SequenceKey
    token_ids: "array[int]"  # the whole sequence, type code "I": prompt, then all output so far. Not to be changed or kept.
    start: int
    end: int
    table: Sequence[int]  # block ids in order. Not to be changed or kept: it grows later.
    draws: int  # at most so many tokens are wanted: 0 unless end == len(token_ids); else 1 to the runner's tokens_per_step
    sampling: SamplingParams
    num_prompt_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of token_ids computed in this step."""
        return self.end - self.start

    @property
    def kv_end(self) -> int:
        """Tokens whose KV may lie in the blocks after the step: all but the last of those drawn is computed too."""
        return self.end + max(0, self.draws - 1)

    @property
    def is_decode(self) -> bool:
        """One token that attends to what is there: the batched decode path."""
        return self.end - self.start == 1

    @property
    def position(self) -> int:
        """Output position of the first token drawn now."""
        return len(self.token_ids) - self.num_prompt_tokens


class StepLoad(NamedTuple):
    """Size of a step, all that a prediction may depend on. Adds up over items, so the scheduler can search chunk lengths."""

    prefill_tokens: int = 0  # tokens of items with more than one token
    prefill_attended_tokens: int = 0  # sum over those tokens of the tokens each attends to (itself included)
    decode_sequences: int = 0  # items with exactly one token
    decode_kv_tokens: int = 0  # sum of `end` over those

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]]) -> "StepLoad":
        """Load of a step that computes these ranges [start, end)."""
        prefill_tokens = attended = decode_sequences = kv_tokens = 0
        for start, end in chunks:
            if end - start == 1:
                decode_sequences += 1
                kv_tokens += end
            else:
                prefill_tokens += end - start
                attended += (end * (end + 1) - start * (start + 1)) // 2
        return cls(prefill_tokens, attended, decode_sequences, kv_tokens)

    @classmethod
    def of_items(cls, items: Iterable[ChunkItem]) -> "StepLoad":
        """Load of a step that computes these."""
        return cls.of([(start, end) for _, _, start, end, _, _, _, _ in items])

    def plus(self, start: int, end: int) -> "StepLoad":
        """This load and a chunk [start, end)."""
        return StepLoad(*(mine + more for mine, more in zip(self, StepLoad.of([(start, end)]), strict=True)))


class Draw(NamedTuple):
    """Tokens drawn one after another, at least one; logprobs of each if the sequence asked for them, else empty."""

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()


class ModelRunner(Protocol):
    """The compute below the scheduler.

    Two stages: constructed, it tells info and layout (for a given block_tokens); then the worker allocates the pool in
    shared memory and `bind` hands it over.

    Contracts:
    - A run writes only slots [start, kv_end) of its items' tables: other blocks are written by pulls at the same time.
    - Slots at or beyond `end` are read only where masked out, but must be finite even so (softmax weight 0 times NaN is
      NaN). The engine zeroes a block, through the pool, before the first chunk that enters it without filling it, and the
      tail of a partial block that came by a pull. So a runner may read any slot of the sequence's own blocks up to block
      (end - 1) // block_tokens, and nothing else: pad tables with the sequence's own table[0], never with block 0.
    - What is drawn depends only on token_ids, num_prompt_tokens and sampling (law 3), not on the batch.
    """

    info: EngineInfo
    layout: BlockLayout
    tokens_per_step: int  # tokens a sequence may be given in one step; more than 1 with speculative decoding and its like

    def bind(self, pool: KvPool) -> None:
        """Use this pool. Called once, before the first run, from the engine's thread or before it exists."""

    def predict_s(self, load: StepLoad) -> float:
        """Predicted length of such a step in seconds; cheap, and non-decreasing in every field of load."""

    def run(self, items: Sequence[ChunkItem]) -> list[Draw | None]:
        """Compute all items; the draws in the order of items (None where draws is False).

        Raises: StepFailed naming the guilty sequences if the others' KV and draws are unharmed (the engine then runs
        the others again, from the same start); any other exception ends the engine.
        """

    def forget(self, key: SequenceKey) -> None:
        """The sequence ended: drop what is remembered for it. Unknown keys are ignored; a key is never used again."""
