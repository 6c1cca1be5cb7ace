"""Soak: many handoffs, random faults, and at the end balanced books and flat memory.

    python tests/load/soak.py --handoffs 100000 --json bench/results/soak-2026-11-25.json

Real processes of the sim engine on this machine: one frontend, two routers, three prefill and three decode instances, two kvtransfer.
Every request goes over a pair, so it is a handoff. Clients ask through the frontend and check every token; some hang up. Meanwhile
processes are killed and started again, stopped and continued, and connections are reset or refused, by a schedule that is a
function of the seed and the number of requests started. At the end: every request has ended once and rightly, nothing is live,
free = total - cached on every worker, 0 bytes are stranded, the ledgers of all kvtransfer instances agree with the workers, and
no process that lived for 10 minutes holds over 2 % more memory in the last tenth of its life than in its second.
"""

import argparse
import asyncio
import json
import logging
import secrets
import shutil
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "load"), str(ROOT / "tests"), str(ROOT / "tests" / "faults"), str(ROOT / "bench")]

import baton_runtime  # noqa: E402,F401 - before gRPC, for its environment settings
from baton_cli import up  # noqa: E402
from baton_runtime.children import free_port  # noqa: E402
from clients import Proxy, proxy  # noqa: E402
from cluster import Cluster, cluster, unsettled, until  # noqa: E402
from machine import machine  # noqa: E402
from soak_clients import Clients, Oracle  # noqa: E402
from soak_faults import Faults  # noqa: E402
from soak_watch import Watch  # noqa: E402

NUM_BLOCKS = 2048  # a small pool: it is full within seconds, so that requests wait, blocks are evicted, and memory does not grow by use
ENV = shutil.which("env") or "/usr/bin/env"
SETTLE_LIMIT_S = 15.0
PROGRESS_S = 5.0
ENVIRONMENT = {
    "BATON_PREFILL_NUM_BLOCKS": str(NUM_BLOCKS),
    "BATON_DECODE_NUM_BLOCKS": str(NUM_BLOCKS),
    "BATON_DECODE_CAN_PREFILL": "false",
    "BATON_PREFILL_LOG_LEVEL": "warning",
    "BATON_DECODE_LOG_LEVEL": "warning",
    "BATON_FRONTEND_LOG_LEVEL": "warning",
    "BATON_ROUTER_LOG_LEVEL": "warning",
    "BATON_KVTRANSFER_LOG_LEVEL": "warning",
}


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--handoffs", type=int, default=100_000, help="confirmed handoffs to reach")
    parser.add_argument("--limit-s", type=float, default=0.0, help="end the load after this time all the same; 0: never")
    parser.add_argument("--clients", type=int, default=48, help="requests under way at a time")
    parser.add_argument("--seed", type=int, default=None, help="of requests and faults; a random one is printed")
    parser.add_argument("--fault-every", type=int, nargs=2, default=(250, 600), metavar=("FROM", "TO"), help="requests between faults")
    parser.add_argument("--json", type=Path, default=None, help="write the result here")
    made = parser.parse_args(args)
    made.seed = made.seed if made.seed is not None else secrets.randbelow(1 << 31)
    return made


