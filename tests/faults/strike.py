"""One field of the fault matrix: strike under a steady stream of handoffs, watch, mend, and judge by what everybody wrote down."""

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
from cluster import Cluster, cluster, until
from fault_kinds import Cell, is_worker
from history import History, Track
from hosts import Hosts
from judge import LAW_2_S, Result, judge_blocks
from load import Kind, Load, Oracle, Tally
from starvation import StarvationWatch

WATCHED_S = 6.0  # from the strike, if it is mended by then
DRAIN_LIMIT_S = 40.0
READY_LIMIT_S = 20.0
STATE_LIMIT_S = 10.0
SAMPLE_S = 0.2
ORPHAN_GRACE_S = 1.0  # blocks of an ended handoff are called stranded after so long: the metric is that late
NICE = -10
FENCES = "baton_handoff_fences_total"
DISAGREED = 'baton_books_handoffs_total{agreement="disagreed"}'
# Attempts that ended because there was no room; that is nobody's fault.
MADE_WAY = ('baton_attempts_total{outcome="preempted"', 'baton_attempts_total{outcome="refused"')

PROFILE = """
description = "half a millisecond per prompt token, blocks of 64 KiB: work is on its way long enough to be hit"
[prefill_ms]
per_token = 0.5
[decode_ms]
constant = 10.0
[model]
num_layers = 4
num_kv_heads = 4
head_dim = 32
"""
KINDS = [
    Kind("short", 8, (40, 400), (10, 80)),
    Kind("long", 4, (800, 1600), (5, 40), batch=True),
    Kind("talker", 4, (40, 200), (150, 200), talks=True),  # decode has what prefill lacks then: it is fetched
    Kind("leaver", 8, (200, 1500), (50, 100), leaves_after_s=1.2),
]
ENVIRONMENT = {
    "BATON_PREFILL_NUM_BLOCKS": "500",
    "BATON_DECODE_NUM_BLOCKS": "400",
    "BATON_PREFILL_MAX_CHUNK_TOKENS": "512",
    "BATON_WATCHED_PULL_DELAY_S": "0.08",
    "BATON_PREFILL_LOG_LEVEL": "debug",
    "BATON_DECODE_LOG_LEVEL": "debug",
}
WATCHED_WORKER = str(Path(__file__).parent / "watched_worker.py")


