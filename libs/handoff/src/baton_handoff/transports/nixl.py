"""Pulls through nixl: one-sided reads over RDMA, CUDA IPC, or between processes of a host. An optional extra.

The own pool is registered once per pair; a peer that proves the pair's secret on a control connection is told how to read. One
thread per opened peer owns the agent it reads with, and an operation that does not end by itself is ended with that agent:
nothing less stops what it may still write (docs/transports.md).
"""

import asyncio
import os
import resource
import threading
from collections.abc import Sequence

import msgspec
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import KvPool
from baton_runtime.log import get_logger
from baton_runtime.rpc import advertised_address, split_address

from baton_handoff.transports.base import PeerPool, PullFailed, PullStats, TransportUnavailable
from baton_handoff.transports.listener import resolved
from baton_handoff.transports.nixl_agent import AgentMaker, NixlAgent
from baton_handoff.transports.nixl_config import NixlConfig
from baton_handoff.transports.nixl_library import NixlFailed, engine_config, has_rdma, is_emulation_on, load_nixl
from baton_handoff.transports.nixl_reader import NAME, Reader, Target
from baton_handoff.transports.nixl_source import NixlSource
from baton_handoff.transports.operation import NO_BLOCKS, Operation, checked_ids, peer_block_bytes, unless_identity
from baton_handoff.transports.reslice import Reslice

log = get_logger(__name__)

_CLOSE_LIMIT_S = 2.0
_DESCRIPTORS_PER_AGENT = 12  # measured: 10, and the control connection
_OTHER_DESCRIPTORS = 1024


class _Parameters(msgspec.Struct):
    address: str
    num_blocks: int
    block_bytes: int
    version: str


class NixlPeer:
    """An opened peer; see PeerPool."""

    name = NAME

    def __init__(self, transport: "NixlTransport", target: Target) -> None:
        self._transport = transport
        self._target = target
        self._live: set[Operation] = set()  # on the event loop only
        self._reader: Reader | None = None

    async def pull(self, source_block_ids: Sequence[int], dest_block_ids: Sequence[int]) -> PullStats:
        """Read; see PeerPool. Ends by itself, after 2 s, or with the agent when dropped."""
        target = self._target
        ids = checked_ids(source_block_ids, dest_block_ids, target.num_blocks, self._transport.pool, NAME, target.reslice)
        return await self._run(Operation(*ids))

    async def connect(self) -> None:
        """Prove the secret and read the peer's token. Raises: PullFailed."""
        await self._run(Operation(NO_BLOCKS, NO_BLOCKS))

    def drop(self) -> None:
        """End the agent and the thread; see PeerPool. A later pull starts afresh."""
        reader, self._reader = self._reader, None
        if reader is not None:
            for operation in self._live:
                reader.stop(operation, "peer dropped")
            reader.drop()
            self._transport.dropped(self, reader.thread)

    async def _run(self, operation: Operation) -> PullStats:
        if self._reader is None:
            self._reader = self._transport.reader(self, self._target)
        reader = self._reader
        self._live.add(operation)
        try:
            reader.submit(operation)
            return await operation.wait(lambda: reader.stop(operation, "cancelled"))
        finally:
            self._live.discard(operation)


