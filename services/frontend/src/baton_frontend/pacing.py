"""When a question may leave: new work at once, resumes a few per tick and before new work."""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Pacer(Generic[T]):
    """After a worker's death hundreds of requests want another place at the same time; new work waits until they have asked.

    Bounded by the requests in flight.
    """

    def __init__(self, per_tick: int) -> None:
        self._per_tick = per_tick
        self._left = per_tick
        self._resumes: deque[T] = deque()
        self._new: deque[T] = deque()

    def __len__(self) -> int:
        """Questions held back."""
        return len(self._resumes) + len(self._new)

    def admit(self, item: T, *, is_resume: bool) -> bool:
        """True: ask now. False: kept; comes back from `tick`."""
        if not is_resume:
            if self._resumes:
                self._new.append(item)
                return False
            return True
        if self._left > 0 and not self._resumes:
            self._left -= 1
            return True
        self._resumes.append(item)
        return False

    def tick(self) -> list[T]:
        """What may leave now."""
        self._left = self._per_tick
        due = []
        while self._resumes and self._left > 0:
            due.append(self._resumes.popleft())
            self._left -= 1
        if not self._resumes:
            due.extend(self._new)
            self._new.clear()
        return due
