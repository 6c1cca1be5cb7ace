"""What the books want done. The books decide and change state at once; whoever holds them performs these in order."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton_engine.api import EngineRequest, Priority, SequenceKey

from baton_handoff.ids import EventKind, FetchEnd, HandoffComplete, HandoffEnd, HandoffKey, Outcome, PeerRef, Side
from baton_handoff.messages import Message


@dataclass(frozen=True, slots=True)
class Send:
    """Say this to the peer if the link is up; else drop it: whatever matters is said again when the link is back."""

    peer_incarnation: str
    message: Message


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Source: the request's table is acquired; give it to the engine. If that raises, call `SourceBook.engine_refused`."""

    key: HandoffKey
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class CancelEngine:
    """Source: stop computing; the engine releases the table."""

    sequence: SequenceKey


@dataclass(frozen=True, slots=True)
class StartPull:
    """Sink: run one operation, then call `pull_returned` of the book it came from (SinkBook, or FetchSinkBook for a fetch) once, when
    nothing writes to dest_ids any more. With an engine that moves KV itself, the operation is the whole handoff."""

    key: HandoffKey
    operation: int
    peer_incarnation: str
    priority: Priority
    source_ids: tuple[int, ...]
    dest_ids: tuple[int, ...]
    request: EngineRequest | None = None  # with engines that move KV themselves, instead of ids


@dataclass(frozen=True, slots=True)
class StartFetch:
    """Source of a handoff: the sink, or the instance the frontend named, has more of the prefix than we. Fetch what is missing of the
    first num_tokens tokens, then call `SourceBook.fetch_ended` once, whatever came of it. hashes: of our own full blocks."""

    key: HandoffKey
    peer: PeerRef
    request: EngineRequest
    hashes: Sequence[bytes]
    num_tokens: int
    traceparent: str


@dataclass(frozen=True, slots=True)
class CancelFetch:
    """Nobody waits for that fetch any more."""

    key: HandoffKey


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """A fetch of ours is over; what was confirmed is in the prefix cache. Exactly one comes per fetch that was taken."""

    key: HandoffKey
    end: FetchEnd


@dataclass(frozen=True, slots=True)
class Completed:
    """Sink: every block is confirmed and committed; zero the tail, then hand the sequence (which owns its table) on.

    tail_block: id of a partial last block, of which tail_tokens hold KV; -1: the last block is full.
    """

    key: HandoffKey
    complete: HandoffComplete
    tail_block: int
    tail_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The Start is over. Exactly one of Completed and Ended comes per accepted start."""

    key: HandoffKey
    side: Side
    end: HandoffEnd


@dataclass(frozen=True, slots=True)
class Report:
    """For the books of kvtransfer: an event of this side, with the blocks held after it by the book's own count.

    held_blocks are our own, confirmed_blocks the source's, of confirmed_block_bytes each; 0: as large as our own.
    """

    key: HandoffKey
    side: Side
    kind: EventKind
    peer_incarnation: str
    held_blocks: int
    confirmed_blocks: int
    traceparent: str
    outcome: Outcome | None = None
    confirmed_block_bytes: int = 0


Action = Send | StartEngine | CancelEngine | StartPull | Completed | Ended | Report | StartFetch | CancelFetch | FetchEnded
