"""Who may read from a source now: a few handoffs at a time, so that each is read fast, and none of them for ever.

A handoff is *read* from its first announce on until everything announced is confirmed. While as many as allowed are read, what others
have computed stays pinned and is not announced; it is the next one's turn by class and age as soon as one is confirmed, or over.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from baton_handoff.admission import Waiting, age_order
from baton_handoff.config import HandoffConfig


@dataclass(slots=True, eq=False, kw_only=True)
class Readable(Waiting):
    """The blocks of a handoff at its source, as far as reading goes. They are [0, num_blocks) of the sequence:

    first <= confirmed <= announced <= computed <= num_blocks
    [0, first)              the sink has them in its own cache; never announced, not pinned
    [first, confirmed)      the sink's; unpinned here
    [confirmed, announced)  computed, pinned, announced
    [announced, computed)   computed, pinned, held back until it is their turn to be read
    [computed, num_blocks)  to be computed
    """

    first: int = 0
    confirmed: int = 0
    announced: int = 0
    block_ids: list[int] = field(default_factory=list)  # of [first, computed)

    @property
    def computed(self) -> int:
        """End of the computed blocks."""
        return self.first + len(self.block_ids)

    @property
    def is_read(self) -> bool:
        """Whether blocks are announced and not confirmed."""
        return self.announced > self.confirmed

    @property
    def is_held_back(self) -> bool:
        """Whether blocks are computed and not announced."""
        return self.computed > self.announced


H = TypeVar("H", bound=Readable)


def may_announce(begun: Iterable[H], config: HandoffConfig) -> list[H]:
    """Those of the begun handoffs that may announce now what they have computed, in this order.

    One that is read already needs no further place, but it announces nothing more while somebody who goes before it waits for one: or a
    long prompt would keep its place from the first chunk to the last. No sink has more than its share of the places, whether others
    want them or not: a sink that hangs keeps its places until it is fenced.
    """
    handoffs = list(begun)
    waiting = sorted((h for h in handoffs if h.is_held_back), key=lambda h: age_order(h, config.times))
    if not waiting:
        return []
    read_by: dict[str, int] = {}
    for handoff in handoffs:
        if handoff.is_read:
            read_by[handoff.peer.incarnation] = read_by.get(handoff.peer.incarnation, 0) + 1
    places = config.max_readers - sum(read_by.values())
    found: list[H] = []
    full: set[str] = set()
    for handoff in waiting:
        sink = handoff.peer.incarnation
        if sink in full:
            continue
        if not handoff.is_read:
            if places <= 0:
                break
            if read_by.get(sink, 0) >= config.max_readers_per_sink:
                full.add(sink)
                continue
            places -= 1
            read_by[sink] = read_by.get(sink, 0) + 1
        found.append(handoff)
    return found
