"""Pulls over TCP: one connection per pair, asked for block by block id, received straight into own blocks.

A blocking thread per opened peer, because a thread that sleeps in recvmsg_into moves several times what an event loop does and
leaves the loop alone. Nothing outside the thread writes to blocks, so an operation is over exactly when the thread says so.
"""

import asyncio
import json
import queue
import secrets
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import KvPool
from baton_runtime.log import get_logger
from baton_runtime.rpc import advertised_address, split_address

from baton_handoff.transports import tcp_wire as wire
from baton_handoff.transports.base import ChecksumMismatch, PeerPool, PullFailed, PullStats, TransportUnavailable
from baton_handoff.transports.operation import NO_BLOCKS, BlockIds, Operation, checked_ids
from baton_handoff.transports.tcp_source import TcpSource
from baton_handoff.transports.tcp_wire import ConnectionFailed, Status, TcpConfig, Watch

log = get_logger(__name__)

NAME = "tcp"
_CLOSE_LIMIT_S = 2.0


class _Parameters(msgspec.Struct):
    address: str
    num_blocks: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class _Target:
    """Who is asked, and how to prove who asks."""

    family: int
    sockaddr: tuple[Any, ...]
    num_blocks: int
    incarnation: str
    own_incarnation: str
    secret: bytes


