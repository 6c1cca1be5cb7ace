"""What travels on the control connection of a pair, beside the bytes that nixl moves.

    source -> sink   challenge: magic, nonce
    sink -> source   hello: both incarnations, nonce, proof of the pair's secret
    source -> sink   welcome: status, proof, and what the sink needs to read the pool (RemotePool as JSON), covered by the proof
    then:
    sink -> source   HOT before it reads by emulation, CALM after it and once it is connected

The connection's end, whoever makes it, ends the reading: the source's agent goes with it. Little-endian.
"""

import hmac
import secrets
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from baton_handoff.transports import tcp_wire as wire
from baton_handoff.transports.nixl_agent import RemotePool
from baton_handoff.transports.tcp_wire import ConnectionFailed, Watch

MAGIC = b"BATONX01"
CHALLENGE = struct.Struct("<8s16s")  # magic, nonce
HELLO = struct.Struct("<64s64s16s")  # sink incarnation, source incarnation, nonce; then the proof
WELCOME = struct.Struct("<II32s")  # status, bytes of the RemotePool, proof
HOT, CALM = b"h", b"c"
_MAX_POOL_BYTES = 1 << 20  # of the JSON; measured: 600


class Status(IntEnum):
    """Answers of the source."""

    OK = 0
    REFUSED = 1  # unknown peer or wrong secret: not told apart
    WRONG_LIFE = 2  # meant for another incarnation
    BROKEN = 3  # nixl fails on the source's side


@dataclass(frozen=True, slots=True)
class Hello:
    """A sink's words, and the bytes they came in."""

    sink: str
    source: str
    raw: bytes
    proof: bytes


def send_challenge(sock: socket.socket, watch: Watch) -> bytes:
    """The source's first word."""
    challenge = CHALLENGE.pack(MAGIC, secrets.token_bytes(wire.NONCE_BYTES))
    wire.send_views(sock, [memoryview(challenge)], watch)
    return challenge


def receive_hello(sock: socket.socket, watch: Watch) -> Hello:
    """The sink's answer to it. Raises: ConnectionFailed."""
    raw = wire.receive(sock, HELLO.size, watch)
    sink, source, _ = HELLO.unpack(raw)
    return Hello(_text(sink), _text(source), raw, wire.receive(sock, wire.MAC_BYTES, watch))


def send_welcome(sock: socket.socket, status: Status, body: bytes, proof: bytes, watch: Watch) -> None:
    """The source's answer; body and proof are empty unless the status is OK."""
    wire.send_views(sock, [memoryview(WELCOME.pack(status, len(body), proof) + body)], watch)


def welcome_proof(secret: bytes, challenge: bytes, hello: bytes, body: bytes) -> bytes:
    """That who sends this body knows the secret."""
    return wire.proof(secret, b"source", challenge, hello + body)


def introduce(sock: socket.socket, sink: str, source: str, secret: bytes, watch: Watch) -> RemotePool:
    """The sink's part of it all. Raises: ConnectionFailed; is_silence says that it is of no use to try again at once."""
    challenge = wire.receive(sock, CHALLENGE.size, watch)
    if not challenge.startswith(MAGIC):
        raise ConnectionFailed("not a nixl control port of this version", is_silence=True)
    hello = HELLO.pack(sink.encode(), source.encode(), secrets.token_bytes(wire.NONCE_BYTES))
    wire.send_views(sock, [memoryview(hello + wire.proof(secret, b"sink", challenge, hello))], watch)
    status, num_bytes, proof = WELCOME.unpack(wire.receive(sock, WELCOME.size, watch))
    if status != Status.OK:
        raise ConnectionFailed(f"refused by the peer: {_status_name(status)}", is_silence=True)
    if num_bytes > _MAX_POOL_BYTES:
        raise ConnectionFailed(f"{num_bytes} bytes about a pool", is_silence=True)
    body = wire.receive(sock, num_bytes, watch)
    if not hmac.compare_digest(proof, welcome_proof(secret, challenge, hello, body)):
        raise ConnectionFailed("the peer does not know the pair's secret", is_silence=True)
    try:
        return msgspec.json.decode(body, type=RemotePool)
    except (msgspec.DecodeError, ValueError) as error:
        raise ConnectionFailed(f"what the peer says about its pool does not parse: {error}", is_silence=True) from error


def heard(sock: socket.socket, *, is_waiting: bool) -> bytes | None:
    """The next word from the other side; None: nothing yet (waiting: for a tick of 0.5 s); b"": the connection is over."""
    try:
        return sock.recv(1, 0 if is_waiting else socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")


def _status_name(status: int) -> str:
    try:
        return Status(status).name
    except ValueError:
        return str(status)
