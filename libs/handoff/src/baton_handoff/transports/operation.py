"""One pull on its way through a transport's thread, and the merging of neighbouring blocks."""

import asyncio
import enum
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from baton_engine.pool import KvPool

from baton_handoff.transports.base import MAX_OPERATION_BYTES, PullFailed, PullStats
from baton_handoff.transports.reslice import Reslice

BlockIds: TypeAlias = npt.NDArray[np.int64]
NO_BLOCKS: BlockIds = np.empty(0, np.int64)


# (source, dest, n): blocks [source, source + n) of the peer go to own blocks [dest, dest + n). A plain tuple: there is one per
# block in the worst case, and each must cost less than the copy of a small block.
Run: TypeAlias = tuple[int, int, int]


def merge_runs(source_ids: BlockIds, dest_ids: BlockIds, max_blocks: int) -> list[Run]:
    """Merge pairs whose ids rise together into runs of at most max_blocks."""
    is_border = (np.diff(source_ids) != 1) | (np.diff(dest_ids) != 1)
    firsts = np.concatenate(([0], np.flatnonzero(is_border) + 1))
    lengths = np.diff(firsts, append=len(source_ids))
    runs: list[Run] = list(zip(source_ids[firsts].tolist(), dest_ids[firsts].tolist(), lengths.tolist(), strict=True))
    if lengths.max() <= max_blocks:
        return runs
    return [
        (source + done, dest + done, min(max_blocks, length - done))
        for source, dest, length in runs
        for done in range(0, length, max_blocks)
    ]


def checked_ids(
    source_ids: Sequence[int],
    dest_ids: Sequence[int],
    num_source_blocks: int,
    pool: KvPool,
    transport: str,
    reslice: Reslice | None = None,
) -> tuple[BlockIds, BlockIds]:
    """Both as columns: block ids, or unit ids where blocks are re-sliced.

    Raises: ValueError about own ids (a bug here), PullFailed about the peer's (it announced nonsense).
    """
    num_source, num_dest, unit_bytes = num_source_blocks, pool.num_blocks, pool.block_bytes
    if reslice is not None:
        num_source, num_dest = num_source * reslice.units_per_source_block, num_dest * reslice.units_per_dest_block
        unit_bytes = reslice.unit_bytes
    source, dest = np.asarray(source_ids, np.int64), np.asarray(dest_ids, np.int64)
    if source.shape != dest.shape or source.ndim != 1 or not source.size:
        raise ValueError(f"{source.size} source blocks for {dest.size} destination blocks")
    # A single block of the source is one operation however large it is, in however many units it arrives.
    if dest.size * unit_bytes > max(MAX_OPERATION_BYTES, peer_block_bytes(pool, reslice)):
        raise ValueError(f"{dest.size} blocks of {unit_bytes} bytes are more than one operation of {MAX_OPERATION_BYTES}")
    if dest.min() < 0 or dest.max() >= num_dest:
        raise ValueError(f"destination block ids {dest.min()}..{dest.max()} in a pool of {num_dest}")
    if source.min() < 0 or source.max() >= num_source:
        raise PullFailed(transport, f"source block ids {source.min()}..{source.max()} in a pool of {num_source}")
    return source, dest


def peer_block_bytes(pool: KvPool, reslice: Reslice | None) -> int:
    """What a block of the peer must have: as own ones, unless they are re-sliced."""
    return pool.block_bytes if reslice is None else reslice.source.block_bytes


def unless_identity(reslice: Reslice | None) -> Reslice | None:
    """None where whole blocks are copied as they are."""
    return None if reslice is None or reslice.is_identity else reslice


class _State(enum.Enum):
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    OVER = enum.auto()


class Operation:
    """One pull: made on the event loop, run by one thread, ended exactly once.

    source_ids, dest_ids: of blocks, or of units where blocks are re-sliced. The thread calls start(), moves bytes while `stopped`
    is empty, then end(). Stopping is a request with a reason. One that never started ends at once; a running one ends when its
    thread says so, because only the thread knows that it has stopped writing.
    """

    def __init__(self, source_ids: BlockIds, dest_ids: BlockIds) -> None:
        self.source_ids = source_ids
        self.dest_ids = dest_ids
        self.stopped = ""  # why it should end early
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[PullStats] = self._loop.create_future()
        self._lock = threading.Lock()
        self._state = _State.QUEUED
        self._started_s = 0.0

    def start(self) -> bool:
        """The thread takes it up. False: it is over already, leave it."""
        with self._lock:
            if self._state is not _State.QUEUED:
                return False
            self._state = _State.RUNNING
        self._started_s = time.monotonic()
        return True

    def stop(self, transport: str, why: str) -> bool:
        """Ask it to end. Returns: whether it is running, so that its thread may have to be woken."""
        with self._lock:
            self.stopped = self.stopped or why
            if self._state is not _State.QUEUED:
                return self._state is _State.RUNNING
            self._state = _State.OVER
        self._resolve(PullFailed(transport, f"dropped before it began: {why}"))
        return False

    def end(self, result: PullFailed | int, num_bytes: int = 0) -> None:
        """The thread has let go of the destination blocks. result: the failure, or the number of copies or calls it took."""
        with self._lock:
            if self._state is _State.OVER:
                return
            self._state = _State.OVER
        if isinstance(result, PullFailed):
            self._resolve(result)
        else:
            self._resolve(PullStats(num_bytes, result, time.monotonic() - self._started_s))

    def _resolve(self, result: PullFailed | PullStats) -> None:
        try:
            self._loop.call_soon_threadsafe(self._set, result)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    def _set(self, result: PullFailed | PullStats) -> None:
        if self._future.done():
            return
        if isinstance(result, PullFailed):
            self._future.set_exception(result)
        else:
            self._future.set_result(result)

    async def wait(self, stop: Callable[[], object]) -> PullStats:
        """The end of the operation. Cancelled: calls stop() and raises CancelledError after the operation has ended."""
        cancelled: asyncio.CancelledError | None = None
        while not self._future.done():
            try:
                await asyncio.wait({self._future})
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
                stop()
        if cancelled is not None:
            self._future.exception()  # looked at, so that asyncio does not report it as forgotten
            raise cancelled
        return self._future.result()