class _Connection:
    """One thread and its socket. Lives until dropped; reconnects by itself when an operation needs it."""

    def __init__(self, target: _Target, pool: KvPool, config: TcpConfig) -> None:
        self._target = target
        self._pool = pool
        self._memory = wire.PoolBytes(pool)
        self._config = config
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._running: Operation | None = None
        self._sock: socket.socket | None = None
        self._is_dropped = False
        self._next_operation = 1  # from here on the thread's own
        self._is_answered = False
        self.thread = threading.Thread(target=self._work, name="tcp-sink", daemon=True)
        self.thread.start()

    def submit(self, operation: Operation) -> None:
        """Queue an operation for the thread."""
        self._queue.put(operation)

    def stop(self, operation: Operation, why: str) -> None:
        """End one operation soon. If it is running its socket is shut; the next operation reconnects."""
        operation.stop(NAME, why)
        with self._lock:
            if self._running is operation and self._sock is not None:
                wire.shut(self._sock)

    def drop(self) -> None:
        """End the thread once its queue is worked off; stop the operations first."""
        with self._lock:
            self._is_dropped = True
            if self._sock is not None:
                wire.shut(self._sock)
        self._queue.put(None)

    def _work(self) -> None:
        while (operation := self._queue.get()) is not None:
            if not operation.start():
                continue
            with self._lock:
                self._running = operation
            result: PullFailed | int
            try:
                result = self._run(operation)
            except Exception as error:  # supervisor: whatever happened, the waiter must hear that it is over
                log.error("tcp_operation_failed", exc_info=error)
                self._disconnect()
                result = PullFailed(NAME, f"internal error: {type(error).__name__}")
            # Before end(): a late stop() must not shut the socket under the next operation.
            with self._lock:
                self._running = None
            operation.end(result, len(operation.dest_ids) * self._pool.block_bytes)
        self._disconnect()

    def _run(self, operation: Operation) -> PullFailed | int:
        """Returns: failure, or number of system calls' worth of batches."""
        try:
            try:
                is_reused = self._sock is not None
                return self._pull(operation)
            except ConnectionFailed as error:
                self._disconnect()
                if not is_reused or self._is_answered or error.is_silence or operation.stopped:
                    raise
            # The connection ended while it was idle; that says nothing about the peer now.
            return self._pull(operation)
        except ConnectionFailed as error:
            self._disconnect()
            why = f"{operation.stopped}: {error}" if operation.stopped else str(error)
            if error.is_silence and not operation.stopped:
                self._fail_queued(why)
            return PullFailed(NAME, why)
        except PullFailed as error:
            return error

    def _pull(self, operation: Operation) -> int:
        self._is_answered = False
        sock = self._connected(operation)
        if not operation.source_ids.size:
            return 0  # open_peer: only the connection is asked for
        watch = Watch(self._config.silence_limit_s, self._config.operation_limit_s, operation)
        self._ask(sock, operation.source_ids, watch)
        self._is_answered = True
        batches = self._memory.batches(operation.dest_ids)
        checksum = 0
        for batch in batches:
            wire.receive_views(sock, batch.views, watch)
            if self._config.checksum:
                checksum = self._memory.checksum(batch.block_ids, checksum)
        (sent,) = wire.TRAILER.unpack(wire.receive(sock, wire.TRAILER.size, watch))
        if sent != checksum:
            raise ChecksumMismatch(NAME, f"checksum of {operation.dest_ids.size} blocks is {checksum:016x}, sent {sent:016x}")
        return len(batches)

    def _ask(self, sock: socket.socket, source_ids: BlockIds, watch: Watch) -> None:
        number = self._next_operation
        self._next_operation += 1
        flags = wire.FLAG_CHECKSUM if self._config.checksum else 0
        request = wire.REQUEST.pack(wire.REQUEST_MAGIC, number, flags, len(source_ids)) + source_ids.astype("<u4").tobytes()
        wire.send_views(sock, [memoryview(request)], watch)
        magic, answered, status = wire.ANSWER.unpack(wire.receive(sock, wire.ANSWER.size, watch))
        if magic != wire.ANSWER_MAGIC or answered != number:
            raise ConnectionFailed(f"answer to operation {answered} instead of {number}")
        if status != Status.OK:
            raise PullFailed(NAME, f"refused by the peer: {_status_name(status)}")

    def _connected(self, operation: Operation) -> socket.socket:
        if self._sock is not None:
            return self._sock
        sock = socket.socket(self._target.family, socket.SOCK_STREAM)
        with self._lock:
            self._sock = sock  # from here on stop() and drop() can shut it
            if self._is_dropped or operation.stopped:
                raise ConnectionFailed("stopped before it connected")
        try:
            sock.settimeout(self._config.connect_limit_s)
            sock.connect(self._target.sockaddr)
            wire.prepare(sock)
        except OSError as error:
            # No use in trying for each queued operation anew.
            raise ConnectionFailed(f"cannot connect to {self._target.sockaddr[:2]}: {error}", is_silence=True) from error
        self._introduce(sock, Watch(self._config.silence_limit_s, self._config.connect_limit_s, operation))
        return sock

    def _introduce(self, sock: socket.socket, watch: Watch) -> None:
        target = self._target
        challenge = wire.receive(sock, wire.CHALLENGE.size, watch)
        if not challenge.startswith(wire.MAGIC):
            raise ConnectionFailed("not a transfer port of this version", is_silence=True)
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        hello = wire.HELLO.pack(target.own_incarnation.encode(), target.incarnation.encode(), self._pool.block_bytes, nonce)
        mac = wire.proof(target.secret, b"sink", challenge, hello)
        wire.send_views(sock, [memoryview(hello + mac)], watch)
        status, mac = wire.WELCOME.unpack(wire.receive(sock, wire.WELCOME.size, watch))
        if status == Status.OK and not wire.is_proof(mac, target.secret, b"source", challenge, hello):
            raise ConnectionFailed("the peer does not know the pair's secret", is_silence=True)
        if status != Status.OK:
            raise ConnectionFailed(f"refused by the peer: {_status_name(status)}", is_silence=True)

    def _disconnect(self) -> None:
        with self._lock:
            sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def _fail_queued(self, why: str) -> None:
        """Without this each of n queued operations would wait out the silence of a stopped peer, one after the other."""
        try:
            while True:
                operation = self._queue.get_nowait()
                if operation is None:
                    self._queue.put(None)
                    return
                operation.end(PullFailed(NAME, why))
        except queue.Empty:
            pass


class TcpPeer:
    """An opened peer; see PeerPool."""

    name = NAME

    def __init__(self, transport: "TcpTransport", target: _Target) -> None:
        self._transport = transport
        self._target = target
        self._live: set[Operation] = set()  # on the event loop only
        self._connection: _Connection | None = None

    async def pull(self, source_block_ids: Sequence[int], dest_block_ids: Sequence[int]) -> PullStats:
        """Ask and receive; see PeerPool. Ends when the socket is shut, or after 2 s of the peer's silence."""
        ids = checked_ids(source_block_ids, dest_block_ids, self._target.num_blocks, self._transport.pool, NAME)
        return await self._run(Operation(*ids))

    async def connect(self) -> None:
        """Connect and prove the secret. Raises: PullFailed."""
        await self._run(Operation(NO_BLOCKS, NO_BLOCKS))

    def drop(self) -> None:
        """Shut the socket and end the thread; see PeerPool. A later pull starts afresh."""
        connection, self._connection = self._connection, None
        if connection is not None:
            for operation in self._live:
                connection.stop(operation, "peer dropped")
            connection.drop()
            self._transport.dropped(self, connection.thread)

    async def _run(self, operation: Operation) -> PullStats:
        if self._connection is None:
            self._connection = self._transport.connect(self, self._target)
        connection = self._connection
        self._live.add(operation)
        try:
            connection.submit(operation)
            return await operation.wait(lambda: connection.stop(operation, "cancelled"))
        finally:
            self._live.discard(operation)


