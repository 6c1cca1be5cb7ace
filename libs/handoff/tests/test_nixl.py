"""nixl: the pair's secret, peers that die, stop or go, and operations that are over when they say so.

Emulated reads (UCX's tcp) are the only ones here that can hang in the middle: reads by the kernel do not need the source to run.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import BlockLayout, KvPool, MemoryPlace
from baton_handoff.transports import PoolMemory
from baton_handoff.transports.base import PullFailed, TransportUnavailable
from baton_handoff.transports.nixl import NixlTransport
from baton_handoff.transports.nixl_agent import NixlAgent
from baton_handoff.transports.nixl_config import NixlConfig
from baton_handoff.transports.nixl_library import NixlMissing, load_nixl
from baton_handoff.transports.reslice import Reslice

try:
    load_nixl()
except NixlMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)

SOURCE, SINK, SECRET = "5" * 16, "d" * 16, bytes(range(16))
LAYOUT = BlockLayout(num_layers=2, block_tokens=16, num_kv_heads=4, head_dim=128, dtype="float32")  # 128 KiB
NUM_BLOCKS = 128
CHILD = Path(__file__).with_name("child_nixl.py")
EMULATED = NixlConfig(emulation=True, ucx=(("TLS", "tcp"),))


class Sink:
    """An own pool and a transport."""

    def __init__(self, config=None, layout=LAYOUT, num_blocks=NUM_BLOCKS):
        self.pool, _ = PoolMemory.allocate(num_blocks, layout, SINK, shared=False)
        self.transport = NixlTransport(self.pool, SINK, "127.0.0.1:0", "", config)

    async def open_peer(self, parameters, secret=SECRET, incarnation=SOURCE, own=SINK, reslice=None):
        return await self.transport.open_peer(Instance(incarnation=incarnation), parameters, secret, own, reslice)


@contextlib.asynccontextmanager
async def opened_sink(*args):
    made = Sink(*args)
    await made.transport.open()
    yield made
    await made.transport.close()


@pytest.fixture
async def sink():
    async with opened_sink() as made:
        yield made


@pytest.fixture
async def emulated_sink():
    async with opened_sink(EMULATED) as made:
        yield made


@contextlib.asynccontextmanager
async def opened_source(layout=LAYOUT, num_blocks=NUM_BLOCKS, incarnation=SOURCE, config=None):
    """A source in this process whose blocks hold their number plus one."""
    pool, _ = PoolMemory.allocate(num_blocks, layout, incarnation, shared=False)
    pool.data[:] = np.arange(1, num_blocks + 1, dtype=np.uint8)[:, None]
    transport = NixlTransport(pool, incarnation, "127.0.0.1:0", "", config)
    await transport.open()
    transport.allow(SINK, SECRET)
    yield transport
    await transport.close()


@pytest.fixture
async def source():
    async with opened_source() as made:
        yield made


class Child:
    """A transport in a process of its own."""

    def __init__(self, process, first):
        self.process = process
        self.first = first

    async def ask(self, line):
        self.process.stdin.write(f"{line}\n".encode())
        return (await self.process.stdout.readline()).strip().decode()


@contextlib.asynccontextmanager
async def child(role, ucx="", incarnation=SOURCE, peer=SINK, offer=b""):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, CHILD, role, incarnation, peer, SECRET.hex(), str(NUM_BLOCKS), str(LAYOUT.block_bytes), ucx),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # UCX prints a back trace when it aborts
    )
    try:
        if offer:
            process.stdin.write(offer + b"\n")
        yield Child(process, (await process.stdout.readline()).strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def failure(pull):
    began_s = time.monotonic()
    with pytest.raises(PullFailed) as caught:
        await pull
    return str(caught.value), time.monotonic() - began_s


async def until(condition, limit_s=10.0):
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


async def stopped(pid):
    """Wait until the process is in state T."""
    await until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")


def all_blocks():
    return list(range(NUM_BLOCKS))


# Whose pool may be read.


async def test_blocks_of_another_process_arrive(sink):
    async with child("source") as source:
        peer = await sink.open_peer(source.first)
        stats = await peer.pull([3, 4, 9], [0, 1, 7])
        assert (sink.pool.data[[0, 1, 7], 0] == [4, 5, 10]).all()
        assert (stats.num_bytes, stats.num_operations) == (3 * LAYOUT.block_bytes, 2)


async def test_offer_lets_nobody_read(source):
    """Metadata of nixl is as good as the memory: it is told only to who proves the secret."""
    assert set(json.loads(source.offer())) == {"address", "num_blocks", "block_bytes", "version"}


async def test_wrong_secret_is_refused(source, sink):
    with pytest.raises(TransportUnavailable, match="REFUSED"):
        await sink.open_peer(source.offer(), secret=bytes(16))


async def test_unknown_peer_is_refused(source, sink):
    with pytest.raises(TransportUnavailable, match="REFUSED"):
        await sink.open_peer(source.offer(), own="e" * 16)


async def test_another_life_of_the_source_is_refused(source, sink):
    with pytest.raises(TransportUnavailable, match="WRONG_LIFE"):
        await sink.open_peer(source.offer(), incarnation="6" * 16)


async def test_source_that_does_not_know_the_secret_is_not_believed(source, sink, monkeypatch):
    listener = source._source.listener
    monkeypatch.setattr(listener, "admit", lambda *args: b"another secret")
    with pytest.raises(TransportUnavailable, match="does not know the pair's secret"):
        await sink.open_peer(source.offer())


async def test_memory_that_is_not_the_peers_is_not_believed(source, sink, monkeypatch):
    monkeypatch.setattr(NixlAgent, "is_token_right", lambda self: False)
    with pytest.raises(TransportUnavailable, match="another process's memory"):
        await sink.open_peer(source.offer())


async def test_forbidden_peer_loses_the_agent_it_reads_from_and_stays_out(source, sink, monkeypatch):
    ended = []
    real = NixlAgent.destroy
    monkeypatch.setattr(NixlAgent, "destroy", lambda self: (real(self), ended.append(self.name)))
    peer = await sink.open_peer(source.offer())
    source.forbid(SINK)
    await until(lambda: any(name.startswith(SOURCE) for name in ended))
    assert "closed the connection" in (await failure(peer.pull([1], [1])))[0]
    with pytest.raises(PullFailed, match="REFUSED"):
        await peer.pull([1], [1])


async def test_peer_allowed_again_can_read_again(source, sink):
    peer = await sink.open_peer(source.offer())
    source.forbid(SINK)
    await failure(peer.pull([1], [1]))
    source.allow(SINK, SECRET)
    await peer.pull([1], [1])
    assert (sink.pool.data[1] == 2).all()


async def test_garbage_on_the_control_port_harms_nobody(source, sink):
    host, port = json.loads(source.offer())["address"].split(":")
    with socket.create_connection((host, int(port)), timeout=5) as stranger, contextlib.suppress(ConnectionResetError):
        stranger.sendall(os.urandom(4000))
        while stranger.recv(4096):
            pass
    await (await sink.open_peer(source.offer())).pull([1], [1])


async def test_port_nobody_listens_on_is_unavailable(source, sink):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    offer = json.loads(source.offer()) | {"address": f"127.0.0.1:{port}"}
    with pytest.raises(TransportUnavailable, match=f"cannot connect.*{port}"):
        await sink.open_peer(json.dumps(offer).encode())


async def test_port_of_something_else_is_unavailable(source, sink):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionResetError):
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        offer = json.loads(source.offer()) | {"address": f"127.0.0.1:{server.getsockname()[1]}"}
        with pytest.raises(TransportUnavailable, match="not a nixl control port"):
            await sink.open_peer(json.dumps(offer).encode())
        await asyncio.to_thread(thread.join, 10)


async def test_peer_with_another_nixl_is_told_apart_before_anything_is_tried(source, sink):
    offer = json.dumps(json.loads(source.offer()) | {"version": "0.9.0"}).encode()
    assert "the peer has nixl 0.9.0" in sink.transport.why_not(Instance(), offer)


# Paths.


async def test_rdma_asked_for_and_not_there_is_unavailable(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "rc")
    pool, _ = PoolMemory.allocate(2, LAYOUT, SINK, shared=False)
    transport = NixlTransport(pool, SINK, "127.0.0.1:0", "")
    with pytest.raises(TransportUnavailable, match=r"UCX failed.*UCX_TLS=rc; no RDMA device"):
        await transport.open()
    await transport.close()


async def test_pool_on_a_device_is_registered_as_device_memory():
    """Here UCX finds out that it is none; elsewhere that is all GPUDirect and CUDA IPC need."""

    class DevicePool(KvPool):
        place = property(lambda self: MemoryPlace(self.data.ctypes.data, self.data.nbytes, device=0))

    pool, _ = PoolMemory.allocate(2, LAYOUT, SINK, shared=False)
    transport = NixlTransport(DevicePool(pool.data, LAYOUT), SINK, "127.0.0.1:0", "")
    with pytest.raises(TransportUnavailable, match=f"registering {pool.data.nbytes} bytes of VRAM"):
        await transport.open()
    await transport.close()


async def test_path_on_which_the_peers_software_would_send_is_refused_unless_asked_for():
    """A reader that is killed in such a read takes the source with it."""
    only_tcp = NixlConfig(ucx=(("TLS", "tcp"),))
    async with opened_sink(only_tcp) as sink, child("source", "tcp") as source:
        with pytest.raises(TransportUnavailable, match="no path leads to it on which memory is read without"):
            await sink.open_peer(source.first)
        assert await source.ask("ping") == "pong"


async def test_emulated_reads_arrive(emulated_sink):
    async with child("source", "tcp") as source:
        peer = await emulated_sink.open_peer(source.first)
        await peer.pull(all_blocks(), all_blocks()[::-1])
        assert (emulated_sink.pool.data[::-1] == (1 + np.arange(NUM_BLOCKS))[:, None]).all()


# Peers that die, stop, go and come back.


async def test_peer_killed_while_it_is_read_fails_fast(sink):
    async with child("source") as source:
        peer = await sink.open_peer(source.first)

        async def pull_until_it_fails():
            while True:
                await peer.pull(all_blocks(), all_blocks())

        async with asyncio.TaskGroup() as group:
            running = group.create_task(failure(pull_until_it_fails()))
            await asyncio.sleep(0.05)
            source.process.kill()
            killed_s = time.monotonic()
        assert time.monotonic() - killed_s < 1.0
        assert "nixl: " in running.result()[0]
        await source.process.wait()
        with pytest.raises(PullFailed, match="cannot connect"):
            await peer.pull([0], [0])


async def test_peer_killed_while_it_is_idle_fails_the_next_pull_at_once(sink):
    async with child("source") as source:
        peer = await sink.open_peer(source.first)
        source.process.kill()
        await source.process.wait()
        assert (await failure(peer.pull([0], [0])))[1] < 0.5


async def test_restarted_peer_is_a_new_one(sink):
    async with child("source") as source:
        first = await sink.open_peer(source.first)
        await first.pull([0], [0])
        source.process.kill()
        await source.process.wait()
    first.drop()
    async with child("source", incarnation="6" * 16) as source:
        second = await sink.open_peer(source.first, incarnation="6" * 16)
        await second.pull([9], [1])
        assert (sink.pool.data[1] == 10).all()


async def test_stopped_peer_can_be_read_because_its_kernel_does_it(sink):
    async with child("source") as source:
        peer = await sink.open_peer(source.first)
        source.process.send_signal(signal.SIGSTOP)
        await stopped(source.process.pid)
        await peer.pull(all_blocks(), all_blocks())
        assert (sink.pool.data[:, 0] == 1 + np.arange(NUM_BLOCKS)).all()
        peer.drop()
        sink.pool.data[:] = 0xEE
        source.process.send_signal(signal.SIGCONT)
        assert await source.ask("ping") == "pong"
        assert (sink.pool.data == 0xEE).all()


async def stuck(sink, source, peer):
    """A pull that runs and cannot go on. Gives its task's coroutine."""
    source.process.send_signal(signal.SIGSTOP)
    await stopped(source.process.pid)
    return peer.pull(all_blocks(), all_blocks())


