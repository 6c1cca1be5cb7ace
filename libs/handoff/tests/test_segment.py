"""Segments: private files, proven by a token, locked for their owner's life."""

import dataclasses
import fcntl
import os
import resource
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from baton_engine.pool import BlockLayout
from baton_handoff.transports import segment
from baton_handoff.transports.segment import PoolMemory, SegmentMismatch, opened_segment, sweep_stale

LAYOUT = BlockLayout(num_layers=2, block_tokens=4, num_kv_heads=2, head_dim=8, dtype="float32")


@pytest.fixture
def allocate(tmp_path):
    made = []

    def allocate(num_blocks=4, incarnation="aaaa", **kwargs):
        pool, memory = PoolMemory.allocate(num_blocks, LAYOUT, incarnation, directory=tmp_path, **kwargs)
        made.append(memory)
        return pool, memory

    yield allocate
    for memory in made:
        memory.close()


def test_pool_is_zeroed_and_has_one_row_per_block(allocate):
    pool, _ = allocate(5)
    assert pool.data.shape == (5, LAYOUT.block_bytes)
    assert not pool.data.any()
    assert pool.data.flags.writeable


def test_segment_file_is_private(allocate):
    _, memory = allocate()
    assert stat.S_IMODE(os.stat(memory.offer.path).st_mode) == 0o600


def test_blocks_lie_in_the_file_behind_the_header(allocate):
    pool, memory = allocate()
    pool.data[1] = np.arange(LAYOUT.block_bytes) % 256
    content = Path(memory.offer.path).read_bytes()
    start = memory.offer.offset + LAYOUT.block_bytes
    assert content[start : start + LAYOUT.block_bytes] == pool.data[1].tobytes()


def test_close_removes_the_file_and_keeps_the_memory_usable(allocate):
    pool, memory = allocate()
    memory.close()
    memory.close()
    assert not Path(memory.offer.path).exists()
    pool.data[0] = 7
    assert pool.data[0].sum() == 7 * LAYOUT.block_bytes


def test_sweep_leaves_live_segments_alone(allocate, tmp_path):
    _, memory = allocate()
    assert sweep_stale(tmp_path) == []
    assert Path(memory.offer.path).exists()


def test_sweep_removes_the_segment_of_a_killed_owner(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from baton_engine.pool import BlockLayout;"
        "from baton_handoff.transports.segment import PoolMemory;"
        "kept = PoolMemory.allocate(4, BlockLayout(1, 1, 1, 8, 'float32'), 'dead', directory=Path(sys.argv[1]));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=15).returncode == -9
    (left,) = tmp_path.glob("baton-kv-dead-*")
    assert sweep_stale(tmp_path) == [left]
    assert not left.exists()


def test_allocating_sweeps_first(allocate, tmp_path):
    stale = tmp_path / "baton-kv-dead-00000000"
    stale.write_bytes(b"")
    allocate()
    assert not stale.exists()


def test_sweep_leaves_other_files_alone(tmp_path):
    other = tmp_path / "something-else"
    other.write_bytes(b"x")
    (tmp_path / "baton-kv-link").symlink_to(other)
    assert sweep_stale(tmp_path) == []
    assert other.exists()


def test_owner_whose_new_file_is_swept_before_it_is_locked_makes_another(tmp_path, monkeypatch):
    real = segment.try_lock
    swept = []

    def try_lock(fd, kind):
        if not swept:
            (path,) = tmp_path.glob("baton-kv-aaaa-*")
            swept.append(path)
            path.unlink()  # a sweeper won the race
        return real(fd, kind)

    monkeypatch.setattr(segment, "try_lock", try_lock)
    _, memory = PoolMemory.allocate(4, LAYOUT, "aaaa", directory=tmp_path)
    assert Path(memory.offer.path).exists()
    assert memory.offer.path != str(swept[0])
    memory.close()


def test_pool_larger_than_the_directory_falls_back_and_names_both_sizes(allocate, tmp_path, monkeypatch):
    Stats = namedtuple("Stats", "f_bavail f_frsize")
    monkeypatch.setattr(segment.os, "statvfs", lambda _: Stats(1, 4096))
    pool, memory = allocate(100)
    assert memory.offer is None
    assert "4096 bytes free" in memory.problem
    assert str(4096 + 100 * LAYOUT.block_bytes) in memory.problem
    assert pool.data.shape == (100, LAYOUT.block_bytes)
    assert not pool.data.any()
    assert list(tmp_path.iterdir()) == []


def test_directory_that_fills_up_while_pages_are_taken_falls_back(allocate, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment.os, "posix_fallocate", full)
    _, memory = allocate()
    assert memory.offer is None
    assert list(tmp_path.iterdir()) == []


def test_missing_directory_falls_back(tmp_path):
    _, memory = PoolMemory.allocate(1, LAYOUT, "aaaa", directory=tmp_path / "none")
    assert memory.offer is None
    assert "none" in memory.problem


def test_unshared_pool_has_nothing_to_offer(allocate, tmp_path):
    _, memory = allocate(shared=False)
    assert memory.offer is None
    assert list(tmp_path.iterdir()) == []


def offer_like(offer, **changes):
    return dataclasses.replace(offer, **changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"token": bytes(16)}, "another token"),
        ({"num_blocks": 5}, "4 x"),
        ({"block_bytes": 8}, "offered 4 x 8"),
        ({"path": "/etc/passwd"}, "is not a segment"),
        ({"path": "/dev/shm/../etc/baton-kv-a-00000000"}, "is not a segment"),
    ],
)
def test_segment_that_differs_from_its_offer_is_not_opened(allocate, tmp_path, changes, why):
    _, memory = allocate()
    with pytest.raises(SegmentMismatch, match=why), opened_segment(offer_like(memory.offer, **changes), tmp_path):
        pass


def test_truncated_segment_is_not_opened(allocate, tmp_path):
    """Reading a mapping beyond the end of its file would be SIGBUS."""
    _, memory = allocate()
    os.truncate(memory.offer.path, 4096)
    with pytest.raises(SegmentMismatch, match="4096 bytes long"), opened_segment(memory.offer, tmp_path):
        pass


def test_reader_does_not_hold_the_owners_lock(allocate, tmp_path):
    _, memory = allocate()
    with opened_segment(memory.offer, tmp_path) as fd:
        memory.close()
        assert segment.try_lock(fd, fcntl.LOCK_EX)


@pytest.mark.skipif(tuple(map(int, os.uname().release.split(".")[:2])) < (5, 14), reason="no MADV_POPULATE_WRITE")
@pytest.mark.parametrize("shared", [True, False])
def test_the_first_write_to_a_block_costs_no_fault(allocate, shared):
    num_blocks = (8 << 20) // LAYOUT.block_bytes
    pool, _ = allocate(num_blocks, shared=shared)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    pool.data[:] = 1
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 100  # of 2048 pages


def test_a_kernel_that_cannot_map_pages_ahead_maps_them_as_they_are_touched(allocate, monkeypatch):
    monkeypatch.setattr(segment, "_MADV_POPULATE_WRITE", 9999)
    pool, _ = allocate(5)
    assert not pool.data.any()
