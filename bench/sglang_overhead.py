"""What Baton adds to an SGLang server: the same server asked directly and through Baton, in turns, as streams of tokens.

    make bench-sglang            writes bench/results/sglang-overhead-DATE-NCPU.json and .txt

One server on a CPU with a tiny random model, whole requests. Directly: POST /generate by token ids. Through Baton: POST /v1/completions of
a frontend, which goes to router, worker, server, and back as events with text. Tokens per second and time to the first token, medians
of the rounds, and Baton's as a share of the direct ones. Everything shares the processors, so Baton's own work takes from the server's.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("sglang", "faults", ".")]

import aiohttp  # noqa: E402
import cluster as cluster_module  # noqa: E402
import psutil  # noqa: E402
from baton_engine.testing import make_random_model  # noqa: E402
from cluster import Cluster, cluster  # noqa: E402
from cpu import PYTHON, settings  # noqa: E402

PROMPT_TOKENS, NUM_TOKENS, ROUNDS = 64, 64, 5
STREAMS = (1, 8, 32)


@dataclass
class Way:
    """How to ask: where, with which headers, and what."""

    url: str
    headers: dict[str, str]
    body: dict[str, object]
    prompt_field: str


def ways(house: Cluster) -> dict[str, Way]:
    """Directly and through Baton."""
    (server,) = psutil.Process(house.instance("decode-0").pid).children()
    command = server.cmdline()
    port, key = (command[command.index(flag) + 1] for flag in ("--port", "--api-key"))
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    direct = Way(f"http://127.0.0.1:{port}/generate", {"Authorization": f"Bearer {key}"}, {"sampling_params": sampling}, "input_ids")
    body: dict[str, object] = {"model": "test-model", "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    return {"direct": direct, "baton": Way(f"{house.url}/v1/completions", {}, body, "prompt")}


async def one(http: aiohttp.ClientSession, way: Way, prompt: list[int]) -> float:
    """Ask once and read to the end; seconds to the first event."""
    began, first = time.perf_counter(), 0.0
    async with http.post(way.url, json=way.body | {"stream": True, way.prompt_field: prompt}, headers=way.headers) as response:
        assert response.status == 200, await response.text()
        last = b""
        async for line in response.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                last = line
    assert b'"length"' in last or b"usage" in last, last
    return first


async def measure(http: aiohttp.ClientSession, way: Way, streams: int, seed: int) -> tuple[float, float]:
    """Tokens per second, and the median time to the first event in seconds."""
    prompts = [[3 + (seed * 7919 + n * 131 + i * (n + 3)) % 240 for i in range(PROMPT_TOKENS)] for n in range(streams)]
    began = time.perf_counter()
    firsts = await asyncio.gather(*(one(http, way, prompt) for prompt in prompts))
    return streams * NUM_TOKENS / (time.perf_counter() - began), statistics.median(firsts)


async def run() -> list[dict[str, float]]:
    """A row per number of streams."""
    cluster_module.READY_LIMIT_S = 240.0
    rows = []
    with tempfile.TemporaryDirectory(prefix="baton-sglang-") as folder:
        model = make_random_model(Path(folder) / "model")
        async with cluster(Path(folder) / "run", engine="sglang", model=model, prefill=0, environment=settings(is_pair=False)) as house:
            asked = ways(house)
            for streams in STREAMS:
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
                for number in range(ROUNDS + 1):
                    for name, way in asked.items():
                        got = await measure(house.http, way, streams, seed=2 * number + (name == "baton"))
                        if number:  # the first warms up
                            found[name].append(got)
                rates = {name: statistics.median(rate for rate, _ in got) for name, got in found.items()}
                firsts = {name: statistics.median(first for _, first in got) * 1e3 for name, got in found.items()}
                row = {"streams": streams, "direct_tokens_per_s": rates["direct"], "baton_tokens_per_s": rates["baton"]}
                row |= {"share": rates["baton"] / rates["direct"], "direct_ttft_ms": firsts["direct"], "baton_ttft_ms": firsts["baton"]}
                rows.append({name: round(value, 3) for name, value in row.items()})
                print(f"{streams} streams: {row['share']:.2f} of the direct tokens/s", file=sys.stderr)
    return rows


def table(rows: list[dict[str, float]]) -> str:
    """For people."""
    lines = [
        "SGLang 0.5.23 on a CPU, asked directly and through Baton, in turns.",
        f"{PROMPT_TOKENS} prompt tokens, {NUM_TOKENS} drawn; medians of {ROUNDS} rounds.",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} processors, {platform.machine()}, Python {platform.python_version()}.",
        "",
        "streams  direct tok/s  Baton tok/s  share  direct TTFT ms  Baton TTFT ms",
    ]
    lines += [
        f"{row['streams']:7.0f}  {row['direct_tokens_per_s']:12.0f}  {row['baton_tokens_per_s']:11.0f}  {row['share']:5.2f}"
        f"  {row['direct_ttft_ms']:14.1f}  {row['baton_ttft_ms']:13.1f}"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the rows for machines")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="where the results go")
    arguments = parser.parse_args()
    if not PYTHON:
        sys.exit("BATON_SGLANG_PYTHON names no Python with SGLang: make bench-sglang")
    rows = asyncio.run(run())
    name = f"sglang-overhead-{time.strftime('%Y-%m-%d')}-{os.cpu_count()}cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
    (arguments.out / f"{name}.txt").write_text(table(rows))
    print(json.dumps(rows) if arguments.json else table(rows), end="\n" if arguments.json else "")


if __name__ == "__main__":
    main()
