"""TCP: the secret of the pair, peers that die, stop or lie, and operations that are over when they say so."""

import asyncio
import contextlib
import dataclasses
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
from baton_engine.pool import BlockLayout
from baton_handoff.transports import PoolMemory, tcp_source, tcp_wire
from baton_handoff.transports.base import ChecksumMismatch, PullFailed, TransportUnavailable
from baton_handoff.transports.shm import ShmTransport
from baton_handoff.transports.tcp import TcpTransport
from baton_handoff.transports.tcp_wire import TcpConfig

SOURCE, SINK, SECRET = "5" * 16, "d" * 16, bytes(range(16))
LAYOUT = BlockLayout(num_layers=2, block_tokens=16, num_kv_heads=4, head_dim=128, dtype="float32")  # 128 KiB
NUM_BLOCKS = 128
CHILD = Path(__file__).with_name("child_source.py")


class Sink:
    """An own pool and an open transport."""

    def __init__(self, config=None):
        self.pool, self.memory = PoolMemory.allocate(NUM_BLOCKS, LAYOUT, SINK, shared=False)
        self.transport = TcpTransport(self.pool, SINK, "127.0.0.1:0", "", config)

    async def open_peer(self, parameters, secret=SECRET, incarnation=SOURCE, own=SINK):
        return await self.transport.open_peer(Instance(incarnation=incarnation), parameters, secret, own)


@pytest.fixture
async def sink():
    made = Sink()
    await made.transport.open()
    yield made
    await made.transport.close()


@pytest.fixture
async def source():
    """A source in this process whose blocks hold their number plus one."""
    pool, _ = PoolMemory.allocate(NUM_BLOCKS, LAYOUT, SOURCE, shared=False)
    pool.data[:] = np.arange(1, NUM_BLOCKS + 1, dtype=np.uint8)[:, None]
    transport = TcpTransport(pool, SOURCE, "127.0.0.1:0", "")
    await transport.open()
    transport.allow(SINK, SECRET)
    yield transport
    await transport.close()


@contextlib.asynccontextmanager
async def child_source(directory, action):
    """A source in a process of its own. Gives (process, shm parameters, tcp parameters)."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, CHILD, SOURCE, directory, str(NUM_BLOCKS), str(LAYOUT.block_bytes), SINK, SECRET.hex(), action),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        shm, tcp, ready = [(await process.stdout.readline()).strip() for _ in range(3)]
        assert ready == b"ready"
        yield process, shm, tcp
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ping(process):
    process.stdin.write(b"ping\n")
    while (await process.stdout.readline()) != b"pong\n":
        pass


async def failure(pull):
    began_s = time.monotonic()
    with pytest.raises(PullFailed) as caught:
        await pull
    return str(caught.value), time.monotonic() - began_s


def all_blocks():
    return list(range(NUM_BLOCKS))


async def test_wrong_secret_is_refused(source, sink):
    with pytest.raises(TransportUnavailable, match="REFUSED"):
        await sink.open_peer(source.offer(), secret=bytes(16))


async def test_unknown_peer_is_refused(source, sink):
    with pytest.raises(TransportUnavailable, match="REFUSED"):
        await sink.open_peer(source.offer(), own="e" * 16)


async def test_every_secret_of_a_peer_is_valid(source, sink):
    source.allow(SINK, bytes(16))
    for secret in (SECRET, bytes(16)):
        await (await sink.open_peer(source.offer(), secret=secret)).pull([1], [1])


async def test_another_life_of_the_source_is_refused(source, sink):
    with pytest.raises(TransportUnavailable, match="WRONG_LIFE"):
        await sink.open_peer(source.offer(), incarnation="6" * 16)


async def test_forbidden_peer_is_thrown_out_and_stays_out(source, sink):
    peer = await sink.open_peer(source.offer())
    source.forbid(SINK)
    with pytest.raises(PullFailed, match="REFUSED"):
        await peer.pull([1], [1])


async def test_source_that_does_not_know_the_secret_is_not_believed(source, sink, monkeypatch):
    """Nobody writes into the sink's blocks but the source it was introduced to."""
    monkeypatch.setattr(source._source.listener, "admit", lambda *_: bytes(16))
    with pytest.raises(TransportUnavailable, match="does not know the pair's secret"):
        await sink.open_peer(source.offer())


