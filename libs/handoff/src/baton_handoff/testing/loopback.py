"""A transport within one process: copies from the peer's pool directly, and does what a test tells it to."""

import asyncio
import time
from collections.abc import Sequence

from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import KvPool

from baton_handoff.transports.base import PullFailed, PullStats, TransportUnavailable
from baton_handoff.transports.reslice import Reslice


class LoopbackNetwork:
    """Pools by incarnation, and what stands between them: hold() stops all pulls in mid-copy, break_paths() fails them."""

    def __init__(self) -> None:
        self.pools: dict[str, KvPool] = {}
        self.is_broken = False
        self.num_pulls = 0
        self._may_go = asyncio.Event()
        self._may_go.set()

    def hold(self) -> None:
        """Pulls copy their first half and wait."""
        self._may_go.clear()

    def go(self) -> None:
        """Held pulls go on."""
        self._may_go.set()

    async def pass_gate(self) -> None:
        """Wait while held."""
        await self._may_go.wait()


class LoopbackPeerPool:
    """One opened peer. Shields its copies as real transports do: a dropped or cancelled pull ends, then nothing writes."""

    name = "loopback"

    def __init__(self, network: LoopbackNetwork, source: KvPool, dest: KvPool, reslice: Reslice | None = None) -> None:
        self._network = network
        self._reslice = reslice or Reslice(source.layout, dest.layout)
        self._source = source
        self._dest = dest
        self._dropped = asyncio.Event()

    async def pull(self, source_block_ids: Sequence[int], dest_block_ids: Sequence[int]) -> PullStats:
        """See PeerPool."""
        started = time.monotonic()
        half = len(dest_block_ids) // 2
        pairs = list(zip(source_block_ids, dest_block_ids, strict=True))
        self._network.num_pulls += 1
        self._copy(pairs[:half])
        await self._gate()
        self._copy(pairs[half:])
        return PullStats(len(pairs) * self._reslice.unit_bytes, len(pairs), time.monotonic() - started)

    def drop(self) -> None:
        """See PeerPool."""
        self._dropped.set()

    async def _gate(self) -> None:
        waits = [asyncio.ensure_future(self._network.pass_gate()), asyncio.ensure_future(self._dropped.wait())]  # ended below
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if self._dropped.is_set() or self._network.is_broken:
            raise PullFailed(self.name, "dropped" if self._dropped.is_set() else "the path is broken")

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        self._reslice.copy(self._dest.data, [dest for _, dest in pairs], self._source.data, [source for source, _ in pairs])


class LoopbackTransport:
    """See Transport. network: shared by all workers of a test."""

    name = "loopback"

    def __init__(self, network: LoopbackNetwork, pool: KvPool, incarnation: str) -> None:
        self.allowed: dict[str, set[bytes]] = {}
        self._network = network
        self._pool = pool
        self._incarnation = incarnation

    async def open(self) -> None:
        """Register the pool."""
        self._network.pools[self._incarnation] = self._pool

    async def close(self) -> None:
        """Nothing to end."""

    def offer(self) -> bytes:
        """See Transport."""
        return b"{}"

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None:
        """See Transport."""
        self.allowed.setdefault(peer_incarnation, set()).add(pair_secret)

    def forbid(self, peer_incarnation: str) -> None:
        """See Transport."""
        self.allowed.pop(peer_incarnation, None)

    def why_not(self, peer: Instance, parameters: bytes) -> str:
        """See Transport."""
        return ""

    async def open_peer(
        self, peer: Instance, parameters: bytes, pair_secret: bytes, own_incarnation: str, reslice: Reslice | None = None
    ) -> LoopbackPeerPool:
        """See Transport."""
        pool = self._network.pools.get(peer.incarnation)
        if pool is None:
            raise TransportUnavailable(self.name, f"{peer.incarnation} is not here")
        return LoopbackPeerPool(self._network, pool, self._pool, reslice)