class House:
    """A cluster of watched workers on hosts of their own, for many strikes."""

    def __init__(self, house: Cluster, folder: Path, oracle: Oracle, machine: StarvationWatch) -> None:
        self.cluster = house
        self._machine = machine
        self.history = History(folder / "watched")
        self._folder = folder
        self._oracle = oracle
        self._log_offset = 0
        self._num_loads = 0
        self._stranded_since: float | None = None

    async def strike(self, cell: Cell, target: tuple[str, str] | None) -> Result:
        """Strike once, when a handoff concerned is in the target state. Raises nothing for what the law says; see problems."""
        self._num_loads += 1
        self._stranded_since = None
        house = self.cluster
        load = Load(house.http, house.url, house.options.served_name, self._oracle, seed=self._num_loads)
        result = Result(cell.name, cell.transport, cell.fault.name, list(cell.victims), target=" ".join(target or ()))
        began, before = time.monotonic(), await self._counters()
        async with load.running(KINDS):
            try:
                t0, t_mended = await self._strike_and_mend(cell, target, result)
            except BaseException:
                await self._undo(cell)
                raise
        ended = time.monotonic()
        result.problems += await self._settled(result)
        result.settled_s = round(time.monotonic() - ended, 3)
        self.history.read()
        judge_blocks(self.history, cell, result, t0, t_mended)
        self._judge_requests(cell, result, load.tally)
        self._judge_counters(cell, result, before, await self._counters())
        self.history.forget()
        result.starved_s = round(self._machine.worst_s(began), 3)
        return result

    async def _strike_and_mend(self, cell: Cell, target: tuple[str, str] | None, result: Result) -> tuple[float, float]:
        """Returns: when it struck and when it was mended, by CLOCK_MONOTONIC."""
        await self._until_busy(cell)
        frozen = await self._freeze(cell, target) if target is not None else None
        if frozen is None:
            await self._until_busy(cell)
        t0 = time.monotonic()
        if not (cell.fault.is_stop and frozen in cell.victims):
            await cell.fault.strike(self.cluster, cell.victims)
        if frozen is not None and (cell.fault.is_partition or frozen not in cell.victims):
            self.cluster.signal(frozen, signal.SIGCONT)
        struck = time.monotonic()
        self.history.read()
        found = self.history.counts(t0, lambda track: self._is_concerned(cell, track))
        result.states = {f"{side} {state}": count for (side, state), count in sorted(found.items())}
        result.is_target_hit = frozen is not None
        async with asyncio.TaskGroup() as group:
            mending = group.create_task(self._mend(cell, struck + cell.fault.lasts_s))
            end = max(t0 + WATCHED_S, struck + cell.fault.lasts_s + 2.0)
            while time.monotonic() < end or not mending.done():
                self._wake_strays(cell, is_mended=mending.done())
                await self._sample(cell, result, t0, is_mended=mending.done())
                await asyncio.sleep(SAMPLE_S)
        return t0, mending.result()

    async def _mend(self, cell: Cell, at: float) -> float:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        mended = time.monotonic()
        await cell.fault.mend(self.cluster, cell.victims)
        return mended

    async def _undo(self, cell: Cell) -> None:
        """After something went wrong with the harness: let nobody stay stopped or cut off."""
        for child in self.cluster.children.values():
            child.send(signal.SIGCONT)
        if self.cluster.hosts is not None:
            await self.cluster.hosts.heal()

    def _is_concerned(self, cell: Cell, track: Track) -> bool:
        """Whether a strike is about this side of a handoff: it is severed from the other, or no worker is struck and all count."""
        one, other = track.instance, self.history.peer(track)
        if not self.history.is_last_life(track):
            return False
        return cell.severs(one, other) or not all(is_worker(victim) for victim in cell.victims)

    async def _until_busy(self, cell: Cell) -> None:
        """Until handoffs that will be struck are computed on one side and decoded on the other."""

        async def busy() -> bool:
            self.history.read()
            found = self.history.counts(time.monotonic(), lambda track: self._is_concerned(cell, track))
            return found["source", "computing"] > 0 and found["sink", "decoding"] > 0

        await until(f"{cell.name}: handoffs to be struck", busy, READY_LIMIT_S)

    async def _freeze(self, cell: Cell, target: tuple[str, str]) -> str | None:
        """Have the worker stop that sees the target state first. Returns: its name; None: nobody did."""
        side, state = target
        service = "prefill" if side == "source" else "decode"
        lives = {name: life for life, name in self.history.names.items()}  # the newest come last
        workers = [name for name in self.cluster.children if is_worker(name)]
        watchers = {}
        for name in workers:
            if name.startswith(service):
                everybody = not all(is_worker(victim) for victim in cell.victims)
                watchers[name] = [lives[peer] for peer in workers if everybody or cell.severs(name, peer)]
        watchers = {name: peers for name, peers in watchers.items() if peers}
        for name, peers in watchers.items():
            arm = self._folder / "watched" / f"{name}.arm"
            arm.write_text(json.dumps({"side": side, "state": state, "peers": peers}))
            self.cluster.signal(name, signal.SIGUSR1)
        try:
            return await until(f"somebody in {target}", lambda: self._stopped(list(watchers)), STATE_LIMIT_S)
        except AssertionError:
            return None
        finally:
            await self._disarm(list(watchers))

    async def _stopped(self, names: list[str]) -> str | None:
        return next((name for name in names if self._process_state(name) == "T"), None)

    def _process_state(self, name: str) -> str:
        process = self.cluster.children[name].process
        assert process is not None
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    async def _disarm(self, names: list[str]) -> None:
        """All but one: two may have stopped at the same time."""
        first = await self._stopped(names)
        for name in names:
            self.cluster.signal(name, signal.SIGUSR2)
            if name != first and self._process_state(name) == "T":
                self.cluster.signal(name, signal.SIGCONT)

    def _wake_strays(self, cell: Cell, *, is_mended: bool) -> None:
        """A second worker may have stopped itself while it was being disarmed."""
        for name, child in self.cluster.children.items():
            is_struck = cell.fault.is_stop and name in cell.victims and not is_mended
            if is_worker(name) and child.is_running and not is_struck and self._process_state(name) == "T":
                child.send(signal.SIGCONT)

    async def _sample(self, cell: Cell, result: Result, t0: float, *, is_mended: bool) -> None:
        """Stranded and mismatching bytes, now, of everybody who answers."""
        stranded = mismatch = 0.0
        for name, child in self.cluster.children.items():
            if not child.is_running or not (is_worker(name) or name.startswith("kvtransfer")):
                continue
            if not is_mended and not cell.fault.is_partition and name in cell.victims:
                continue
            values = await self._metrics(name)
            if values and is_worker(name):
                stranded += values["baton_kv_stranded_bytes"]
            elif values:
                mismatch += values["baton_ledger_mismatch_bytes"]
        result.max_stranded_bytes = max(result.max_stranded_bytes, stranded)
        result.max_mismatch_bytes = max(result.max_mismatch_bytes, mismatch)
        late = time.monotonic() - t0
        is_bookkeeper_away = not is_mended and any(victim.startswith("kvtransfer") for victim in cell.victims)
        self._stranded_since = (self._stranded_since or time.monotonic()) if stranded else None
        if self._stranded_since is not None:
            result.stranded_s = max(result.stranded_s, round(time.monotonic() - self._stranded_since, 3))
            if time.monotonic() - self._stranded_since > LAW_2_S - ORPHAN_GRACE_S:
                result.problems.append(f"{stranded:g} bytes stranded for {result.stranded_s} s, {late:.1f} s after the strike")
        if late > LAW_2_S and mismatch and not is_bookkeeper_away:
            result.problems.append(f"{mismatch:g} mismatching bytes after {late:.1f} s")

    async def _metrics(self, name: str) -> dict[str, float]:
        """Samples by name, labels included, and summed over labels; empty if it does not answer."""
        url = f"http://{self.cluster.instance(name).metrics_address}/metrics"
        try:
            async with self.cluster.http.get(url, timeout=aiohttp.ClientTimeout(total=1.0)) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError):
            return {}
        values: Counter[str] = Counter()
        for line in text.splitlines():
            if line.startswith("baton_"):
                name, _, value = line.rpartition(" ")
                values[name] += float(value)
                if "{" in name:
                    values[name.partition("{")[0]] += float(value)
        return values

    async def _counters(self) -> dict[str, dict[str, float]]:
        """By instance, what only rises."""
        wanted = (FENCES, DISAGREED, "baton_handoff_data_loss_total", 'baton_attempts_total{outcome="engine_error"', *MADE_WAY)
        found = {}
        for name, child in self.cluster.children.items():
            if (is_worker(name) or name.startswith("kvtransfer")) and child.is_running:
                values = await self._metrics(name)
                found[name] = {want: _sum(values, want) for want in wanted}
        return found

    async def _settled(self, result: Result) -> list[str]:
        """Idle and sound within law 2's time; free blocks as at the beginning: all."""
        try:
            await self.cluster.settled(limit_s=LAW_2_S)
        except AssertionError as error:
            return [str(error)]
        return []

    def _judge_requests(self, cell: Cell, result: Result, tally: Tally) -> None:
        """Law 1 and 3: every request has one ending, and no token is wrong, missing or repeated."""
        result.requests = dict(tally.count())
        result.problems += tally.corrupt
        # A frontend that is dead cannot answer; one that reaches nobody says so.
        allowed = ("failed", "refused") if cell.fault.is_kill else ("refused",)
        if cell.victims != ("frontend-0",) or not (cell.fault.is_kill or cell.fault.is_partition):
            allowed = ()
        bad = [outcome for outcome in tally.outcomes if outcome.how in ("failed", "refused") and outcome.how not in allowed]
        if bad:
            result.problems += [f"request {outcome.how}: {outcome.detail} ({outcome.kind})" for outcome in bad[:5]]
        ends = Counter(self._finished_requests())
        result.problems += [f"request {request} ended {count} times" for request, count in ends.items() if count > 1]

    def _finished_requests(self) -> Iterator[str]:
        """Ids in the frontend's canonical lines since the last call."""
        with self.cluster.children["frontend-0"].log.open("rb") as log:
            log.seek(self._log_offset)
            text = log.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._log_offset += len(complete)
        for line in complete.splitlines():
            if b'"request_finished"' in line:
                yield json.loads(line)["request_id"]

    def _judge_counters(self, cell: Cell, result: Result, before: dict, after: dict) -> None:
        num_made_way = 0
        for name, counts in after.items():
            if cell.fault.is_kill and name in cell.victims:
                continue
            rise = {what: value - before.get(name, {}).get(what, 0.0) for what, value in counts.items()}
            result.fences += int(rise.pop(FENCES))
            num_made_way += int(sum(rise.pop(what) for what in MADE_WAY))
            result.problems += [f"{name}: {what} rose by {value:g}" for what, value in rise.items() if value]
        if cell.fault.is_short and cell.fault.is_stop:
            if result.fences:
                result.problems.append(f"{result.fences} peers were fenced though nobody was silent for 2 s")
            if result.requests["resumed"] > num_made_way:
                result.problems.append(f"{result.requests['resumed']} requests were resumed, {num_made_way} of them for lack of room")


