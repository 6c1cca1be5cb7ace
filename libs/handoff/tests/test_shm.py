"""Shared memory: proof by token, copies that end at a border, mappings that outlive their owner."""

import asyncio
import threading

import numpy as np
import pytest
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import BlockLayout
from baton_handoff.transports import PoolMemory, shm
from baton_handoff.transports.base import PullFailed, TransportUnavailable
from baton_handoff.transports.reslice import Reslice
from baton_handoff.transports.shm import ShmTransport

LAYOUT = BlockLayout(num_layers=2, block_tokens=4, num_kv_heads=2, head_dim=32, dtype="float32")


@pytest.fixture
async def pair(tmp_path):
    """Source memory and pool; an open sink transport."""
    source_pool, source_memory = PoolMemory.allocate(64, LAYOUT, "5" * 16, directory=tmp_path)
    source_pool.data[:] = np.arange(1, 65, dtype=np.uint8)[:, None]
    sink_pool, sink_memory = PoolMemory.allocate(64, LAYOUT, "d" * 16, directory=tmp_path)
    source = ShmTransport(source_memory, source_pool, tmp_path)
    sink = ShmTransport(sink_memory, sink_pool, tmp_path)
    await sink.open()
    yield source, sink, source_memory
    await sink.close()
    source_memory.close()
    sink_memory.close()


async def open_peer(sink, source, parameters=None):
    return await sink.open_peer(Instance(), parameters or source.offer(), b"", "d" * 16)


class Gate:
    """Makes the owner thread wait before copy number `at`."""

    def __init__(self, monkeypatch, at):
        self.reached, self.opened = threading.Event(), threading.Event()
        gate, merge = self, shm.merge_runs

        class Runs(list):
            def __iter__(self):
                for number, run in enumerate(list.__iter__(self)):
                    if number == at:
                        gate.reached.set()
                        assert gate.opened.wait(10)
                    yield run

        monkeypatch.setattr(shm, "merge_runs", lambda *args: Runs(merge(*args)))


async def test_wrong_token_is_unavailable(pair):
    source, sink, memory = pair
    parameters = source.offer().replace(memory.offer.token.hex().encode(), b"00" * 16)
    with pytest.raises(TransportUnavailable, match="another token"):
        await open_peer(sink, source, parameters)


async def test_removed_segment_is_unavailable(pair):
    source, sink, memory = pair
    memory.close()
    with pytest.raises(TransportUnavailable, match="No such file"):
        await open_peer(sink, source)


async def test_pool_in_anonymous_memory_cannot_be_opened():
    pool, memory = PoolMemory.allocate(1, LAYOUT, "a", shared=False)
    with pytest.raises(TransportUnavailable, match="not in shared memory"):
        await ShmTransport(memory, pool).open()


async def test_opened_peer_can_be_read_after_its_owner_is_gone(pair):
    """Walk "Prefill dies": the copy reads a mapping that outlives the owner."""
    source, sink, memory = pair
    peer = await open_peer(sink, source)
    memory.close()
    await peer.pull([3, 60], [0, 1])
    assert (sink.pool.data[:2, 0] == [4, 61]).all()


async def test_memory_of_a_dead_owner_is_given_back_after_drop(pair):
    source, sink, memory = pair
    peer = await open_peer(sink, source)
    peer.drop()  # alive: kept
    await peer.pull([0], [0])
    memory.close()
    peer.drop()
    with pytest.raises(PullFailed, match="No such file"):
        await peer.pull([0], [0])


async def test_memory_of_dead_owners_is_given_back_when_another_peer_is_opened(pair, tmp_path):
    """A neighbour that was dropped while it was only stopped, and died later, is dropped by nobody any more."""
    source, sink, memory = pair
    await (await open_peer(sink, source)).pull([0], [0])
    memory.close()
    pool, other = PoolMemory.allocate(4, LAYOUT, "6" * 16, directory=tmp_path)
    peer = await open_peer(sink, ShmTransport(other, pool, tmp_path))
    await peer.pull([0], [0])
    assert list(sink._mappings) == [other.offer.token]
    other.close()


