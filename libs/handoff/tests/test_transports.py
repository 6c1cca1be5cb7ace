"""What holds for every transport, with real threads; and the choice between them."""

import asyncio
import contextlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
from baton_contracts.discovery.v1.instance_pb2 import Instance, TransportOffer
from baton_engine.pool import BlockLayout
from baton_handoff.transports import PoolMemory, choose, make_transports, tcp_memory, tcp_source
from baton_handoff.transports.base import MAX_OPERATION_BYTES, PullFailed, TransportUnavailable
from baton_handoff.transports.nixl import NixlTransport
from baton_handoff.transports.nixl_library import NixlMissing, load_nixl
from baton_handoff.transports.operation import merge_runs
from baton_handoff.transports.reslice import Reslice
from baton_handoff.transports.shm import ShmTransport
from baton_handoff.transports.tcp import TcpTransport
from baton_handoff.transports.tcp_memory import BlockBytes, Landing
from baton_handoff.transports.tcp_wire import MAX_CALL_BYTES, MAX_CALL_VIEWS

SOURCE, SINK, SECRET = "5" * 16, "d" * 16, bytes(range(16))
LAYOUT = BlockLayout(num_layers=2, block_tokens=4, num_kv_heads=2, head_dim=32, dtype="float32")  # 4 KiB


class Worker:
    """A pool with one transport over it."""

    def __init__(self, kind: str, directory: Path, incarnation: str, num_blocks: int, layout: BlockLayout = LAYOUT) -> None:
        self.incarnation = incarnation
        self.pool, self.memory = PoolMemory.allocate(num_blocks, layout, incarnation, directory=directory)
        rng = np.random.default_rng(num_blocks)
        self.pool.data[:] = rng.integers(0, 256, self.pool.data.shape, dtype=np.uint8)
        listen = "127.0.0.1:0"
        self.transport = (
            ShmTransport(self.memory, self.pool, directory)
            if kind == "shm"
            else {"tcp": TcpTransport, "nixl": NixlTransport}[kind](self.pool, incarnation, listen, "")
        )

    def instance(self) -> Instance:
        offer = TransportOffer(name=self.transport.name, parameters=self.transport.offer())
        return Instance(instance_id="worker", incarnation=self.incarnation, transports=[offer])

    async def open_peer(self, source: "Worker", secret: bytes = SECRET, reslice: Reslice | None = None):
        peer = source.instance()
        return await self.transport.open_peer(peer, peer.transports[0].parameters, secret, self.incarnation, reslice)


@pytest.fixture(params=["shm", "tcp", "nixl"])
def kind(request):
    if request.param == "nixl":
        try:
            load_nixl()
        except NixlMissing as missing:
            pytest.skip(str(missing))
    return request.param


