"""Whether processes grow with the number of requests they have served.

    python bench/short_memory.py [--requests 1000000] [--connections 64] [--frontends 1] [--prefill 0] [--out bench/results]

Short requests (one token, not streamed, every answer checked) over kept connections, in ten parts of the load client; after each part the
resident size of every process. `--prefill 1` hands each request's KV over as well.

Target: each frontend's resident size after all requests is within 2 % of that after the first tenth. Router and workers are reported.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import psutil
from machine import machine
from many_streams import RESULTS, Cluster, Target, exactly, house, load, pids, verdict, write

PARTS = 10
LIMIT = 0.02
QUIET_S = 1.0  # before a size is read: what the last requests left has been dealt with


async def sizes_mib(made: Cluster) -> dict[str, float]:
    """Resident size of every process, once nothing is under way."""
    await made.settled(limit_s=30.0)
    await asyncio.sleep(QUIET_S)
    return {name: round(psutil.Process(pid).memory_info().rss / 2**20, 2) for name, pid in pids(made).items()}


async def measure(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """One row per part, and how requests ended in all."""
    rows: list[dict[str, Any]] = []
    ends: dict[str, int] = {}
    part = -(-arguments.requests // PARTS)
    async with house(frontends=arguments.frontends, decodes=1, environment={}, profile="instant", prefill=arguments.prefill) as made:
        for number in range(1, PARTS + 1):
            report = await load(
                made,
                *("-c", str(arguments.connections), "-n", str(part), "-d", "0", "--no-stream", "--max-tokens", "1"),
                *("--prompt-words", "8", "--prompts", "64", "--seed", str(number)),
                limit_s=7200.0,
            )
            for end, count in report["requests"].items():
                ends[end] = ends.get(end, 0) + count
            row = {"requests": number * part, "requests_per_s": report["requests_per_s"], "rss_mib": await sizes_mib(made)}
            rows.append(row)
            cells = "  ".join(f"{name} {size:.1f}" for name, size in row["rss_mib"].items())
            print(f"{row['requests']:>9,} requests, {row['requests_per_s']:>7,.0f}/s   MiB: {cells}", flush=True)
    return rows, ends


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By process: last size by first, less one."""
    first, last = rows[0]["rss_mib"], rows[-1]["rss_mib"]
    return {name: round(last[name] / first[name] - 1, 4) for name in first}


async def main(arguments: argparse.Namespace) -> int:
    """Returns: the exit code, 1 if the target was missed."""
    facts = machine()
    rows, ends = await measure(arguments)
    grown = growth(rows)
    found = [exactly("requests answered rightly", ends.get("complete", 0), ends["started"])]
    for name, share in grown.items():
        if name.startswith("frontend-"):
            found.append(Target(f"growth of {name}", share, f"within {LIMIT:.0%}", abs(share) <= LIMIT))
    table = [
        f"{row['requests']:>9,}  {row['requests_per_s']:>7,.0f}/s  " + "  ".join(f"{size:>12.1f}" for size in row["rss_mib"].values())
        for row in rows
    ]
    head = f"{'requests':>9}  {'':>9}  " + "  ".join(f"{name:>12}" for name in rows[0]["rss_mib"])
    between = f"from {rows[0]['requests']:,} to {rows[-1]['requests']:,} requests"
    changes = ", ".join(f"{name} {share:+.1%}" for name, share in grown.items())
    said = "\n".join(["resident size, MiB", head, *table, "", f"{between}: {changes}", "", verdict(found)])
    print(said)
    options = {name: value for name, value in vars(arguments).items() if name != "out"}
    result = {"options": options, "ends": ends, "rows": rows, "growth": grown, "targets": [vars(target) for target in found]}
    write("short-memory", facts, result, said, arguments.out)
    return int(not all(target.is_met for target in found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=0, help="prefill workers; 0: decode does everything")
    parser.add_argument("--out", type=Path, default=RESULTS)
    sys.exit(asyncio.run(main(parser.parse_args())))
