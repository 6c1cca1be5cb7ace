"""How long a cancelled attempt still holds blocks: law 6, measured where the blocks are.

From the moment the cancel was read (or the deadline passed, or the frontend was given up) until the block manager has nothing of the
attempt left: no table, no pin, no reservation. The block manager itself says so, in whatever thread let go of the last block.
"""

import enum
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from baton_engine.api import SequenceKey
from baton_engine.blocks import BlockManager
from baton_handoff.ids import HandoffKey


class CancelPhase(enum.Enum):
    """What a worker was doing for an attempt when it was cancelled.

    QUEUED: waits for room, holds nothing. COMPUTING: its prompt. TRANSFERRING: computed and pinned here, or being pulled to here.
    DECODING: in the batch that draws tokens.
    """

    QUEUED = "queued"
    COMPUTING = "computing"
    TRANSFERRING = "transferring"
    DECODING = "decoding"


class CancelObserver(Protocol):
    """Who is told; from any thread."""

    def cancel_to_free(self, phase: CancelPhase, seconds: float) -> None:
        """All blocks of a cancelled attempt are free or cached now."""


class CancelTimes:
    """Watches cancelled attempts until they hold nothing. Lives on the loop; the observer is called from any thread."""

    def __init__(self, blocks: BlockManager, observer: CancelObserver, clock: Callable[[], float]) -> None:
        self._blocks = blocks
        self._observer = observer
        self._clock = clock

    def cancelled(self, key: SequenceKey, phase: CancelPhase, *, is_in_engine: bool) -> None:
        """To be called before the cancel is acted on. What is in the engine lets go when the engine says so, even of nothing."""
        owners: list[Hashable] = list(self.fetches(key))
        if is_in_engine or self._blocks.has_table(key) or self._blocks.held(key):
            owners.append(key)
        began = self._clock()
        count_down = _CountDown(len(owners), lambda: self._observer.cancel_to_free(phase, self._clock() - began))
        for owner in owners:
            self._blocks.when_let_go(owner, count_down.one_less)

    def fetches(self, key: SequenceKey) -> Sequence[HandoffKey]:
        """Fetches for this attempt that hold blocks of their own."""
        return [owner for owner in self._blocks.pinned_owners() if isinstance(owner, HandoffKey) and owner.sequence == key]

    def ended(self, key: SequenceKey) -> None:
        """The engine reported the end: had it let go before the cancel came, there is nothing to measure."""
        self._blocks.when_let_go(key, None)


class _CountDown:
    """Calls back when so many have let go; at once if nobody has anything."""

    def __init__(self, num_owners: int, callback: Callable[[], None]) -> None:
        self._left = num_owners
        self._callback = callback
        self._lock = threading.Lock()
        if not num_owners:
            callback()

    def one_less(self) -> None:
        """From any thread."""
        with self._lock:
            self._left -= 1
            is_over = self._left == 0
        if is_over:
            self._callback()
