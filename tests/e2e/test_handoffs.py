"""`baton handoffs` as a user runs it: lines, JSON, another replica when the watched one dies, errors that name the fix."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cluster import Cluster, cluster, until

pytestmark = pytest.mark.timeout(90)
PROMPT = list(range(10, 60))


async def baton(house: Cluster, *arguments: str) -> tuple[int, str, str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "baton_cli.main", "handoffs", "--etcd", house.options.etcd, *arguments]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def watching(house: Cluster, *arguments: str) -> AsyncIterator[list[dict]]:
    """`baton handoffs --json --watch`, its lines as they come."""
    command = [sys.executable, "-m", "baton_cli.main", "handoffs", "--etcd", house.options.etcd, "--json", "--watch", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    lines: list[dict] = []
    output = process.stdout

    async def read() -> None:
        async for line in output:
            lines.append(json.loads(line))  # noqa: PERF401  # readers look while it grows

    async with asyncio.TaskGroup() as group:
        reader = group.create_task(read())
        try:
            yield lines
        finally:
            process.kill()
            await process.wait()
            await reader


async def test_handoffs_are_shown_as_they_happen_and_by_another_replica_when_one_dies(tmp_path: Path) -> None:
    async with cluster(tmp_path, kvtransfer=2) as house, watching(house) as lines:

        async def seen(kvtransfer: str, request: int) -> dict | None:
            ended = [line for line in lines if line["event"] == "handoff" and not line["is_live"] and line["kvtransfer"] == kvtransfer]
            return ended[-1] if len(ended) >= request else None

        await until("a snapshot", lambda: asyncio.sleep(0, any(line["event"] == "snapshot" for line in lines)), 15)
        watched = lines[0]["kvtransfer"]
        await house.complete(prompt=PROMPT, max_tokens=3)
        row = await until("the handoff", lambda: seen(watched, 1), 10)
        assert (row["source"], row["sink"], row["state"], row["transport"]) == ("prefill-0", "decode-0", "confirmed", "shm")
        assert row["transport_reason"].startswith("shm:")
        assert row["pulled_bytes"] == row["confirmed_bytes"] > 0
        await house.kill(watched)
        other = "kvtransfer-1" if watched == "kvtransfer-0" else "kvtransfer-0"
        await until(
            "a snapshot of the other", lambda: asyncio.sleep(0, lines[-1]["event"] == "snapshot" and lines[-1]["kvtransfer"] == other), 10
        )
        assert {"event": "lost", "kvtransfer": watched}.items() <= lines[-2].items()
        await house.complete(prompt=PROMPT[::-1], max_tokens=3)
        await until("the next handoff", lambda: seen(other, 1), 10)


async def test_once_prints_one_document_or_a_table_and_says_what_is_missing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as house:
        code, out, err = await baton(house, "--json")
        assert (code, json.loads(out)["handoffs"]) == (0, []), err
        code, out, err = await baton(house)
        assert (code, out.strip()) == (0, "0 live handoffs, by kvtransfer-0"), err
        await house.kill("kvtransfer-0")
        code, out, err = await baton(house, "--once")
        assert (code, out) == (1, "")
        assert "no kvtransfer answers (kvtransfer-0 at" in err
        assert "baton up" in err
        await house.etcd.kill()
        code, out, err = await baton(house, "--json")
        assert (code, out) == (1, "")
        assert f"etcd at {house.options.etcd} does not answer" in err