class Soak:
    """One run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._began = time.monotonic()
        self._is_interrupted = False
        self.problems: list[str] = []

    def clock(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    async def run(self) -> dict[str, Any]:
        """The whole of it. Returns what goes into the JSON file. SIGINT and SIGTERM end the load; what it has shown is judged."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, self._interrupt)
        async with AsyncExitStack() as stack:
            gates = {name: await stack.enter_async_context(proxy()) for name in ("prefill-0", "decode-0")}
            for gate in gates.values():
                gate.target = ("127.0.0.1", free_port())
            house = await stack.enter_async_context(
                cluster(
                    self._folder,
                    prefill=3,
                    decode=3,
                    kvtransfer=2,
                    router=2,
                    environment=ENVIRONMENT,
                    change=lambda name, command: [*_settings(name, gates), *command],
                )
            )
            return await self._on(house, gates)

    async def _on(self, house: Cluster, gates: dict[str, Proxy]) -> dict[str, Any]:
        watch = Watch(house, self.clock)
        clients = Clients(house.url, self._options.seed, Oracle("instant", up.demo_model()), lambda: self._is_over(watch))
        faults = Faults(house, gates, self._options.seed, tuple(self._options.fault_every), lambda: clients.tally.started)
        self._began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(watch.run()), tasks.create_task(self._progress(watch, clients, faults))]
            breaking = tasks.create_task(faults.run(lambda: self._is_over(watch)))
            await clients.run(self._options.clients)
            load_s = self.clock()
            await breaking
            await self._settle(house)
            for task in background:
                task.cancel()
        watch.sample_memory()
        await watch.sample()
        await self._check(house, clients)
        return self._result(watch, clients, faults, load_s)

    def _interrupt(self) -> None:
        self._is_interrupted = True

    def _is_over(self, watch: Watch) -> bool:
        return self._is_interrupted or watch.handoffs >= self._options.handoffs or 0 < self._options.limit_s <= self.clock()

    async def _progress(self, watch: Watch, clients: Clients, faults: Faults) -> None:
        before, at = 0, self.clock()
        while True:
            await asyncio.sleep(PROGRESS_S)
            now, handoffs, tally = self.clock(), watch.handoffs, clients.tally
            complete, left = tally.ends["complete"], tally.ends["left"]
            say(
                f"{now:7.0f} s {handoffs:7d} handoffs {(handoffs - before) / (now - at):6.1f}/s  {complete} complete, {left} left, "
                f"{tally.resumed} resumed, {tally.ended - complete - left} errors, {len(tally.wrong)} wrong, {faults.done.total()} faults"
            )
            before, at = handoffs, now

    async def _settle(self, house: Cluster) -> None:
        """Until nothing is live and every book agrees."""
        last = ""

        async def is_idle() -> bool:
            nonlocal last
            last = unsettled(await house.report(), ())
            return not last

        try:
            await until("settled", is_idle, SETTLE_LIMIT_S)
        except AssertionError:
            self.problems.append(f"not settled within {SETTLE_LIMIT_S:g} s: {last}")

    async def _check(self, house: Cluster, clients: Clients) -> None:
        """The end state."""
        tally = clients.tally
        self.problems += tally.wrong[:20]
        if tally.ended != tally.started:
            self.problems.append(f"{tally.started} requests were started, {tally.ended} have ended")
        for instance in (await house.report()).instances:
            blocks = instance.blocks
            if blocks is not None and blocks.free + blocks.cached != blocks.total:
                self.problems.append(f"{instance.instance_id}: {blocks}")
        for name in house.children:
            service = name.partition("-")[0]
            if service in ("prefill", "decode", "kvtransfer", "frontend"):
                self._check_metrics(name, await house.metrics(name), clients)

    def _check_metrics(self, name: str, values: Any, clients: Clients) -> None:
        for metric in ("baton_kv_stranded_bytes", "baton_ledger_mismatch_bytes", "baton_inflight_requests", "baton_handoffs_in_flight"):
            if values.get(metric, 0):
                self.problems.append(f"{name}: {metric} {values[metric]}")
        if name.startswith("frontend"):
            ends, finished = clients.tally.ends, int(values.get('baton_requests_total{outcome="length"}', 0))
            if not ends["complete"] <= finished <= ends["complete"] + ends["left"]:
                self.problems.append(f"the frontend finished {finished} requests, clients saw {ends['complete']} and left {ends['left']}")

    def _result(self, watch: Watch, clients: Clients, faults: Faults, load_s: float) -> dict[str, Any]:
        memory = [life.verdict(self.clock()) for life in watch.lives.values() if len(life.samples) > 20]
        self.problems += [f"memory of {life['name']} grew by {life['growth']}" for life in memory if life["is_flat"] is False]
        tally = clients.tally
        return {
            "machine": machine(),
            "seed": self._options.seed,
            "clients": self._options.clients,
            "fault_every_requests": list(self._options.fault_every),
            "load_s": round(load_s, 1),
            "handoffs": watch.handoffs,
            "handoffs_per_s": round(watch.handoffs / load_s, 1),
            "handoffs_by_outcome": watch.outcomes,
            "gigabytes_handed_over": round(watch.gigabytes, 3),
            "requests": {"started": tally.started, "resumed": tally.resumed, "wrong": len(tally.wrong), **dict(tally.ends)},
            "faults": dict(faults.done),
            "largest_bytes_seen": dict(watch.worst),
            "longest_without_a_break_s": {name: round(seconds, 1) for name, seconds in watch.longest_s.items()},
            "memory": memory,
            "fault_log": faults.log,
            "problems": self.problems,
        }


def _settings(name: str, gates: dict[str, Proxy]) -> list[str]:
    """What one process has that others of its service do not: a network in front of it that can be cut; tcp in place of shared memory."""
    service = name.partition("-")[0].upper()
    if (gate := gates.get(name)) is not None and gate.target is not None:
        return [ENV, f"BATON_{service}_LISTEN=127.0.0.1:{gate.target[1]}", f"BATON_{service}_ADVERTISE={gate.address}"]
    return [ENV, f"BATON_{service}_TRANSPORTS=tcp"] if name == "prefill-1" else []


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Exit code 0 if everything was as it must be."""
    options = arguments()
    logging.disable(logging.WARNING)
    say(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="baton-soak-") as folder:
        result = asyncio.run(Soak(options, Path(folder)).run())
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name not in ("machine", "memory", "fault_log")}, indent=1))
    for life in result["memory"]:
        print({name: value for name, value in life.items() if name != "course"})
    for problem in result["problems"]:
        say(f"PROBLEM {problem}")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
