"""The books are an independent count: a leak in a worker moves both metrics, and `baton status` says so.

Every replica keeps all of them: any of them may be late, be killed or hang, and so may all.
"""

import asyncio
import signal
import sys
import time
from pathlib import Path

import pytest
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_contracts.kvtransfer.v1.kvtransfer_service_pb2_grpc import KvTransferServiceStub
from baton_runtime.rpc import open_channel
from cluster import SETTLE_LIMIT_S, Cluster, cluster, until
from leaky_decode import LEAKED_BLOCKS
from news import handoff_under_way, reporting_again
from test_deaths import LONG_PROMPT, other_prompt

pytestmark = pytest.mark.timeout(90)
LEAKY = str(Path(__file__).parent / "leaky_decode.py")


async def test_a_leak_moves_both_metrics_and_its_end_moves_them_back(tmp_path: Path) -> None:
    async with cluster(tmp_path) as house:
        await house.kill("decode-0")
        house.children["decode-0"].command = [sys.executable, LEAKY]
        await house.start("decode-0")
        await house.complete(prompt=list(range(10, 60)), max_tokens=5)
        await house.settled()
        block_bytes = house.instance("decode-0").layout.block_bytes

        async def metrics() -> tuple[float, float]:
            decode, books = await house.metrics("decode-0"), await house.metrics("kvtransfer-0")
            return decode["baton_kv_stranded_bytes"], books["baton_ledger_mismatch_bytes"]

        assert await metrics() == (0, 0)
        house.signal("decode-0", signal.SIGUSR1)

        async def leak_shows() -> bool:
            return await metrics() == (LEAKED_BLOCKS * block_bytes, LEAKED_BLOCKS * block_bytes)

        await until("both metrics show the leak", leak_shows, SETTLE_LIMIT_S)
        states = {i.instance_id: i.state for i in (await house.report()).instances}
        assert "stranded" in states["decode-0"]
        assert "differ" in states["kvtransfer-0"]
        house.signal("decode-0", signal.SIGUSR2)
        await house.settled()
        assert await metrics() == (0, 0)


async def books_of(house: Cluster, name: str) -> pb.GetBooksResponse:
    async with open_channel(house.instance(name).grpc_address) as channel:
        return await KvTransferServiceStub(channel).GetBooks(pb.GetBooksRequest(), timeout=5)


async def handed_over(house: Cluster, decode: str, seed: int) -> bool:
    """Ask once; whether its KV came from prefill."""
    before = (await house.metrics(decode)).get("baton_handoff_bytes_total", 0)
    await house.complete(prompt=other_prompt(seed, 100), max_tokens=5)
    return (await house.metrics(decode)).get("baton_handoff_bytes_total", 0) > before


async def test_two_replicas_keep_the_same_books_and_status_counts_each_link_once(tmp_path: Path) -> None:
    async with cluster(tmp_path, decode=2, kvtransfer=2) as house:
        await reporting_again(house, 3)
        await asyncio.gather(*(house.complete(prompt=other_prompt(seed, 100), max_tokens=3) for seed in range(8)))
        await house.settled()
        report = await house.report()
        books = [i for i in report.instances if i.service == "kvtransfer"]
        assert [(i.agreed_handoffs, i.disagreed_handoffs, i.mismatch_bytes) for i in books] == [(8, 0, 0)] * 2
        pairs = [(link.source, link.sink) for link in report.links]
        assert sorted(set(pairs)) == pairs
        assert pairs
        assert all(link.transport == "shm" and link.reason for link in report.links)
        moved = sum([(await house.metrics(f"decode-{n}"))["baton_handoff_bytes_total"] for n in range(2)])
        assert sum(link.pulled_bytes for link in report.links) == moved
        for name in ("kvtransfer-0", "kvtransfer-1"):
            assert (await house.metrics(name))['baton_books_introductions_total{result="introduced"}'] >= 2


async def test_replica_that_comes_late_or_again_has_the_books_right_within_a_second(tmp_path: Path, slow: str, roomy_model: Path) -> None:
    async with cluster(tmp_path, profile=slow, model=roomy_model, kvtransfer=2) as house:
        await house.kill("kvtransfer-1")
        async with handoff_under_way(house, LONG_PROMPT * 4):  # still under way when the process has started
            await house.start("kvtransfer-1")

            async def both_report() -> float | None:
                return time.monotonic() if len((await books_of(house, "kvtransfer-1")).reporting_incarnations) == 2 else None

            heard_at = await until("both workers say hello", both_report, 5)

            async def same() -> bool:
                old, new = await asyncio.gather(books_of(house, "kvtransfer-0"), books_of(house, "kvtransfer-1"))
                return (old.live_handoffs, old.held_bytes) == (new.live_handoffs, new.held_bytes) and new.live_handoffs == 1

            await until("the new books are as the old ones", same, 1.0 - (time.monotonic() - heard_at))
        await house.settled()
        report = await house.report()
        new = next(i for i in report.instances if i.instance_id == "kvtransfer-1")
        assert (new.agreed_handoffs, new.disagreed_handoffs, new.mismatch_bytes) == (1, 0, 0)


async def test_new_pairs_are_introduced_by_whichever_replica_lives(tmp_path: Path) -> None:
    async with cluster(tmp_path, kvtransfer=2) as house:
        house.signal("kvtransfer-0", signal.SIGSTOP)
        await house.kill("decode-0")
        await house.start("decode-0")
        assert await until("a new pair with one replica stopped", lambda: handed_over(house, "decode-0", 1), 15)
        house.signal("kvtransfer-0", signal.SIGCONT)
        await reporting_again(house, 2)
        await house.settled()
        await house.kill("kvtransfer-1")
        await house.kill("prefill-0")
        await house.start("prefill-0")
        assert await until("a new pair with the other replica killed", lambda: handed_over(house, "decode-0", 2), 15)
        await house.kill("kvtransfer-0")
        assert await until("a known pair with no replica", lambda: handed_over(house, "decode-0", 3), 5)
        await asyncio.gather(house.start("kvtransfer-0"), house.start("kvtransfer-1"))
        await reporting_again(house, 2)
        assert await handed_over(house, "decode-0", 4)
        await house.settled()


async def test_replica_that_wakes_up_declares_nobody_dead_and_disturbs_nothing(tmp_path: Path, slow: str, roomy_model: Path) -> None:
    async with cluster(tmp_path, profile=slow, model=roomy_model, kvtransfer=2) as house:
        await reporting_again(house, 2)
        async with handoff_under_way(house, LONG_PROMPT):
            house.signal("kvtransfer-0", signal.SIGSTOP)
        for seed in range(5, 8):
            await house.complete(prompt=other_prompt(seed, 300), max_tokens=20)  # longer than the limits of silence, all together
        house.signal("kvtransfer-0", signal.SIGCONT)
        await reporting_again(house, 2)
        assert await handed_over(house, "decode-0", 8)
        await house.settled()
        for name in ("kvtransfer-0", "kvtransfer-1"):
            assert (await house.metrics(name)).get("baton_books_peers_down_total", 0) == 0
        for name in ("prefill-0", "decode-0"):
            assert (await house.metrics(name)).get("baton_handoff_fences_total", 0) == 0
        books = await asyncio.gather(books_of(house, "kvtransfer-0"), books_of(house, "kvtransfer-1"))
        assert books[0].disagreed_handoffs == books[1].disagreed_handoffs == 0
