"""How long the news of a death take: from the fault to every worker that was introduced, to the fences, to the end of the handoffs.

Times are read from the logs of the processes, whose clock is this machine's: `peer_down_heard` (told by kvtransfer),
`source_fenced` and `sink_fenced` (given up by the worker's own clock), `handoff_ended` (level debug).
"""

import asyncio
import datetime
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from clients import stream
from cluster import Cluster, until

WAYS = ("kill", "stop", "cut")  # SIGKILL, SIGSTOP, the cable out of its host
LIMIT_S = {"kill": 0.3, "stop": 2.5, "cut": 2.5}
WAIT_S = 6.0
DEBUG = {f"BATON_{service}_LOG_LEVEL": "debug" for service in ("PREFILL", "DECODE")}


@dataclass
class Heard:
    """One death. Seconds from the fault, by the worker that noticed or was told."""

    way: str
    victim: str
    news: dict[str, float] = field(default_factory=dict)  # from the first kvtransfer that said so
    fences: dict[str, float] = field(default_factory=dict)
    ends: list[float] = field(default_factory=list)  # of the victim's handoffs, at their other sides

    @property
    def unlinked(self) -> dict[str, float]:
        """News at workers that had no link of their own to the victim."""
        return {name: after_s for name, after_s in self.news.items() if name not in self.fences}


class Logs:
    """What processes have logged since this was made."""

    def __init__(self, house: Cluster) -> None:
        self._starts = {name: (child.log, child.log.stat().st_size) for name, child in house.children.items()}

    def events(self, name: str) -> Iterator[dict]:
        """Complete lines of one process."""
        log, start = self._starts[name]
        with log.open("rb") as file:
            file.seek(start)
            for line in file.read().split(b"\n")[:-1]:
                if line.startswith(b"{"):
                    yield json.loads(line)


def _at(event: dict) -> float:
    return datetime.datetime.fromisoformat(event["timestamp"]).timestamp()


@asynccontextmanager
async def handoff_under_way(house: Cluster, prompt: list[int]) -> AsyncIterator[tuple[str, str]]:
    """A request whose blocks are on their way; its prefill and its decode. Left when the client has its whole answer."""
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(stream(house.http, house.url, model="test-model", prompt=prompt, max_tokens=3, ignore_eos=True))

        async def pulling() -> tuple[str, str] | None:
            busy = {i.instance_id: i for i in (await house.report()).instances if i.blocks is not None and i.live_handoffs}
            sinks = [name for name, i in busy.items() if i.service == "decode" and i.blocks.reserved and i.blocks.used]
            sources = [name for name, i in busy.items() if i.service == "prefill"]
            return (sources[0], sinks[0]) if sources and sinks else None

        yield await until("a handoff under way", pulling, 15)
        await answer


async def strike(house: Cluster, victim: str, way: str) -> Heard:
    """Do it, and wait until every other worker has heard of it. Call within handoff_under_way."""
    logs, incarnation = Logs(house), house.instance(victim).incarnation
    others = [name for name in house.children if name.startswith(("prefill", "decode")) and name != victim]
    heard = Heard(way, victim)
    struck_at = time.time()
    if way == "cut":
        assert house.hosts is not None
        await house.hosts.cut(victim)
    else:
        house.signal(victim, signal.SIGKILL if way == "kill" else signal.SIGSTOP)

    async def all_know() -> bool:
        for name in others:
            for event in logs.events(name):
                after_s = _at(event) - struck_at
                if event.get("peer") == incarnation and event["event"] == "peer_down_heard":
                    heard.news.setdefault(name, after_s)
                elif event.get("peer") == incarnation and event["event"] in ("source_fenced", "sink_fenced"):
                    heard.fences.setdefault(name, after_s)
        return heard.news.keys() >= set(others) and bool(heard.fences)

    await until(f"all know that {victim} is gone: {heard}", all_know, WAIT_S)
    for name in heard.fences:  # an end may come before the fence: the frontend has a clock of its own
        ends = (event for event in logs.events(name) if event["event"] == "handoff_ended" and event["outcome"] != "confirmed")
        heard.ends += [_at(event) - struck_at for event in ends]
    return heard


async def revive(house: Cluster, heard: Heard) -> None:
    """Undo it, and wait until the house is whole."""
    if heard.way == "kill":
        await house.children[heard.victim].process.wait()  # type: ignore[union-attr]
        await house.start(heard.victim)
    elif heard.way == "stop":
        house.signal(heard.victim, signal.SIGCONT)
    else:
        assert house.hosts is not None
        await house.hosts.heal()


async def reporting_again(house: Cluster, num_workers: int) -> None:
    """Wait until every kvtransfer hears every worker."""

    async def all_report() -> bool:
        names = [name for name in house.children if name.startswith("kvtransfer")]
        return all([(await house.metrics(name))["baton_books_workers"] == num_workers for name in names])

    await until("every worker reports again", all_report, 30)


def percentile(values: list[float], share: float) -> float:
    """0 of an empty list."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
