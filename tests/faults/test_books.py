"""The books are an independent count: a leak in a worker moves both metrics, and `baton status` says so."""

import signal
import sys
from pathlib import Path

import pytest
from cluster import SETTLE_LIMIT_S, cluster, until
from leaky_decode import LEAKED_BLOCKS

pytestmark = pytest.mark.timeout(60)
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
