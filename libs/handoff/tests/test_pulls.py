import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from baton_contracts.discovery.v1.instance_pb2 import Instance, TransportOffer
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as kv_pb
from baton_engine.api import Priority
from baton_handoff.actions import StartPull
from baton_handoff.ids import FailureCause, HandoffKey
from baton_handoff.introductions import Introductions
from baton_handoff.pulls import UNWANTED_S, Puller, PullKey
from baton_handoff.transports.base import ChecksumMismatch, PullFailed, PullStats, TransportUnavailable
from baton_handoff.transports.reslice import Reslice
from baton_runtime.testing import wait_until

START = StartPull(HandoffKey("r", 1, "d"), 1, "p", Priority.INTERACTIVE, (1, 2), (3, 4))


class FakePool:
    def __init__(self, name: str, failures: list[Exception]) -> None:
        self.name = name
        self.is_dropped = False
        self._failures = failures

    async def pull(self, source_block_ids: Sequence[int], dest_block_ids: Sequence[int]) -> PullStats:
        if self._failures:
            raise self._failures.pop(0)
        return PullStats(200, 1, 0.1)

    def drop(self) -> None:
        self.is_dropped = True


class FakeTransport:
    def __init__(self, name: str, opens: bool | None = True, failures: list[Exception] | None = None) -> None:
        self.name = name
        self.opens = opens
        self.failures = failures or []
        self.pools: list[FakePool] = []
        self.secrets: list[bytes] = []
        self.opened: Callable[[], object] = lambda: None

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    def offer(self) -> bytes:
        return b""

    def allow(self, peer_incarnation: str, pair_secret: bytes) -> None: ...
    def forbid(self, peer_incarnation: str) -> None: ...
    def why_not(self, peer: Instance, parameters: bytes) -> str:
        return ""

    async def open_peer(
        self, peer: Instance, parameters: bytes, pair_secret: bytes, own_incarnation: str, reslice: Reslice | None = None
    ) -> FakePool:
        self.secrets.append(pair_secret)
        if self.opens is None:
            await asyncio.Event().wait()
        if not self.opens:
            raise TransportUnavailable(self.name, "the token differs")
        self.pools.append(FakePool(self.name, self.failures))
        self.opened()
        return self.pools[-1]


def puller(*transports: FakeTransport, offered: Sequence[str] = ("shm", "tcp"), introduced: bool = True, limit_s: float = 2.0) -> Puller:
    known = Introductions(lambda: Instance(incarnation="d"))
    offers = [TransportOffer(name=name) for name in offered]
    if introduced:
        known.add(kv_pb.Introduction(peer=Instance(incarnation="p", transports=offers), pair_secret=b"s"))
    return Puller(transports, known, lambda: Instance(incarnation="d"), limit_s)


async def test_first_transport_that_opens_is_used_for_all_operations() -> None:
    shm, tcp = FakeTransport("shm"), FakeTransport("tcp")
    pulls = puller(shm, tcp)
    assert pulls.transport_of("p") == ""
    for _ in range(3):
        assert (await pulls.run(START)).failure is None
    assert pulls.transport_of("p") == "shm"
    assert (len(shm.pools), len(tcp.pools)) == (1, 0)


async def test_memory_that_turns_out_not_to_be_shared_falls_back_to_tcp() -> None:
    pulls = puller(FakeTransport("shm", opens=False), FakeTransport("tcp"))
    assert (await pulls.run(START)).failure is None
    assert pulls.transport_of("p") == "tcp"


async def test_nothing_in_common_is_no_introduction() -> None:
    assert (await puller(FakeTransport("shm"), offered=["nixl"]).run(START)).failure is FailureCause.NO_INTRODUCTION
    assert (await puller(FakeTransport("shm"), introduced=False).run(START)).failure is FailureCause.NO_INTRODUCTION


async def test_no_transport_that_opens_is_path_down() -> None:
    assert (await puller(FakeTransport("shm", opens=False)).run(START)).failure is FailureCause.PATH_DOWN


async def test_checksum_is_data_loss_and_never_tried_again() -> None:
    tcp = FakeTransport("tcp", failures=[ChecksumMismatch("tcp", "differs")])
    assert (await puller(tcp).run(START)).failure is FailureCause.DATA_LOSS


