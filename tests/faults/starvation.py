"""Whether this machine lets its processes run. Where it does not, no time of any law can be kept, nor judged."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

TICK_S = 0.25
WINDOW_S = 2.0


def waited_s(pid: int, root: Path = Path("/proc")) -> float:
    """Seconds for which the threads of a process wanted a processor and had none, so far; 0 if it is gone."""
    total_ns = 0
    try:
        for task in (root / str(pid) / "task").iterdir():
            total_ns += int((task / "schedstat").read_text().split()[1])
    except (OSError, IndexError):
        pass  # it, or a thread of it, has just ended
    return total_ns / 1e9


class StarvationWatch:
    """A thread that looks at all processes of a run four times a second. Use it as a context."""

    def __init__(self, pids: Callable[[], Iterable[int]], waited: Callable[[int], float] = waited_s) -> None:
        self._pids = pids
        self._waited = waited
        self._recent: dict[int, deque[tuple[float, float]]] = {}  # when, waited so far; of the last WINDOW_S
        self._worst: list[tuple[float, float]] = []  # when, most that one of them waited in the window that ended then
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="starvation", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def worst_s(self, since: float) -> float:
        """Most that one process waited within WINDOW_S, in windows that ended after that time (time.monotonic())."""
        return max((waited for ended, waited in self._worst if ended >= since), default=0.0)

    def look(self, now: float) -> None:
        """One look at all of them."""
        pids = list(self._pids())
        self._recent = {pid: self._recent.get(pid, deque()) for pid in pids}
        worst = 0.0
        for pid, recent in self._recent.items():
            recent.append((now, self._waited(pid)))
            while recent[0][0] < now - WINDOW_S:
                recent.popleft()
            worst = max(worst, recent[-1][1] - recent[0][1])
        self._worst.append((now, worst))

    def _run(self) -> None:
        while not self._is_over.wait(TICK_S):
            self.look(time.monotonic())