async def nothing_comes(sink, source):
    """Whatever the woken source still sends is written nowhere. (It may abort: UCX cannot bear a reader that has gone.)"""
    sink.pool.data[:] = 0xEE
    source.process.send_signal(signal.SIGCONT)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            await source.process.wait()
    async with opened_source(incarnation="6" * 16, config=EMULATED) as other:  # the sink's nixl goes on working meanwhile
        peer = await sink.open_peer(other.offer(), incarnation="6" * 16)
        await peer.pull([9], [0])
        assert (sink.pool.data[0] == 10).all()
        assert (sink.pool.data[1:] == 0xEE).all()


async def test_emulated_read_of_a_stopped_peer_fails_in_time_and_writes_nothing_when_it_wakes(emulated_sink):
    async with child("source", "tcp") as source:
        peer = await emulated_sink.open_peer(source.first)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(failure(await stuck(emulated_sink, source, peer)))
        why, duration_s = running.result()
        assert "not done after 2.0 s" in why
        assert duration_s < 2.8
        await nothing_comes(emulated_sink, source)


async def test_drop_ends_an_emulated_read_of_a_stopped_peer_at_once(emulated_sink):
    async with child("source", "tcp") as source:
        peer = await emulated_sink.open_peer(source.first)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(failure(await stuck(emulated_sink, source, peer)))
            await until(lambda: peer._reader._live)
            dropped_s = time.monotonic()
            peer.drop()
            why, _ = await running
            assert time.monotonic() - dropped_s < 1.0
        assert "peer dropped" in why
        await nothing_comes(emulated_sink, source)


