"""The state of one instance's drain: asked for by SIGTERM or by a call, shortened, over. Plain state; lifecycle.py acts on it.

serving --ask--> draining --end--> drained (nothing held any more)
                    |              or cut off (the grace was over, or a second signal came)
                    '--ask again: the same drain; its end can only come sooner
"""

import asyncio
import contextlib
import enum
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Holdings:
    """What keeps an instance from ending; 0 for what a service does not have.

    running: requests of a frontend, sequences of a worker. live_handoffs: handoffs and fetches that are not over.
    """

    running: int = 0
    live_handoffs: int = 0
    pinned_blocks: int = 0
    reserved_blocks: int = 0


class Phase(enum.Enum):
    """Where the drain is."""

    SERVING = "serving"
    DRAINING = "draining"
    DRAINED = "drained"
    CUT_OFF = "cut off"


class Drain:
    """One instance's only drain.

    on_ask: called after each `ask` that began or shortened the drain.
    """

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """grace_s: for who names none, in seconds."""
        self._grace_s = grace_s
        self._clock = clock
        self._began_at = self._ends_at = self._over_at = 0.0
        self._num_watchers = 0
        self._unwatched = asyncio.Event()
        self.phase = Phase.SERVING
        self.over = asyncio.Event()
        self.on_ask: Callable[[], None] = lambda: None

    @property
    def is_asked(self) -> bool:
        """Whether it has begun, or is over."""
        return self.phase is not Phase.SERVING

    @property
    def elapsed_s(self) -> float:
        """Since it began, until it was over."""
        return (self._over_at if self.over.is_set() else self._clock()) - self._began_at if self.is_asked else 0.0

    @property
    def remaining_s(self) -> float:
        """Until what still runs is cut off; the whole grace before it has begun, 0 once it is over."""
        if self.phase is Phase.SERVING:
            return self._grace_s
        return 0.0 if self.over.is_set() else max(0.0, self._ends_at - self._clock())

    def ask(self, grace_s: float | None = None) -> None:
        """Begin. Asked again: nothing changes but for an end that comes sooner, because whoever asked will not wait longer."""
        if self.over.is_set():
            return
        ends_at = self._clock() + (self._grace_s if grace_s is None else grace_s)
        if self.phase is Phase.SERVING:
            self.phase = Phase.DRAINING
            self._began_at, self._ends_at = self._clock(), ends_at
        elif ends_at < self._ends_at:
            self._ends_at = ends_at
        else:
            return
        self.on_ask()

    def end(self, *, is_complete: bool) -> None:
        """Over: with nothing held, or cut off. Idempotent; nothing to say if it was never asked for."""
        if self.phase is Phase.DRAINING:
            self._over_at = self._clock()
            self.phase = Phase.DRAINED if is_complete else Phase.CUT_OFF
            self.over.set()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Somebody wants to hear the end; `heard` waits for them."""
        self._num_watchers += 1
        self._unwatched.clear()
        try:
            yield
        finally:
            self._num_watchers -= 1
            if not self._num_watchers:
                self._unwatched.set()

    async def heard(self) -> bool:
        """Return once nobody is left to be told the end. Returns: whether there was somebody."""
        if not self._num_watchers:
            return False
        await self._unwatched.wait()
        return True
