"""Pulls over TCP: one connection per pair, asked for block by block id, received straight into own blocks.

This is the event loop's side of it; the threads are in tcp_sink (reads) and tcp_source (is read).
"""

import asyncio
import json
import threading
import time
from collections.abc import Sequence

import msgspec
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import KvPool
from baton_runtime.rpc import advertised_address, split_address

from baton_handoff.transports.base import PeerPool, PullFailed, PullStats, TransportUnavailable
from baton_handoff.transports.listener import resolved
from baton_handoff.transports.operation import NO_BLOCKS, Operation, checked_ids, peer_block_bytes, unless_identity
from baton_handoff.transports.reslice import Reslice
from baton_handoff.transports.tcp_memory import BlockBytes, Landing
from baton_handoff.transports.tcp_sink import NAME, Connection, Target
from baton_handoff.transports.tcp_source import TcpSource
from baton_handoff.transports.tcp_wire import TcpConfig

_CLOSE_LIMIT_S = 2.0


class _Parameters(msgspec.Struct):
    address: str
    num_blocks: int
    block_bytes: int


class TcpPeer:
    """An opened peer; see PeerPool."""

    name = NAME

    def __init__(self, transport: "TcpTransport", target: Target) -> None:
        self._transport = transport
        self._target = target
        self._live: set[Operation] = set()  # on the event loop only
        self._connection: Connection | None = None

    async def pull(self, source_block_ids: Sequence[int], dest_block_ids: Sequence[int]) -> PullStats:
        """Ask and receive; see PeerPool. Ends when the socket is shut, or after 2 s of the peer's silence."""
        target = self._target
        ids = checked_ids(source_block_ids, dest_block_ids, target.num_blocks, self._transport.pool, NAME, target.reslice)
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
        self._memory = BlockBytes(pool.data)
        self._source = TcpSource(pool, self._memory, incarnation, self._config)
        self._connected: set[TcpPeer] = set()
        self._ending: set[threading.Thread] = set()
        self._address = ""
        self._is_closed = False

    async def open(self) -> None:
        """Listen for peers; see Transport."""
        host, port = split_address(self._listen)
        await asyncio.to_thread(self._source.listener.open, host.strip("[]"), port or 0)
        self._address = advertised_address(self._listen, self._source.listener.port, self._advertise)

    async def close(self) -> None:
        """Drop peers, end threads; see Transport."""
        if self._is_closed:
            return
        self._is_closed = True
        for peer in tuple(self._connected):
            peer.drop()
        deadline_s = time.monotonic() + _CLOSE_LIMIT_S
        await asyncio.to_thread(self._source.listener.close, _CLOSE_LIMIT_S)
        for thread in tuple(self._ending):
            await asyncio.to_thread(thread.join, max(0.0, deadline_s - time.monotonic()))

    def offer(self) -> bytes:
        """Address and shape; see Transport."""
        return json.dumps({"address": self._address, "num_blocks": self.pool.num_blocks, "block_bytes": self.pool.block_bytes}).encode()

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None:
        """Let a peer in that proves this secret; see Transport."""
        self._source.listener.allow(peer_incarnation, pair_secret)

    def forbid(self, peer_incarnation: str) -> None:
        """Throw a peer out; see Transport."""
        self._source.listener.forbid(peer_incarnation)

    def why_not(self, peer: Instance, parameters: bytes) -> str:
        """Only whether they parse; see Transport."""
        try:
            split_address(msgspec.json.decode(parameters, type=_Parameters).address)
        except (msgspec.DecodeError, ValueError) as error:
            return f"parameters do not parse: {error}"
        return ""

    async def open_peer(
        self, peer: Instance, parameters: bytes, pair_secret: bytes, own_incarnation: str, reslice: Reslice | None = None
    ) -> PeerPool:
        """Connect to the peer and prove the secret; see Transport."""
        if problem := self.why_not(peer, parameters):
            raise TransportUnavailable(NAME, problem)
        given = msgspec.json.decode(parameters, type=_Parameters)
        if given.block_bytes != (expected := peer_block_bytes(self.pool, reslice)):
            raise TransportUnavailable(NAME, f"the peer's blocks have {given.block_bytes} bytes, expected {expected}")
        family, sockaddr = await resolved(given.address, NAME, self._config.connect_limit_s)
        target = Target(family, sockaddr, given.num_blocks, peer.incarnation, own_incarnation, pair_secret, unless_identity(reslice))
        opened = TcpPeer(self, target)
        try:
            await opened.connect()
        except PullFailed as error:
            opened.drop()
            raise TransportUnavailable(NAME, error.why) from error
        except asyncio.CancelledError:
            opened.drop()
            raise
        return opened

    def connect(self, peer: TcpPeer, target: Target) -> Connection:
        """A connection's thread for a peer of this transport."""
        if self._is_closed:
            raise PullFailed(NAME, "the transport is closed")
        self._connected.add(peer)
        return Connection(target, Landing(self.pool, self._memory, target.reslice), self._config)

    def dropped(self, peer: TcpPeer, thread: threading.Thread) -> None:
        """A peer was dropped; its thread ends by itself, close() waits for it."""
        self._connected.discard(peer)
        self._ending = {*(ending for ending in self._ending if ending.is_alive()), thread}