async def test_cancelled_pull_ends_after_its_agent(emulated_sink):
    async with child("source", "tcp") as source:
        peer = await emulated_sink.open_peer(source.first)
        async with asyncio.TaskGroup() as group:
            pull = group.create_task(await stuck(emulated_sink, source, peer))
            await until(lambda: peer._reader._live)
            pull.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pull
        assert peer._reader._agent is None
        await nothing_comes(emulated_sink, source)


async def test_cancelled_pull_of_a_healthy_peer_costs_it_nothing(sink, source):
    """It is given time to end by itself: the next pull uses the same agent."""
    peer = await sink.open_peer(source.offer())
    agent = peer._reader._agent
    async with asyncio.TaskGroup() as group:
        pull = group.create_task(peer.pull(all_blocks(), all_blocks()))
        await asyncio.sleep(0)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
    await peer.pull([1], [1])
    assert peer._reader._agent is agent


async def test_reader_killed_in_the_middle_does_not_harm_the_source(sink):
    async with child("source") as source:
        async with child("sink", incarnation=SINK, peer=SOURCE, offer=source.first) as reader:
            assert reader.first == b"open"
            await asyncio.sleep(0.05)  # it reads all the time
            reader.process.kill()
            await reader.process.wait()
        assert await source.ask("ping") == "pong"
        await (await sink.open_peer(source.first)).pull([1], [1])


