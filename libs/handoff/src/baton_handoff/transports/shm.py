"""Pulls between processes that share memory: copy from a read-only mapping of the peer's segment.

The copy is the reader's own: whatever becomes of the owner, the mapping stays readable, and only this process's blocks are
written. One thread per transport owns all mappings and makes all copies; neighbouring blocks are one copy. There is no checksum:
the owner takes no part in a copy, so there would be nothing to compare with.
"""

import asyncio
import fcntl
import json
import mmap
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import KvPool
from baton_runtime.log import get_logger

from baton_handoff.transports.base import PeerPool, PullFailed, PullStats, TransportUnavailable
from baton_handoff.transports.operation import Operation, checked_ids, merge_runs, peer_block_bytes, unless_identity
from baton_handoff.transports.reslice import Reslice
from baton_handoff.transports.segment import SHM_DIRECTORY, PoolMemory, SegmentMismatch, SegmentOffer, opened_segment, try_lock

log = get_logger(__name__)

NAME = "shm"
# A copy cannot be stopped, so it is kept short: 1 MiB is some 0.2 ms.
MAX_COPY_BYTES = 1 << 20
_CLOSE_LIMIT_S = 2.0


class _Parameters(msgspec.Struct):
    path: str
    token: str
    num_blocks: int
    block_bytes: int
    offset: int


def _decode_offer(parameters: bytes) -> SegmentOffer:
    """Raises: SegmentMismatch."""
    try:
        given = msgspec.json.decode(parameters, type=_Parameters)
        return SegmentOffer(given.path, bytes.fromhex(given.token), given.num_blocks, given.block_bytes, given.offset)
    except (msgspec.DecodeError, ValueError) as error:
        raise SegmentMismatch(f"parameters do not parse: {error}") from error


