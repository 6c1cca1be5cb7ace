"""The sink's side of the nixl transport: the thread that owns the agent with which one peer's pool is read."""

import queue
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from baton_engine.pool import KvPool
from baton_runtime.log import get_logger

from baton_handoff.transports import nixl_wire
from baton_handoff.transports import tcp_wire as wire
from baton_handoff.transports.base import PullFailed
from baton_handoff.transports.nixl_agent import AgentMaker, NixlAgent
from baton_handoff.transports.nixl_config import NixlConfig
from baton_handoff.transports.nixl_landing import Landing
from baton_handoff.transports.nixl_library import NixlFailed
from baton_handoff.transports.operation import Operation
from baton_handoff.transports.reslice import Reslice
from baton_handoff.transports.tcp_wire import ConnectionFailed, Watch

log = get_logger(__name__)

NAME = "nixl"
_IDLE_TICK_S = 1.0
_CONTROL_TICK_S = 0.02


@dataclass(frozen=True, slots=True)
class Target:
    """Whose pool is read, where its control port is, and how to prove who reads. reslice: None for equal layouts."""

    family: int
    sockaddr: tuple[Any, ...]
    incarnation: str
    own_incarnation: str
    secret: bytes
    num_blocks: int
    block_bytes: int
    reslice: Reslice | None = None


@dataclass(slots=True)
class _Live:
    operation: Operation
    transfers: Iterator[int]  # the reads it is made of, one after the other
    transfer: int  # the one that runs
    deadline_s: float
    stop_by_s: float = float("inf")  # once it is not wanted any more


