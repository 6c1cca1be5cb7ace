"""What the soak looks at from outside while it runs: the handoffs of all lives of all workers, the books, the memory of every process."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from cluster import Cluster

EVERY_S = 1.0
MEMORY_EVERY_S = 2.0
GROWTH_LIMIT = 1.02  # last tenth of a life over its second tenth
# Ended handoffs are remembered for 60 s: a life must be long enough for its second tenth to come after that.
MIN_LIFE_S = 600.0
COURSE_POINTS = 40
SERVICES = ("prefill", "decode", "kvtransfer")
_STRANDED, _MISMATCH = "baton_kv_stranded_bytes", "baton_ledger_mismatch_bytes"


@dataclass
class Life:
    """Memory of one process from start to end: (seconds of the run, RSS in KiB, of it private)."""

    name: str
    pid: int
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def verdict(self, end_s: float) -> dict[str, object]:
        """RSS of its second and of its last tenth, in MiB, and whether it grew too much; None if it did not live for long enough."""
        first, last = self.samples[0][0], self.samples[-1][0]
        span = last - first
        second = self._mean(first + span * 0.1, first + span * 0.2)
        final = self._mean(last - span * 0.1, last)
        is_judged = span >= MIN_LIFE_S
        return {
            "name": self.name,
            "lived_s": round(span),
            "to_the_end": end_s - last < 3 * MEMORY_EVERY_S,
            "second_tenth_mib": round(second / 1024, 2),
            "last_tenth_mib": round(final / 1024, 2),
            "growth": round(final / second - 1, 4) if second else None,
            "is_flat": final <= GROWTH_LIMIT * second if is_judged else None,
            "course": self._course(),
        }

    def _course(self) -> list[list[float]]:
        """Some of the samples: [seconds of the run, RSS in MiB, of it private]."""
        step = -(-len(self.samples) // COURSE_POINTS)
        return [[round(at), round(rss / 1024, 1), round(private / 1024, 1)] for at, rss, private in self.samples[::step]]

    def _mean(self, start: float, end: float) -> float:
        found = [rss for at, rss, _ in self.samples if start <= at <= end]
        return sum(found) / len(found) if found else 0.0


class Watch:
    """Samples everything about once a second. Counters of a life that is killed lose what came after its last sample."""

    def __init__(self, house: Cluster, clock: Callable[[], float]) -> None:
        self.lives: dict[tuple[str, int], Life] = {}
        self.worst: Counter[str] = Counter()  # largest stranded and mismatch bytes seen
        self.longest_s: Counter[str] = Counter()  # and for how long without a break
        self._since: dict[tuple[str, str], float] = {}
        self._house = house
        self._clock = clock
        self._last: dict[tuple[int, str], float] = {}
        self._totals: Counter[str] = Counter()

    @property
    def handoffs(self) -> int:
        """Confirmed, as the sinks count them."""
        return int(self._totals["baton_handoffs_total:confirmed"])

    @property
    def outcomes(self) -> dict[str, int]:
        """Handoffs by outcome, as the sinks count them."""
        prefix = "baton_handoffs_total:"
        return {name.removeprefix(prefix): int(count) for name, count in sorted(self._totals.items()) if name.startswith(prefix)}

    @property
    def gigabytes(self) -> float:
        """Pulled and confirmed."""
        return self._totals["baton_handoff_bytes_total"] / 1e9

    async def run(self) -> None:
        """Until cancelled."""
        turn = 0
        while True:
            if turn % round(MEMORY_EVERY_S / EVERY_S) == 0:
                self.sample_memory()
            turn += 1
            await self.sample()
            await asyncio.sleep(EVERY_S)

    async def sample(self) -> None:
        """Read every worker and kvtransfer that answers."""
        names = [name for name in self._house.children if name.partition("-")[0] in SERVICES]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0)) as http:
            await asyncio.gather(*(self._sample_one(http, name) for name in names))

    async def _sample_one(self, http: aiohttp.ClientSession, name: str) -> None:
        process = self._house.children[name].process
        pid = process.pid if process is not None and process.returncode is None else 0
        address = next((i.metrics_address for i in self._house.view.instances.values() if i.pid == pid and i.instance_id == name), "")
        if not address:
            return
        try:
            async with http.get(f"http://{address}/metrics") as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError):
            return  # stopped, or gone
        for line in text.splitlines():
            if line.startswith("baton_handoffs_total{") and 'role="sink"' in line:
                self._count(pid, line, "baton_handoffs_total:" + line.partition('outcome="')[2].partition('"')[0])
            elif line.startswith("baton_handoff_bytes_total "):
                self._count(pid, line, "baton_handoff_bytes_total")
            elif line.startswith((_STRANDED, _MISMATCH)):
                self._note(name, line)

    def _count(self, pid: int, line: str, name: str) -> None:
        value = float(line.rpartition(" ")[2])
        self._totals[name] += value - self._last.get((pid, line.rpartition(" ")[0]), 0.0)
        self._last[pid, line.rpartition(" ")[0]] = value

    def _note(self, name: str, line: str) -> None:
        metric, value, now = line.partition(" ")[0].partition("{")[0], float(line.rpartition(" ")[2]), self._clock()
        self.worst[metric] = max(self.worst[metric], int(value))
        if not value:
            self._since.pop((name, metric), None)
        since = self._since.setdefault((name, metric), now) if value else now
        self.longest_s[metric] = max(self.longest_s[metric], now - since)

    def sample_memory(self) -> None:
        """RSS of every process of ours that runs."""
        for name, child in self._house.children.items():
            if child.process is None or child.process.returncode is not None:
                continue
            sizes = memory_kib(child.process.pid)
            if sizes is not None:
                life = self.lives.setdefault((name, child.process.pid), Life(name, child.process.pid))
                life.samples.append((self._clock(), *sizes))


def memory_kib(pid: int) -> tuple[int, int] | None:
    """Resident memory of a process, and the part of it that is its own; None if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    sizes = {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss") or line.startswith("VmRSS")}
    return (sizes["VmRSS"], sizes["RssAnon"]) if "VmRSS" in sizes else None
