"""One handoff at the source: what was asked for, and how far it is. How far it is read: readers.Readable."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from baton_engine.api import EngineRequest

from baton_handoff.ids import FetchHint
from baton_handoff.readers import Readable
from baton_handoff.tag import TagChain


class SourceState(enum.Enum):
    """States of a live handoff at the source."""

    QUEUED = "queued"
    OFFERED = "offered"
    FETCHING = "fetching"
    COMPUTING = "computing"
    COMPUTED = "computed"


@dataclass(slots=True, eq=False, kw_only=True)
class SourceHandoff(Readable):
    """One live handoff."""

    request: EngineRequest
    traceparent: str
    hashes: Sequence[bytes]
    tags: TagChain
    state: SourceState = SourceState.QUEUED
    cached_tokens: int = 0
    ready_at: float = 0.0
    hint: FetchHint | None = None
    fetched_tokens: int = 0

    @property
    def is_begun(self) -> bool:
        """Whether the sink holds room for it and we hold blocks."""
        return self.state in (SourceState.FETCHING, SourceState.COMPUTING, SourceState.COMPUTED)
