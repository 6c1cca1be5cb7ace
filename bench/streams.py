"""Tens of thousands of concurrent streams on one host, every token of each checked.

    python bench/streams.py [--streams 50000] [--open-rate 2000] [--frontends 4] [--decodes 4] [--tokens 100] [--step-s 0.5] [--out DIR]

Several frontends on one port, decode workers of the sim engine that draw one token per stream every 500 ms (2 tokens/s each;
--step-s), and the load client of `baton bench stream` in several processes, connecting from several loopback addresses: one address
has some 28,000 ports. No process may need more open files than the hard limit (`ulimit -Hn`). The opening rate belongs to the result:
admitting a stream costs far more than a token, and while streams are opened it is admission that fills the machine.

Targets: every stream complete, in order and equal to the answer without streaming, all of them open at one time; at most 16 KiB of
frontend memory per stream (largest resident size less that before the load, over all frontends); p99 gap below two steps.
"""

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

from machine import machine
from many_streams import RESULTS, STEP_S, Idle, Target, at_most, exactly, house, load, of_service, settings, sources, verdict, write

MEMORY_KIB = 16.0


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The load client's report, and how idle the machine was."""
    streams, opening_s = arguments.streams, arguments.streams / arguments.open_rate
    # The kernel's split is not exact: each frontend takes more than its share.
    environment = settings(streams, arguments.decodes, arguments.tokens, max_inflight=streams)
    idle = Idle()
    async with house(frontends=arguments.frontends, decodes=arguments.decodes, environment=environment, step_s=arguments.step_s) as made:
        watching = asyncio.create_task(idle.watch())
        try:
            report = await load(
                made,
                *("-c", str(streams), "-n", str(streams), "-d", "0", "--open-rate", str(arguments.open_rate)),
                *("--max-tokens", str(arguments.tokens), "--prompts", "16", "--processes", str(arguments.clients)),
                *("--answer-limit", str(60 + 3 * arguments.tokens * arguments.step_s)),
                *sources(arguments.sources),
            )
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
    began, ended = report["began_at"], report["began_at"] + report["load_s"]
    opened = began + opening_s
    report["idle_share"] = {
        "while_opening": idle.share(began, opened),
        "all_open": idle.share(opened, max(opened, began + arguments.tokens * arguments.step_s)),
        "whole_load": idle.share(began, ended),
    }
    return report


def memory_kib(report: dict[str, Any]) -> float:
    """Of all frontends together, per stream."""
    grown = sum(server["rss_mib_most"] - server["rss_mib_before"] for server in of_service(report["servers"], "frontend"))
    return round(grown * 1024 / max(1, report["most_open"]), 2)


def targets(report: dict[str, Any], streams: int, step_s: float) -> list[Target]:
    """What the issue asks for."""
    requests, gap_ms = report["requests"], report["gap_ms"]
    return [
        exactly("streams complete and equal to the answer without streaming", requests.get("complete", 0), streams),
        exactly("errors and refusals", sum(requests.values()) - requests["started"] - requests.get("complete", 0), 0),
        Target("compared by text", None, "text", report["check"].startswith("text")),
        exactly("open at one time", report["most_open"], streams),
        at_most("frontend memory per stream, KiB", memory_kib(report), MEMORY_KIB),
        at_most("p99 gap, ms", gap_ms.get("p99"), 2 * step_s * 1000),
    ]


def text(report: dict[str, Any], arguments: argparse.Namespace, found: list[Target]) -> str:
    """For people."""
    lines = [
        f"{arguments.streams:,} streams of {arguments.tokens} tokens, one per {arguments.step_s:g} s, opened at "
        f"{arguments.open_rate:,.0f}/s; "
        f"{arguments.frontends} frontends on one port, {arguments.decodes} decode workers, {report['processes']} client processes",
        f"over in {report['load_s']:.1f} s, {report['tokens_per_s']:,.0f} tokens/s on average; ends: {report['requests']}",
        f"tokens per event {report['tokens_per_event']}",
        "",
    ]
    for name, key in (("first text", "first_text_ms"), ("gap", "gap_ms"), ("whole answer", "whole_answer_ms")):
        if quantiles := report[key]:
            cells = "  ".join(f"{share} {quantiles[share]:,.0f}" for share in ("p50", "p90", "p99", "p99.9", "max"))
            lines.append(f"{name:<14} ms   {cells}")
    lines.append("")
    lines += [
        f"{server['name']:<14} {server['cpu_share']:>5.0%} of a processor, {server['cpu_us_per_token'] or 0:>6.2f} us per token of all, "
        f"{server['rss_mib_before']:.0f} -> {server['rss_mib_most']:.0f} MiB"
        for server in report["servers"]
    ]
    lines.append(f"{'clients':<14} {report['client_cpu_s'] / report['load_s']:>5.0%} of a processor")
    shares = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in report["idle_share"].items() if share is not None)
    lines += [f"idle: {shares}", "", verdict(found)]
    if report["problems"]:
        lines += ["", "problems:", *(f"  {problem}" for problem in report["problems"])]
    return "\n".join(lines)


async def main(arguments: argparse.Namespace) -> int:
    """Returns: the exit code, 1 if a target was missed."""
    facts = machine()
    report = await measure(arguments)
    found = targets(report, arguments.streams, arguments.step_s)
    said = text(report, arguments, found)
    print(said)
    options = {name: value for name, value in vars(arguments).items() if name != "out"}
    write(
        f"streams-{arguments.streams}",
        facts,
        {"options": options, **report, "targets": [vars(target) for target in found]},
        said,
        arguments.out,
    )
    return int(not all(target.is_met for target in found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=50_000)
    parser.add_argument("--open-rate", type=float, default=2000.0, help="streams opened per second")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--step-s", type=float, default=STEP_S, help="between two tokens of a stream")
    parser.add_argument("--frontends", type=int, default=4)
    parser.add_argument("--decodes", type=int, default=4)
    parser.add_argument("--clients", type=int, default=0, help="client processes; 0: as few as can hold the streams")
    parser.add_argument("--sources", type=int, default=4, help="loopback addresses the clients connect from")
    parser.add_argument("--out", type=Path, default=RESULTS)
    sys.exit(asyncio.run(main(parser.parse_args())))
