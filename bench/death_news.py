"""How long the news of a death take, between real processes: detection, kvtransfer, every worker that was introduced.

    python bench/death_news.py [--rounds 10] [--ways kill,stop,cut] [--out bench/results]

Two prefill and two decode workers (sim engine), two kvtransfer. In each round a worker, prefill and decode in turn, is killed
(SIGKILL), stopped (SIGSTOP) or cut off (its network namespace's cable; needs root) while one of its handoffs is under way. Printed,
from the fault: the news at workers that had no link to it; the fence at the worker that had one; the end of the victim's handoffs there.
Targets: 300 ms after a kill, 2.5 s after a stop or a cut. A worker fences by its own clock; news only shorten what it doubts itself.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import hosts as hosts_module  # noqa: E402
from baton_cli import up  # noqa: E402
from baton_runtime.log import configure_logging  # noqa: E402
from cluster import Cluster, cluster  # noqa: E402
from hosts import Hosts  # noqa: E402
from machine import machine  # noqa: E402
from news import DEBUG, LIMIT_S, Heard, handoff_under_way, percentile, reporting_again, revive, strike  # noqa: E402

NUM_WORKERS = 4
# 1 ms per prompt token: a prompt of 2,000 is on its way for 2 s.
PROFILE = """
description = "slow enough to be hit in the middle"
[prefill_ms]
per_token = 1.0
[decode_ms]
constant = 10.0
"""


def roomy_model(folder: Path) -> Path:
    """The demo model's folder with a longer context; the sim engine takes sizes and the tokenizer from it, not the weights."""
    made = folder / "roomy"
    shutil.copytree(up.demo_model(), made)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65536}))
    return made


async def measure(house: Cluster, way: str, rounds: int) -> list[Heard]:
    """One fault after the other, the house whole in between."""
    found = []
    for number in range(rounds):
        await reporting_again(house, NUM_WORKERS)
        prompt = [random.randrange(10, 160) for _ in range(2000)]
        async with handoff_under_way(house, prompt) as (source, sink):
            heard = await strike(house, sink if number % 2 else source, way)
            found.append(heard)
            if way != "kill":
                await revive(house, heard)
        if way == "kill":
            await revive(house, heard)
        print(f"  {way} {heard.victim}: {text_of(heard)}", flush=True)
    return found


def text_of(heard: Heard) -> str:
    """One round."""
    parts = [f"{name} {1e3 * after_s:.0f} ms" for name, after_s in sorted(heard.unlinked.items())]
    fences = [f"{name} {1e3 * after_s:.0f} ms" for name, after_s in sorted(heard.fences.items())]
    return f"news {', '.join(parts)}; fence {', '.join(fences)}; ends {', '.join(f'{1e3 * end:.0f} ms' for end in heard.ends)}"


def summary(way: str, found: list[Heard]) -> list[dict[str, object]]:
    """Rows of the table."""
    columns = {
        "news, no link": [after_s for heard in found for after_s in heard.unlinked.values()],
        "fence, linked": [after_s for heard in found for after_s in heard.fences.values()],
        "handoffs over": [end for heard in found for end in heard.ends],
    }
    return [
        {
            "fault": way,
            "what": what,
            "samples": len(values),
            "p50_ms": round(1e3 * percentile(values, 0.5), 1),
            "p99_ms": round(1e3 * percentile(values, 0.99), 1),
            "max_ms": round(1e3 * max(values, default=0.0), 1),
            "limit_ms": 1e3 * LIMIT_S[way],
        }
        for what, values in columns.items()
    ]


def table(rows: list[dict[str, object]]) -> str:
    """For people."""
    lines = [f"{'fault':<6}{'what':<15}{'samples':>8}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'limit':>8}"]
    lines += [
        f"{row['fault']:<6}{row['what']:<15}{row['samples']:>8}{row['p50_ms']:>9}{row['p99_ms']:>9}{row['max_ms']:>9}{row['limit_ms']:>8.0f}"
        for row in rows
    ]
    return "\n".join(lines)


async def main(arguments: argparse.Namespace) -> int:
    """Returns: the exit code, 1 if a target was missed."""
    facts, rows = machine(), []
    for way in arguments.ways.split(","):
        if way == "cut" and (why := hosts_module.why_not()):
            print(f"cut: left out, {why}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            profile = Path(folder, "slow.toml")
            profile.write_text(PROFILE)
            async with contextlib.AsyncExitStack() as stack:
                hosts = await stack.enter_async_context(Hosts()) if way == "cut" else None
                made = cluster(
                    Path(folder),
                    profile=str(profile),
                    model=roomy_model(Path(folder)),
                    prefill=2,
                    decode=2,
                    kvtransfer=2,
                    environment=DEBUG,
                    hosts=hosts,
                )
                house = await stack.enter_async_context(made)
                rows += summary(way, await measure(house, way, arguments.rounds))
    print(table(rows))
    if arguments.out:
        path = Path(arguments.out)
        path.mkdir(parents=True, exist_ok=True)
        name = f"death-news-{datetime.date.today()}-{facts['num_cpus']}cpu"
        path.joinpath(f"{name}.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        path.joinpath(f"{name}.txt").write_text(table(rows) + "\n")
    return int(any(row["p99_ms"] > row["limit_ms"] for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ways", default="kill,stop,cut")
    parser.add_argument("--out", default="")
    configure_logging("bench", "bench", "", level="warning", fmt="console")
    sys.exit(asyncio.run(main(parser.parse_args())))