async def test_failure_on_a_fresh_pool_is_path_down() -> None:
    tcp = FakeTransport("tcp", failures=[PullFailed("tcp", "reset")])
    assert (await puller(tcp).run(START)).failure is FailureCause.PATH_DOWN
    assert tcp.pools[0].is_dropped


async def test_connection_cut_since_the_last_operation_is_opened_again_once() -> None:
    tcp = FakeTransport("tcp")
    pulls = puller(tcp)
    await pulls.run(START)
    tcp.failures.append(PullFailed("tcp", "reset"))
    assert (await pulls.run(START)).failure is None
    assert len(tcp.pools) == 2
    tcp.failures.extend([PullFailed("tcp", "reset"), PullFailed("tcp", "reset")])
    assert (await pulls.run(START)).failure is FailureCause.PATH_DOWN
    assert len(tcp.pools) == 3


async def test_drop_ends_an_operation_that_is_still_opening() -> None:
    """Its blocks wait for it: they must not wait for a peer that does not answer."""
    tcp = FakeTransport("tcp", opens=None)
    pulls = puller(tcp, limit_s=60)
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(pulls.run(START)) for _ in range(2)]
        await wait_until(lambda: tcp.secrets)
        pulls.drop("p")
    assert [task.result().failure for task in running] == [FailureCause.PATH_DOWN] * 2


async def test_opening_is_bounded() -> None:
    assert (await puller(FakeTransport("tcp", opens=None), limit_s=0.05).run(START)).failure is FailureCause.PATH_DOWN


async def test_dropped_peer_is_opened_afresh_for_the_next_operation() -> None:
    tcp = FakeTransport("tcp")
    pulls = puller(tcp)
    await pulls.run(START)
    pulls.drop("p")
    assert tcp.pools[0].is_dropped
    assert (await pulls.run(START)).failure is None
    assert len(tcp.pools) == 2


async def test_link_counts_bytes_speed_and_why_until_its_peer_is_dropped() -> None:
    pulls = puller(FakeTransport("shm", opens=False), FakeTransport("tcp"))
    for _ in range(2):
        await pulls.run(START)
    link = pulls.links["p"]
    assert (link.transport, link.pulled_bytes, link.bytes_per_s, link.version) == ("tcp", 400, 2000, 3)
    assert "the token differs" in link.reason
    pulls.drop("p")
    assert not pulls.links


async def test_operation_nobody_wants_is_cancelled_after_a_second_and_others_go_on() -> None:
    """It keeps its blocks until it ends: a slow link must not keep them for long."""
    pulls = puller(FakeTransport("tcp", opens=None), limit_s=60.0)
    async with asyncio.TaskGroup() as group:
        unwanted = group.create_task(pulls.run(START))
        wanted = group.create_task(pulls.run(replace(START, operation=2)))
        await asyncio.sleep(0)
        pulls.end_unwanted([PullKey(1, False)], 100.0)
        pulls.end_unwanted([PullKey(1, False), PullKey(2, True)], 100.0 + UNWANTED_S - 0.1)
        await asyncio.sleep(0)
        assert not unwanted.cancelling()
        pulls.end_unwanted([PullKey(1, False), PullKey(2, True)], 100.0 + UNWANTED_S)
        await asyncio.wait([unwanted])
        assert unwanted.cancelled()
        assert not wanted.done()
        pulls.drop("p")
    pulls.end_unwanted([PullKey(1, False)], 200.0)


async def test_operation_that_is_wanted_again_has_its_second_anew() -> None:
    """Numbers are never used twice; but a list that lacks one for a moment must not count against it."""
    pulls = puller(FakeTransport("tcp", opens=None), limit_s=60.0)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(pulls.run(START))
        await asyncio.sleep(0)
        for unwanted, now in (([PullKey(1, False)], 0.0), ([], 0.5), ([PullKey(1, False)], UNWANTED_S + 0.1)):
            pulls.end_unwanted(unwanted, now)
        assert not running.cancelling()
        pulls.drop("p")


async def test_pool_that_opened_as_the_operation_was_cancelled_is_dropped() -> None:
    tcp = FakeTransport("tcp")
    tcp.opened = lambda: running.cancel()
    pulls = puller(tcp)
    running: asyncio.Task[object] = asyncio.create_task(pulls.run(START))
    await asyncio.wait([running])
    assert running.cancelled()
    assert pulls.transport_of("p") == ""
    assert tcp.pools[0].is_dropped
