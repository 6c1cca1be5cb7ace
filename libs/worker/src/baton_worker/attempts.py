"""Which attempt of a request is the newest one seen here, and which are over."""

from collections import OrderedDict
from dataclasses import dataclass

TOMBSTONE_S = 60.0
# A flood of cancels for requests nobody starts must not eat the memory; 60 s of a few thousand requests per second fit.
MAX_TOMBSTONES = 500_000


@dataclass(slots=True)
class _Seen:
    highest: int
    num_live: int = 0


class Attempts:
    """Highest attempt seen per request, by Start or by Cancel; remembered until 60 s after the last of them was over.

    All its state: `_seen`, and `_tombstones`, the requests without a live attempt, oldest first, with the time to forget them.
    """

    def __init__(self, tombstone_s: float = TOMBSTONE_S, max_tombstones: int = MAX_TOMBSTONES) -> None:
        self._tombstone_s = tombstone_s
        self._max_tombstones = max_tombstones
        self._seen: dict[str, _Seen] = {}
        self._tombstones: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def highest(self, request_id: str) -> int:
        """Highest attempt seen; 0: none."""
        seen = self._seen.get(request_id)
        return seen.highest if seen is not None else 0

    def start(self, request_id: str, attempt: int) -> bool:
        """Whether this Start is the newest seen; then it is live until `end`. False: it is STALE and nothing was noted."""
        seen = self._seen.setdefault(request_id, _Seen(highest=0))
        if attempt <= seen.highest:
            return False
        seen.highest = attempt
        seen.num_live += 1
        self._tombstones.pop(request_id, None)
        return True

    def end(self, request_id: str, now: float) -> None:
        """One live attempt of the request is over; with the last one the tombstone's time begins."""
        seen = self._seen[request_id]
        seen.num_live -= 1
        if seen.num_live == 0:
            self._bury(request_id, now)

    def cancel(self, request_id: str, attempt: int, now: float) -> None:
        """This attempt and all lower ones are over, whether their Start has arrived or not."""
        seen = self._seen.setdefault(request_id, _Seen(highest=0))
        seen.highest = max(seen.highest, attempt)
        if seen.num_live == 0:
            self._bury(request_id, now)

    def expire(self, now: float) -> None:
        """Forget tombstones whose time has passed."""
        while self._tombstones:
            request_id, forget_at = next(iter(self._tombstones.items()))
            if forget_at > now and len(self._tombstones) <= self._max_tombstones:
                return
            del self._tombstones[request_id], self._seen[request_id]

    def _bury(self, request_id: str, now: float) -> None:
        self._tombstones[request_id] = now + self._tombstone_s
        self._tombstones.move_to_end(request_id)