async def test_secret_never_travels(source, sink, monkeypatch):
    sent = []
    real = tcp_wire.send_views
    monkeypatch.setattr(tcp_wire, "send_views", lambda sock, views, *rest: (sent.extend(bytes(v) for v in views), real(sock, views, *rest)))
    await sink.open_peer(source.offer())
    assert SECRET not in b"".join(sent)


async def test_port_nobody_listens_on_is_unavailable(sink):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    parameters = json.dumps({"address": f"127.0.0.1:{port}", "num_blocks": 1, "block_bytes": LAYOUT.block_bytes}).encode()
    with pytest.raises(TransportUnavailable, match=f"cannot connect.*{port}"):
        await sink.open_peer(parameters)


async def test_port_of_something_else_is_unavailable(sink):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionResetError):
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        parameters = json.dumps({"address": address, "num_blocks": 1, "block_bytes": LAYOUT.block_bytes}).encode()
        with pytest.raises(TransportUnavailable, match="not a transfer port"):
            await sink.open_peer(parameters)
        await asyncio.to_thread(thread.join, 10)


async def test_garbage_on_the_transfer_port_harms_nobody(source, sink):
    host, port = json.loads(source.offer())["address"].split(":")
    with socket.create_connection((host, int(port)), timeout=5) as stranger, contextlib.suppress(ConnectionResetError):
        stranger.sendall(os.urandom(4000))
        while stranger.recv(4096):
            pass
    peer = await sink.open_peer(source.offer())
    await peer.pull([1], [1])


async def test_connections_over_the_limit_are_closed(sink):
    pool, _ = PoolMemory.allocate(2, LAYOUT, SOURCE, shared=False)
    source = TcpTransport(pool, SOURCE, "127.0.0.1:0", "", TcpConfig(max_connections=1))
    await source.open()
    source.allow(SINK, SECRET)
    peer = await sink.open_peer(source.offer())
    with pytest.raises(TransportUnavailable, match=r"closed|reset"):
        await sink.open_peer(source.offer())
    await peer.pull([0], [0])
    await source.close()


async def test_connection_that_ended_while_idle_is_made_again(source, sink):
    peer = await sink.open_peer(source.offer())
    for connection in tuple(source._source.listener._connections):
        tcp_wire.shut(connection)
    await peer.pull([4], [2])
    assert (sink.pool.data[2] == 5).all()


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_next_operation_is_asked_for_while_one_runs(source, sink, monkeypatch):
    """The source finds the next request when it has sent the last byte."""
    peer = await sink.open_peer(source.offer())
    asked = []
    receive_views, send_views = tcp_wire.receive_views, tcp_wire.send_views

    def receive(sock, views, *rest):
        asked.append("blocks") if views[0].nbytes > 1000 else None
        receive_views(sock, views, *rest)

    def send(sock, views, *rest):
        asked.append("request") if bytes(views[0][:4]) == tcp_wire.REQUEST_MAGIC else None
        send_views(sock, views, *rest)

    monkeypatch.setattr(tcp_wire, "receive_views", receive)
    monkeypatch.setattr(tcp_wire, "send_views", send)
    await asyncio.gather(*(peer.pull(all_blocks(), all_blocks()) for _ in range(3)))
    num_batches = NUM_BLOCKS * LAYOUT.block_bytes // tcp_wire.MAX_CALL_BYTES
    assert asked.count("request") == 3
    assert asked[: num_batches + 1].count("request") == 2
    assert (sink.pool.data[:, 0] == np.arange(1, NUM_BLOCKS + 1)).all()


async def test_operation_stopped_before_its_turn_never_writes_and_the_next_one_works(source, sink, monkeypatch):
    """It was asked for: its answer is on its way, and is not taken for another's."""
    peer = await sink.open_peer(source.offer())
    connection = peer._connection
    blocked = threading.Event()
    monkeypatch.setattr(tcp_wire, "receive_views", stop_at_blocks(tcp_wire.receive_views, blocked, first=2))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(peer.pull([9, 1, 7, 3, 8, 40, 50, 60], [0, 1, 2, 3, 4, 5, 6, 7]))
        stopped = group.create_task(peer.pull([5], [100]))
        later = group.create_task(peer.pull([6], [101]))
        await until(lambda: connection._ahead is not None)
        stopped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopped
        sink.pool.data[100] = 0xEE
        blocked.set()
    assert running.result().num_bytes == 8 * LAYOUT.block_bytes
    assert later.result().num_bytes == LAYOUT.block_bytes
    assert (sink.pool.data[:2, 0] == [10, 2]).all()
    assert (sink.pool.data[100] == 0xEE).all()
    assert (sink.pool.data[101] == 7).all()