class TcpTransport:
    """Transport over TCP; see Transport. Both sides of it: the own pool served, and peers' pools pulled from."""

    name = NAME

    def __init__(self, pool: KvPool, incarnation: str, listen: str, advertise: str, config: TcpConfig | None = None) -> None:
        self.pool = pool
        self._listen = listen
        self._advertise = advertise
        self._config = config or TcpConfig()
        self._source = TcpSource(pool, incarnation, self._config)
        self._connected: set[TcpPeer] = set()
        self._ending: set[threading.Thread] = set()
        self._address = ""
        self._is_closed = False

    async def open(self) -> None:
        """Listen for peers; see Transport."""
        host, port = split_address(self._listen)
        await asyncio.to_thread(self._source.open, host.strip("[]"), port or 0)
        self._address = advertised_address(self._listen, self._source.port, self._advertise)

    async def close(self) -> None:
        """Drop peers, end threads; see Transport."""
        if self._is_closed:
            return
        self._is_closed = True
        for peer in tuple(self._connected):
            peer.drop()
        await asyncio.to_thread(self._source.close, _CLOSE_LIMIT_S)
        for thread in tuple(self._ending):
            await asyncio.to_thread(thread.join, _CLOSE_LIMIT_S)

    def offer(self) -> bytes:
        """Address and shape; see Transport."""
        return json.dumps({"address": self._address, "num_blocks": self.pool.num_blocks, "block_bytes": self.pool.block_bytes}).encode()

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None:
        """Let a peer in that proves this secret; see Transport."""
        self._source.allow(peer_incarnation, pair_secret)

    def forbid(self, peer_incarnation: str) -> None:
        """Throw a peer out; see Transport."""
        self._source.forbid(peer_incarnation)

    def why_not(self, peer: Instance, parameters: bytes) -> str:
        """Compares block sizes; see Transport."""
        try:
            given = msgspec.json.decode(parameters, type=_Parameters)
            split_address(given.address)
        except (msgspec.DecodeError, ValueError) as error:
            return f"parameters do not parse: {error}"
        if given.block_bytes != self.pool.block_bytes:
            return f"the peer's blocks have {given.block_bytes} bytes, own ones {self.pool.block_bytes}"
        return ""

    async def open_peer(self, peer: Instance, parameters: bytes, pair_secret: bytes, own_incarnation: str) -> PeerPool:
        """Connect to the peer and prove the secret; see Transport."""
        if problem := self.why_not(peer, parameters):
            raise TransportUnavailable(NAME, problem)
        given = msgspec.json.decode(parameters, type=_Parameters)
        family, sockaddr = await self._resolve(given.address)
        opened = TcpPeer(self, _Target(family, sockaddr, given.num_blocks, peer.incarnation, own_incarnation, pair_secret))
        try:
            await opened.connect()
        except PullFailed as error:
            opened.drop()
            raise TransportUnavailable(NAME, error.why) from error
        except asyncio.CancelledError:
            opened.drop()
            raise
        return opened

    def connect(self, peer: TcpPeer, target: _Target) -> _Connection:
        """A connection's thread for a peer of this transport."""
        if self._is_closed:
            raise PullFailed(NAME, "the transport is closed")
        self._connected.add(peer)
        return _Connection(target, self.pool, self._config)

    def dropped(self, peer: TcpPeer, thread: threading.Thread) -> None:
        """A peer was dropped; its thread ends by itself, close() waits for it."""
        self._connected.discard(peer)
        self._ending = {*(ending for ending in self._ending if ending.is_alive()), thread}

    async def _resolve(self, address: str) -> tuple[int, tuple[Any, ...]]:
        # Once, here: a name server that hangs must not hold a pull's blocks.
        host, port = split_address(address)
        try:
            async with asyncio.timeout(self._config.connect_limit_s):
                found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            raise TransportUnavailable(NAME, f"cannot resolve {address}: {error}") from error
        return found[0][0], found[0][4]


def _status_name(status: int) -> str:
    try:
        return Status(status).name
    except ValueError:
        return str(status)
