"""One handoff at the sink: what it has got, in the source's blocks and in our own."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton_engine.api import EngineRequest

from baton_handoff.admission import Waiting
from baton_handoff.cut import Cut
from baton_handoff.ids import Outcome
from baton_handoff.tag import TagChain


class SinkState(enum.Enum):
    """States of a handoff at the sink. Only pulling and draining ones hold blocks; a draining one is over for everybody else."""

    TICKET = "ticket"
    PULLING = "pulling"
    DRAINING = "draining"
    OVER = "over"


@dataclass(slots=True, eq=False, kw_only=True)
class SinkHandoff(Waiting):
    """One handoff. In the source's blocks, [0, cut.num_source_blocks) of the sequence:

    first <= confirmed <= asked <= pulled <= announced <= cut.num_source_blocks
    [0, first)             our own cached prefix, pinned by being in the table
    [first, confirmed)     confirmed by the source
    [confirmed, pulled)    bytes read; asked is the end of the Confirm in flight (= confirmed: none is)
    [pulled, announced)    may be pulled
    [announced, end)       not computed yet; with engines that move KV themselves pulled may be ahead of announced

    In our own blocks, [0, num_blocks) of the sequence and our table: [0, committed) cached or filled by what is confirmed,
    [committed, num_blocks) reserved.
    """

    request: EngineRequest
    traceparent: str
    hashes: Sequence[bytes]
    cut: Cut  # of a ticket: as if the source's blocks were like ours, and nothing cached
    tags: TagChain | None = None  # by the source's layout; None: a ticket
    state: SinkState = SinkState.TICKET
    committed: int = 0
    first: int = 0
    confirmed: int = 0
    asked: int = 0
    asked_tag: bytes = b""
    pulled: int = 0
    source_ids: list[int] = field(default_factory=list)  # of [first, announced)
    pull_end: int = 0  # of the running operation, exclusive
    operation: int = 0  # number of the running operation; 0: none runs
    cached_tokens: int = 0
    last_chunk_blocks: int = 0  # of the newest announce
    outcome: Outcome | None = None
    retry_s: float = 0.0  # after which it was last told to be offered again

    @property
    def announced(self) -> int:
        """End of the announced blocks."""
        return self.first + len(self.source_ids)

    @property
    def confirmed_bytes(self) -> int:
        """Bytes that were moved and confirmed, as the source counts them."""
        return (self.confirmed - self.first) * self.cut.source.block_bytes

    @property
    def committed_tokens(self) -> int:
        """Leading tokens whose KV is ours to keep."""
        return min(self.committed * self.cut.own.block_tokens, self.num_tokens)
