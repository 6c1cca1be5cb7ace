"""Who waits for blocks of one pool, who goes first, and what is promised: one line for whole requests, tickets and offers alike.

Everybody asks the block manager, which asks here. What does not fit waits in line by its rank, a point in time: when it came, later for
lower classes. So everything is first at some time. Of those refused for over PATIENCE_S the first one's room is kept from all who come
after it: they get blocks only if its own would still be there. So what is available to it only grows, but for the growth of sequences
that run, which end; and a large request is not starved by small ones, whichever way either came.

A promise is a number of blocks for an owner that will take them soon (an offer is under way to its sink). It counts as taken.

A plain class without a lock; the block manager holds its own around every call.
"""

from collections.abc import Hashable
from dataclasses import dataclass

PATIENCE_S = 1.0  # so long others may go on overtaking
SILENT_S = 1.0  # who asks again and again, and has not for so long, keeps nobody out


@dataclass(frozen=True, slots=True)
class Turn:
    """As whom one asks for blocks, and when.

    rank: time.monotonic() of arrival, later for lower classes; the smaller goes first. now: time.monotonic(). stays: does not ask again
    until blocks become available, and is in line until withdrawn; else it is in line as long as it asks again and again.
    """

    rank: float
    now: float
    stays: bool = False


@dataclass(slots=True)
class _Claim:
    rank: float
    since: float  # first refusal
    last: float  # newest refusal
    stays: bool
    num_blocks: int


class WaitingRoom:
    """All its state: `_claims`, who waits; `_promises` in blocks; `_now`, the latest time anybody has told."""

    def __init__(self) -> None:
        self._claims: dict[Hashable, _Claim] = {}
        self._promises: dict[Hashable, int] = {}
        self._now = 0.0

    @property
    def promised(self) -> int:
        """Blocks promised to anybody."""
        return sum(self._promises.values())

    def promised_to_others(self, owner: Hashable) -> int:
        """Blocks promised to anybody but owner."""
        return self.promised - self._promises.get(owner, 0)

    def has_promise(self, owner: Hashable) -> bool:
        """Whether blocks are promised to owner."""
        return owner in self._promises

    def first(self) -> Hashable | None:
        """Who goes first: the one of the lowest rank of those who have waited for over PATIENCE_S; None if nobody has."""
        overdue = ((claim.rank, claim.since, owner) for owner, claim in self._claims.items() if self._now - claim.since > PATIENCE_S)
        return min(overdue, key=lambda entry: entry[:2], default=(0.0, 0.0, None))[2]

    def kept_from(self, owner: Hashable, turn: Turn | None) -> int:
        """Blocks owner must leave available for the one that goes first. Who asks without a turn goes last."""
        first = self.first()
        if first is None or first == owner or owner in self._promises:
            return 0
        claim = self._claims[first]
        return 0 if turn is not None and turn.rank < claim.rank else claim.num_blocks

    def at(self, now: float) -> None:
        """It is that late."""
        self._now = max(self._now, now)

    def refuse(self, owner: Hashable, turn: Turn, num_blocks: int) -> None:
        """There is no room for num_blocks now: owner waits in line, from its first refusal on."""
        self.at(turn.now)
        claim = self._claims.setdefault(owner, _Claim(turn.rank, turn.now, turn.now, turn.stays, num_blocks))
        claim.last, claim.num_blocks = turn.now, num_blocks

    def promise(self, owner: Hashable, num_blocks: int) -> None:
        """Count num_blocks as taken, until owner leaves."""
        self._promises[owner] = num_blocks

    def leave(self, owner: Hashable) -> bool:
        """Owner has its blocks, or wants none any more. Returns: whether others may have room now that had none."""
        was_waiting = self._claims.pop(owner, None) is not None
        return self._promises.pop(owner, None) is not None or was_waiting

    def expire(self, now: float) -> bool:
        """Time has passed. Returns: whether others may have room now that had none."""
        self.at(now)
        silent = [owner for owner, claim in self._claims.items() if not claim.stays and now - claim.last > SILENT_S]
        for owner in silent:
            del self._claims[owner]
        return bool(silent)
