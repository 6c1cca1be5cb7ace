"""How long a cancelled attempt still holds blocks: law 6, measured where the blocks are.

From the moment the cancel was read (or the deadline passed, or the frontend was given up) until the block manager has nothing of the
attempt left: no table, no pin, no reservation. The block manager itself says so, in whatever thread let go of the last block.
"""

import enum
from collections.abc import Callable
from typing import Protocol

from baton_engine.api import SequenceKey
from baton_engine.blocks import BlockManager


class CancelPhase(enum.Enum):
    """What a worker was doing for an attempt when it was cancelled.

    QUEUED: waits for room, holds nothing. COMPUTING: its prompt. TRANSFERRING: pinned and computed here, or being pulled to here.
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
        began = self._clock()

        def let_go() -> None:
            self._observer.cancel_to_free(phase, self._clock() - began)

        if is_in_engine or self._blocks.has_table(key) or self._blocks.held(key):
            self._blocks.when_let_go(key, let_go)
        else:
            let_go()

    def ended(self, key: SequenceKey) -> None:
        """The engine reported the end: had it let go before the cancel came, there is nothing to measure."""
        self._blocks.when_let_go(key, None)
