"""The two interfaces of an engine, and the records that cross them.

`Engine` is what services see: per request, never blocking the event loop. `StepEngine` is what sim and torch implement:
plain synchronous code driven by one thread (`baton_engine.driver`). How the interface maps onto an engine with a
transport of its own: docs/engine-sglang.md.
"""

import enum
from array import array
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from baton_engine.blocks import BlockManager, CacheEvents
from baton_engine.pool import KvPool


class SequenceKey(NamedTuple):
    """One attempt of one request on one worker; owns blocks in the block manager."""

    request_id: str
    attempt: int


class Priority(enum.IntEnum):
    """Class of a request; the values are those of baton.worker.v1.Priority."""

    INTERACTIVE = 1
    BATCH = 2


class Work(enum.Enum):
    """What an engine is asked to do with a sequence."""

    WHOLE = "whole"  # compute the prompt and decode
    PREFILL_ONLY = "prefill_only"  # compute KV of all tokens but the last, sample nothing
    DECODE_ONLY = "decode_only"  # KV of all tokens but the last lies in the sequence's blocks already


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens; fields and ranges as in baton.worker.v1.Sampling, zero values resolved."""

    seed: int = 0
    choice: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NativeHandoff:
    """Where an engine with a transport of its own meets its partner (docs/engine-sglang.md)."""

    address: str  # host:port of the source engine's rendezvous
    room: int  # 63 bits, the same on both sides, never used twice


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to run.

    token_ids holds the prompt, then output already delivered (a resume); position p of the output is token
    num_prompt_tokens + p. cache_root is the 16-byte root of the block hash chain (`baton_runtime.hashing`).
    """

    key: SequenceKey
    token_ids: "array[int]"
    num_prompt_tokens: int
    cache_root: bytes
    work: Work
    priority: Priority = Priority.INTERACTIVE
    sampling: SamplingParams = field(default_factory=SamplingParams)
    first_announced_block: int = 0  # PREFILL_ONLY: blocks below are the sink's own; only those from here are pinned and reported
    native: NativeHandoff | None = None  # only for engines whose info.handoff is "native"

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV is computed before the first draw: all but the last."""
        return len(self.token_ids) - 1


class EndReason(enum.Enum):
    """Why an engine ended a sequence. The worker maps it to baton.worker.v1.FinishReason."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    PREFILLED = "prefilled"
    PREEMPTED = "preempted"
    ENGINE_ERROR = "engine_error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities of one drawn token (natural logarithm, before temperature)."""

    key: SequenceKey
    position: int
    logprob: float
    top_token_ids: Sequence[int]
    top_logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """The one end of a sequence. Its blocks are released already (pins of announced blocks remain)."""

    key: SequenceKey
    reason: EndReason
    output_tokens: int  # drawn here, not counting tokens given at the start
    cached_tokens: int  # leading tokens whose KV came from this engine's prefix cache
    stop_token_id: int | None = None
    message: str = ""  # ENGINE_ERROR: for the log, no prompt text


@dataclass(frozen=True, slots=True)
class BlocksReady:
    """Blocks of a PREFILL_ONLY sequence that are computed; the engine has pinned them for `key` in the block manager.

    They are blocks [first_block, first_block + len(block_ids)) of the sequence.
    """

    key: SequenceKey
    first_block: int
    block_ids: Sequence[int]
    cached_tokens: int
    ready_at: float  # time.monotonic() at the end of compute


@dataclass(slots=True)
class StepOutput:
    """What one step did. keys, positions and token_ids are columns of equal length, one entry per token; several tokens of a
    sequence lie beside each other, in order."""

    step: int
    keys: list[SequenceKey] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ends: list[SequenceEnd] = field(default_factory=list)
    ready: list[BlocksReady] = field(default_factory=list)
    started: list[SequenceKey] = field(default_factory=list)  # sequences that ran for the first time
    prefill_tokens: int = 0
    decode_sequences: int = 0
    kv_tokens: int = 0
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineBeat:
    """Sign of life of the engine thread."""

    step: int
    running_step_age_s: float
    predicted_step_s: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Queue and batch sizes; blocks are in BlockManager.counts()."""

    running_sequences: int
    waiting_sequences: int
    waiting_prefill_tokens: int
    active_kv_tokens: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is. handoff is "blocks" (ours) or "native" (the engine moves KV itself)."""

    max_model_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    fingerprint: str
    handoff: str = "blocks"


