"""Stranded memory, looked for without asking the state machines: the block manager's owners against who was started and who lives."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from baton_engine.blocks import BlockManager

# A step that runs when its handoff ends, or an operation that is returning, may hold blocks for this long and is not stranded.
ORPHAN_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Start:
    """One accepted Start that has not ended."""

    peer_incarnation: str
    is_source: bool


class Audit:
    """Counts blocks pinned or reserved for nobody, or for a handoff whose other side is silent.

    All its state: `_orphaned_at`, when an owner was first seen without a live Start.
    """

    def __init__(
        self,
        blocks: BlockManager,
        starts: Mapping[Hashable, Start],
        silent_s: Callable[[Start, float], float],
        stranded_s: float,
    ) -> None:
        self._blocks = blocks
        self._starts = starts
        self._silent_s = silent_s
        self._stranded_s = stranded_s
        self._orphaned_at: dict[Hashable, float] = {}

    def stranded_blocks(self, now: float) -> int:
        """Blocks stranded now. Ask regularly: an owner counts once it has been without a Start for the grace."""
        owners = self._blocks.pinned_owners()
        self._orphaned_at = {owner: self._orphaned_at.get(owner, now) for owner in owners if owner not in self._starts}
        return sum(num_blocks for owner, num_blocks in owners.items() if self._is_stranded(owner, now))

    def _is_stranded(self, owner: Hashable, now: float) -> bool:
        start = self._starts.get(owner)
        if start is None:
            return now - self._orphaned_at[owner] >= ORPHAN_GRACE_S
        return self._silent_s(start, now) > self._stranded_s
