"""The worker's KV memory as a file in shared memory that neighbours on the host may read.

    offset 0                    4096                                          4096 + num_blocks * block_bytes
    | header page: magic, token | block 0 | block 1 | ...                    |

The owner holds an exclusive flock on the file for its life. Whoever gets that lock knows that the owner is dead: flocks end
with their process, whatever killed it. The file is removed by its owner or, failing that, by the next worker that starts.
"""

import errno
import fcntl
import mmap
import os
import re
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from baton_engine.pool import BlockLayout, KvPool
from baton_runtime.log import get_logger

_MADV_POPULATE_WRITE = 23  # linux/mman.h; without a name in the module mmap
_MAP_STEP_BYTES = 64 << 20  # the interpreter is held meanwhile

log = get_logger(__name__)

SHM_DIRECTORY = Path("/dev/shm")
HEADER_BYTES = 4096
TOKEN_BYTES = 16
_PREFIX = "baton-kv-"
_NAME = re.compile(r"baton-kv-[0-9a-zA-Z]{1,64}-[0-9a-f]{8}")
_MAGIC = b"BATONKV1"
_HEADER = struct.Struct("<8s16sQQ")  # magic, token, num_blocks, block_bytes
_MAX_NAME_TRIES = 8


class SharedMemoryTooSmall(Exception):
    """The directory cannot hold the pool. Names both sizes."""

    def __init__(self, directory: Path, needed_bytes: int, free_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        super().__init__(
            f"{directory} has {free_bytes} bytes free ({free_bytes / 2**20:.0f} MiB), the KV pool needs {needed_bytes} "
            f"({needed_bytes / 2**20:.0f} MiB); enlarge it (containers: shm_size) or shrink the pool"
        )


class SegmentMismatch(Exception):
    """A file is not the segment its offer describes. The text says in what they differ, without tokens."""


@dataclass(frozen=True, slots=True)
class SegmentOffer:
    """What a reader is told: file, token in its header, and the shape behind it."""

    path: str
    token: bytes
    num_blocks: int
    block_bytes: int
    offset: int = HEADER_BYTES

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.offset + self.num_blocks * self.block_bytes


class PoolMemory:
    """Owner of the memory behind a KvPool. Lives as long as the worker process."""

    def __init__(self, offer: SegmentOffer | None, problem: str, fd: int) -> None:
        self.offer = offer  # None: anonymous memory, nothing to share
        self.problem = problem  # why it is not shared; "" if it is
        self._fd = fd  # holds the lock; -1 without a segment

    @classmethod
    def allocate(
        cls, num_blocks: int, layout: BlockLayout, incarnation: str, *, directory: Path = SHM_DIRECTORY, shared: bool = True
    ) -> tuple[KvPool, "PoolMemory"]:
        """Allocate the pool, zeroed: in shared memory, else in anonymous memory with a warning that names the sizes.

        Segments of dead owners are removed first.

        All pages are taken now, so that a full /dev/shm is an answer at the start and not SIGBUS in the middle of a step.
        """
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks")
        problem = "shared memory not asked for"
        if shared:
            try:
                return cls._allocate_segment(num_blocks, layout, incarnation, directory)
            except (SharedMemoryTooSmall, OSError) as error:
                problem = str(error)
                log.warning("kv_pool_not_shared", why=problem)
        memory = mmap.mmap(-1, num_blocks * layout.block_bytes)
        _map_pages(memory)
        return _pool_over(memory, 0, num_blocks, layout), cls(None, problem, -1)

    @classmethod
    def _allocate_segment(cls, num_blocks: int, layout: BlockLayout, incarnation: str, directory: Path) -> tuple[KvPool, "PoolMemory"]:
        sweep_stale(directory)  # first: what the dead left behind counts against the room there is
        token = secrets.token_bytes(TOKEN_BYTES)
        fd, path = _create_locked(directory, incarnation)
        try:
            offer = SegmentOffer(str(path), token, num_blocks, layout.block_bytes)
            _reserve(fd, directory, offer.file_bytes)
            memory = mmap.mmap(fd, offer.file_bytes)
            _map_pages(memory)
            memory[: _HEADER.size] = _HEADER.pack(_MAGIC, token, num_blocks, layout.block_bytes)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise
        return _pool_over(memory, HEADER_BYTES, num_blocks, layout), cls(offer, "", fd)

    def close(self) -> None:
        """Remove the file and let go of the lock. Own and foreign mappings stay valid until their processes drop them. Idempotent."""
        if self.offer is None or self._fd < 0:
            return
        Path(self.offer.path).unlink(missing_ok=True)
        # Explicitly: the mapping has a descriptor of its own that shares the lock and lives until the pool is garbage.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        self._fd = -1


def sweep_stale(directory: Path = SHM_DIRECTORY) -> list[Path]:
    """Remove segments whose owners are dead; leave live ones and those of other users alone. Returns: the removed ones."""
    removed = []
    for path in sorted(directory.glob(f"{_PREFIX}*")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            # Unlinked under the lock: an owner that has just created the file sees it gone and makes another one.
            if try_lock(fd, fcntl.LOCK_EX):
                path.unlink(missing_ok=True)
                removed.append(path)
        except PermissionError:
            pass  # sticky directory, not our file
        finally:
            os.close(fd)
    if removed:
        log.info("stale_segments_removed", paths=[str(path) for path in removed])
    return removed


def try_lock(fd: int, kind: int) -> bool:
    """Take the flock of that kind if nobody stands against it."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def opened_segment(offer: SegmentOffer, directory: Path) -> Iterator[int]:
    """Open the file of an offer for reading and prove that it is the segment meant. Gives the descriptor.

    Only files of the own directory with a segment's name are looked at: the path comes from another process.

    Raises: SegmentMismatch.
    """
    name = Path(offer.path).name
    if not _NAME.fullmatch(name) or Path(offer.path).parent != directory:
        raise SegmentMismatch(f"{offer.path!r} is not a segment in {directory}")
    try:
        fd = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise SegmentMismatch(f"{offer.path}: {os.strerror(error.errno or 0)}") from error
    try:
        _check_header(fd, offer)
        yield fd
    finally:
        os.close(fd)


def _check_header(fd: int, offer: SegmentOffer) -> None:
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        raise SegmentMismatch(f"{offer.path} has no header")
    magic, token, num_blocks, block_bytes = _HEADER.unpack(header)
    if magic != _MAGIC or not secrets.compare_digest(token, offer.token):
        raise SegmentMismatch(f"{offer.path} holds another token: another host or another life")
    if (num_blocks, block_bytes, HEADER_BYTES) != (offer.num_blocks, offer.block_bytes, offer.offset):
        raise SegmentMismatch(f"{offer.path} holds {num_blocks} x {block_bytes} bytes, offered {offer.num_blocks} x {offer.block_bytes}")
    size = os.fstat(fd).st_size
    if size < offer.file_bytes:
        raise SegmentMismatch(f"{offer.path} is {size} bytes long, offered {offer.file_bytes}")


def _create_locked(directory: Path, incarnation: str) -> tuple[int, Path]:
    """A new file, locked. A sweeper may see it between creation and lock; then it is, or will be, unlinked: make another."""
    for _ in range(_MAX_NAME_TRIES):
        path = directory / f"{_PREFIX}{incarnation}-{secrets.token_hex(4)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        if try_lock(fd, fcntl.LOCK_EX) and os.fstat(fd).st_nlink == 1:
            return fd, path
        path.unlink(missing_ok=True)
        os.close(fd)
    raise OSError(errno.EAGAIN, f"segments in {directory} are removed as fast as they are made")


def _reserve(fd: int, directory: Path, num_bytes: int) -> None:
    stats = os.statvfs(directory)
    free_bytes = stats.f_bavail * stats.f_frsize
    # Asked first: an allocation that fails half-way has meanwhile taken the room of others.
    if num_bytes > free_bytes:
        raise SharedMemoryTooSmall(directory, num_bytes, free_bytes)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SharedMemoryTooSmall(directory, num_bytes, free_bytes) from error


def _map_pages(memory: mmap.mmap) -> None:
    """Fill the page table now: the first write to each page, in the middle of a handoff, would cost a fault (2 MiB: 1 to 1.6 ms instead
    of 0.1, measured 2026-11-21 on a virtual machine)."""
    for start in range(0, len(memory), _MAP_STEP_BYTES):
        try:
            memory.madvise(_MADV_POPULATE_WRITE, start, min(_MAP_STEP_BYTES, len(memory) - start))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return  # a kernel before 5.14: pages are mapped as they are touched


def _pool_over(memory: mmap.mmap, offset: int, num_blocks: int, layout: BlockLayout) -> KvPool:
    data = np.frombuffer(memory, np.uint8, num_blocks * layout.block_bytes, offset)
    return KvPool(data.reshape(num_blocks, layout.block_bytes), layout)
