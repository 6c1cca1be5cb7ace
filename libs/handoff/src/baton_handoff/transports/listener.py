"""A port that peers connect to: a thread for each connection, and the secrets by which peers are known; and its address."""

import asyncio
import hmac
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from baton_runtime.log import get_logger
from baton_runtime.rpc import split_address

from baton_handoff.transports import tcp_wire as wire
from baton_handoff.transports.base import TransportUnavailable
from baton_handoff.transports.tcp_wire import ConnectionFailed

log = get_logger(__name__)

# Secrets kept per peer: every start of every kvtransfer replica draws new ones, and all stay valid.
MAX_SECRETS_PER_PEER = 16


class PairListener:
    """Accepts connections and hands each to `serve` in a thread of its own, which must end when its socket is shut.

    Methods are called on the event loop, except admit (by serve); none blocks but close().
    """

    def __init__(self, name: str, serve: Callable[[socket.socket], None], max_connections: int) -> None:
        self._name = name
        self._serve = serve
        self._max_connections = max_connections
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
            wire.avoid_bbr(self._listener)
        except OSError as error:
            raise TransportUnavailable(self._name, f"cannot listen on {host}:{port}: {error}") from error
        self.port = self._listener.getsockname()[1]
        self._start_thread(self._accept, self._listener, f"{self._name}-accept")

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None:
        """Accept proofs made with this secret from this peer."""
        with self._lock:
            known = self._secrets.setdefault(peer_incarnation, [])
            if pair_secret not in known:
                known.append(pair_secret)
                del known[:-MAX_SECRETS_PER_PEER]

    def forbid(self, peer_incarnation: str) -> None:
        """Accept nothing more from this peer and end its connections."""
        with self._lock:
            self._secrets.pop(peer_incarnation, None)
            for sock, incarnation in self._connections.items():
                if incarnation == peer_incarnation:
                    wire.shut(sock)

    def admit(self, sock: socket.socket, peer_incarnation: str, given: bytes, made_with: Callable[[bytes], bytes]) -> bytes:
        """The secret of this peer that `given` proves; b"" if none does. From here on forbid() ends this connection.

        made_with: the proof that a secret would give.
        """
        with self._lock:
            # All secrets are tried, so that the time taken does not tell which one is nearly right.
            known = self._secrets.get(peer_incarnation, [])
            fitting = [secret for secret in known if hmac.compare_digest(given, made_with(secret))]
            if not fitting or not peer_incarnation:
                return b""
            self._connections[sock] = peer_incarnation
        return fitting[0]

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
            except (ConnectionFailed, OSError) as error:
                log.debug("transfer_connection_ended", thread=name, why=str(error))
            except Exception as error:  # supervisor: one broken connection must not go unseen, nor end the others
                log.error("transfer_thread_failed", thread=name, exc_info=error)
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
                is_full = self._is_closed or len(self._connections) >= self._max_connections
                if not is_full:
                    self._connections[sock] = ""
            if is_full:
                sock.close()
            else:
                self._start_thread(self._serve, sock, self._name)


async def resolved(address: str, transport: str, limit_s: float) -> tuple[int, tuple[Any, ...]]:
    """Address family and socket address of host:port. Asked for once, when a peer is opened: a name server that hangs must not hold
    a pull's blocks. Raises: TransportUnavailable.
    """
    host, port = split_address(address)
    try:
        async with asyncio.timeout(limit_s):
            found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError) as error:
        raise TransportUnavailable(transport, f"cannot resolve {address}: {error}") from error
    return found[0][0], found[0][4]
