"""The soak in its short form: handoffs under faults, and every book balances. Memory takes the long form: `make soak`."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("limit_s", "fewest"), [("20", 20), pytest.param("60", 60, marks=pytest.mark.slow)])
async def test_handoffs_under_random_faults_leave_balanced_books(tmp_path: Path, limit_s: str, fewest: int) -> None:
    result = tmp_path / "soak.json"
    options = ["--limit-s", limit_s, "--clients", "16", "--fault-every", "15", "60", "--json", str(result)]
    log = tmp_path / "soak.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(sys.executable, str(SOAK), *options, stdout=output, stderr=output)
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
    assert code == 0, log.read_text()[-5000:]
    found = json.loads(result.read_text())
    assert found["problems"] == []
    assert found["handoffs"] > fewest
    assert sum(found["faults"].values()) > 0
