"""The bytes part for engines that move KV themselves: what is told of it in discovery, and the operations at the sink."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.api import NativeEngine, NativeHandoff, Work
from baton_runtime.errors import BatonError
from baton_runtime.log import get_logger

from baton_handoff.actions import StartPull
from baton_handoff.ids import FailureCause, HandoffKey
from baton_handoff.introductions import Introductions
from baton_handoff.pulls import LinkStats, PullKey, PullResult
from baton_handoff.transports.base import PeerPool, PullStats, TransportUnavailable
from baton_handoff.transports.reslice import Reslice

_WHY = "the engines move KV themselves"

log = get_logger(__name__)


def room_of(key: HandoffKey) -> int:
    """Where the two engines of a handoff meet: 63 bits that both sides compute, and no other try has."""
    identity = f"{key.request_id}\0{key.attempt}\0{key.decode_incarnation}".encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") >> 1


class NativeTransport:
    """The offer of an engine that moves KV itself; implements `Transport`, but nothing can be pulled over it.

    name says how: workers are paired only if they have a name in common. address: host:port where sinks meet this engine; "": it is no
    source.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    async def open(self) -> None:
        """See Transport: the engine is open."""

    async def close(self) -> None:
        """See Transport."""

    def offer(self) -> bytes:
        """See Transport."""
        return json.dumps({"address": self.address}).encode()

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None:
        """See Transport: whoever reaches the engine's own ports may take part (docs/engine-sglang.md, security)."""

    def forbid(self, peer_incarnation: str) -> None:
        """See Transport."""

    def why_not(self, peer: Instance, parameters: bytes) -> str:
        """See Transport."""
        return ""

    async def open_peer(
        self, peer: Instance, parameters: bytes, pair_secret: bytes, own_incarnation: str, reslice: Reslice | None = None
    ) -> PeerPool:
        """See Transport."""
        raise TransportUnavailable(self.name, _WHY)


class NativeReceiver:
    """Runs the operations of a sink: each is one whole handoff, from the meeting of the two engines to the first token.

    The same to the manager and the peers as `pulls.Puller`.
    """

    def __init__(self, engine: NativeEngine, name: str, introductions: Introductions, clock: Callable[[], float] = time.monotonic) -> None:
        """name: of the own NativeTransport."""
        self._engine = engine
        self._name = name
        self._introductions = introductions
        self._clock = clock
        self._running: dict[PullKey, tuple[str, asyncio.Task[None]]] = {}
        self.links: dict[str, LinkStats] = {}

    def transport_of(self, incarnation: str) -> str:
        """See Puller."""
        return self._name if incarnation in self.links else ""

    def why_of(self, incarnation: str) -> str:
        """See Puller."""
        return _WHY if incarnation in self.links else ""

    def drop(self, incarnation: str) -> None:
        """See Puller."""
        self.links.pop(incarnation, None)
        for peer, task in list(self._running.values()):
            if peer == incarnation:
                _cancel_once(task)

    def end_unwanted(self, unwanted: Iterable[PullKey], now: float) -> None:
        """See Puller; at once, for the engine would wait for the other side."""
        for key in unwanted:
            if key in self._running:
                _cancel_once(self._running[key][1])

    async def run(self, start: StartPull) -> PullResult:
        """See Puller. duration_s of the result includes the time in which the source computed."""
        key = PullKey(start.operation, start.key.is_fetch)
        try:
            receive = self._receive(start)
        except BatonError as error:
            log.warning("receive_failed", request_id=start.key.request_id, peer=start.peer_incarnation, why=error.message)
            return PullResult(failure=FailureCause.NO_INTRODUCTION)
        began = self._clock()
        task = asyncio.get_running_loop().create_task(receive, name=f"receive {start.key.request_id}")
        self._running[key] = (start.peer_incarnation, task)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            _cancel_once(task)
            await asyncio.wait({task})
            raise
        finally:
            del self._running[key]
        return self._result(start, task, self._clock() - began)

    def _receive(self, start: StartPull) -> Coroutine[Any, Any, None]:
        assert start.request is not None, "an operation of a native engine names the sequence"
        known = self._introductions.get(start.peer_incarnation)
        offers = {offer.name: offer.parameters for offer in known.peer.transports} if known is not None else {}
        if self._name not in offers:
            raise TransportUnavailable(self._name, f"the peer offers {', '.join(offers) or 'nothing'}")
        address = json.loads(offers[self._name])["address"]
        native = NativeHandoff(address, room_of(start.key))
        return self._engine.receive(replace(start.request, work=Work.DECODE_ONLY, native=native))

    def _result(self, start: StartPull, task: "asyncio.Task[None]", duration_s: float) -> PullResult:
        if task.cancelled():
            return PullResult(failure=FailureCause.PATH_DOWN)
        error = task.exception()
        if isinstance(error, BatonError):
            log.warning("receive_failed", request_id=start.key.request_id, peer=start.peer_incarnation, why=error.message)
            return PullResult(failure=FailureCause.PATH_DOWN)
        if error is not None:
            raise error
        assert start.request is not None
        layout = self._engine.pool.layout
        num_bytes = -(-start.request.num_kv_tokens // layout.block_tokens) * layout.block_bytes
        stats = PullStats(num_bytes, 1, duration_s)
        self.links.setdefault(start.peer_incarnation, LinkStats(self._name, _WHY)).pulled(stats)
        return PullResult(stats)


def _cancel_once(task: "asyncio.Task[None]") -> None:
    """Again, and it would no longer wait for the engine's own end of it."""
    if not task.cancelling():
        task.cancel()
