"""An event loop whose clock jumps to the next timer instead of waiting for it: for tests that show times, exactly and at once.

    run_virtual(main())        # asyncio.sleep(3600) inside takes no time, and loop.time() has moved by 3600 s

Whatever measures has to be given `loop.time` as its clock. Sockets and threads have no place here: nothing waits for them.
"""

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class NothingScheduled(AssertionError):
    """Every task waits for something that no timer will bring."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time passes only when everything waits, and then up to the next timer. Begins at 100 s, so that 0 is nobody's time."""

    def __init__(self) -> None:
        self._now = 100.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """The virtual time, in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class _JumpingSelector(selectors.BaseSelector):
    """A selector that never waits."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self._loop = loop
        self._selector = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = self._selector.select(0)
        if not events and timeout is None:
            raise NothingScheduled("every task waits, and no timer is set")
        if not events and timeout is not None:
            self._loop.advance(max(0.0, timeout))
        return events

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._selector.get_map()

    def close(self) -> None:
        self._selector.close()


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on a VirtualTimeLoop. Raises: NothingScheduled, or what main raises."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
