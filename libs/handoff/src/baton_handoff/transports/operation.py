"""One pull on its way through a transport's thread, and the merging of neighbouring blocks."""

import asyncio
import enum
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from baton_engine.pool import KvPool

from baton_handoff.transports.base import MAX_OPERATION_BYTES, PullFailed, PullStats


class Run(NamedTuple):
    """Blocks [source, source + num_blocks) of the peer go to own blocks [dest, dest + num_blocks)."""

    source: int
    dest: int
    num_blocks: int


def merge_runs(source_ids: Iterable[int], dest_ids: Iterable[int], max_blocks: int) -> list[Run]:
    """Merge pairs whose ids rise together into runs of at most max_blocks."""
    runs: list[Run] = []
    first_source = first_dest = length = 0
    for source, dest in zip(source_ids, dest_ids, strict=True):
        if 0 < length < max_blocks and source == first_source + length and dest == first_dest + length:
            length += 1
            continue
        if length:
            runs.append(Run(first_source, first_dest, length))
        first_source, first_dest, length = source, dest, 1
    if length:
        runs.append(Run(first_source, first_dest, length))
    return runs


def check_ids(source_ids: Sequence[int], dest_ids: Sequence[int], num_source_blocks: int, pool: KvPool, transport: str) -> None:
    """Raises: ValueError about own ids (a bug here), PullFailed about the peer's (it announced nonsense)."""
    if len(source_ids) != len(dest_ids) or not len(source_ids):
        raise ValueError(f"{len(source_ids)} source blocks for {len(dest_ids)} destination blocks")
    if len(dest_ids) > 1 and len(dest_ids) * pool.block_bytes > MAX_OPERATION_BYTES:
        raise ValueError(f"{len(dest_ids)} blocks of {pool.block_bytes} bytes are more than one operation of {MAX_OPERATION_BYTES}")
    if not 0 <= min(dest_ids) <= max(dest_ids) < pool.num_blocks:
        raise ValueError(f"destination block ids {min(dest_ids)}..{max(dest_ids)} in a pool of {pool.num_blocks}")
    if not 0 <= min(source_ids) <= max(source_ids) < num_source_blocks:
        raise PullFailed(transport, f"source block ids {min(source_ids)}..{max(source_ids)} in a pool of {num_source_blocks}")


class _State(enum.Enum):
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    OVER = enum.auto()


class Operation:
    """One pull: made on the event loop, run by one thread, ended exactly once.

    The thread calls start(), moves bytes while `stopped` is empty, then end(). Stopping is a request with a reason. One that
    never started ends at once; a running one ends when its thread says so, because only the thread knows that it has
    stopped writing.
    """

    def __init__(self, source_ids: Sequence[int], dest_ids: Sequence[int]) -> None:
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