class _Mapping:
    """One peer's segment, mapped. Used by the owner thread only."""

    def __init__(self, fd: int, offer: SegmentOffer) -> None:
        self.offer = offer
        self._fd = os.dup(fd)  # for the owner's lock; same open file, so this reader holds none
        self._memory = mmap.mmap(fd, offer.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        data = np.frombuffer(self._memory, np.uint8, offer.num_blocks * offer.block_bytes, offer.offset)
        self.blocks: npt.NDArray[np.uint8] = data.reshape(offer.num_blocks, offer.block_bytes)

    def is_owner_dead(self) -> bool:
        """Whether nobody holds the owner's lock any more."""
        if not try_lock(self._fd, fcntl.LOCK_SH):
            return False
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    def close(self) -> None:
        """Give the memory back. Only after the last copy out of it."""
        del self.blocks
        self._memory.close()
        os.close(self._fd)


class ShmPeer:
    """An opened peer; see PeerPool."""

    name = NAME

    def __init__(self, transport: "ShmTransport", offer: SegmentOffer, reslice: Reslice | None = None) -> None:
        self.offer = offer
        self.reslice = reslice  # None: blocks are copied whole
        self._live: set[Operation] = set()  # on the event loop only
        self._transport = transport

    async def pull(self, source_block_ids: Sequence[int], dest_block_ids: Sequence[int]) -> PullStats:
        """Copy blocks; see PeerPool. Ends at the next copy's border (1 MiB) when dropped or cancelled."""
        ids = checked_ids(source_block_ids, dest_block_ids, self.offer.num_blocks, self._transport.pool, NAME, self.reslice)
        operation = Operation(*ids)
        self._live.add(operation)
        try:
            return await self._transport.run(self, operation)
        finally:
            self._live.discard(operation)

    def drop(self) -> None:
        """End this peer's operations; see PeerPool. If its owner is dead, its memory is given back after that."""
        for operation in self._live:
            operation.stop(NAME, "peer dropped")
        self._transport.retire(self.offer)


class ShmTransport:
    """Transport over shared memory; see Transport. allow and forbid decide nothing here: file mode and token do."""

    name = NAME

    def __init__(self, memory: PoolMemory, pool: KvPool, directory: Path = SHM_DIRECTORY) -> None:
        self.pool = pool
        self._own = memory.offer
        self._problem = memory.problem
        self._directory = directory
        # Bounded by its callers: one operation per handoff.
        self._queue: queue.SimpleQueue[tuple[SegmentOffer, Reslice | None, Operation | None] | None] = queue.SimpleQueue()
        self._live: set[Operation] = set()  # on the event loop only
        self._lock = threading.Lock()  # guards the dict; what is in it only the thread reads
        self._mappings: dict[bytes, _Mapping] = {}  # by token
        self._thread: threading.Thread | None = None
        self._is_closed = False

    async def open(self) -> None:
        """Start the owner thread. Raises: TransportUnavailable if the own pool is not in shared memory."""
        if self._own is None:
            raise TransportUnavailable(NAME, f"the own pool is not in shared memory: {self._problem}")
        self._thread = threading.Thread(target=self._work, name="shm-transport", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """End operations and the thread; see Transport."""
        if self._is_closed:
            return
        self._is_closed = True
        for operation in self._live:
            operation.stop(NAME, "transport closed")
        self._queue.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _CLOSE_LIMIT_S)

    def offer(self) -> bytes:
        """Path, token and shape of the own segment; see Transport."""
        if self._own is None:
            raise TransportUnavailable(NAME, "the own pool is not in shared memory")
        own = self._own
        return json.dumps(
            {
                "path": own.path,
                "token": own.token.hex(),
                "num_blocks": own.num_blocks,
                "block_bytes": own.block_bytes,
                "offset": own.offset,
            }
        ).encode()

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None:
        """Nothing to do: who may open a file of mode 0600 may read it."""

    def forbid(self, peer_incarnation: str) -> None:
        """Nothing to do: a reader of our memory cannot be stopped, and cannot harm."""

    def why_not(self, peer: Instance, parameters: bytes) -> str:
        """Compares the token in the peer's segment with its offer; see Transport."""
        try:
            with opened_segment(_decode_offer(parameters), self._directory):
                return ""
        except SegmentMismatch as error:
            return str(error)

    async def open_peer(
        self, peer: Instance, parameters: bytes, pair_secret: bytes, own_incarnation: str, reslice: Reslice | None = None
    ) -> PeerPool:
        """Map the peer's segment; see Transport."""
        if problem := self.why_not(peer, parameters):
            raise TransportUnavailable(NAME, problem)
        try:
            offer = _decode_offer(parameters)
            if offer.block_bytes != (expected := peer_block_bytes(self.pool, reslice)):
                raise TransportUnavailable(NAME, f"the peer's blocks have {offer.block_bytes} bytes, expected {expected}")
            self._map(offer)
            self._retire_others(offer)
        except (SegmentMismatch, OSError) as error:
            raise TransportUnavailable(NAME, str(error)) from error
        return ShmPeer(self, offer, unless_identity(reslice))

    async def run(self, peer: ShmPeer, operation: Operation) -> PullStats:
        """Have the owner thread copy; the end of the operation."""
        if self._is_closed or self._thread is None:
            raise PullFailed(NAME, "the transport is closed")
        self._live.add(operation)
        try:
            self._queue.put((peer.offer, peer.reslice, operation))
            return await operation.wait(lambda: operation.stop(NAME, "cancelled"))
        finally:
            self._live.discard(operation)

    def retire(self, offer: SegmentOffer) -> None:
        """Have the owner thread give a dead owner's memory back, behind the copies queued so far."""
        self._queue.put((offer, None, None))

    def _retire_others(self, offer: SegmentOffer) -> None:
        with self._lock:
            others = [mapping.offer for token, mapping in self._mappings.items() if token != offer.token]
        for other in others:
            self.retire(other)

    def _map(self, offer: SegmentOffer) -> _Mapping:
        with self._lock:
            mapping = self._mappings.get(offer.token)
            if mapping is None:
                with opened_segment(offer, self._directory) as fd:
                    mapping = self._mappings[offer.token] = _Mapping(fd, offer)
            return mapping

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            offer, reslice, operation = item
            try:
                if operation is None:
                    self._unmap_if_dead(offer)
                elif operation.start():
                    operation.end(*self._copy(offer, reslice, operation))
            except Exception as error:  # supervisor: the thread serves every peer and must outlive one bad operation
                log.error("shm_operation_failed", exc_info=error)
                if operation is not None:
                    operation.end(PullFailed(NAME, f"internal error: {type(error).__name__}"))

    def _copy(self, offer: SegmentOffer, reslice: Reslice | None, operation: Operation) -> tuple[PullFailed | int, int]:
        """Returns: failure or number of copies, and bytes."""
        try:
            blocks = self._map(offer).blocks
        except (SegmentMismatch, OSError) as error:
            return PullFailed(NAME, str(error)), 0
        if reslice is not None:
            return self._copy_resliced(blocks, reslice, operation)
        dest = self.pool.data
        runs = merge_runs(operation.source_ids, operation.dest_ids, max(1, MAX_COPY_BYTES // offer.block_bytes))
        for num_copies, (source_id, dest_id, num_blocks) in enumerate(runs):
            if operation.stopped:
                return _stopped(operation, num_copies, len(runs)), 0
            if num_blocks == 1:
                dest[dest_id] = blocks[source_id]  # half the price of a slice of one
            else:
                dest[dest_id : dest_id + num_blocks] = blocks[source_id : source_id + num_blocks]
        return len(runs), len(operation.dest_ids) * offer.block_bytes

    def _copy_resliced(self, blocks: npt.NDArray[np.uint8], reslice: Reslice, operation: Operation) -> tuple[PullFailed | int, int]:
        per_copy = max(1, MAX_COPY_BYTES // reslice.unit_bytes)
        num_units = len(operation.dest_ids)
        starts = range(0, num_units, per_copy)
        for num_copies, start in enumerate(starts):
            if operation.stopped:
                return _stopped(operation, num_copies, len(starts)), 0
            units = slice(start, start + per_copy)
            reslice.copy(self.pool.data, operation.dest_ids[units], blocks, operation.source_ids[units])
        return len(starts), num_units * reslice.unit_bytes

    def _unmap_if_dead(self, offer: SegmentOffer) -> None:
        # A mapping keeps its pages: without this every restart of a neighbour would cost the host a whole pool.
        with self._lock:
            mapping = self._mappings.get(offer.token)
            if mapping is None or not mapping.is_owner_dead():
                return
            del self._mappings[offer.token]
        mapping.close()
        log.debug("segment_unmapped", path=offer.path)


def _stopped(operation: Operation, num_copies: int, num_planned: int) -> PullFailed:
    return PullFailed(NAME, f"{operation.stopped} after {num_copies} of {num_planned} copies")
