"""The side that is read: one blocking thread per connected peer that sends blocks as asked, and turns among them.

It reads the pool while the worker may already have given the blocks away: then the reader gets garbage, its Confirm is
answered NOT_PINNED, and the bytes are thrown away (docs/handoff.md, rule 3).

At most max_readers operations are answered at a time, in the order in which they were asked for, so that each ends soon and the
worker's own memory traffic is not drowned. A turn is not held longer than _HOLD_LIMIT_S, nor by a reader that takes nothing for
_SEND_TICK_S (tcp_wire): such an operation goes on beside the others, for a slow reader costs little and a stopped one nothing.
"""

import socket

import numpy as np
import xxhash
from baton_engine.pool import KvPool
from baton_runtime.log import get_logger

from baton_handoff.transports import tcp_wire as wire
from baton_handoff.transports.base import MAX_OPERATION_BYTES
from baton_handoff.transports.listener import PairListener
from baton_handoff.transports.operation import BlockIds
from baton_handoff.transports.tcp_memory import BlockBytes
from baton_handoff.transports.tcp_turns import Turn, Turns
from baton_handoff.transports.tcp_wire import ConnectionFailed, Status, TcpConfig, Watch

log = get_logger(__name__)

_IDLE_LIMIT_S = float("inf")  # TCP keepalive ends a dead connection; a living idle one may stay
# An operation of 32 MiB needs this at 128 MiB/s.
_HOLD_LIMIT_S = 0.25
# How often a reader that waits is told so. It takes us for silent after 2 s.
_WAITING_TICK_S = 0.5


class TcpSource:
    """Serves the own pool to whoever proves the pair's secret."""

    def __init__(self, pool: KvPool, memory: BlockBytes, incarnation: str, config: TcpConfig) -> None:
        """memory: the pool's."""
        self._pool = pool
        self._memory = memory
        self._incarnation = incarnation
        self._config = config
        self._max_blocks = max(1, MAX_OPERATION_BYTES // pool.block_bytes)
        self._turns = Turns(config.max_readers)
        self.listener = PairListener("tcp", self._serve, config.max_connections)

    def _serve(self, sock: socket.socket) -> None:
        wire.prepare(sock)
        if self._is_welcome(sock):
            while True:
                self._answer(sock)

    def _is_welcome(self, sock: socket.socket) -> bool:
        watch = Watch(self._config.silence_limit_s, self._config.connect_limit_s)
        challenge = wire.CHALLENGE.pack(wire.MAGIC, wire.nonce())
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
        secret = self.listener.admit(sock, _text(sink), given, lambda known: wire.proof(known, b"sink", challenge, hello))
        if not secret:
            return Status.REFUSED, bytes(wire.MAC_BYTES)
        status = Status.OK
        if _text(source) != self._incarnation:
            status = Status.WRONG_LIFE
        elif block_bytes != self._pool.block_bytes:
            status = Status.WRONG_LAYOUT
        return status, wire.proof(secret, b"source", challenge, hello)

    def _answer(self, sock: socket.socket) -> None:
        """Serve one request. Raises: ConnectionFailed when the connection is over."""
        wire.idle(sock, True)
        request = wire.receive(sock, wire.REQUEST.size, Watch(_IDLE_LIMIT_S, _IDLE_LIMIT_S))
        wire.idle(sock, False)
        magic, operation, flags, num_blocks = wire.REQUEST.unpack(request)
        if magic != wire.REQUEST_MAGIC or not 0 < num_blocks <= self._max_blocks:
            raise ConnectionFailed(f"a request for {num_blocks} blocks with magic {magic!r}")
        watch = Watch(self._config.silence_limit_s, self._config.operation_limit_s)
        block_ids = np.frombuffer(wire.receive(sock, 4 * num_blocks, watch), "<u4").astype(np.int64)
        if block_ids.max() >= self._pool.num_blocks:
            wire.send_views(sock, [_head(operation, Status.OUT_OF_RANGE)], watch)
            return
        turn = self._turns.ask()
        try:
            while not turn.wait(_WAITING_TICK_S):
                wire.send_views(sock, [_head(operation, Status.WAITING)], watch)
            self._send_blocks(sock, operation, block_ids, bool(flags & wire.FLAG_CHECKSUM), turn)
        finally:
            turn.give_back()

    def _send_blocks(self, sock: socket.socket, operation: int, block_ids: BlockIds, with_checksum: bool, turn: Turn) -> None:
        watch = _TurnWatch(self._config, turn)
        checksum = xxhash.xxh3_64()
        left_bytes = len(block_ids) * self._pool.block_bytes
        head = [_head(operation, Status.OK)]  # travels with the first bytes, as the checksum does with the last
        for views, num_bytes in self._memory.batches(block_ids):
            left_bytes -= num_bytes
            if left_bytes:
                wire.send_views(sock, head + views, watch, num_bytes + len(head) * wire.ANSWER.size)
                # Afterwards: the bytes are in the cache then, and the reader has something to do meanwhile.
                _add(checksum, views if with_checksum else [])
            else:
                _add(checksum, views if with_checksum else [])
                trailer = wire.TRAILER.pack(checksum.intdigest() if with_checksum else 0)
                wire.send_views(sock, [*head, *views, memoryview(trailer)], watch)
            head = []


class _TurnWatch(Watch):
    """Gives the turn back when the reader takes nothing, or needs long."""

    def __init__(self, config: TcpConfig, turn: Turn) -> None:
        super().__init__(config.silence_limit_s, config.operation_limit_s)
        self._turn = turn

    def progressed(self, call_began_s: float, num_bytes: int) -> None:
        super().progressed(call_began_s, num_bytes)
        if self._turn.held_s(call_began_s) > _HOLD_LIMIT_S:
            self._turn.give_back()

    def timed_out(self) -> None:
        self._turn.give_back()
        super().timed_out()


def _head(operation: int, status: Status) -> memoryview:
    return memoryview(wire.ANSWER.pack(wire.ANSWER_MAGIC, operation, status))


def _add(checksum: xxhash.xxh3_64, views: list[memoryview]) -> None:
    for view in views:
        checksum.update(view)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")
