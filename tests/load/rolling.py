"""Rolling restart under load: every instance of every service is drained and started again, round after round.

    python tests/load/rolling.py --rounds 6 --json bench/results/rolling-2026-11-26.json

Real processes of the sim engine on this machine, two of each service. Clients stream completions through the frontends' shared port and
check every token (what the sim draws is a pure function of the tokens before). Every other instance is drained by the call that
`baton drain --wait` makes, the others by SIGTERM; each must end by itself with exit code 0, having finished or handed back all it had.
At the end: every request was answered, nothing is live, pinned or reserved, 0 bytes are stranded, and the books agree.

A client asks again, as HTTP clients do, when nobody took its connection, when the connection ended before the answer's head, or on a 503:
nothing was executed then. How often is in the result, by reason. Anything else but a whole answer with the right tokens is a failure.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults"), str(ROOT / "bench")]

import baton_runtime  # noqa: E402,F401 - before gRPC, for its environment settings
from baton_cli import drain, up  # noqa: E402
from baton_contracts.instance.v1 import instance_service_pb2 as pb  # noqa: E402
from cluster import Cluster, cluster, roomy_model, until  # noqa: E402
from load import Kind, Load, Oracle, Outcome, _Answer  # noqa: E402
from machine import machine  # noqa: E402

SERVICES = ("frontend", "router", "prefill", "decode", "kvtransfer")
PER_SERVICE = 2
DRAIN_LIMIT_S, PATIENCE_S, SETTLE_LIMIT_S = 100.0, 30.0, 15.0
PROFILE = """
description = "slow enough that each drain meets running work"
[prefill_ms]
per_token = 0.2
[decode_ms]
constant = 10.0
"""
KINDS = [Kind("chat", 6, prompt=(20, 120), answer=(20, 60)), Kind("long", 2, prompt=(400, 1200), answer=(60, 120))]
# Decode reads no prompts: every request is a handoff. The grace is longer than any answer.
ENVIRONMENT = {f"BATON_{service.upper()}_DRAIN_GRACE_S": "60" for service in SERVICES} | {"BATON_DECODE_CAN_PREFILL": "false"}


class PatientLoad(Load):
    """Clients that ask again while nothing was executed. asked_again: how often, by reason."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked_again: Counter[str] = Counter()

    async def _ask(self, kind: Kind, prompt: list[int]) -> tuple[Outcome, _Answer]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            outcome, answer = await super()._ask(kind, prompt)
            reason = _nothing_executed(outcome, answer)
            if not reason or time.monotonic() > deadline:
                return outcome, answer
            self.asked_again[reason] += 1
            await asyncio.sleep(0.05)


def _nothing_executed(outcome: Outcome, answer: _Answer) -> str:
    """Why the request may be sent again; empty if it may not, or need not."""
    if answer.status == 503:
        return f"503 {json.loads(answer.error)['error']['code']}"
    return outcome.detail if answer.status == 0 and outcome.detail.startswith("connection: ") else ""


@dataclass
class Restart:
    """One instance, drained and started again."""

    name: str
    how: str  # "call" or "SIGTERM"
    held_at_first: int  # running requests or sequences when the drain began, as told by the call; -1 by SIGTERM
    drain_s: float  # from asking to the end of the process
    start_s: float  # from its new start until it is in discovery and the routers hear it


