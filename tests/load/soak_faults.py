"""The faults of the soak: a schedule that is a function of the seed, and what carries it out on a running cluster."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from clients import Proxy
from cluster import Cluster

# Killed ones are never the first of their kind: so that some processes live through the whole run, and their memory can be judged.
STOPPED = ("prefill-0", "prefill-1", "prefill-2", "decode-0", "decode-1", "decode-2", "kvtransfer-0", "kvtransfer-1")
KILLED = ("prefill-1", "prefill-2", "decode-1", "decode-2", "kvtransfer-1")
# Stops: shorter than the beat, suspect (1 s), just fenced (2 s), long fenced.
STOP_S = (0.2, 1.3, 2.3, 5.0)
AWAY_S = (0.0, 0.1, 1.0, 3.0)


@dataclass(frozen=True)
class Fault:
    """Not before that many requests were started. seconds: until the process is continued, started again, or reachable again."""

    at_request: int
    kind: str  # "kill", "stop", "cut" (connections are reset, new ones served), "away" (and refused for so long)
    target: str
    seconds: float


def schedule(seed: int, every: tuple[int, int]) -> Iterator[Fault]:
    """Faults without end, one after another, each `every` requests after the one before."""
    source = random.Random(f"{seed}:faults")
    at = 0
    while True:
        at += source.randint(*every)
        kind = source.choices(("kill", "stop", "cut", "away"), weights=(4, 4, 1, 1))[0]
        if kind == "kill":
            yield Fault(at, kind, source.choice(KILLED), source.choice((0.0, 1.0)))
        elif kind == "stop":
            yield Fault(at, kind, source.choice(STOPPED), source.choice(STOP_S))
        else:
            yield Fault(at, kind, source.choice(("prefill-0", "decode-0")), source.choice(AWAY_S) if kind == "away" else 0.0)


class Faults:
    """Carries the schedule out until cancelled; every fault is undone before the next one."""

    def __init__(self, house: Cluster, gates: dict[str, Proxy], seed: int, every: tuple[int, int], started: Callable[[], int]) -> None:
        self.done: Counter[str] = Counter()
        self.log: list[dict[str, object]] = []
        self._house = house
        self._gates = gates
        self._schedule = schedule(seed, every)
        self._started = started
        self._began = time.monotonic()

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Until the load is over."""
        for fault in self._schedule:
            while self._started() < fault.at_request:
                if is_over():
                    return
                await asyncio.sleep(0.02)
            self.log.append({**asdict(fault), "at_s": round(time.monotonic() - self._began, 2)})
            await self._carry_out(fault)
            self.done[fault.kind] += 1

    async def _carry_out(self, fault: Fault) -> None:
        if fault.kind == "kill":
            await self._house.kill(fault.target)
            await asyncio.sleep(fault.seconds)
            await self._house.start(fault.target)
        elif fault.kind == "stop":
            self._house.signal(fault.target, signal.SIGSTOP)
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                self._house.signal(fault.target, signal.SIGCONT)
        else:
            gate = self._gates[fault.target]
            gate.is_open = fault.kind == "cut"
            gate.cut()
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                gate.is_open = True
