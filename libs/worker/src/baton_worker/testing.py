"""Fakes for tests of what uses this package; no timing, no I/O."""

from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import numpy as np
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import EndReason, EngineBeat, EngineInfo, EngineRequest, EngineStats, SequenceEnd, SequenceKey, StepOutput
from baton_engine.blocks import BlockManager
from baton_engine.pool import BlockLayout, KvPool
from baton_handoff.ids import EndReason as HandoffEndReason
from baton_handoff.ids import FetchEnd, FetchHint, FetchOutcome, HandoffComplete, HandoffEnd, PeerRef
from baton_runtime.errors import BatonError

from baton_worker.frontends import Frontends


class FakeControl:
    """Runs sequences by hand: a started one draws token `100 * position` whenever `step` names it, until it is ended.

    refuse: raised by start while set. live, paused, cancelled, forbidden, first_tokens: what was asked for so far.
    """

    def __init__(self) -> None:
        self.frontends: Frontends | None = None
        self.refuse: BatonError | None = None
        self.live: dict[SequenceKey, int] = {}  # next position
        self.paused: set[SequenceKey] = set()
        self.cancelled: dict[SequenceKey, pb.FinishReason] = {}
        self.forbidden: list[tuple[str, int]] = []
        self.first_tokens: list[SequenceKey] = []

    def start(self, start: pb.Start) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.live[SequenceKey(start.request_id, start.attempt)] = len(start.token_ids) // 4 - start.num_prompt_tokens

    def cancel(self, key: SequenceKey, reason: "pb.FinishReason") -> None:
        assert key in self.live
        self.cancelled[key] = reason

    def forbid(self, request_id: str, attempt: int) -> None:
        self.forbidden.append((request_id, attempt))

    def pause(self, key: SequenceKey) -> None:
        assert key in self.live
        assert key not in self.paused
        self.paused.add(key)

    def resume(self, key: SequenceKey) -> None:
        self.paused.remove(key)

    def first_token(self, key: SequenceKey) -> None:
        self.first_tokens.append(key)

    def step(self, *keys: SequenceKey, num_steps: int = 1) -> None:
        """Draw num_steps tokens for these (default: all) live sequences that are not paused."""
        assert self.frontends is not None
        for _ in range(num_steps):
            output = StepOutput(step=0)
            for key in keys or list(self.live):
                if key in self.live and key not in self.paused:
                    output.keys.append(key)
                    output.positions.append(self.live[key])
                    output.token_ids.append(token_at(self.live[key]))
                    self.live[key] += 1
            self.frontends.on_output(output)

    def end(self, key: SequenceKey, reason: "pb.FinishReason", now: float = 0.0) -> None:
        """End a live sequence; with the reason of its cancel if it was cancelled."""
        assert self.frontends is not None
        del self.live[key]
        self.paused.discard(key)
        self.frontends.end(key, pb.Finished(reason=self.cancelled.get(key, reason)), now)

    def end_cancelled(self, now: float = 0.0) -> None:
        """End everything that was cancelled, as an engine does at its next step."""
        for key in [key for key in self.cancelled if key in self.live]:
            self.end(key, pb.FINISH_REASON_CANCELLED, now)


class FakeStream:
    """What a session sees of a gRPC stream."""

    def __init__(self) -> None:
        self.num_wakes = 0
        self.error: BatonError | None = None

    def wake(self) -> None:
        self.num_wakes += 1

    def end(self, error: BatonError) -> None:
        self.error = error


def token_at(position: int) -> int:
    """The token FakeControl draws at an output position."""
    return 100 * position


def start_message(
    slot: int, request_id: str, attempt: int = 1, *, prompt: int = 4, delivered: int = 0, max_tokens: int = 1 << 20
) -> pb.Start:
    """A valid Start of whole work: prompt tokens 1, 2, ..., and delivered output as FakeControl draws it."""
    token_ids = array("I", [*range(1, prompt + 1), *(token_at(p) for p in range(delivered))])
    return pb.Start(
        slot=slot,
        request_id=request_id,
        attempt=attempt,
        priority=pb.PRIORITY_INTERACTIVE,
        token_ids=token_ids.tobytes(),
        num_prompt_tokens=prompt,
        cache_root=bytes(16),
        sampling=pb.Sampling(seed=1, max_tokens=max_tokens),
        whole=pb.Whole(),
    )