class NixlTransport:
    """Transport through nixl; see Transport. Both sides of it: the own pool served, and peers' pools pulled from."""

    name = NAME

    def __init__(self, pool: KvPool, incarnation: str, listen: str, advertise: str, config: NixlConfig | None = None) -> None:
        """listen, advertise: host of the control port, as others reach it; the port is any. Raises: NixlMissing."""
        self.pool = pool
        self._library = load_nixl()
        self._config = config or NixlConfig()
        self._emulation = is_emulation_on(self._config.emulation)
        self._listen = listen
        self._advertise = advertise
        self._ucx = engine_config(self._emulation, self._config.ucx)
        self._maker = AgentMaker(self._make, incarnation)
        self._source = NixlSource(pool, incarnation, self._maker, self._config)
        self._opened: set[NixlPeer] = set()
        self._ending: set[threading.Thread] = set()
        self._address = ""
        self._is_closed = False

    async def open(self) -> None:
        """Make the first agent and listen for peers; see Transport. Raises: TransportUnavailable."""
        _allow_descriptors(2 * self._config.max_connections * _DESCRIPTORS_PER_AGENT + _OTHER_DESCRIPTORS)
        try:
            await asyncio.to_thread(self._maker.prepare)
        except NixlFailed as error:
            raise TransportUnavailable(NAME, f"{error}; {_environment()}") from error
        host, _ = split_address(self._listen)
        await asyncio.to_thread(self._source.listener.open, host.strip("[]"), 0)
        self._address = advertised_address(f"{host}:0", self._source.listener.port, split_address(self._advertise)[0])
        log.info("nixl_open", version=self._library.version, ucx=self._ucx, emulation=self._emulation)

    async def close(self) -> None:
        """Drop peers, end agents and threads; see Transport."""
        if self._is_closed:
            return
        self._is_closed = True
        for peer in tuple(self._opened):
            peer.drop()
        await asyncio.to_thread(self._source.listener.close, _CLOSE_LIMIT_S)
        for thread in tuple(self._ending):
            await asyncio.to_thread(thread.join, _CLOSE_LIMIT_S)
        await asyncio.to_thread(self._maker.close)

    def offer(self) -> bytes:
        """Address of the control port, shape, nixl's version; see Transport. Nothing in it lets anybody read."""
        given = _Parameters(self._address, self.pool.num_blocks, self.pool.block_bytes, self._library.version)
        return msgspec.json.encode(given)

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None:
        """Tell a peer how to read if it proves this secret; see Transport."""
        self._source.listener.allow(peer_incarnation, pair_secret)

    def forbid(self, peer_incarnation: str) -> None:
        """End the agents a peer reads from; see Transport."""
        self._source.listener.forbid(peer_incarnation)

    def why_not(self, peer: Instance, parameters: bytes) -> str:
        """Compares block sizes and versions; see Transport."""
        try:
            given = msgspec.json.decode(parameters, type=_Parameters)
            split_address(given.address)
        except (msgspec.DecodeError, ValueError) as error:
            return f"parameters do not parse: {error}"
        if _release(given.version) != _release(self._library.version):
            return f"the peer has nixl {given.version}, here is {self._library.version}"
        return ""

    async def open_peer(
        self, peer: Instance, parameters: bytes, pair_secret: bytes, own_incarnation: str, reslice: Reslice | None = None
    ) -> PeerPool:
        """Connect to the peer, prove the secret, read its token; see Transport."""
        if problem := self.why_not(peer, parameters):
            raise TransportUnavailable(NAME, problem)
        given = msgspec.json.decode(parameters, type=_Parameters)
        reslice = unless_identity(reslice)
        if given.block_bytes != (expected := peer_block_bytes(self.pool, reslice)):
            raise TransportUnavailable(NAME, f"the peer's blocks have {given.block_bytes} bytes, expected {expected}")
        family, sockaddr = await resolved(given.address, NAME, self._config.connect_limit_s)
        target = Target(family, sockaddr, peer.incarnation, own_incarnation, pair_secret, given.num_blocks, given.block_bytes, reslice)
        opened = NixlPeer(self, target)
        try:
            await opened.connect()
        except PullFailed as error:
            opened.drop()
            raise TransportUnavailable(NAME, error.why) from error
        except asyncio.CancelledError:
            opened.drop()
            raise
        return opened

    def reader(self, peer: NixlPeer, target: Target) -> Reader:
        """A thread for a peer of this transport."""
        if self._is_closed:
            raise PullFailed(NAME, "the transport is closed")
        self._opened.add(peer)
        return Reader(target, self.pool, self._maker, self._config, emulation=self._emulation)

    def dropped(self, peer: NixlPeer, thread: threading.Thread) -> None:
        """A peer was dropped; its thread ends by itself, close() waits for it."""
        self._opened.discard(peer)
        self._ending = {*(ending for ending in self._ending if ending.is_alive()), thread}

    def _make(self, name: str) -> NixlAgent:
        return NixlAgent(self._library, name, self.pool.place, self._ucx)


def _release(version: str) -> list[str]:
    """What two ends must have in common: "1.5" of "1.5.1"."""
    return version.split(".")[:2]


def _allow_descriptors(wanted: int) -> None:
    """Raise the soft limit of open files: agents must not use up what the rest of the process needs."""
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if hard < wanted:
        log.warning("few_file_descriptors", limit=hard, wanted=wanted)
    if soft < min(wanted, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _environment() -> str:
    """What a person may look at who wonders why UCX does not start."""
    given = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name in ("UCX_TLS", "UCX_NET_DEVICES")]
    return f"{', '.join(given) or 'UCX_TLS is not set'}; {'an' if has_rdma() else 'no'} RDMA device is present"
