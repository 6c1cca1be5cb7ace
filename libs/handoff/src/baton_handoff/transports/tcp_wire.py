"""What travels on a transfer connection, and blocking sends and receives that notice silence.

    source -> sink   challenge: magic, nonce
    sink -> source   hello: both incarnations, block_bytes, nonce, proof of the pair secret
    source -> sink   welcome: status, proof of the pair secret (the sink's memory is written by nobody else's bytes)
    then, any number of times:
    sink -> source   request: operation, number of blocks, u32 block ids; the next one may follow before this one is answered
    source -> sink   answer: operation, status; WAITING: another answer follows; OK: the blocks' bytes in that order, their checksum

Little-endian. The checksum is XXH3 (64 bit) of all the operation's bytes: it finds damaged, missing and misplaced ones and is no
protection from malice. The secret itself never travels: each side proves it by HMAC-SHA256 over both nonces and the hello.
"""

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256

from baton_handoff.transports.operation import Operation

MAGIC = b"BATONT02"
NONCE_BYTES = 16
MAC_BYTES = 32
CHALLENGE = struct.Struct("<8s16s")  # magic, nonce
HELLO = struct.Struct("<64s64sQ16s")  # sink incarnation, source incarnation, block_bytes, nonce; then MAC_BYTES
WELCOME = struct.Struct("<I32s")  # status, mac
REQUEST = struct.Struct("<4sQII")  # "PULL", operation, flags, number of blocks; then ids
ANSWER = struct.Struct("<4sQI")  # "DATA", operation, status
TRAILER = struct.Struct("<Q")  # checksum of the bytes, 0 if not asked for
REQUEST_MAGIC, ANSWER_MAGIC = b"PULL", b"DATA"
FLAG_CHECKSUM = 1

# One system call moves at most this much: the checksum then reads what is still in the cache (with the kernel's own copy of it,
# twice this lies there), and a stop is noticed. Measured best of 128 KiB to 2 MiB.
MAX_CALL_BYTES = 1 << 19
# Well below the kernel's 1024. More than 64 made no difference.
MAX_CALL_VIEWS = 256
# A sleeping receiver is woken when so much is there, not for every segment: waking costs the sender more than sending (measured:
# a fifth faster, without a checksum).
WAKE_BYTES = 1 << 19
# What takes BBR's place where it is the system's choice, in this order, as far as the system has them and lets us. Operations are bursts
# with pauses between them; BBR takes the pauses for the speed of the path and paces the next burst by it, with one segment under way
# and a delayed acknowledgement for each (measured 2026-11-25: 2 MiB took 75-105 ms instead of 3, some once in 500 operations; with
# cubic never in 6,600).
INSTEAD_OF_BBR = ("cubic", "reno")
_TICK_S = 0.5
_SEND_TICK_S = 0.25
_IDLE_TICK_S = 60.0


class Status(IntEnum):
    """Answers of the source."""

    OK = 0
    REFUSED = 1  # unknown peer or wrong secret: not told apart
    WRONG_LIFE = 2  # meant for another incarnation
    WRONG_LAYOUT = 3  # block_bytes differ
    BUSY = 4  # too many connections
    OUT_OF_RANGE = 5  # a block id is not in the pool
    WAITING = 6  # other readers are served first; said now and then, so that nobody takes the source for silent


@dataclass(frozen=True, slots=True)
class TcpConfig:
    """Limits of the tcp transport.

    silence_limit_s: an operation whose peer sends nothing for so long has failed.
    operation_limit_s: a request of at most 32 MiB that takes longer has failed, even if bytes trickle; and so has one whose turn at
        the source does not come for so long. An operation is one request, or several where single units of large blocks are wanted.
    connect_limit_s: limit of connecting and, again, of proving the secret.
    checksum: ask for a checksum of every operation and compare it.
    max_connections: peers that may be connected to this source; one each.
    max_readers: operations this source answers at a time, the longest waiting first; none keeps its place for more than
        _HOLD_LIMIT_S (tcp_source).
    """

    silence_limit_s: float = 2.0
    operation_limit_s: float = 10.0
    connect_limit_s: float = 2.0
    checksum: bool = True
    max_connections: int = 512
    max_readers: int = 4


class ConnectionFailed(Exception):
    """The connection cannot go on. The text gives the facts. is_silence: the peer is there but does not answer."""

    def __init__(self, why: str, *, is_silence: bool = False) -> None:
        self.is_silence = is_silence
        super().__init__(why)


