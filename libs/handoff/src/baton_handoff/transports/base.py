"""What every transport offers, and how a pull can fail.

BatonError
|- TransportUnavailable   this transport cannot reach this peer; try the next one
`- PullFailed             one operation ended without all its bytes; nothing of it may be used
   `- ChecksumMismatch    all bytes came, but not those that were sent
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_runtime.errors import BatonError

from baton_handoff.transports.reslice import Reslice

# An operation is the unit in which blocks are given back after a failure; callers keep it small (docs/handoff.md, section 4).
MAX_OPERATION_BYTES = 32 << 20


class TransportUnavailable(BatonError):
    """This transport cannot be used with this peer. transport: its name; why: facts, no secrets."""

    reason = "TRANSPORT_UNAVAILABLE"
    status = grpc.StatusCode.UNAVAILABLE
    retryable = True

    def __init__(self, transport: str, why: str) -> None:
        self.transport = transport
        self.why = why
        super().__init__(f"{transport}: {why}")


class PullFailed(BatonError):
    """One operation ended early. Nothing writes to its destination blocks any more; their content is undefined."""

    reason = "PULL_FAILED"
    status = grpc.StatusCode.UNAVAILABLE
    retryable = True

    def __init__(self, transport: str, why: str) -> None:
        self.transport = transport
        self.why = why
        super().__init__(f"{transport}: {why}")


class ChecksumMismatch(PullFailed):
    """The bytes differ from those sent: damaged on the way, or the source reused the blocks in the middle of the operation."""

    reason = "CHECKSUM_MISMATCH"
    status = grpc.StatusCode.DATA_LOSS
    retryable = False


@dataclass(frozen=True, slots=True)
class PullStats:
    """What one or several operations moved. num_operations: copies or socket calls after merging neighbouring blocks."""

    num_bytes: int
    num_operations: int
    duration_s: float


class PeerPool(Protocol):
    """One opened peer's pool of blocks."""

    name: str

    async def pull(self, source_block_ids: Sequence[int], dest_block_ids: Sequence[int]) -> PullStats:
        """Copy the peer's blocks source_block_ids into own blocks dest_block_ids, pairwise. One operation; <= MAX_OPERATION_BYTES.

        Where the peer was opened with a reslice, the ids are of its units: each unit of the source becomes one of the own.

        When this returns or raises, nothing writes to the destination blocks any more. That includes cancellation: the
        operation is told to stop and CancelledError is raised once it has (a block border for shm, a shut socket for tcp).

        Raises: PullFailed (with facts), ValueError if lengths differ or a destination id is not a block of the own pool.
        """

    def drop(self) -> None:
        """End running and queued operations soon; they raise PullFailed. Idempotent. A later pull starts afresh."""


class Transport(Protocol):
    """One way of moving blocks, one object per worker process."""

    name: str

    async def open(self) -> None:
        """Be ready to be pulled from and to pull. Raises: TransportUnavailable."""

    async def close(self) -> None:
        """Drop all peers, end all threads. Idempotent."""

    def offer(self) -> bytes:
        """`TransportOffer.parameters` of the own pool: JSON (docs/handoff.md, section 7). After open()."""

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None:
        """Let this peer pull if it proves to know the secret. Several secrets per peer are valid side by side."""

    def forbid(self, peer_incarnation: str) -> None:
        """Forget the peer's secrets and end what it is reading. Idempotent."""

    def why_not(self, peer: Instance, parameters: bytes) -> str:
        """Why this transport cannot be used with the peer's offer; "" if it may be. Cheap: no connection is made."""

    async def open_peer(
        self, peer: Instance, parameters: bytes, pair_secret: bytes, own_incarnation: str, reslice: Reslice | None = None
    ) -> PeerPool:
        """Open the peer's pool for pulls. Raises: TransportUnavailable.

        reslice: how its blocks become own ones; None (or one that changes nothing): they are equal and copied whole.
        """
