"""Which attempt of a request is the newest, and how those that are over ended. Remembered for 60 s after the last of them."""

from collections import deque
from dataclasses import dataclass

from baton_handoff.ids import HandoffKey, Outcome


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What late messages about an ended handoff are answered from.

    refusal: what a repeated Begin is told. ready_at: at a source, the end of compute of the last announced block.
    """

    outcome: Outcome
    num_blocks: int
    confirmed_blocks: int
    refusal: str = "CANCELLED"
    ready_at: float = 0.0

    @property
    def is_confirmed(self) -> bool:
        """Whether every block was confirmed."""
        return self.outcome is Outcome.CONFIRMED


@dataclass(slots=True)
class _Request:
    highest: int = 0  # attempt, by Start or by Cancel
    cancelled: int = 0  # this attempt and all below are over
    num_live: int = 0
    forget_at: float = 0.0


class Tombstones:
    """Highest attempts and ended handoffs.

    All its state: `_requests` by request_id, `_stones` by handoff, `_graves` in order of the time to forget them.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._requests: dict[str, _Request] = {}
        self._stones: dict[HandoffKey, Tombstone] = {}
        self._graves: deque[tuple[float, str, HandoffKey | None]] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def newest(self, request_id: str) -> int:
        """Highest attempt seen, by Start or by Cancel; a Start must be above it. 0: nothing is known."""
        request = self._requests.get(request_id)
        return max(request.highest, request.cancelled) if request is not None else 0

    def is_older(self, key: HandoffKey) -> bool:
        """Whether a higher attempt than this one was seen."""
        request = self._requests.get(key.request_id)
        return request is not None and key.attempt < request.highest

    def is_over(self, key: HandoffKey) -> bool:
        """Whether this attempt is older than the newest one, or cancelled."""
        request = self._requests.get(key.request_id)
        return request is not None and (key.attempt < request.highest or key.attempt <= request.cancelled)

    def saw(self, request_id: str, attempt: int) -> None:
        """A Start of this attempt was taken; its handoff lives until `bury`."""
        request = self._requests.setdefault(request_id, _Request())
        request.highest = max(request.highest, attempt)
        request.num_live += 1

    def cancel(self, request_id: str, attempt: int, now: float) -> None:
        """A Cancel of this attempt and all below arrived, perhaps before its Start."""
        request = self._requests.setdefault(request_id, _Request())
        request.cancelled = max(request.cancelled, attempt)
        self._remember(request_id, None, now)

    def bury(self, key: HandoffKey, stone: Tombstone, now: float) -> None:
        """A handoff ended."""
        self._stones[key] = stone
        self._requests[key.request_id].num_live -= 1
        self._remember(key.request_id, key, now)

    def get(self, key: HandoffKey) -> Tombstone | None:
        """How that handoff ended; None if it is unknown."""
        return self._stones.get(key)

    def expire(self, now: float) -> None:
        """Forget what is over for 60 s."""
        while self._graves and self._graves[0][0] <= now:
            _, request_id, key = self._graves.popleft()
            if key is not None:
                self._stones.pop(key, None)
            request = self._requests.get(request_id)
            if request is not None and request.num_live == 0 and request.forget_at <= now:
                del self._requests[request_id]

    def _remember(self, request_id: str, key: HandoffKey | None, now: float) -> None:
        forget_at = now + self._keep_s
        self._requests[request_id].forget_at = forget_at
        self._graves.append((forget_at, request_id, key))