class FrontendModel:
    """The other end of a session as docs/worker.md wants it: collects tokens, refuses gaps, repeats and second ends."""

    def __init__(self, incarnation: str = "f1") -> None:
        self.incarnation = incarnation
        self.session = 0
        self.next_position: dict[int, int] = {}
        self.keys: dict[int, SequenceKey] = {}
        self.tokens: dict[SequenceKey, list[int]] = {}
        self.finished: dict[SequenceKey, pb.Finished] = {}
        self.processed_frame = 0

    def hello(self) -> pb.AttachHello:
        """Opens the next stream, naming every sequence whose end has not come."""
        self.session += 1
        self.processed_frame = 0
        resumes = [
            pb.Resume(slot=slot, request_id=key.request_id, attempt=key.attempt, next_position=self.next_position[slot])
            for slot, key in self.keys.items()
        ]
        return pb.AttachHello(
            contract_version=1, instance_id="frontend-0", incarnation=self.incarnation, session=self.session, resumes=resumes
        )

    def started(self, start: pb.Start) -> pb.Start:
        """Note a Start that is about to be sent."""
        key = SequenceKey(start.request_id, start.attempt)
        self.keys[start.slot] = key
        self.next_position[start.slot] = len(start.token_ids) // 4 - start.num_prompt_tokens
        self.tokens[key] = []
        return start

    def process(self, frame: pb.AttachResponse) -> None:
        """Take in a frame. Raises: AssertionError for anything the contract rules out."""
        assert frame.frame == self.processed_frame + 1
        self.processed_frame = frame.frame
        slots, positions, token_ids = array("I", frame.slots), array("I", frame.positions), array("I", frame.token_ids)
        assert len(slots) == len(positions) == len(token_ids)
        for slot, position, token_id in zip(slots, positions, token_ids, strict=True):
            assert position == self.next_position[slot], f"slot {slot}: position {position}, not {self.next_position[slot]}"
            self.next_position[slot] += 1
            self.tokens[self.keys[slot]].append(token_id)
        for finished in frame.finished:
            key = self.keys.pop(finished.slot)
            assert key not in self.finished
            self.finished[key] = finished


@dataclass
class HeldHandoff:
    """A handoff that FakeHandoffs was asked for."""

    request: EngineRequest
    peer: PeerRef
    on_complete: Callable[[HandoffComplete], None] | None
    on_end: Callable[[HandoffEnd], None]
    fetch_from: FetchHint | None = None


