"""What the benchmarks of many connections share: a house whose limits are out of the way, the load client, how idle the machine was."""

import asyncio
import datetime
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from cluster import Cluster, cluster, roomy_model, until  # noqa: E402

__all__ = ["Cluster", "until"]  # for the benchmarks, which need not know where tests/ is

RESULTS = Path(__file__).parent / "results"
STEP_S = 0.5  # between two tokens of a stream, unless told otherwise
TOKENS_PER_PROMPT = 512  # room for a prompt of 64 words; the demo model's tokenizer makes some 320 tokens of them
BLOCK_TOKENS = 64


def paced_profile(step_s: float) -> str:
    """One token per sequence every step_s, prompts for nothing, and as few bytes of KV per token as the sim can do with."""
    return f"""
description = "one step per {step_s * 1000:g} ms, whatever is in it"
[decode_ms]
constant = {step_s * 1000:g}
[model]
num_layers = 1
num_kv_heads = 1
head_dim = 2
dtype = "float32"
"""


def settings(streams: int, decodes: int, max_tokens: int, max_inflight: int) -> dict[str, str]:
    """Limits that let so many streams run; each of them is per process, and any of several could get most of them."""
    share = -(-streams * 3 // (2 * decodes)) if decodes > 1 else streams
    blocks_per_stream = -(-(TOKENS_PER_PROMPT + max_tokens) // BLOCK_TOKENS) + 1
    return {
        "BATON_FRONTEND_MAX_INFLIGHT": str(max_inflight),
        "BATON_ROUTER_MAX_WAITING_SEQUENCES": str(streams + 1),
        "BATON_DECODE_MAX_BATCH_SEQUENCES": str(share),
        "BATON_DECODE_MAX_WAITING": str(share),
        "BATON_DECODE_MAX_CHUNK_TOKENS": str(TOKENS_PER_PROMPT * share),
        "BATON_DECODE_BLOCK_TOKENS": str(BLOCK_TOKENS),
        "BATON_DECODE_NUM_BLOCKS": str(blocks_per_stream * share + 1024),
    }


@asynccontextmanager
async def house(
    *, frontends: int, decodes: int, environment: Mapping[str, str], profile: str = "", prefill: int = 0, step_s: float = STEP_S
) -> AsyncIterator[Cluster]:
    """A Baton of real processes with the sim engine, on free ports. profile: a shipped one; empty: steps of step_s."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        folder = Path(name)
        (folder / "profile.toml").write_text(paced_profile(step_s))
        async with cluster(
            folder / "run",
            profile=profile or str(folder / "profile.toml"),
            model=roomy_model(folder / "roomy"),
            frontend=frontends,
            decode=decodes,
            prefill=prefill,
            environment=environment,
        ) as made:
            yield made


def pids(made: Cluster) -> dict[str, int]:
    """All processes of the house but etcd, by name."""
    return {name: child.process.pid for name, child in made.children.items() if child.process is not None}


def of_service(servers: Iterable[Mapping[str, Any]], service: str) -> list[Mapping[str, Any]]:
    """The processes of one service, in a report of the load client."""
    return [server for server in servers if server["name"].startswith(f"{service}-")]


async def load(made: Cluster, *arguments: str, watch: bool = True, limit_s: float = 900.0) -> dict[str, Any]:
    """Run `baton bench stream --json` to its end, its progress on our terminal. Raises: RuntimeError if it made no report."""
    watched = [f"--pid={name}={pid}" for name, pid in pids(made).items()] if watch else []
    command = (sys.executable, "-m", "baton_cli.main", "bench", "stream", "--json", "--url", made.url, *watched, *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(limit_s):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if not output.strip():
        raise RuntimeError(f"the load client ended with {process.returncode} and no report")
    report: dict[str, Any] = json.loads(output)
    return report


def sources(count: int) -> list[str]:
    """The options that make the client connect from so many loopback addresses."""
    return [f"--source=127.0.0.{number}" for number in range(1, count + 1)]


@dataclass
class Idle:
    """How much of the machine was idle, over time: run `watch` beside the load."""

    samples: list[tuple[float, float, float]] = field(default_factory=list)  # end (seconds since the epoch), seconds idle, seconds in all

    async def watch(self) -> None:
        """Look once a second until cancelled."""
        before = psutil.cpu_times()
        while True:
            await asyncio.sleep(1.0)
            now = psutil.cpu_times()
            idle, total = (now.idle + now.iowait) - (before.idle + before.iowait), sum(now[:8]) - sum(before[:8])
            self.samples.append((time.time(), idle, total))
            before = now

    def share(self, start: float, end: float) -> float | None:
        """Of [start, end), seconds since the epoch; None if nothing was seen there."""
        seen = [(idle, total) for at, idle, total in self.samples if start <= at < end]
        total = sum(total for _, total in seen)
        return round(sum(idle for idle, _ in seen) / total, 3) if total else None


@dataclass(frozen=True)
class Target:
    """One line of the verdict. found None: could not be measured."""

    name: str
    found: float | None
    limit: str
    is_met: bool


def at_most(name: str, found: float | None, limit: float, unit: str = "") -> Target:
    """A target that something does not exceed."""
    return Target(name, found, f"at most {limit:g}{unit}", found is not None and found <= limit)


def exactly(name: str, found: float, wanted: float) -> Target:
    """A target that something is met exactly."""
    return Target(name, found, f"{wanted:g}", found == wanted)


def verdict(targets: Iterable[Target]) -> str:
    """One line per target."""
    return "\n".join(
        f"{'met   ' if t.is_met else 'MISSED'}  {t.name}: {'-' if t.found is None else f'{t.found:,.6g}'} (target {t.limit})"
        for t in targets
    )


def write(name: str, facts: Mapping[str, object], found: Mapping[str, object], text: str, out: Path) -> None:
    """Results as NAME-DATE-Ncpu.json and .txt."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{datetime.date.today()}-{facts['num_cpus']}cpu"
    (out / f"{stem}.json").write_text(json.dumps({"machine": facts, **found}, indent=1) + "\n")
    (out / f"{stem}.txt").write_text(text + "\n")