class Reader:
    """One thread with its control connection and its agent. Connects when an operation needs it; lives until dropped.

    Whatever goes wrong with one operation ends the agent, because nothing less ends what it reads; the operations that run
    beside it fail with it. Operations end after their agent has.
    """

    def __init__(self, target: Target, pool: KvPool, maker: AgentMaker, config: NixlConfig, *, emulation: bool) -> None:
        self._target = target
        self._pool = pool
        self._landing = Landing(pool, target.reslice)
        self._maker = maker
        self._config = config
        self._emulation = emulation
        # Bounded by its callers: one operation per handoff, two per peer.
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._sock: socket.socket | None = None
        self._connecting: Operation | None = None
        self._is_dropped = False
        # From here on the thread's own.
        self._agent: NixlAgent | None = None
        self._live: list[_Live] = []
        self._next_control_s = 0.0
        self.thread = threading.Thread(target=self._work, name="nixl-sink", daemon=True)
        self.thread.start()

    def submit(self, operation: Operation) -> None:
        """Queue an operation for the thread."""
        self._queue.put(operation)

    def stop(self, operation: Operation, why: str) -> None:
        """End one operation soon. A read that goes on in spite of it is ended with the agent."""
        operation.stop(NAME, why)
        with self._lock:
            if self._connecting is operation and self._sock is not None:
                wire.shut(self._sock)

    def drop(self) -> None:
        """End the agent and the thread; stop the operations first."""
        with self._lock:
            self._is_dropped = True
            if self._sock is not None:
                wire.shut(self._sock)
        self._queue.put(None)

    def _work(self) -> None:
        is_over = False
        while not is_over:
            try:
                is_over = not self._turn()
            except Exception as error:  # supervisor: whatever happened, the waiters must hear that it is over
                log.error("nixl_reader_failed", exc_info=error)
                is_over = self._is_dropped
                self._give_up(f"internal error: {type(error).__name__}")
        self._give_up("peer dropped")
        self._fail_queued("peer dropped")

    def _turn(self) -> bool:
        """Take up what is queued, look after what runs. False: dropped."""
        try:
            if self._live and self._landing.staging_rows:
                raise queue.Empty  # there is one buffer
            operation = self._queue.get(timeout=_IDLE_TICK_S) if not self._live else self._queue.get_nowait()
        except queue.Empty:
            self._look_after(nap=bool(self._live))
            return True
        if operation is None or self._is_dropped:
            if operation is not None:
                operation.stop(NAME, "peer dropped")
            return False
        if operation.start():
            self._take_up(operation)
        return True

    def _take_up(self, operation: Operation) -> None:
        why, is_hopeless = "", False
        try:
            self._post(operation)
        except (NixlFailed, ConnectionFailed) as error:
            why = str(error)
            is_hopeless = isinstance(error, ConnectionFailed) and error.is_silence
        except Exception as error:  # supervisor: whatever happened, this operation must end
            log.error("nixl_operation_failed", exc_info=error)
            why = f"internal error: {type(error).__name__}"
        # Not in the except clause: the error refers to frames, and those to what has to be gone with the agent.
        if why:
            self._give_up(why, operation)
            if is_hopeless and not operation.stopped:
                self._fail_queued(why)

    def _post(self, operation: Operation) -> None:
        agent = self._connected(operation)
        if not operation.source_ids.size:
            operation.end(0)  # open_peer: only the connection is asked for
            self._maker.refill()
            return
        if self._is_over():
            raise ConnectionFailed("the peer has closed the connection")
        if self._emulation and not self._live:
            self._say(nixl_wire.HOT)
        deadline_s = time.monotonic() + self._config.operation_limit_s
        transfers = self._landing.transfers(agent, operation.source_ids, operation.dest_ids)
        self._live.append(_Live(operation, transfers, next(transfers), deadline_s))
        self._look_after(nap=False)

    def _look_after(self, *, nap: bool) -> None:
        """See what has ended and what must be; lets UCX work."""
        agent = self._agent
        if agent is None:
            return
        why = ""
        try:
            if not self._live:
                agent.progress()  # keeps what came meanwhile from piling up
            for live in tuple(self._live):
                why = why or self._advance(agent, live)
        except (NixlFailed, ConnectionFailed) as error:
            why = str(error)
        if self._live and not why and self._is_over():
            why = "the peer has closed the connection"
        if why:
            is_late = any(time.monotonic() >= live.deadline_s for live in self._live)
            self._give_up(why)
            if is_late:
                self._fail_queued(why)  # each would wait as long, one after the other
        elif nap and self._live:
            time.sleep(_nap_s(time.monotonic() - self._live[-1].deadline_s + self._config.operation_limit_s))

    def _advance(self, agent: NixlAgent, live: _Live) -> str:
        """Take an operation as far as it goes now. Returns: why the agent must go for its sake; "" if it need not."""
        while agent.is_done(live.transfer):
            agent.release(live.transfer)
            following = next(live.transfers, None)
            if following is None:
                self._finish(live)
                return ""
            live.transfer = following
            if why := self._why_end(live):
                return why
        return self._why_end(live)

    def _finish(self, live: _Live) -> None:
        self._live.remove(live)
        operation = live.operation
        num_runs = 1 + int(np.count_nonzero((np.diff(operation.source_ids) != 1) | (np.diff(operation.dest_ids) != 1)))
        operation.end(num_runs, operation.dest_ids.size * self._landing.unit_bytes)
        if self._emulation and not self._live:
            self._say(nixl_wire.CALM)

    def _why_end(self, live: _Live) -> str:
        """Why the agent must go for this operation's sake; "" while it may go on."""
        now_s = time.monotonic()
        if self._is_dropped:
            return live.operation.stopped or "peer dropped"
        if live.operation.stopped:
            live.stop_by_s = min(live.stop_by_s, now_s + self._config.stop_grace_s)
            return live.operation.stopped if now_s >= live.stop_by_s else ""
        return f"not done after {self._config.operation_limit_s} s" if now_s >= live.deadline_s else ""

    def _is_over(self) -> bool:
        """Whether the source has ended the connection: it died, or does not let us read any more."""
        now_s = time.monotonic()
        if self._live and now_s < self._next_control_s:
            return False
        self._next_control_s = now_s + _CONTROL_TICK_S
        return self._sock is None or nixl_wire.heard(self._sock, is_waiting=False) is not None

    def _give_up(self, why: str, *failed: Operation) -> None:
        """End the agent, the connection, and then the operations: those that failed to begin and those that run."""
        with self._lock:
            sock, self._sock = self._sock, None
            self._connecting = None
        agent, self._agent = self._agent, None
        live, self._live = self._live, []
        if sock is not None:
            sock.close()
        if agent is not None and not agent.destroy():
            return  # never seen; it may still write, so these operations never end, and nobody gets their blocks
        for operation in (*failed, *(ended.operation for ended in live)):
            stopped = operation.stopped
            operation.end(PullFailed(NAME, f"{stopped}: {why}" if stopped and stopped != why else why))

    def _fail_queued(self, why: str) -> None:
        try:
            while True:
                operation = self._queue.get_nowait()
                if operation is None:
                    self._queue.put(None)
                    return
                operation.end(PullFailed(NAME, why))
        except queue.Empty:
            pass

    def _connected(self, operation: Operation) -> NixlAgent:
        if self._agent is not None:
            return self._agent
        sock = socket.socket(self._target.family, socket.SOCK_STREAM)
        with self._lock:
            self._sock, self._connecting = sock, operation  # from here on stop() and drop() can shut it
            if self._is_dropped or operation.stopped:
                raise ConnectionFailed("stopped before it connected")
        try:
            sock.settimeout(self._config.connect_limit_s)
            sock.connect(self._target.sockaddr)
            wire.prepare(sock)
        except OSError as error:
            raise ConnectionFailed(f"cannot connect to {self._target.sockaddr[:2]}: {error}", is_silence=True) from error
        agent = self._introduced(sock, operation)
        self._say(nixl_wire.CALM)
        with self._lock:
            self._connecting = None
        return agent

    def _introduced(self, sock: socket.socket, operation: Operation) -> NixlAgent:
        target, limit_s = self._target, self._config.connect_limit_s
        remote = nixl_wire.introduce(sock, target.own_incarnation, target.incarnation, target.secret, Watch(limit_s, limit_s, operation))
        if (remote.num_blocks, remote.block_bytes) != (target.num_blocks, target.block_bytes):
            shape = f"{remote.num_blocks} x {remote.block_bytes}"
            raise ConnectionFailed(f"a pool of {shape} bytes, offered {target.num_blocks} x {target.block_bytes}", is_silence=True)
        self._agent = agent = self._maker.take()
        agent.connect(remote, self._pool.block_bytes, self._landing.staging_rows)
        ends_s = time.monotonic() + limit_s
        for transfer in agent.probes():
            self._await_probe(agent, transfer, operation, ends_s)
        if not agent.is_token_right():
            raise ConnectionFailed("reads end up in another process's memory", is_silence=True)
        return agent

    def _await_probe(self, agent: NixlAgent, transfer: int, operation: Operation, ends_s: float) -> None:
        while not agent.is_done(transfer):
            if operation.stopped or self._is_dropped:
                raise ConnectionFailed("stopped while it connected")
            if time.monotonic() > ends_s:
                raise ConnectionFailed(f"nothing could be read for {self._config.connect_limit_s} s", is_silence=True)
            time.sleep(_nap_s(0.0))
        agent.release(transfer)

    def _say(self, word: bytes) -> None:
        if self._sock is not None:
            wire.send_views(self._sock, [memoryview(word)], Watch(self._config.connect_limit_s, self._config.connect_limit_s))


def _nap_s(running_s: float) -> float:
    """How long to look away from a transfer that has been running for so long: a hundredth of it, from 20 us to 2 ms."""
    return min(2e-3, max(20e-6, running_s / 100))