# What it costs.


async def test_idle_pair_uses_no_cpu(sink):
    async with child("source") as source:
        peer = await sink.open_peer(source.first)
        await peer.pull([1], [1])
        used_s = float(await source.ask("cpu"))
        await asyncio.sleep(2)
        assert float(await source.ask("cpu")) - used_s < 0.1
    peer.drop()


async def test_agents_end_with_their_peers(sink):
    """Ten descriptors each: they must not pile up."""
    async with child("source") as source:
        counts = []
        for _ in range(4):
            peer = await sink.open_peer(source.first)
            await peer.pull([1], [1])
            counts.append(len(os.listdir("/proc/self/fd")))
            peer.drop()
            await until(lambda peer=peer: not any(thread.is_alive() for thread in sink.transport._ending))
        assert max(counts) - min(counts) <= 2


# Other layouts.


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"num_shards": 2}, {}),
        ({}, {"num_shards": 2}),
        ({"num_shards": 2}, {"num_shards": 4}),
        ({}, {"block_tokens": 64}),
        ({"block_tokens": 64}, {}),
    ],
    ids=["2->1 shards", "1->2 shards", "2->4 shards", "16->64 tokens", "64->16 tokens"],
)
async def test_blocks_of_another_layout_are_resliced_by_ranges(theirs, ours):
    shape = {"num_layers": 2, "block_tokens": 16, "num_kv_heads": 4, "head_dim": 8, "dtype": "float32"}
    source_layout, sink_layout = BlockLayout(**(shape | theirs)), BlockLayout(**(shape | ours))
    reslice = Reslice(source_layout, sink_layout)
    async with opened_source(source_layout, 8) as source, opened_sink(None, sink_layout, 8) as sink:
        source.pool.data[:] = np.random.default_rng(1).integers(0, 256, source.pool.data.shape, np.uint8)
        peer = await sink.open_peer(source.offer(), reslice=reslice)
        source_units, dest_units = [1, 0, 5, 3], [2, 3, 0, 7]
        expected = np.zeros_like(sink.pool.data)
        reslice.copy(expected, dest_units, source.pool.data, source_units)
        stats = await peer.pull(source_units, dest_units)
        assert (sink.pool.data == expected).all()
        assert stats.num_bytes == 4 * reslice.unit_bytes
