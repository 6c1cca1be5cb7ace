"""An engine that moves KV itself, for tests: two of them that share `Rooms` hand over to each other within this process."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator

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
from baton_engine.errors import ReceiveFailed
from baton_engine.pool import BlockLayout, KvPool


class Room:
    """Where two engines meet. KV moves when both are there and `may_move` is set (it is, until a test clears it)."""

    def __init__(self) -> None:
        self.source, self.sink, self.may_move = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.may_tell_source = asyncio.Event()  # else the sink has the KV, and the source has not heard of it
        self.may_let_go = asyncio.Event()  # else the sink's engine does not end what it was told to
        for event in (self.may_move, self.may_tell_source, self.may_let_go):
            event.set()
        self.fails = False

    async def moved(self) -> None:
        """Both were there, and the KV is at the sink."""
        for event in (self.source, self.sink, self.may_move):
            await event.wait()


class Rooms(defaultdict[int, Room]):
    """Rooms by number. holds_back: new ones do not move KV, or do not tell the source, before the test says so."""

    def __init__(self, *, moves: bool = True, tells_source: bool = True) -> None:
        super().__init__()
        self.moves, self.tells_source = moves, tells_source

    def __missing__(self, number: int) -> Room:
        room = self[number] = Room()
        if not self.moves:
            room.may_move.clear()
        if not self.tells_source:
            room.may_tell_source.clear()
        return room


class NativeMiniEngine:
    """As `MiniEngine`, of an engine that moves KV itself: a sequence ends in the step after its KV has moved, or after its cancel, and
    waits for ever if neither comes. No sequence gives up by itself: the protocol must see to all of them."""

    def __init__(self, blocks: BlockManager) -> None:
        self.fail_next: set[SequenceKey] = set()
        self._blocks = blocks
        self._waiting: dict[SequenceKey, EngineRequest] = {}
        self._moved: dict[SequenceKey, None] = {}  # ordered
        self._cancelled: dict[SequenceKey, None] = {}
        self._step = 0

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._moved or self._cancelled)

    def holds(self, key: SequenceKey) -> bool:
        """Whether the sequence has not ended."""
        return key in self._waiting

    def start(self, request: EngineRequest) -> None:
        """Take a PREFILL_ONLY sequence whose table is acquired."""
        self._waiting[request.key] = request

    def moved(self, key: SequenceKey) -> None:
        """Its KV is at the sink, all of it."""
        self._moved[key] = None

    def cancel(self, key: SequenceKey) -> None:
        """End it in the next step."""
        if key in self._waiting:
            self._cancelled[key] = None

    def step(self) -> StepOutput:
        """One that has moved, else one that was cancelled, ends; of one that is both, the server has answered already."""
        self._step += 1
        output = StepOutput(step=self._step)
        key = next(iter([*self._moved, *self._cancelled]))
        request, reason = self._waiting.pop(key), EndReason.CANCELLED
        if key in self._moved:
            reason = EndReason.PREFILLED
            first = request.first_announced_block
            ids = self._blocks.pin(key, first, len(self._blocks.table(key)) - first)
            output.ready.append(BlocksReady(key, first, ids, 0, float(self._step)))
        self._moved.pop(key, None)
        self._cancelled.pop(key, None)
        self._blocks.release(key)
        output.ends.append(SequenceEnd(key, reason, 0, 0))
        return output


class NativeFakeEngine:
    """`baton_engine.api.NativeEngine`. received: sequences whose KV came and that were not taken over."""

    def __init__(self, num_blocks: int, layout: BlockLayout, fingerprint: str, rooms: Rooms) -> None:
        self.info = EngineInfo(1 << 20, 1 << 16, frozenset(), fingerprint, "native")
        self.pool = KvPool.without_memory(num_blocks, layout)
        self.blocks = self.cache = BlockManager(num_blocks)
        self.received: set[SequenceKey] = set()
        self.unexplained = 0
        self._rooms = rooms
        self._runs: dict[SequenceKey, asyncio.Task[None]] = {}
        self._outputs: asyncio.Queue[StepOutput] = asyncio.Queue()

    @property
    def num_running(self) -> int:
        """Sequences it computes."""
        return len(self._runs)

    async def open(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """End everything."""
        for key in list(self._runs):
            self.cancel(key)

    def start(self, request: EngineRequest) -> None:
        """As Engine.start; a sequence that is taken over draws one token."""
        if request.work is Work.PREFILL_ONLY:
            self._runs[request.key] = asyncio.get_running_loop().create_task(self._hand_over(request))
            return
        assert request.key in self.received, "only what was received is taken over"
        self.received.discard(request.key)
        output = StepOutput(0, [request.key], [0], [len(request.token_ids)])
        self._end(request.key, EndReason.LENGTH, output)

    async def receive(self, request: EngineRequest) -> None:
        """As NativeEngine.receive."""
        assert request.native is not None
        room = self._rooms[request.native.room]
        room.sink.set()
        try:
            await room.moved()
        except asyncio.CancelledError:
            await room.may_let_go.wait()
            raise
        if room.fails:
            raise ReceiveFailed("the transfer failed")
        self.received.add(request.key)

    def cancel(self, key: SequenceKey) -> None:
        """As Engine.cancel."""
        run = self._runs.pop(key, None)
        if run is not None:
            run.cancel()
            self._end(key, EndReason.CANCELLED, StepOutput(0))

    def pause(self, key: SequenceKey) -> None:
        """Ignored."""

    def resume(self, key: SequenceKey) -> None:
        """Ignored."""

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """One per thing that happens."""
        while True:
            yield await self._outputs.get()

    def beat(self) -> EngineBeat:
        """Well."""
        return EngineBeat(0, 0.0, 0.0)

    def stats(self) -> EngineStats:
        """Zeros."""
        return EngineStats(0, 0, 0, 0)

    def unexplained_bytes(self) -> int:
        """What the test says."""
        return self.unexplained

    async def _hand_over(self, request: EngineRequest) -> None:
        assert request.native is not None
        room = self._rooms[request.native.room]
        room.source.set()
        await room.moved()
        await room.may_tell_source.wait()
        del self._runs[request.key]
        if room.fails:
            return self._end(request.key, EndReason.ENGINE_ERROR, StepOutput(0))
        first = request.first_announced_block
        block_ids = self.blocks.pin(request.key, first, len(self.blocks.table(request.key)) - first)
        ready = BlocksReady(request.key, first, block_ids, 0, asyncio.get_running_loop().time())
        self._end(request.key, EndReason.PREFILLED, StepOutput(0, ready=[ready]))

    def _end(self, key: SequenceKey, reason: EndReason, output: StepOutput) -> None:
        self.blocks.release(key)
        output.ends.append(SequenceEnd(key, reason, len(output.token_ids), 0))
        self._outputs.put_nowait(output)
