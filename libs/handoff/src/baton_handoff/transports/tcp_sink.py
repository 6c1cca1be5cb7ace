"""The side that reads: one thread and one connection per opened peer, on which blocks are asked for by id.

A blocking thread, because one that sleeps in recvmsg_into moves several times what an event loop does and leaves the loop alone.
Nothing outside the thread writes to blocks, so an operation is over exactly when the thread says so.

The request of the next operation is sent while the bytes of the running one still come, so that the source never waits for us.
If that next one is stopped before its turn, the connection is given up: its answer is on its way and nobody wants it.
"""

import queue
import socket
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import xxhash
from baton_runtime.log import get_logger

from baton_handoff.transports import tcp_wire as wire
from baton_handoff.transports.base import ChecksumMismatch, PullFailed
from baton_handoff.transports.operation import BlockIds, Operation
from baton_handoff.transports.reslice import Reslice
from baton_handoff.transports.tcp_memory import Landing, Part
from baton_handoff.transports.tcp_wire import ConnectionFailed, Status, TcpConfig, Watch

log = get_logger(__name__)

NAME = "tcp"
# A request sent ahead must fit into the socket's buffers: the source does not read while it sends.
_MAX_IDS_AHEAD = 4096


@dataclass(frozen=True, slots=True)
class Target:
    """Who is asked, and how to prove who asks. reslice: how its blocks become own ones; None if they are copied whole."""

    family: int
    sockaddr: tuple[Any, ...]
    num_blocks: int
    incarnation: str
    own_incarnation: str
    secret: bytes
    reslice: Reslice | None = None


class Connection:
    """One thread and its socket. Lives until dropped; reconnects by itself when an operation needs it."""

    def __init__(self, target: Target, landing: Landing, config: TcpConfig) -> None:
        self._target = target
        self._landing = landing
        self._config = config
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._running: Operation | None = None
        self._sock: socket.socket | None = None
        self._is_dropped = False
        self._taken: deque[Operation | None] = deque()  # from here on the thread's own: taken from the queue before their turn
        self._ahead: tuple[Operation, list[Part], int] | None = None  # asked for before its turn, under this number
        self._last_number = 0
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
        while (operation := self._next()) is not None:
            if operation.start():
                self._serve(operation)
            elif self._ahead is not None and self._ahead[0] is operation:
                self._disconnect()
        self._disconnect()

    def _next(self) -> Operation | None:
        return self._taken.popleft() if self._taken else self._queue.get()

    def _serve(self, operation: Operation) -> None:
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
        operation.end(result, len(operation.dest_ids) * self._landing.unit_bytes)

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
        if self._ahead is not None and self._ahead[0] is operation:
            (_, parts, number), self._ahead = self._ahead, None
        else:
            parts, number = self._landing.parts(operation.source_ids, operation.dest_ids), 0
        num_batches = 0
        for part in parts:
            number = number or self._ask(sock, part.block_ids, self._watch(operation))
            num_batches += self._receive(sock, part, number, operation, may_ask_ahead=part is parts[-1])
            number = 0
        return num_batches

    def _receive(self, sock: socket.socket, part: Part, number: int, operation: Operation, *, may_ask_ahead: bool) -> int:
        """All bytes of a part, to where they belong. Returns: number of batches."""
        self._await_turn(sock, number, operation)
        watch = self._watch(operation)
        checksum, num_batches, left_bytes = xxhash.xxh3_64(), 0, part.num_bytes
        is_woken_late = left_bytes >= 2 * wire.WAKE_BYTES
        if is_woken_late:
            wire.wake_at(sock, wire.WAKE_BYTES)
        for views, num_bytes in part.batches():
            num_batches += 1
            left_bytes -= num_bytes
            if is_woken_late and left_bytes < wire.WAKE_BYTES:
                is_woken_late = False
                wire.wake_at(sock, 1)
            wire.receive_views(sock, views, watch, num_bytes)
            if self._config.checksum:
                for view in views:
                    checksum.update(view)
            if may_ask_ahead and self._ahead is None:
                self._ask_ahead(sock, watch)
        (sent,) = wire.TRAILER.unpack(wire.receive(sock, wire.TRAILER.size, watch))
        if self._config.checksum and sent != checksum.intdigest():
            raise ChecksumMismatch(NAME, f"checksum of {len(part.block_ids)} blocks is {checksum.intdigest():016x}, sent {sent:016x}")
        return num_batches

    def _watch(self, operation: Operation) -> Watch:
        return Watch(self._config.silence_limit_s, self._config.operation_limit_s, operation)

    def _ask(self, sock: socket.socket, block_ids: BlockIds, watch: Watch) -> int:
        """Send a request. Returns: its number."""
        self._last_number += 1
        flags = wire.FLAG_CHECKSUM if self._config.checksum else 0
        head = wire.REQUEST.pack(wire.REQUEST_MAGIC, self._last_number, flags, len(block_ids))
        wire.send_views(sock, [memoryview(head + block_ids.astype("<u4").tobytes())], watch)
        return self._last_number

    def _ask_ahead(self, sock: socket.socket, watch: Watch) -> None:
        """Ask for the next operation, if there is one, while the running one's bytes still come."""
        if not self._taken:
            if self._queue.empty():
                return
            self._taken.append(self._queue.get())
        operation = self._taken[0]
        if operation is None or operation.stopped or not 0 < len(operation.source_ids) <= _MAX_IDS_AHEAD:
            return
        parts = self._landing.parts(operation.source_ids, operation.dest_ids)
        self._ahead = (operation, parts, self._ask(sock, parts[0].block_ids, watch))

    def _await_turn(self, sock: socket.socket, number: int, operation: Operation) -> None:
        """Until the source begins to answer this request. Raises: PullFailed if it refuses."""
        watch = self._watch(operation)
        status = int(Status.WAITING)
        while status == Status.WAITING:
            magic, answered, status = wire.ANSWER.unpack(wire.receive(sock, wire.ANSWER.size, watch))
            self._is_answered = True
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
            wire.avoid_bbr(sock)
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
        block_bytes = self._landing.peer_block_bytes
        hello = wire.HELLO.pack(target.own_incarnation.encode(), target.incarnation.encode(), block_bytes, wire.nonce())
        mac = wire.proof(target.secret, b"sink", challenge, hello)
        wire.send_views(sock, [memoryview(hello + mac)], watch)
        status, mac = wire.WELCOME.unpack(wire.receive(sock, wire.WELCOME.size, watch))
        if status == Status.OK and not wire.is_proof(mac, target.secret, b"source", challenge, hello):
            raise ConnectionFailed("the peer does not know the pair's secret", is_silence=True)
        if status != Status.OK:
            raise ConnectionFailed(f"refused by the peer: {_status_name(status)}", is_silence=True)

    def _disconnect(self) -> None:
        self._ahead = None
        with self._lock:
            sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def _fail_queued(self, why: str) -> None:
        """Without this each of n queued operations would wait out the silence of a stopped peer, one after the other."""
        while not self._queue.empty():
            self._taken.append(self._queue.get())
        for operation in self._taken:
            if operation is not None:
                operation.end(PullFailed(NAME, why))


def _status_name(status: int) -> str:
    try:
        return Status(status).name
    except ValueError:
        return str(status)