async def test_operation_asked_for_ahead_survives_the_end_of_the_one_before(source, sink, monkeypatch):
    peer = await sink.open_peer(source.offer())
    connection = peer._connection
    blocked = threading.Event()
    monkeypatch.setattr(tcp_wire, "receive_views", stop_at_blocks(tcp_wire.receive_views, blocked, first=2))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(peer.pull([9, 1, 7, 3, 8, 40, 50, 60], [0, 1, 2, 3, 4, 5, 6, 7]))
        ahead = group.create_task(peer.pull([5], [100]))
        await until(lambda: connection._ahead is not None)
        running.cancel()
        blocked.set()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert ahead.result().num_bytes == LAYOUT.block_bytes
    assert (sink.pool.data[100] == 6).all()


async def test_reader_that_waits_for_its_turn_is_told_so_and_gets_it(source, monkeypatch):
    """Else it would take a busy source for a silent one."""
    sink = Sink(TcpConfig(silence_limit_s=1.5))
    await sink.transport.open()
    monkeypatch.setattr(tcp_source, "_WAITING_TICK_S", 0.05)
    peer = await sink.open_peer(source.offer())
    turns = source._source._turns
    held = [turns.ask() for _ in range(TcpConfig().max_readers)]
    told = []
    send = tcp_wire.send_views
    monkeypatch.setattr(tcp_wire, "send_views", lambda sock, views, *rest: (told.append(views), send(sock, views, *rest)))
    async with asyncio.TaskGroup() as group:
        pull = group.create_task(peer.pull([4], [2]))
        await until(lambda: len(told) > 40)  # for longer than the silence it bears
        assert not pull.done()
        for turn in held:
            turn.give_back()
    assert (sink.pool.data[2] == 5).all()
    assert turns.num_waiting == 0
    await sink.transport.close()


async def test_reader_whose_turn_never_comes_gives_up(source, monkeypatch):
    sink = Sink(TcpConfig(operation_limit_s=0.3))
    await sink.transport.open()
    monkeypatch.setattr(tcp_source, "_WAITING_TICK_S", 0.05)
    peer = await sink.open_peer(source.offer())
    turns = source._source._turns
    held = [turns.ask() for _ in range(TcpConfig().max_readers)]
    why, _ = await failure(peer.pull([4], [2]))
    assert "limit 0.3 s" in why
    await sink.transport.close()
    await until(lambda: turns.num_waiting == 0)  # and the source forgets it
    assert all(turn.held_s(time.monotonic()) > 0 for turn in held)


async def test_stopped_readers_do_not_keep_others_out(sink, monkeypatch):
    pool, _ = PoolMemory.allocate(NUM_BLOCKS, LAYOUT, SOURCE, shared=False)
    source = TcpTransport(pool, SOURCE, "127.0.0.1:0", "", TcpConfig(max_readers=1))
    await source.open()
    source.allow(SINK, SECRET)
    address = json.loads(source.offer())["address"]
    stopped = [await asyncio.to_thread(asking_socket, address) for _ in range(2)]  # they ask for 16 MiB and read none of it
    peer = await sink.open_peer(source.offer())
    began_s = time.monotonic()
    await peer.pull([1], [1])
    assert time.monotonic() - began_s < 1.5
    for sock in stopped:
        sock.close()
    await source.close()


def asking_socket(address):
    """A connection that has proved the secret and asked for every block."""
    host, port = address.split(":")
    sock = socket.create_connection((host, int(port)), timeout=5)
    challenge = sock.recv(tcp_wire.CHALLENGE.size, socket.MSG_WAITALL)
    hello = tcp_wire.HELLO.pack(SINK.encode(), SOURCE.encode(), LAYOUT.block_bytes, tcp_wire.nonce())
    sock.sendall(hello + tcp_wire.proof(SECRET, b"sink", challenge, hello))
    sock.recv(tcp_wire.WELCOME.size, socket.MSG_WAITALL)
    sock.sendall(tcp_wire.REQUEST.pack(tcp_wire.REQUEST_MAGIC, 1, 0, NUM_BLOCKS) + np.arange(NUM_BLOCKS, dtype="<u4").tobytes())
    return sock


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7, 8, 9, 12, 13, NUM_BLOCKS])
async def test_no_operation_sleeps_out_a_tick_before_its_last_bytes(source, sink, num_blocks):
    """The receiver is woken late only while enough is still to come (wake_at)."""
    peer = await sink.open_peer(source.offer())
    durations_s = [(await peer.pull(all_blocks()[:num_blocks], all_blocks()[:num_blocks])).duration_s for _ in range(3)]
    assert min(durations_s) < 0.4


