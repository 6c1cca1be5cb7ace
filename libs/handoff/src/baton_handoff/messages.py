"""What the two sides say, as plain records; `wire` translates them to baton.worker.v1."""

from dataclasses import dataclass

from baton_handoff.ids import ConfirmAnswer, HandoffKey


@dataclass(frozen=True, slots=True)
class Begin:
    """Source to sink: I could start this prefill now."""

    key: HandoffKey
    num_tokens: int
    num_blocks: int
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Accepted:
    """Everything is reserved; announce from first_block on."""

    first_block: int


@dataclass(frozen=True, slots=True)
class NotNow:
    """Offer again after retry_after_ms; nothing is held."""

    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Never. reason: STALE, CANCELLED, TOO_LARGE, DRAINING."""

    reason: str


@dataclass(frozen=True, slots=True)
class BeginReply:
    """Sink to source: the answer to a Begin."""

    key: HandoffKey
    answer: Accepted | NotNow | Refused


@dataclass(frozen=True, slots=True)
class Announce:
    """Source to sink: blocks [first_block, first_block + len(block_ids)) are computed and pinned.

    block_ids are the source's. age_s: since the end of compute of the last of them, when sent.
    """

    key: HandoffKey
    first_block: int
    block_ids: tuple[int, ...]
    cached_tokens: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Confirm:
    """Sink to source: I have read blocks below end_block; were they pinned the whole time, and do we mean the same tokens?"""

    key: HandoffKey
    end_block: int
    tag: bytes


@dataclass(frozen=True, slots=True)
class ConfirmReply:
    """Source to sink: the commit.

    age_s: since the end of compute of the last announced block, when sent, by the source's clock; 0 unless confirmed.
    """

    key: HandoffKey
    end_block: int
    answer: ConfirmAnswer
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CancelHandoff:
    """Either side gave up. reason: UPPER_SNAKE, for logs."""

    key: HandoffKey
    reason: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """Sink to source: pin the longest leading run of these blocks that you have cached. hashes[i] is block first_block + i's."""

    key: HandoffKey
    first_block: int
    hashes: tuple[bytes, ...]
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class FetchReply:
    """Source to sink: blocks [first_block, first_block + len(block_ids)) are pinned for this fetch, and where.

    No block_ids: nothing is, the fetch is over for the source; refusal says why.
    """

    key: HandoffKey
    first_block: int
    block_ids: tuple[int, ...]
    refusal: str = ""


FromSource = Begin | Announce | ConfirmReply | CancelHandoff | FetchReply
FromSink = BeginReply | Confirm | CancelHandoff | Fetch
Message = FromSource | FromSink