@asynccontextmanager
async def open_house(folder: Path, model: Path, transport: str, *, on_hosts: bool = True) -> AsyncIterator[House]:
    """Two prefill, two decode, one of each other service, each on its own host (else all on loopback), workers with one transport."""
    folder.mkdir(parents=True, exist_ok=True)
    profile = folder / "profile.toml"
    profile.write_text(PROFILE)
    watched = folder / "watched"
    watched.mkdir()
    environment = {
        **ENVIRONMENT,
        **({"UCX_NET_DEVICES": "inside"} if on_hosts else {}),
        "BATON_PREFILL_TRANSPORTS": transport,
        "BATON_DECODE_TRANSPORTS": transport,
        "BATON_WATCHED_FOLDER": str(watched),
    }

    def watch(name: str, command: list[str]) -> list[str]:
        return ["/usr/bin/env", f"BATON_WATCHED_NAME={name}", sys.executable, WATCHED_WORKER, name[:-2]] if is_worker(name) else command

    async with AsyncExitStack() as stack:
        stack.enter_context(_priority())
        hosts = await stack.enter_async_context(Hosts()) if on_hosts else None
        options = {"profile": str(profile), "model": model, "prefill": 2, "decode": 2, "environment": environment}
        async with cluster(folder, hosts=hosts, change=watch, **options) as house:
            made = House(house, folder, Oracle(str(profile), model), stack.enter_context(StarvationWatch(lambda: _pids(house))))
            await until("the workers' histories", lambda: _histories(made), READY_LIMIT_S)
            yield made


@contextmanager
def _priority() -> Iterator[None]:
    """For this process and all it starts, where that is allowed: what else this machine does is not what is tested."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, min(before, NICE))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def _pids(house: Cluster) -> list[int]:
    return [child.process.pid for child in house.children.values() if child.is_running and child.process is not None]


async def _histories(house: House) -> bool:
    house.history.read()
    return len(house.history.names) >= sum(is_worker(name) for name in house.cluster.children)


def _sum(values: dict[str, float], name: str) -> float:
    """Of a metric, or of those of its labels that begin as given."""
    return values.get(name, 0.0) if "{" not in name else sum(value for label, value in values.items() if label.startswith(name))