class FakeHandoffs:
    """Stands for HandoffManager: remembers what it was asked for; tests say what becomes of it.

    refuse: raised by start_prefill and start_decode while set. A cancelled handoff ends at once if ends_cancelled.
    num_held_blocks: what safe_to_stop looks at besides the handoffs held.
    """

    def __init__(self, *, ends_cancelled: bool = True) -> None:
        self.refuse: BatonError | None = None
        self.held: dict[SequenceKey, HeldHandoff] = {}
        self.fetches: dict[SequenceKey, tuple[FetchHint, Callable[[FetchEnd], None]]] = {}
        self.cancelled: list[tuple[str, int, str]] = []
        self.num_outputs = 0
        self.fenced: list[str] = []
        self.is_draining = False
        self.num_held_blocks = 0
        self._ends_cancelled = ends_cancelled

    def start_prefill(
        self,
        request: EngineRequest,
        decode: PeerRef,
        traceparent: str,
        on_end: Callable[[HandoffEnd], None],
        fetch_from: FetchHint | None = None,
    ) -> None:
        self._start(HeldHandoff(request, decode, None, on_end, fetch_from))

    def start_fetch(self, request: EngineRequest, hint: FetchHint, traceparent: str, on_end: Callable[[FetchEnd], None]) -> None:
        self.fetches[request.key] = (hint, on_end)

    def start_decode(
        self,
        request: EngineRequest,
        prefill: PeerRef,
        traceparent: str,
        on_complete: Callable[[HandoffComplete], None],
        on_end: Callable[[HandoffEnd], None],
    ) -> None:
        self._start(HeldHandoff(request, prefill, on_complete, on_end))

    def cancel(self, request_id: str, attempt: int, reason: str) -> None:
        self.cancelled.append((request_id, attempt, reason))
        if self._ends_cancelled and (held := self.held.pop(SequenceKey(request_id, attempt), None)) is not None:
            held.on_end(HandoffEnd(HandoffEndReason.CANCELLED))
        if self._ends_cancelled and (fetch := self.fetches.pop(SequenceKey(request_id, attempt), None)) is not None:
            fetch[1](FetchEnd(FetchOutcome.CANCELLED))

    def on_output(self, output: StepOutput) -> None:
        self.num_outputs += 1

    def fence_all(self, reason: str) -> None:
        self.fenced.append(reason)

    def set_draining(self) -> None:
        self.is_draining = True

    def live_handoffs(self) -> int:
        return len(self.held) + len(self.fetches)

    def stranded_bytes(self) -> int:
        return 0

    def queued(self) -> int:
        return len(self.held)

    def safe_to_stop(self) -> bool:
        return not self.held and not self.fetches and not self.num_held_blocks

    def complete(self, key: SequenceKey, cached_tokens: int = 0, handoff_bytes: int = 0, exposed_s: float = 0.0) -> None:
        """The KV is here."""
        held = self.held.pop(key)
        assert held.on_complete is not None
        held.on_complete(HandoffComplete(cached_tokens, handoff_bytes, exposed_s))

    def end_fetch(self, key: SequenceKey, end: FetchEnd) -> None:
        """The fetch is over."""
        self.fetches.pop(key)[1](end)

    def end(self, key: SequenceKey, end: HandoffEnd) -> None:
        """The handoff is over."""
        self.held.pop(key).on_end(end)

    def _start(self, handoff: HeldHandoff) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.held[handoff.request.key] = handoff


class FakeEngine:
    """Stands for Engine: keeps what it was asked for; `ended` makes the step output that ends a sequence.

    refuse: raised by start while set. The block manager is real, the pool small.
    """

    def __init__(self, num_blocks: int = 64, block_tokens: int = 4) -> None:
        layout = BlockLayout(num_layers=1, block_tokens=block_tokens, num_kv_heads=1, head_dim=2, dtype="float32")
        self.info = EngineInfo(max_model_tokens=4096, vocab_size=1 << 20, eos_token_ids=frozenset(), fingerprint="f")
        self.pool = KvPool(np.zeros((num_blocks, layout.block_bytes), np.uint8), layout)
        self.blocks = self.cache = BlockManager(num_blocks)
        self.refuse: BatonError | None = None
        self.live: dict[SequenceKey, EngineRequest] = {}
        self.cancelled: list[SequenceKey] = []
        self.paused: set[SequenceKey] = set()
        self._outputs: deque[StepOutput] = deque()

    async def open(self) -> None:
        """See Engine."""

    async def close(self) -> None:
        """See Engine."""

    def start(self, request: EngineRequest) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.live[request.key] = request

    def cancel(self, key: SequenceKey) -> None:
        self.cancelled.append(key)

    def pause(self, key: SequenceKey) -> None:
        self.paused.add(key)

    def resume(self, key: SequenceKey) -> None:
        self.paused.discard(key)

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """What was put into it so far."""
        while self._outputs:
            yield self._outputs.popleft()

    def beat(self) -> EngineBeat:
        return EngineBeat(1, 0.0, 0.0)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0)

    def ended(
        self, key: SequenceKey, reason: EndReason, *, output_tokens: int = 0, cached_tokens: int = 0, message: str = ""
    ) -> StepOutput:
        """The step in which a live sequence ends; its blocks are released."""
        del self.live[key]
        self.blocks.release(key)
        return StepOutput(step=1, ends=[SequenceEnd(key, reason, output_tokens, cached_tokens, message=message)])