async def test_drop_while_connecting_ends_at_once(sink):
    """A host that answers nothing: its queue of connections is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as stack:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for _ in range(3):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(server.getsockname())
        parameters = json.dumps({"address": address, "num_blocks": 1, "block_bytes": LAYOUT.block_bytes}).encode()
        async with asyncio.TaskGroup() as group:
            opening = group.create_task(sink.open_peer(parameters))
            await until(lambda: any(thread.name == "tcp-sink" for thread in threading.enumerate()))
            await asyncio.sleep(0)
            began_s = time.monotonic()
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        assert time.monotonic() - began_s < 1.0


async def test_source_that_answers_twice_is_not_believed(source, sink, monkeypatch):
    peer = await sink.open_peer(source.offer())
    head = tcp_source._head
    with monkeypatch.context() as patch:
        patch.setattr(tcp_source, "_head", lambda operation, status: memoryview(bytes(head(operation, status)) * 2))
        with pytest.raises(PullFailed):
            await peer.pull([1], [1])
    await (await sink.open_peer(source.offer())).pull([1], [1])


async def test_answer_to_another_request_is_not_believed(source, sink, monkeypatch):
    peer = await sink.open_peer(source.offer())
    head = tcp_source._head
    with monkeypatch.context() as patch:
        patch.setattr(tcp_source, "_head", lambda operation, status: head(operation + 1, status))
        with pytest.raises(PullFailed, match="answer to operation 2 instead of 1"):
            await peer.pull([1], [1])
    await peer.pull([1], [1])


async def test_damaged_bytes_are_noticed(source, sink, monkeypatch):
    peer = await sink.open_peer(source.offer())
    with monkeypatch.context() as patch:
        patch.setattr(tcp_wire, "receive_views", damage_blocks(tcp_wire.receive_views))
        with pytest.raises(ChecksumMismatch, match="checksum of 1 blocks"):
            await peer.pull([1], [1])
    await peer.pull([1], [1])


async def test_swapped_blocks_are_noticed(source, sink, monkeypatch):
    """A sum would not see it."""
    peer = await sink.open_peer(source.offer())
    with monkeypatch.context() as patch:
        patch.setattr(tcp_source.wire, "send_views", swap_blocks(tcp_wire.send_views))
        with pytest.raises(ChecksumMismatch, match="checksum of 2 blocks"):
            await peer.pull([1, 9], [1, 9])
    await peer.pull([1], [1])


async def test_checksum_can_be_left_out(source, monkeypatch):
    sink = Sink(TcpConfig(checksum=False))
    await sink.transport.open()
    monkeypatch.setattr(tcp_wire, "receive_views", damage_blocks(tcp_wire.receive_views))
    await (await sink.open_peer(source.offer())).pull([1, 9], [3, 4])
    assert (sink.pool.data[3:5, 0] == [2, 10]).all()
    await sink.transport.close()


def damage_blocks(real):
    def receive_views(sock, views, *rest):
        real(sock, views, *rest)
        if views[0].nbytes > 1000:
            views[0][-1] ^= 4

    return receive_views


def swap_blocks(real):
    def send_views(sock, views, *rest):
        large = [view for view in views if view.nbytes > 1000]
        if len(large) > 1:
            views = [*views[: views.index(large[0])], *reversed(large), *views[views.index(large[-1]) + 1 :]]
        real(sock, views, *rest)

    return send_views


async def test_peer_killed_in_mid_pull_fails_fast(sink, tmp_path):
    async with child_source(tmp_path, "kill") as (process, _, parameters):
        peer = await sink.open_peer(parameters)
        why, duration_s = await failure(peer.pull(all_blocks(), all_blocks()))
        assert await process.wait() == -signal.SIGKILL
    assert duration_s < 1.5
    assert "bytes" in why


async def test_peer_stopped_in_mid_pull_fails_within_two_seconds_and_writes_nothing_when_woken(sink, tmp_path):
    async with child_source(tmp_path, "stop") as (process, _, parameters):
        peer = await sink.open_peer(parameters)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(failure(peer.pull(all_blocks(), all_blocks())))
            queued = group.create_task(failure(peer.pull([0], [0])))
        why, duration_s = running.result()
        assert "silent" in why
        assert duration_s < 2.6
        assert queued.result()[1] < 2.7  # not another two seconds
        sink.pool.data[:] = 0xEE
        process.send_signal(signal.SIGCONT)
        await ping(process)
        await peer.pull([4], [0])  # and it is a good peer again
        assert (sink.pool.data[0] == 5).all()
        assert (sink.pool.data[1:] == 0xEE).all()


async def test_drop_ends_a_pull_of_a_stopped_peer_at_once(sink, tmp_path):
    async with child_source(tmp_path, "stop") as (process, _, parameters):
        peer = await sink.open_peer(parameters)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(failure(peer.pull(all_blocks(), all_blocks())))
            await stopped(process.pid)
            dropped_s = time.monotonic()
            peer.drop()
            why, _ = await running
            assert time.monotonic() - dropped_s < 1.0
        assert "peer dropped" in why
        sink.pool.data[:] = 0xEE
        process.send_signal(signal.SIGCONT)
        await ping(process)
        assert (sink.pool.data == 0xEE).all()


async def test_cancelled_pull_shuts_its_socket_and_the_next_one_reconnects(sink, tmp_path):
    async with child_source(tmp_path, "stop") as (process, _, parameters):
        peer = await sink.open_peer(parameters)
        async with asyncio.TaskGroup() as group:
            pull = group.create_task(peer.pull(all_blocks(), all_blocks()))
            await stopped(process.pid)
            pull.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pull
        sink.pool.data[:] = 0xEE
        process.send_signal(signal.SIGCONT)
        await ping(process)
        await peer.pull([4], [0])
        assert (sink.pool.data[1:] == 0xEE).all()


async def test_reader_that_stops_does_not_hold_the_source(source, monkeypatch):
    """The source's thread gives up; its blocks were never at stake, its threads are."""
    monkeypatch.setattr(source._source, "_config", dataclasses.replace(TcpConfig(), silence_limit_s=0.5))
    sink = Sink()
    await sink.transport.open()
    blocked = threading.Event()
    monkeypatch.setattr(tcp_wire, "receive_views", stop_at_blocks(tcp_wire.receive_views, blocked))
    peer = await sink.open_peer(source.offer())
    async with asyncio.TaskGroup() as group:
        pull = group.create_task(failure(peer.pull(all_blocks(), all_blocks())))
        while source._source.listener._connections:
            await asyncio.sleep(0.02)
        blocked.set()
    assert "bytes" in pull.result()[0]
    await sink.transport.close()


