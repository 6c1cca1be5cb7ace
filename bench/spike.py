"""A spike of new streams while chats are running: each new one gets its first text or a 429 in time, and the chats hardly notice.

    python bench/spike.py [--streams 20000] [--chats 100] [--frontends 4] [--decodes 2] [--max-inflight 4096] [--out bench/results]

The chats (2 tokens/s each from the sim engine) run alone for some time, then the load client opens all connections within one second,
each with one request. What is beyond the frontends' `max_inflight` is refused with 429 at once; the rest is accepted, its first text
counts. The gaps of the chats are those between events as a client reads them, before the spike, and from its beginning until its last
answer or refusal.

Targets: every new stream has its first text or its 429 within 4 s of being sent, none hangs or breaks; every chat goes on, with the
text it should have; the chats' p99 gap during the spike is at most 1.5 times that before.
"""

import argparse
import asyncio
import json
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from machine import machine, settle
from many_streams import RESULTS, STEP_S, Cluster, Target, at_most, exactly, house, load, settings, sources, until, verdict, write

LIMIT_MS = 4000.0
GAP_FACTOR = 1.5
OPEN_WITHIN_S = 1.0
CHAT_TOKENS = 10_000  # more than they get to: they are left when the spike is over


@dataclass
class Chat:
    """One running chat as its client saw it."""

    times: list[float] = field(default_factory=list)  # of its events with text, seconds since the epoch
    text: str = ""
    error: str = ""  # also that it ended


async def run_chat(http: aiohttp.ClientSession, url: str, chat: Chat) -> None:
    """From the request until cancelled."""
    body = {
        "model": "test-model",
        "messages": [{"role": "user", "content": "a chat that was there before"}],
        "max_tokens": CHAT_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    try:
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                for choice in event.get("choices", ()):
                    if content := choice.get("delta", {}).get("content"):
                        chat.times.append(time.time())
                        chat.text += content
                if "error" in event:
                    chat.error = str(event["error"])
        chat.error = chat.error or f"ended with status {response.status}"
    except (aiohttp.ClientError, TimeoutError) as error:
        chat.error = repr(error)


def gaps_ms(chats: list[Chat], start: float, end: float) -> list[float]:
    """Gaps that ended in [start, end), seconds since the epoch; ascending."""
    return sorted(
        (after - before) * 1000 for chat in chats for before, after in zip(chat.times, chat.times[1:], strict=False) if start <= after < end
    )


def quantile(values: list[float], share: float) -> float | None:
    """Of ascending values."""
    return round(values[min(len(values) - 1, int(share * len(values)))], 1) if values else None


async def measure(made: Cluster, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Chat], float]:
    """The load client's report, the chats, and when the time alone began."""
    chats = [Chat() for _ in range(arguments.chats)]
    options = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=None)}
    async with aiohttp.ClientSession(**options) as http, asyncio.TaskGroup() as group:
        running = [group.create_task(run_chat(http, made.url, chat)) for chat in chats]
        await until("all chats are running", lambda: asyncio.sleep(0, all(len(chat.times) > 2 for chat in chats)), 60.0)
        settle()
        alone_began = time.time()
        await asyncio.sleep(arguments.alone)
        report = await load(
            made,
            *("-c", str(arguments.streams), "-n", str(arguments.streams), "-d", "0"),
            *("--open-rate", str(arguments.streams / OPEN_WITHIN_S), "--max-tokens", str(arguments.tokens), "--prompts", "4"),
            *("--processes", str(arguments.clients), "--answer-limit", "120", *sources(arguments.sources)),
        )
        for task in running:
            task.cancel()
    return report, chats, alone_began


