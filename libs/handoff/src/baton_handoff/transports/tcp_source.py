"""The side that is read: an acceptor thread, and one blocking thread per connected peer that sends blocks as asked.

It reads the pool while the worker may already have given the blocks away: then the reader gets garbage, its Confirm is
answered NOT_PINNED, and the bytes are thrown away (docs/handoff.md, rule 3).
"""

import secrets
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
from baton_engine.pool import KvPool
from baton_runtime.log import get_logger

from baton_handoff.transports import tcp_wire as wire
from baton_handoff.transports.base import MAX_OPERATION_BYTES, TransportUnavailable
from baton_handoff.transports.operation import BlockIds
from baton_handoff.transports.tcp_wire import ConnectionFailed, Status, TcpConfig, Watch

log = get_logger(__name__)

# Secrets kept per peer: every start of every kvtransfer replica draws new ones, and all stay valid.
MAX_SECRETS_PER_PEER = 16
_IDLE_LIMIT_S = float("inf")  # TCP keepalive ends a dead connection; a living idle one may stay


class TcpSource:
    """Serves the own pool. Methods are called on the event loop; none blocks but close()."""

    def __init__(self, pool: KvPool, incarnation: str, config: TcpConfig) -> None:
        self._pool = pool
        self._memory = wire.PoolBytes(pool)
        self._incarnation = incarnation
        self._config = config
        self._lock = threading.Lock()  # guards what follows
        self._secrets: dict[str, list[bytes]] = {}
        self._connections: dict[socket.socket, str] = {}  # to the incarnation it proved; "" before
        self._threads: set[threading.Thread] = set()
        self._is_closed = False
        self._listener: socket.socket | None = None
        self.port = 0

    def open(self, host: str, port: int) -> None:
        """Listen. Raises: TransportUnavailable."""
        try:
            family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._listener = socket.create_server(address[:2], family=family, backlog=128)
        except OSError as error:
            raise TransportUnavailable("tcp", f"cannot listen on {host}:{port}: {error}") from error
        self.port = self._listener.getsockname()[1]
        self._start_thread(self._accept, self._listener, name="tcp-source-accept")

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None:
        """Accept proofs made with this secret from this peer."""
        with self._lock:
            known = self._secrets.setdefault(peer_incarnation, [])
            if pair_secret not in known:
                known.append(pair_secret)
                del known[:-MAX_SECRETS_PER_PEER]

    def forbid(self, peer_incarnation: str) -> None:
        """Accept nothing more from this peer and end what it reads."""
        with self._lock:
            self._secrets.pop(peer_incarnation, None)
            for sock, incarnation in self._connections.items():
                if incarnation == peer_incarnation:
                    wire.shut(sock)

    def close(self, limit_s: float) -> None:
        """End all threads; waits at most limit_s. Blocks: call it in a thread."""
        with self._lock:
            self._is_closed = True
            for sock in self._connections:
                wire.shut(sock)
            threads = set(self._threads)
        if self._listener is not None:
            wire.shut(self._listener)
        deadline_s = time.monotonic() + limit_s
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _start_thread(self, target: Callable[[socket.socket], None], sock: socket.socket, name: str) -> None:
        def work() -> None:
            try:
                target(sock)
            except Exception as error:  # supervisor: one broken connection must not go unseen, nor end the others
                log.error("tcp_source_thread_failed", thread=name, exc_info=error)
            finally:
                with self._lock:
                    self._connections.pop(sock, None)
                    self._threads.discard(thread)
                sock.close()

        thread = threading.Thread(target=work, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                with self._lock:
                    if self._is_closed:
                        return
                time.sleep(0.05)  # out of descriptors: accept fails at once until some are free
                continue
            with self._lock:
                is_full = self._is_closed or len(self._connections) >= self._config.max_connections
                if not is_full:
                    self._connections[sock] = ""
            if is_full:
                sock.close()
            else:
                self._start_thread(self._serve, sock, name="tcp-source")

    def _serve(self, sock: socket.socket) -> None:
        try:
            wire.prepare(sock)
            if self._is_welcome(sock):
                while self._answer(sock):
                    pass
        except (ConnectionFailed, OSError) as error:
            log.debug("tcp_source_connection_ended", why=str(error))

    def _is_welcome(self, sock: socket.socket) -> bool:
        watch = Watch(self._config.silence_limit_s, self._config.connect_limit_s)
        challenge = wire.CHALLENGE.pack(wire.MAGIC, secrets.token_bytes(wire.NONCE_BYTES))
        wire.send_views(sock, [memoryview(challenge)], watch)
        hello = wire.receive(sock, wire.HELLO.size, watch)
        given = wire.receive(sock, wire.MAC_BYTES, watch)
        status, mac = self._judge(sock, challenge, hello, given)
        wire.send_views(sock, [memoryview(wire.WELCOME.pack(status, mac))], watch)
        if status is not Status.OK:
            log.warning("tcp_peer_refused", status=status.name)
        return status is Status.OK

    def _judge(self, sock: socket.socket, challenge: bytes, hello: bytes, given: bytes) -> tuple[Status, bytes]:
        sink, source, block_bytes, _ = wire.HELLO.unpack(hello)
        peer = sink.rstrip(b"\0").decode("ascii", "replace")
        with self._lock:
            # All secrets are tried, so that the time taken does not tell which one is nearly right.
            fitting = [s for s in self._secrets.get(peer, []) if wire.is_proof(given, s, b"sink", challenge, hello)]
            if not fitting or not peer:
                return Status.REFUSED, bytes(wire.MAC_BYTES)
            # Under the lock: from here on forbid() finds this connection.
            self._connections[sock] = peer
        status = Status.OK
        if source.rstrip(b"\0").decode("ascii", "replace") != self._incarnation:
            status = Status.WRONG_LIFE
        elif block_bytes != self._pool.block_bytes:
            status = Status.WRONG_LAYOUT
        return status, wire.proof(fitting[0], b"source", challenge, hello)

    def _answer(self, sock: socket.socket) -> bool:
        """Serve one request. False: the connection is over."""
        request = wire.receive(sock, wire.REQUEST.size, Watch(_IDLE_LIMIT_S, _IDLE_LIMIT_S))
        magic, operation, flags, num_blocks = wire.REQUEST.unpack(request)
        if magic != wire.REQUEST_MAGIC or not 0 < num_blocks <= max(1, MAX_OPERATION_BYTES // self._pool.block_bytes):
            raise ConnectionFailed(f"a request for {num_blocks} blocks with magic {magic!r}")
        watch = Watch(self._config.silence_limit_s, self._config.operation_limit_s)
        block_ids = np.frombuffer(wire.receive(sock, 4 * num_blocks, watch), "<u4").astype(np.int64)
        is_in_range = bool(block_ids.max() < self._pool.num_blocks)
        head = wire.ANSWER.pack(wire.ANSWER_MAGIC, operation, Status.OK if is_in_range else Status.OUT_OF_RANGE)
        wire.send_views(sock, [memoryview(head)], watch)
        if is_in_range:
            self._send_blocks(sock, block_ids, bool(flags & wire.FLAG_CHECKSUM), watch)
        return True

    def _send_blocks(self, sock: socket.socket, block_ids: BlockIds, with_checksum: bool, watch: Watch) -> None:
        checksum = 0
        for batch in self._memory.batches(block_ids):
            if with_checksum:
                checksum = self._memory.checksum(batch.block_ids, checksum)
            wire.send_views(sock, batch.views, watch)
        wire.send_views(sock, [memoryview(wire.TRAILER.pack(checksum))], watch)