class Rolling:
    """The restarts. problems: what should not have been."""

    def __init__(self, house: Cluster) -> None:
        self._house = house
        self.restarts: list[Restart] = []
        self.problems: list[str] = []

    async def round(self, services: tuple[str, ...], per_service: int) -> None:
        """Every instance once."""
        for service in services:
            for index in range(per_service):
                how = "SIGTERM" if len(self.restarts) % 2 else "call"
                await self._restart(f"{service}-{index}", how)
                print(f"  {self.restarts[-1]}", file=sys.stderr, flush=True)

    async def _restart(self, name: str, how: str) -> None:
        child, began, held = self._house.children[name], time.monotonic(), -1
        assert child.process is not None
        if how == "call":
            held = await self._call(name)
        else:
            self._house.signal(name, signal.SIGTERM)
        async with asyncio.timeout(DRAIN_LIMIT_S):
            code = await child.process.wait()
        ended = time.monotonic()
        said = [line for line in child.last_lines(200).splitlines() if '"service_drained"' in line]
        if code != 0 or not said or not json.loads(said[-1])["complete"]:
            self.problems.append(f"{name} ended by {how} with exit code {code}: {said[-1:] or child.last_lines()}")
        await self._house.start(name)
        await until("the routers hear all workers", self._routers_are_open, DRAIN_LIMIT_S)
        self.restarts.append(Restart(name, how, held, round(ended - began, 2), round(time.monotonic() - ended, 2)))
        report = await self._house.report()
        self.problems += [f"after {name}: {i.instance_id} strands {i.stranded_bytes} bytes" for i in report.instances if i.stranded_bytes]

    async def _call(self, name: str) -> int:
        heard: list[pb.DrainResponse] = []
        instance = self._house.instance(name)
        ending = await drain.follow(instance, grace_s=None, timeout_s=DRAIN_LIMIT_S, is_wait=True, heard=heard.append)
        if ending is not drain.Ending.DRAINED or heard[-1].holdings != pb.Holdings():
            self.problems.append(f"drain of {name}: {ending}, holds {heard[-1].holdings}")
        return heard[0].holdings.running

    async def _routers_are_open(self) -> bool:
        return await up.routers_are_open(self._house.view, self._house.options.counts)


async def run(folder: Path, rounds: int, services: tuple[str, ...], per_service: int) -> dict[str, Any]:
    """Returns what goes into the JSON file; `problems` is empty if all is well."""
    profile = folder / "profile.toml"
    profile.write_text(PROFILE)
    model = roomy_model(folder / "model")
    counts = dict.fromkeys(SERVICES, PER_SERVICE)
    async with cluster(folder, profile=str(profile), model=model, environment=ENVIRONMENT, **counts) as house:
        load = PatientLoad(house.http, house.url, "test-model", Oracle(str(profile), model), 1)
        rolling, began = Rolling(house), time.monotonic()
        async with load.running(KINDS):
            await until("every client's first answer", lambda: _answered(load, sum(kind.clients for kind in KINDS)), DRAIN_LIMIT_S)
            for _ in range(rounds):
                await rolling.round(services, per_service)
        duration_s = time.monotonic() - began
        try:
            await house.settled(limit_s=SETTLE_LIMIT_S)
        except AssertionError as error:
            rolling.problems.append(str(error))
        report = await house.report()
    outcomes = load.tally.outcomes
    failed = [f"{outcome.kind}: {outcome.how} {outcome.detail}" for outcome in outcomes if outcome.how != "ok"]
    return {
        "requests": len(outcomes),
        "answered": len(outcomes) - len(failed),
        "resumed": load.tally.count()["resumed"],
        "asked_again": dict(load.asked_again),
        "num_restarts": len(rolling.restarts),
        "duration_s": round(duration_s, 1),
        "drain_s": {service: _spread(rolling.restarts, service) for service in services},
        "stranded_bytes": sum(i.stranded_bytes or 0 for i in report.instances),
        "mismatch_bytes": sum(i.mismatch_bytes or 0 for i in report.instances),
        "agreed_handoffs": max(i.agreed_handoffs or 0 for i in report.instances),
        "disagreed_handoffs": sum(i.disagreed_handoffs or 0 for i in report.instances),
        "problems": [*rolling.problems, *failed, *load.tally.corrupt, *report.problems],
        "restarts": [vars(restart) for restart in rolling.restarts],
    }


async def _answered(load: Load, num: int) -> bool:
    return len(load.tally.outcomes) >= num


def _spread(restarts: list[Restart], service: str) -> dict[str, float]:
    """Shortest, middle and longest drain of a service, in seconds."""
    taken = sorted(restart.drain_s for restart in restarts if restart.name.startswith(service))
    return {"min": taken[0], "median": taken[len(taken) // 2], "max": taken[-1]}


def main() -> None:
    """Exits with 1 if there are problems."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="restarts of every instance")
    parser.add_argument("--services", nargs="+", choices=SERVICES, default=SERVICES, help="which are restarted")
    parser.add_argument("--per-service", type=int, choices=range(1, PER_SERVICE + 1), default=PER_SERVICE, help="instances of each")
    parser.add_argument("--json", type=Path, default=None, help="write the result here")
    options = parser.parse_args()
    on = machine()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(run(Path(folder), options.rounds, tuple(options.services), options.per_service))
    text = json.dumps({"machine": on, **result}, indent=2)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "restarts"}, indent=2))
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
