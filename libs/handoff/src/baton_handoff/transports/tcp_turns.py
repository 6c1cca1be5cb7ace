"""Turns: at most so many readers are served at a time, the one that has waited longest next."""

import threading
import time
from collections import deque


class Turns:
    """Hands out turns. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._num_free = limit
        self._waiting: deque[Turn] = deque()

    @property
    def num_waiting(self) -> int:
        """Readers whose turn has not come."""
        return len(self._waiting)

    def ask(self) -> "Turn":
        """A turn, or a place in the queue for one. Give it back in any case."""
        turn = Turn(self)
        with self._lock:
            if self._num_free:
                self._num_free -= 1
                turn.begin()
            else:
                self._waiting.append(turn)
        return turn

    def give_back(self, turn: "Turn") -> None:
        """See Turn."""
        with self._lock:
            if turn.is_over:
                return
            turn.is_over = True
            if not turn.has_begun:
                self._waiting.remove(turn)
            elif self._waiting:
                self._waiting.popleft().begin()
            else:
                self._num_free += 1


class Turn:
    """One reader's. It begins once and is given back once."""

    def __init__(self, turns: Turns) -> None:
        self.is_over = False
        self._turns = turns
        self._begun = threading.Event()
        self._begun_s = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether it has come, or had."""
        return self._begun.is_set()

    def begin(self) -> None:
        """For Turns."""
        self._begun_s = time.monotonic()
        self._begun.set()

    def wait(self, limit_s: float) -> bool:
        """Wait until it begins, at most so long. Returns: whether it has begun."""
        return self._begun.wait(limit_s)

    def held_s(self, now_s: float) -> float:
        """How long it has been held; 0 if it is over or has not begun."""
        return now_s - self._begun_s if self.has_begun and not self.is_over else 0.0

    def give_back(self) -> None:
        """Let the next one begin. Idempotent."""
        self._turns.give_back(self)
