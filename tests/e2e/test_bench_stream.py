"""`baton bench stream` against the real thing: every stream checked, and a wrong one noticed."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from cluster import cluster

pytestmark = pytest.mark.timeout(90)


async def bench(*arguments: str) -> tuple[int, dict, str]:
    """Exit code, the report, and what was said beside it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton_cli.main", "bench", "stream", "--json", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(output) if output.strip() else {}, said.decode()


async def test_streams_are_whole_and_equal_to_the_answers_without_streaming(tmp_path: Path) -> None:
    plot = tmp_path / "stream.svg"
    async with cluster(tmp_path) as house:
        frontend = house.children["frontend-0"].process
        assert frontend is not None
        load = ("-c", "24", "-n", "120", "-d", "0", "--processes", "2", "--max-tokens", "12", "--prompts", "4", "--prompt-words", "8")
        code, report, said = await bench("--url", house.url, *load, "--plot", str(plot), "--pid", f"frontend={frontend.pid}")
        assert code == 0, (report, said)
        code_short, short, _ = await bench("--url", house.url, *load, "--no-stream", "--endpoint", "completions")
    assert report["requests"] == {"started": 120, "complete": 120}
    assert report["check"].startswith("text")
    assert report["tokens"] == 120 * 12
    assert report["first_text_ms"]["count"] == 120
    assert report["servers"][0]["cpu_us_per_token"] > 0
    assert "<svg" in plot.read_text()
    assert code_short == 0
    assert short["requests"]["complete"] == 120


async def test_a_server_that_refuses_the_request_is_quoted(tmp_path: Path) -> None:
    async with cluster(tmp_path) as house:
        code, _, said = await bench("--url", house.url, "--max-tokens", "1000000")
    assert code == 1
    assert "refuses the request with 400" in said


async def test_nobody_there_is_said_in_one_line() -> None:
    code, _, said = await bench("--url", "http://127.0.0.1:9")
    assert code == 1
    assert said.startswith("Error: http://127.0.0.1:9 cannot be asked")
    assert said.count("\n") == 1