class Watch:
    """When to give up on a blocking exchange: silence, a limit in all, or an operation that was asked to stop."""

    def __init__(self, silence_limit_s: float, limit_s: float, operation: Operation | None = None) -> None:
        self._silence_limit_s = silence_limit_s
        self._limit_s = limit_s
        self._operation = operation
        self._began_s = self._alive_s = time.monotonic()
        self.num_bytes = 0

    def call_began(self) -> float:
        """Before a system call: the time; raises ConnectionFailed if the whole took too long or is not wanted any more."""
        if self._operation is not None and self._operation.stopped:
            raise ConnectionFailed(f"stopped after {self.num_bytes} bytes")
        now_s = time.monotonic()
        if now_s - self._began_s > self._limit_s:
            raise ConnectionFailed(f"{self.num_bytes} bytes in {now_s - self._began_s:.1f} s, limit {self._limit_s} s", is_silence=True)
        return now_s

    def progressed(self, call_began_s: float, num_bytes: int) -> None:
        """The call moved bytes, at some time after it began."""
        self._alive_s = call_began_s
        self.num_bytes += num_bytes

    def timed_out(self) -> None:
        """The call moved nothing for a tick; raises ConnectionFailed if that is too long by now."""
        silent_s = time.monotonic() - self._alive_s
        if silent_s >= self._silence_limit_s - _TICK_S / 2:
            raise ConnectionFailed(f"peer silent for {silent_s:.1f} s after {self.num_bytes} bytes", is_silence=True)


def prepare(sock: socket.socket) -> None:
    """Blocking with the kernel's own timeouts (no poll per call), keepalive, no delay."""
    sock.settimeout(None)
    _set_tick(sock, socket.SO_RCVTIMEO, _TICK_S)
    _set_tick(sock, socket.SO_SNDTIMEO, _SEND_TICK_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 10_000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def avoid_bbr(sock: socket.socket) -> None:
    """Before it connects or listens (accepted connections inherit it): a socket that BBR has begun to pace stays paced."""
    if not hasattr(socket, "TCP_CONGESTION"):
        return
    if not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr"):
        return
    for name in INSTEAD_OF_BBR:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError:  # not loaded, or not among tcp_allowed_congestion_control
            continue
        return


def idle(sock: socket.socket, is_idle: bool) -> None:
    """Whether the next receive may take for ever: it need not look at the clock twice a second then."""
    _set_tick(sock, socket.SO_RCVTIMEO, _IDLE_TICK_S if is_idle else _TICK_S)


def wake_at(sock: socket.socket, num_bytes: int) -> None:
    """Wake a receiver that sleeps in this socket when so many bytes are there (or the connection ends).

    At least num_bytes must be sure to come behind what the next call asks for; else that call sleeps out its tick.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
    except OSError:
        pass  # a matter of speed only; not every system lets it be set


def shut(sock: socket.socket) -> None:
    """Wake whoever blocks in this socket; its thread closes it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # not connected any more


def send_views(sock: socket.socket, views: Sequence[memoryview], watch: Watch, num_bytes: int = 0) -> None:
    """Send all of a batch of at most MAX_CALL_VIEWS. num_bytes: of all of them, if known. Raises: ConnectionFailed."""
    pending, left_bytes = views, num_bytes or sum(map(len, views))
    while True:
        began_s = watch.call_began()
        try:
            sent = sock.sendmsg(pending)
        except BlockingIOError:
            watch.timed_out()
            continue
        except OSError as error:
            raise ConnectionFailed(f"sending failed after {watch.num_bytes} bytes: {error}") from error
        watch.progressed(began_s, sent)
        left_bytes -= sent
        if left_bytes <= 0:
            return
        pending = _rest(pending, sent)


def receive_views(sock: socket.socket, views: Sequence[memoryview], watch: Watch, num_bytes: int = 0) -> None:
    """Fill all of a batch of at most MAX_CALL_VIEWS. num_bytes: of all of them, if known. Raises: ConnectionFailed."""
    pending, left_bytes = views, num_bytes or sum(map(len, views))
    while True:
        began_s = watch.call_began()
        try:
            received = sock.recvmsg_into(pending, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            watch.timed_out()
            continue
        except OSError as error:
            raise ConnectionFailed(f"receiving failed after {watch.num_bytes} bytes: {error}") from error
        if received == 0:
            raise ConnectionFailed(f"connection closed after {watch.num_bytes} bytes")
        watch.progressed(began_s, received)
        left_bytes -= received
        if left_bytes <= 0:
            return
        pending = _rest(pending, received)


def receive(sock: socket.socket, num_bytes: int, watch: Watch) -> bytes:
    """Exactly num_bytes. Raises: ConnectionFailed."""
    buffer = bytearray(num_bytes)
    receive_views(sock, [memoryview(buffer)], watch)
    return bytes(buffer)


def nonce() -> bytes:
    """NONCE_BYTES that nobody can guess."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, side: bytes, challenge: bytes, hello: bytes) -> bytes:
    """MAC_BYTES that only a holder of the secret can make for this connection and this side (b"sink", b"source")."""
    return hmac.digest(secret, side + challenge + hello, sha256)


def is_proof(given: bytes, secret: bytes, side: bytes, challenge: bytes, hello: bytes) -> bool:
    """In constant time."""
    return hmac.compare_digest(given, proof(secret, side, challenge, hello))


def _set_tick(sock: socket.socket, option: int, tick_s: float) -> None:
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(tick_s), int(tick_s % 1 * 1e6)))


def _rest(views: Sequence[memoryview], done_bytes: int) -> list[memoryview]:
    for index, view in enumerate(views):
        if done_bytes < view.nbytes:
            return [view[done_bytes:], *views[index + 1 :]]
        done_bytes -= view.nbytes
    return []