class StepEngine(Protocol):
    """Synchronous engine, driven by one thread. Only add, cancel, step and has_work change scheduling state.

    blocks is thread-safe on its own: handoffs reserve, pin and release while a step runs. A step never writes to a
    block that is not in the table of one of its sequences.
    """

    info: EngineInfo
    pool: KvPool
    blocks: BlockManager

    def add(self, request: EngineRequest) -> None:
        """Queue a sequence.

        PREFILL_ONLY and DECODE_ONLY sequences own their table in `blocks` already (acquire or reserve + commit, under
        request.key); WHOLE ones get theirs when scheduled.

        Raises: SequenceTooLong, InvalidArgument; nothing was kept then, and a table is still the caller's.
        """

    def cancel(self, key: SequenceKey) -> None:
        """End a sequence at the next step with CANCELLED. Unknown keys are ignored."""

    def pause(self, key: SequenceKey) -> None:
        """Leave a sequence out of steps from the next one on; it keeps its blocks. Unknown keys are ignored."""

    def resume(self, key: SequenceKey) -> None:
        """Undo pause. Unknown keys are ignored."""

    def has_work(self) -> bool:
        """Whether plan and step would do anything now. False while everything is paused or waits for blocks."""

    def plan(self) -> float:
        """Choose what the next step runs; its predicted length in seconds, at most 0.25."""

    def step(self) -> StepOutput:
        """Run what plan chose. An exception ends the incarnation: guilty sequences, where known, end with ENGINE_ERROR."""

    def stats(self) -> EngineStats:
        """Sizes now; callable from any thread."""


class PrefixCache(Protocol):
    """What a worker tells routers of an engine's prefix cache."""

    def drain_events(self) -> CacheEvents:
        """Net change since the last call."""

    def drain_with_hashes(self) -> tuple[CacheEvents, Sequence[bytes]]:
        """drain_events, and everything cached at the same instant."""


class Engine(Protocol):
    """Asynchronous engine, as services see it. All methods are called on the event loop and return at once."""

    info: EngineInfo
    pool: KvPool
    blocks: BlockManager

    @property
    def cache(self) -> PrefixCache:
        """Its prefix cache; the block manager itself, if the engine keeps its KV in blocks."""

    async def open(self) -> None:
        """Start the thread or child process; returns when it can take work."""

    async def close(self) -> None:
        """End all sequences with CANCELLED, stop, release memory. Idempotent."""

    def start(self, request: EngineRequest) -> None:
        """Queue a sequence; what becomes of it arrives in outputs().

        PREFILL_ONLY and DECODE_ONLY sequences own a table in `blocks` under request.key; from here on the engine releases
        it, at the end it reports. They were admitted by whoever made the table, so only WHOLE ones count against the queue.

        Raises: QueueFull, SequenceTooLong, InvalidArgument, EngineFailed; nothing was kept then, and a table is still the caller's.
        """

    def cancel(self, key: SequenceKey) -> None:
        """End a sequence within one step. Unknown keys are ignored; exactly one SequenceEnd comes for known ones."""

    def pause(self, key: SequenceKey) -> None:
        """Leave a sequence out of steps, soon: at most one more token of it follows. It stays admitted and keeps its blocks;
        the worker pauses what a frontend does not take in time, and resumes or cancels it. Unknown keys are ignored."""

    def resume(self, key: SequenceKey) -> None:
        """Undo pause. Unknown keys are ignored."""

    def outputs(self) -> AsyncIterator[StepOutput]:
        """Step outputs in order, one consumer. Ends when the engine closes; raises EngineFailed if it died."""

    def beat(self) -> EngineBeat:
        """Progress of the engine now."""

    def stats(self) -> EngineStats:
        """Sizes now."""


class NativeEngine(Engine, Protocol):
    """An engine that moves KV itself: info.handoff is "native". `blocks` is a mirror, in numbers, of what it keeps; `pool` has no memory.

    A PREFILL_ONLY sequence with request.native hands its KV to whoever meets it in that room; its blocks are ready, all at once, when
    it has.
    """

    def receive(self, request: EngineRequest) -> Coroutine[Any, Any, None]:
        """Meet the source in the room of request.native; returns when the KV is here. DECODE_ONLY; the table is the caller's until
        `start` takes the sequence over. To be begun as soon as the source may begin: neither side waits for the other to be told.

        When it returns or raises, also CancelledError after one cancel, nothing writes to its KV any more, unless it is taken over.
        Raises: ReceiveFailed; and as start.
        """

    def unexplained_bytes(self) -> int:
        """KV that it has kept for over 5 s and no sequence explains. It ends itself (EngineFailed) if that goes on."""