async def test_drop_ends_a_running_copy_at_the_next_border_and_queued_ones_at_once(pair, monkeypatch):
    source, sink, _ = pair
    peer = await open_peer(sink, source)
    gate = Gate(monkeypatch, at=2)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(failure(peer.pull([9, 7, 5, 3], [0, 1, 2, 3])))
        queued = group.create_task(failure(peer.pull([9], [10])))
        assert await asyncio.to_thread(gate.reached.wait, 10)
        peer.drop()
        assert "before it began" in str(await queued)
        gate.opened.set()
    assert "peer dropped after" in str(running.result())
    # the copy at whose border the drop was noticed is whole; the rest is untouched
    assert not sink.pool.data[3].any()
    assert not sink.pool.data[10].any()


async def test_drop_ends_a_resliced_copy_at_the_next_border(pair, monkeypatch):
    source, sink, _ = pair
    wide = BlockLayout(LAYOUT.num_layers, LAYOUT.block_tokens, LAYOUT.num_kv_heads, LAYOUT.head_dim, LAYOUT.dtype, num_shards=2)
    reached, opened = threading.Event(), threading.Event()
    copy = Reslice.copy

    def gated(*args):
        copy(*args)
        reached.set()
        assert opened.wait(10)

    monkeypatch.setattr(Reslice, "copy", gated)
    monkeypatch.setattr(shm, "MAX_COPY_BYTES", 2 * LAYOUT.block_bytes)
    peer = await sink.open_peer(Instance(), source.offer(), b"", "d" * 16, Reslice(LAYOUT, wide))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(failure(peer.pull([9, 7, 5, 3], [0, 1, 2, 3])))
        assert await asyncio.to_thread(reached.wait, 10)
        peer.drop()
        opened.set()
    assert "after 1 of 2 copies" in str(running.result())
    assert sink.pool.data[:2].all()
    assert not sink.pool.data[2:4].any()


async def test_cancelled_pull_returns_only_when_nothing_writes_any_more(pair, monkeypatch):
    source, sink, _ = pair
    peer = await open_peer(sink, source)
    gate = Gate(monkeypatch, at=1)
    async with asyncio.TaskGroup() as group:
        pull = group.create_task(peer.pull([9, 7, 5], [0, 1, 2]))
        assert await asyncio.to_thread(gate.reached.wait, 10)
        pull.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not pull.done()  # the thread may still write
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await pull
    sink.pool.data[:] = 0xEE
    await peer.pull([0], [63])
    assert (sink.pool.data[:63] == 0xEE).all()


async def test_loop_is_free_while_the_thread_copies(pair, monkeypatch):
    source, sink, _ = pair
    peer = await open_peer(sink, source)
    gate = Gate(monkeypatch, at=0)
    async with asyncio.TaskGroup() as group:
        group.create_task(peer.pull([1], [1]))
        assert await asyncio.to_thread(gate.reached.wait, 10)
        await asyncio.sleep(0)
        gate.opened.set()
    assert (sink.pool.data[1] == 2).all()


async def test_thread_survives_a_broken_operation(pair, monkeypatch):
    source, sink, _ = pair
    peer = await open_peer(sink, source)
    with monkeypatch.context() as patch:
        patch.setattr(shm, "merge_runs", lambda *_: 1 / 0)
        with pytest.raises(PullFailed, match="internal error: ZeroDivisionError"):
            await peer.pull([0], [0])
    await peer.pull([0], [0])


async def test_close_ends_what_runs(pair, monkeypatch):
    source, sink, _ = pair
    peer = await open_peer(sink, source)
    gate = Gate(monkeypatch, at=1)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(failure(peer.pull([1, 3], [1, 2])))
        assert await asyncio.to_thread(gate.reached.wait, 10)
        closing = group.create_task(sink.close())
        await asyncio.sleep(0)
        gate.opened.set()
        await closing
    assert isinstance(running.result(), PullFailed) or running.result() is None


async def failure(pull):
    try:
        await pull
    except PullFailed as error:
        return error
    return None
