"""The source's side of the nixl transport: who may read, and the agents that let them."""

import socket
import time

import msgspec
from baton_engine.pool import KvPool
from baton_runtime.log import get_logger

from baton_handoff.transports import nixl_wire
from baton_handoff.transports import tcp_wire as wire
from baton_handoff.transports.listener import PairListener
from baton_handoff.transports.nixl_agent import AgentMaker, NixlAgent
from baton_handoff.transports.nixl_config import NixlConfig
from baton_handoff.transports.nixl_library import NixlFailed
from baton_handoff.transports.nixl_wire import Status
from baton_handoff.transports.tcp_wire import Watch

log = get_logger(__name__)

_HOT_NAP_S = 50e-6


class NixlSource:
    """Gives every peer that proves the pair's secret an agent of its own to read from, for as long as its connection stands."""

    def __init__(self, pool: KvPool, incarnation: str, maker: AgentMaker, config: NixlConfig) -> None:
        self._pool = pool
        self._incarnation = incarnation
        self._maker = maker
        self._config = config
        self.listener = PairListener("nixl", self._serve, config.max_connections)

    def _serve(self, sock: socket.socket) -> None:
        wire.prepare(sock)
        agent = self._welcomed(sock)
        if agent is None:
            return
        try:
            self._work(sock, agent)
        except NixlFailed as error:
            log.warning("nixl_source_failed", why=str(error))
        finally:
            agent.destroy()  # takes back what the peer was given

    def _welcomed(self, sock: socket.socket) -> NixlAgent | None:
        """The agent of a peer that has proved who it is, and was told how to read."""
        watch = Watch(self._config.connect_limit_s, self._config.connect_limit_s)
        challenge = nixl_wire.send_challenge(sock, watch)
        hello = nixl_wire.receive_hello(sock, watch)
        secret = self.listener.admit(sock, hello.sink, hello.proof, lambda known: wire.proof(known, b"sink", challenge, hello.raw))
        status = Status.OK
        if not secret:
            status = Status.REFUSED
        elif hello.source != self._incarnation:
            status = Status.WRONG_LIFE
        agent, body = self._made() if status is Status.OK else (None, b"")
        try:
            if status is Status.OK and agent is None:
                status = Status.BROKEN
            if status is not Status.OK:
                log.warning("nixl_peer_refused", peer=hello.sink, status=status.name)
            proof = nixl_wire.welcome_proof(secret, challenge, hello.raw, body) if status is Status.OK else bytes(wire.MAC_BYTES)
            nixl_wire.send_welcome(sock, status, body, proof, watch)
        except BaseException:
            if agent is not None:
                agent.destroy()
            raise
        return agent

    def _made(self) -> tuple[NixlAgent | None, bytes]:
        """An agent, and what its reader is told; None if nixl fails."""
        agent = None
        try:
            agent = self._maker.take()
            return agent, msgspec.json.encode(agent.offered(self._pool.num_blocks, self._pool.block_bytes))
        except NixlFailed as error:
            log.error("nixl_agent_failed", why=str(error))
        if agent is not None:
            agent.destroy()
        return None, b""

    def _work(self, sock: socket.socket, agent: NixlAgent) -> None:
        """Let UCX make the connection, and later work when the sink says so; returns when the connection ends."""
        if not self._is_connected(sock, agent):
            return
        self._maker.refill()
        hot_until_s = 0.0
        while True:
            is_hot = time.monotonic() < hot_until_s
            word = nixl_wire.heard(sock, is_waiting=not is_hot)
            if word == b"":
                return
            if word is not None:
                # Bounded: a sink that stops while it reads must not keep this process busy.
                hot_until_s = time.monotonic() + 2 * self._config.operation_limit_s if word == nixl_wire.HOT else 0.0
            agent.progress()
            if is_hot:
                time.sleep(_HOT_NAP_S)

    def _is_connected(self, sock: socket.socket, agent: NixlAgent) -> bool:
        """Work without waiting until the sink says that it is connected; False if it goes, or takes too long."""
        limit_s = time.monotonic() + self._config.connect_limit_s
        while time.monotonic() < limit_s:
            word = nixl_wire.heard(sock, is_waiting=False)
            if word is not None:
                return word == nixl_wire.CALM
            agent.progress()
            time.sleep(_HOT_NAP_S)
        return False
