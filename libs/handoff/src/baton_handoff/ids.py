"""Who a handoff is, who its other side is, and how it ends."""

import enum
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from baton_engine.api import SequenceKey
from baton_runtime.errors import BatonError


class HandoffKey(NamedTuple):
    """Identity of a handoff or a fetch, in every message. decode_incarnation is the sink's."""

    request_id: str
    attempt: int
    decode_incarnation: str
    is_fetch: bool = False

    @property
    def sequence(self) -> SequenceKey:
        """The sequence it is for; of a handoff also the owner of its blocks in the block manager, on either side."""
        return SequenceKey(self.request_id, self.attempt)

    @property
    def owner(self) -> Hashable:
        """Owner of its blocks in the block manager, on either side. A fetch owns blocks beside those of its sequence."""
        return self if self.is_fetch else self.sequence


@dataclass(frozen=True, slots=True)
class PeerRef:
    """The other side, as the frontend named it. address: host:port of its gRPC server; needed by the sink only."""

    instance_id: str
    incarnation: str
    address: str = ""


@dataclass(frozen=True, slots=True)
class FetchHint:
    """Where the leading num_tokens tokens of a sequence are believed to be cached."""

    peer: PeerRef
    num_tokens: int


class Side(enum.IntEnum):
    """Sides of a handoff; values as baton.kvtransfer.v1.Side."""

    SOURCE = 1
    SINK = 2


class EventKind(enum.IntEnum):
    """What can happen to a handoff; values as baton.kvtransfer.v1.HandoffEventKind."""

    BEGUN = 1
    PROGRESS = 2
    ENDED = 3


class Outcome(enum.IntEnum):
    """How a handoff ended on one side; values as baton.kvtransfer.v1.HandoffOutcome."""

    CONFIRMED = 1
    CANCELLED = 2
    FENCED = 3
    NOT_PINNED = 4
    DATA_LOSS = 5
    FAILED = 6


class EndReason(enum.IntEnum):
    """Why a Start ended in the handoff; values as baton.worker.v1.FinishReason."""

    CANCELLED = 3
    DEADLINE = 4
    PREFILLED = 5
    HANDOFF_FAILED = 6
    PREEMPTED = 7
    REFUSED = 8
    STALE = 9
    ENGINE_ERROR = 10
    INVALID = 12


class FailureCause(enum.IntEnum):
    """With HANDOFF_FAILED: what happened; values as baton.worker.v1.HandoffFailureCause."""

    PEER_FENCED = 1
    PATH_DOWN = 2
    PEER_CANCELLED = 3
    NOT_PINNED = 4
    DATA_LOSS = 5
    NO_INTRODUCTION = 6


class ConfirmAnswer(enum.IntEnum):
    """Answers to a Confirm; values as baton.worker.v1.ConfirmAnswer."""

    CONFIRMED = 1
    NOT_PINNED = 2
    TAG_MISMATCH = 3
    STALE = 4


@dataclass(frozen=True, slots=True)
class HandoffEnd:
    """The one end of a Start, unless a HandoffComplete was it.

    cause is set with HANDOFF_FAILED, error with REFUSED, INVALID and ENGINE_ERROR. confirmed_tokens: leading tokens whose KV
    the sink has (source: knows to be) confirmed; num_bytes: bytes moved and confirmed. cached_tokens: at the source, leading
    tokens it did not have to compute, of which fetched_tokens came from another's cache. exposed_s: at the source with PREFILLED,
    as in HandoffComplete.
    """

    reason: EndReason
    cause: FailureCause | None = None
    peer_incarnation: str = ""
    confirmed_tokens: int = 0
    error: BatonError | None = None
    num_bytes: int = 0
    cached_tokens: int = 0
    fetched_tokens: int = 0
    exposed_s: float = 0.0

    @property
    def bytes(self) -> int:
        """Same as num_bytes."""
        return self.num_bytes


@dataclass(frozen=True, slots=True)
class HandoffComplete:
    """The KV is in the sink's blocks, all of it confirmed.

    cached_tokens: leading tokens nobody had to compute for this attempt, on either side. exposed_s: from the end of compute of the
    last block to its confirm, both at the source, by the source's clock; 0 if no bytes moved. last_chunk_bytes: those of the last
    announce, which cannot travel before compute ends.
    """

    cached_tokens: int
    handoff_bytes: int
    exposed_s: float = 0.0
    last_chunk_bytes: int = 0


class FetchOutcome(enum.StrEnum):
    """How a fetch ended at the sink; the values are labels of metrics."""

    FETCHED = "fetched"  # all that was asked for
    PARTIAL = "partial"  # the source had only the first of it
    NOT_FOUND = "not_found"  # the source had none of it, or had no leave to give it
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    FENCED = "fenced"  # the source died or hangs, or cannot be reached
    PULL_FAILED = "pull_failed"
    NOT_PINNED = "not_pinned"
    DATA_LOSS = "data_loss"
    NO_ROOM = "no_room"  # not begun: too little room here, or too many fetches
    NO_SOURCE = "no_source"  # not begun: not introduced, other block size, suspect


@dataclass(frozen=True, slots=True)
class FetchEnd:
    """The one end of a fetch. num_tokens: fetched and confirmed, now in our own prefix cache, whatever the outcome."""

    outcome: FetchOutcome
    num_tokens: int = 0
    num_bytes: int = 0