def stop_at_blocks(real, event, first=1):
    """Receive as usual until batch number `first` of blocks; that one waits for the event."""
    count = 0

    def receive_views(sock, views, *rest):
        nonlocal count
        if views[0].nbytes > 1000:
            count += 1
            if count >= first:
                assert event.wait(10)
        real(sock, views, *rest)

    return receive_views


async def test_killed_owner_of_shared_memory_does_not_disturb_a_reader(tmp_path):
    """Facts: with a pull, a dead source costs nothing but the source."""
    pool, memory = PoolMemory.allocate(NUM_BLOCKS, LAYOUT, SINK, directory=tmp_path)
    transport = ShmTransport(memory, pool, tmp_path)
    await transport.open()
    async with child_source(tmp_path, "nothing") as (process, parameters, _):
        peer = await transport.open_peer(Instance(incarnation=SOURCE), parameters, SECRET, SINK)
        await peer.pull([0], [0])
        process.kill()
        await process.wait()
        await peer.pull([9], [1])
        assert (pool.data[:2, 0] == [1, 10]).all()
    await transport.close()
    memory.close()


async def stopped(pid):
    """Wait until the process is in state T."""
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        await asyncio.sleep(0.01)


def test_connections_do_not_take_the_systems_word_for_pacing():
    """BBR, the default of some machines, takes pauses between operations for a slow path: one in 500 took 30 times as long."""
    if b"bbr" not in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_bytes():
        pytest.skip("this kernel has no BBR")
    with socket.socket() as listener, socket.socket() as sock:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
        tcp_wire.avoid_bbr(listener)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sock.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            chosen = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
    assert chosen in tcp_wire.INSTEAD_OF_BBR


def test_what_the_operator_chose_stays():
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        tcp_wire.avoid_bbr(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"reno")