@pytest.fixture
async def workers(kind, tmp_path):
    """A source of 300 blocks and a sink of 200."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for incarnation, num_blocks in ((SOURCE, 300), (SINK, 200)):
            worker = Worker(kind, tmp_path, incarnation, num_blocks)
            stack.callback(worker.memory.close)
            await worker.transport.open()
            stack.push_async_callback(worker.transport.close)
            made.append(worker)
        made[0].transport.allow(SINK, SECRET)
        yield made


IDS = {
    "scattered": (random.Random(1).sample(range(300), 150), random.Random(2).sample(range(200), 150)),
    "contiguous": (list(range(100, 250)), list(range(50, 200))),
    "one": ([299], [199]),
    "same source twice": ([7, 7, 8], [0, 1, 2]),
    "descending": (list(range(20, 0, -1)), list(range(20, 40))),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
async def test_pulled_blocks_equal_the_sources_and_others_are_untouched(workers, ids):
    source, sink = workers
    before = sink.pool.data.copy()
    peer = await sink.open_peer(source)
    stats = await peer.pull(*ids)
    before[ids[1]] = source.pool.data[ids[0]]
    assert np.array_equal(sink.pool.data, before)
    assert stats.num_bytes == len(ids[0]) * LAYOUT.block_bytes
    assert stats.num_operations >= 1
    assert stats.duration_s > 0


async def test_concurrent_pulls_of_one_peer_all_arrive(workers):
    source, sink = workers
    peer = await sink.open_peer(source)
    await asyncio.gather(*(peer.pull([290 - i, i], [2 * i, 2 * i + 1]) for i in range(20)))
    assert np.array_equal(sink.pool.data[[0, 1, 38, 39]], source.pool.data[[290, 0, 271, 19]])


async def test_source_block_outside_of_the_peers_pool_fails_the_pull(workers):
    source, sink = workers
    peer = await sink.open_peer(source)
    with pytest.raises(PullFailed, match="300"):
        await peer.pull([300], [0])
    await peer.pull([299], [0])


@pytest.mark.parametrize(("source_ids", "dest_ids"), [([0], [200]), ([0], [-1]), ([0, 1], [0]), ([], [])])
async def test_own_block_ids_that_make_no_sense_are_a_bug_not_a_failure(workers, source_ids, dest_ids):
    source, sink = workers
    peer = await sink.open_peer(source)
    with pytest.raises(ValueError, match="block"):
        await peer.pull(source_ids, dest_ids)


async def test_operation_over_the_limit_is_refused(workers):
    source, sink = workers
    peer = await sink.open_peer(source)
    too_many = MAX_OPERATION_BYTES // LAYOUT.block_bytes + 1
    with pytest.raises(ValueError, match="more than one operation"):
        await peer.pull([0] * too_many, [0] * too_many)


async def test_other_block_size_is_unavailable_and_names_both(kind, workers, tmp_path):
    sink = workers[1]
    other = Worker(kind, tmp_path, "e" * 16, 4, BlockLayout(1, 4, 2, 32, "float32"))
    await other.transport.open()
    try:
        with pytest.raises(TransportUnavailable, match=r"2048 bytes, expected 4096"):
            await sink.open_peer(other)
    finally:
        await other.transport.close()
        other.memory.close()


def layout(block_tokens, num_shards):
    """2 KiB per token: blocks of 8 KiB to 2 MiB."""
    return BlockLayout(num_layers=2, block_tokens=block_tokens, num_kv_heads=4, head_dim=64, dtype="float16", num_shards=num_shards)


@contextlib.asynccontextmanager
async def resliced(kind, directory, source_layout, dest_layout, num_tokens):
    """A source and a sink of so many tokens each, and the peer opened by the sink."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for incarnation, its in ((SOURCE, source_layout), (SINK, dest_layout)):
            worker = Worker(kind, directory, incarnation, num_tokens // its.block_tokens, its)
            stack.callback(worker.memory.close)
            await worker.transport.open()
            stack.push_async_callback(worker.transport.close)
            made.append(worker)
        source, sink = made
        source.transport.allow(SINK, SECRET)
        reslice = Reslice(source_layout, dest_layout)
        yield source, sink, reslice, await sink.open_peer(source, reslice=reslice)


RESLICES = [
    (layout(16, 1), layout(16, 2)),
    (layout(16, 2), layout(16, 1)),
    (layout(16, 2), layout(16, 4)),
    (layout(16, 1), layout(64, 1)),
    (layout(64, 1), layout(16, 1)),
    (layout(64, 4), layout(16, 2)),
    (layout(1024, 1), layout(4, 2)),  # source blocks larger than one system call
    (layout(4, 2), layout(1024, 1)),
]


@pytest.mark.parametrize(("source_layout", "dest_layout"), RESLICES)
async def test_units_arrive_where_the_other_layout_has_them_and_others_are_untouched(kind, tmp_path, source_layout, dest_layout):
    async with resliced(kind, tmp_path, source_layout, dest_layout, 2048) as (source, sink, reslice, peer):
        num_units = 2048 // reslice.unit_tokens
        source_units, dest_units = (random.Random(seed).sample(range(num_units), num_units // 2) for seed in (1, 2))
        expected = sink.pool.data.copy()
        reslice.copy(expected, dest_units, source.pool.data, source_units)
        stats = await peer.pull(source_units, dest_units)
        assert np.array_equal(sink.pool.data, expected)
        assert stats.num_bytes == num_units // 2 * reslice.unit_bytes


@pytest.mark.parametrize("ids", [([5], [70]), ([5, 5, 6], [1, 2, 3]), (list(range(7, 90)), list(range(100, 183)))])
async def test_single_units_of_large_blocks_can_be_pulled(kind, tmp_path, ids):
    async with resliced(kind, tmp_path, layout(64, 1), layout(16, 2), 4096) as (source, sink, reslice, peer):
        expected = sink.pool.data.copy()
        reslice.copy(expected, ids[1], source.pool.data, ids[0])
        await peer.pull(*ids)
        assert np.array_equal(sink.pool.data, expected)


async def test_one_unit_of_each_of_many_large_blocks_is_asked_for_in_several_requests(tmp_path, monkeypatch):
    """The bytes on the wire are many times those wanted; each request keeps to the source's limit."""
    source_layout, dest_layout = layout(256, 1), layout(16, 1)  # 512 KiB to 32 KiB
    for module in (tcp_memory, tcp_source):
        monkeypatch.setattr(module, "MAX_OPERATION_BYTES", 2 * source_layout.block_bytes)
    async with resliced("tcp", tmp_path, source_layout, dest_layout, 7 * 256) as (source, sink, reslice, peer):
        ids = [1 + 16 * block for block in range(7)], list(range(7))
        expected = sink.pool.data.copy()
        reslice.copy(expected, ids[1], source.pool.data, ids[0])
        stats, _ = await asyncio.gather(peer.pull(*ids), peer.pull([0], [100]))
        reslice.copy(expected, [100], source.pool.data, [0])
        assert np.array_equal(sink.pool.data, expected)
        assert stats.num_bytes == 7 * dest_layout.block_bytes
        assert len(Landing(sink.pool, BlockBytes(sink.pool.data), reslice).parts(np.array(ids[0]), np.array(ids[1]))) == 4


async def test_reslice_that_changes_nothing_copies_whole_blocks(workers):
    source, sink = workers
    peer = await sink.open_peer(source, reslice=Reslice(LAYOUT, LAYOUT))
    assert (await peer.pull(list(range(50)), list(range(50)))).num_operations == 1
    assert np.array_equal(sink.pool.data[:50], source.pool.data[:50])


async def test_units_outside_of_either_pool_are_refused(kind, tmp_path):
    async with resliced(kind, tmp_path, layout(64, 1), layout(16, 1), 1024) as (_, _, _, peer):
        await peer.pull([63], [63])
        with pytest.raises(PullFailed, match="64"):
            await peer.pull([64], [0])
        with pytest.raises(ValueError, match="64"):
            await peer.pull([0], [64])


async def test_source_with_other_blocks_than_the_reslice_says_is_unavailable(workers):
    source, sink = workers
    other = BlockLayout(LAYOUT.num_layers, 2 * LAYOUT.block_tokens, LAYOUT.num_kv_heads, LAYOUT.head_dim, LAYOUT.dtype)
    with pytest.raises(TransportUnavailable, match="4096 bytes, expected 8192"):
        await sink.open_peer(source, reslice=Reslice(other, LAYOUT))


async def test_parameters_that_do_not_parse_are_unavailable(workers):
    _, sink = workers
    for parameters in (
        b"",
        b"{}",
        b"\xff",
        b'{"address": 1}',
        b'{"path": "x", "token": "zz", "num_blocks": 1, "block_bytes": 1, "offset": 1}',
    ):
        with pytest.raises(TransportUnavailable, match="do not parse"):
            await sink.transport.open_peer(Instance(), parameters, SECRET, SINK)


async def test_drop_without_operations_is_harmless_and_the_next_pull_works(workers):
    source, sink = workers
    peer = await sink.open_peer(source)
    peer.drop()
    peer.drop()
    await peer.pull([5], [6])
    assert np.array_equal(sink.pool.data[6], source.pool.data[5])


async def test_pull_after_close_fails(workers):
    source, sink = workers
    peer = await sink.open_peer(source)
    await sink.transport.close()
    await sink.transport.close()
    with pytest.raises(PullFailed, match="closed"):
        await peer.pull([0], [0])


async def test_queued_pull_that_is_cancelled_never_writes(workers):
    source, sink = workers
    peer = await sink.open_peer(source)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(peer.pull(list(range(100)), list(range(100))))
        queued = group.create_task(peer.pull(list(range(40)), list(range(100, 140))))
        await asyncio.sleep(0)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
    assert (await running).num_bytes == 100 * LAYOUT.block_bytes
    # It may have begun meanwhile: then it ended first. What counts is that nothing is written from now on.
    sink.pool.data[100:140] = 0xEE
    await peer.pull([0], [0])
    assert (sink.pool.data[100:140] == 0xEE).all()


def test_runs_merge_only_where_both_sides_are_neighbours():
    assert merge_runs(np.array([4, 5, 6, 9, 10]), np.array([0, 1, 2, 3, 7]), 8) == [(4, 0, 3), (9, 3, 1), (10, 7, 1)]
    assert merge_runs(np.array([4, 5, 6]), np.array([0, 1, 2]), 2) == [(4, 0, 2), (6, 2, 1)]
    assert merge_runs(np.array([3]), np.array([9]), 2) == [(3, 9, 1)]


@pytest.mark.parametrize("block_bytes", [12, 4096, 65536, MAX_CALL_BYTES, MAX_CALL_BYTES + 8, 3 * MAX_CALL_BYTES + 5])
@pytest.mark.parametrize("ids", [[0], [3, 4, 5, 0], [5, 3, 1], [2, 2, 3], list(range(6))])
def test_batches_give_the_blocks_in_order_in_calls_of_bounded_size(block_bytes, ids):
    data = np.random.default_rng(1).integers(0, 256, (6, block_bytes), np.uint8)
    batches = list(BlockBytes(data).batches(np.array(ids)))
    assert b"".join(bytes(view) for views, _ in batches for view in views) == data[ids].tobytes()
    assert all(0 < sum(view.nbytes for view in views) == num_bytes <= MAX_CALL_BYTES for views, num_bytes in batches)
    assert len(batches) == -(-len(ids) * block_bytes // MAX_CALL_BYTES)


def test_batches_never_hold_more_views_than_a_call_takes():
    data = np.zeros((2000, 8), np.uint8)
    ids = np.arange(0, 2000, 2)
    assert [len(views) for views, _ in BlockBytes(data).batches(ids)] == [MAX_CALL_VIEWS] * 3 + [1000 - 3 * MAX_CALL_VIEWS]


def test_neighbouring_blocks_are_one_view():
    data = np.zeros((100, 4096), np.uint8)
    assert [[view.nbytes for view in views] for views, _ in BlockBytes(data).batches(np.arange(10, 60))] == [[50 * 4096]]


def test_memory_with_gaps_is_refused():
    with pytest.raises(ValueError, match="not contiguous"):
        BlockBytes(np.zeros((4, 16), np.uint8)[:, ::2])


async def test_shm_is_chosen_first_if_the_token_is_there(tmp_path):
    async with two_workers(tmp_path) as (own, peer):
        assert [candidate.reason for candidate in choose(own, peer)] == ["shm: same segment token", "tcp: fall-back of shm"]


async def test_tcp_is_chosen_with_the_reason_if_memory_is_not_shared(tmp_path):
    async with two_workers(tmp_path) as (own, peer):
        os.truncate(next(tmp_path.glob(f"baton-kv-{SOURCE}-*")), 0)
        (candidate,) = choose(own, peer)
        assert candidate.transport.name == "tcp"
        assert "has no header" in candidate.reason


async def test_peer_that_offers_nothing_known_has_no_candidate(tmp_path):
    async with two_workers(tmp_path) as (own, _):
        assert choose(own, Instance(transports=[TransportOffer(name="nixl", parameters=b"")])) == []


@contextlib.asynccontextmanager
async def two_workers(directory):
    source, sink = Worker("shm", directory, SOURCE, 2), Worker("shm", directory, SINK, 2)
    tcp = [TcpTransport(worker.pool, worker.incarnation, "127.0.0.1:0", "") for worker in (source, sink)]
    opened = [source.transport, sink.transport, *tcp]
    try:
        for transport in opened:
            await transport.open()
        offers = [TransportOffer(name=transport.name, parameters=transport.offer()) for transport in (source.transport, tcp[0])]
        yield [sink.transport, tcp[1]], Instance(incarnation=SOURCE, transports=offers)
    finally:
        for transport in opened:
            await transport.close()
        for worker in (source, sink):
            worker.memory.close()


def test_shm_is_left_out_without_shared_memory():
    pool, memory = PoolMemory.allocate(1, LAYOUT, SINK, shared=False)
    made = make_transports(("shm", "tcp"), memory, pool, SINK, "127.0.0.1:0", "")
    assert [transport.name for transport in made] == ["tcp"]


def test_no_usable_transport_is_refused_with_the_reason():
    pool, memory = PoolMemory.allocate(1, LAYOUT, SINK, shared=False)
    with pytest.raises(ValueError, match="shared memory not asked for"):
        make_transports(("shm",), memory, pool, SINK, "127.0.0.1:0", "")
    with pytest.raises(ValueError, match="unknown transport 'rdma'"):
        make_transports(("rdma",), memory, pool, SINK, "127.0.0.1:0", "")
