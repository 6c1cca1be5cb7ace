"""The soak in its short form: a minute of handoffs under faults, and every book balances. Memory takes the long form: `make soak`."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.timeout(300)
async def test_a_minute_of_handoffs_under_random_faults_leaves_balanced_books(tmp_path: Path) -> None:
    result = tmp_path / "soak.json"
    options = ["--limit-s", "45", "--clients", "16", "--fault-every", "40", "120", "--json", str(result)]
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
    assert found["handoffs"] > 50
    assert sum(found["faults"].values()) > 0