def judged(report: dict[str, Any], chats: list[Chat], alone_began: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of both sides."""
    began = report["began_at"]
    before = gaps_ms(chats, alone_began, alone_began + arguments.alone)
    during = gaps_ms(chats, began, began + report["load_s"])
    first = gaps_ms(chats, began, began + LIMIT_MS / 1000)
    longest = max((chat.text for chat in chats), key=len)  # all have one prompt: what one says the others say too
    requests = report["requests"]
    refused = report["refused_ms"].get("count", 0)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        "accepted": requests.get("complete", 0),
        "refused": refused,
        "neither": requests["started"] - requests.get("complete", 0) - refused,
        "first_text_ms": report["first_text_ms"],
        "refused_ms": report["refused_ms"],
        "chats_whole": sum(not chat.error and chat.times[-1] >= began and longest.startswith(chat.text) for chat in chats),
        "chat_errors": [chat.error for chat in chats if chat.error][:10],
        "gap_ms_before": {name: quantile(before, share) for name, share in shares.items()} | {"count": len(before)},
        "gap_ms_during": {name: quantile(during, share) for name, share in shares.items()} | {"count": len(during)},
        "gap_ms_first_4_s": {name: quantile(first, share) for name, share in shares.items()} | {"count": len(first)},
    }


def targets(found: dict[str, Any], arguments: argparse.Namespace) -> list[Target]:
    """What the issue asks for."""
    before, during = found["gap_ms_before"]["p99"], found["gap_ms_during"]["p99"]
    slowest = max(found["first_text_ms"].get("max", 0.0), found["refused_ms"].get("max", 0.0))
    return [
        exactly("new streams that were neither answered wholly nor refused with 429", found["neither"], 0),
        exactly("new streams answered or refused", found["accepted"] + found["refused"], arguments.streams),
        at_most("slowest first text or refusal, ms", slowest, LIMIT_MS),
        exactly("chats that went on to the end, with the text they should have", found["chats_whole"], arguments.chats),
        at_most("p99 gap of the chats, during by before", round(during / before, 3) if before and during else None, GAP_FACTOR),
    ]


def text(found: dict[str, Any], arguments: argparse.Namespace, verdicts: list[Target]) -> str:
    """For people."""
    lines = [
        f"{arguments.chats} chats at {1 / STEP_S:g} tokens/s, then {arguments.streams:,} new streams of {arguments.tokens} tokens within "
        f"{OPEN_WITHIN_S:g} s; {arguments.frontends} frontends of {arguments.max_inflight:,} requests each, "
        f"{arguments.decodes} decode workers",
        f"{found['accepted']:,} accepted and answered, {found['refused']:,} refused with 429, {found['neither']:,} neither",
        "",
    ]
    for name, key in (("first text", "first_text_ms"), ("429", "refused_ms")):
        if quantiles := found[key]:
            lines.append(f"{name:<22} ms   " + "  ".join(f"{share} {quantiles[share]:,.0f}" for share in ("p50", "p90", "p99", "max")))
    for name, key in (("before", "gap_ms_before"), ("during", "gap_ms_during"), ("its first 4 s", "gap_ms_first_4_s")):
        cells = "  ".join(f"{share} {value:,.0f}" for share, value in found[key].items() if value is not None)
        lines.append(f"{'chat gap ' + name:<22} ms   {cells}")
    lines += ["", verdict(verdicts)]
    return "\n".join(lines)


async def main(arguments: argparse.Namespace) -> int:
    """Returns: the exit code, 1 if a target was missed."""
    facts = machine()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    environment = settings(arguments.streams + arguments.chats, arguments.decodes, 200, arguments.max_inflight)
    async with house(frontends=arguments.frontends, decodes=arguments.decodes, environment=environment) as made:
        report, chats, alone_began = await measure(made, arguments)
    found = judged(report, chats, alone_began, arguments)
    verdicts = targets(found, arguments)
    said = text(found, arguments, verdicts)
    print(said)
    options = {name: value for name, value in vars(arguments).items() if name != "out"}
    write("spike", facts, {"options": options, **found, "load": report, "targets": [vars(t) for t in verdicts]}, said, arguments.out)
    return int(not all(target.is_met for target in verdicts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=20_000, help="new ones, opened within one second")
    parser.add_argument("--chats", type=int, default=100, help="running before, during and after")
    parser.add_argument("--tokens", type=int, default=10, help="of each new stream")
    parser.add_argument("--alone", type=float, default=15.0, help="seconds the chats run alone")
    parser.add_argument("--frontends", type=int, default=4)
    parser.add_argument("--decodes", type=int, default=2)
    parser.add_argument("--max-inflight", type=int, default=4096, help="requests per frontend; the default is the product's")
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--sources", type=int, default=4, help="loopback addresses the clients connect from")
    parser.add_argument("--out", type=Path, default=RESULTS)
    sys.exit(asyncio.run(main(parser.parse_args())))
