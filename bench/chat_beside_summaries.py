"""Do chats stay fast beside summarisation? Chats alone, jobs alone, both together; disaggregated, and all on decode; one picture.

    python bench/chat_beside_summaries.py [--parts modelled,sim,torch] [--seconds 30] [--out bench/results]

Three parts, each with the same number of workers in both layouts:

- modelled: the real placement, handoff books and schedulers in modelled time (`modelled_fleet.py`): what the design costs a chat,
  with nothing of this machine in it. The targets are judged here, where a noisy machine cannot help or hurt.
- sim: real processes over HTTP, the same profile. On a machine with few cores its p99 has what the operating system adds as well.
- torch: the demo model, really computed, one core per role (as far as there are cores); the rest of Baton and the client share them.
  Jobs are as long as the model's context allows. Reported without a target.

Jobs have service_tier "flex" (batch class); the modelled part shows jobs that do not say so as well. Every answer is checked: sim's
tokens are a function of the prompt; torch's must be those of the same prompt asked alone afterwards (a sample of them).
"""

import argparse
import asyncio
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
from baton_engine.api import Priority
from baton_engine.sim_folder import read_sim_folder
from baton_engine.sim_pattern import next_tokens, states, token_terms
from baton_engine.sim_profile import SimModel, SimProfile, load_profile
from baton_runtime.virtual_time import run_virtual
from machine import machine, settle
from mixed_load import Ask, Chatter, Shape, Summariser, Times, quantile
from modelled_fleet import Call, ModelledFleet

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "faults")]
from cluster import Cluster, cluster, roomy_model  # noqa: E402

# Of the profile: an accelerator four times slower than the one it was measured on, so that Python on two cores is small beside a step.
TIME_SCALE = 4.0
POOL_TOKENS = 524_288  # of each sim worker: the default of 64 MiB
PARTS = ("modelled", "sim", "torch")
TARGET_CHAT_RATIO, TARGET_JOB_SPEED = 1.1, 0.9
JOB_EVERY_S = 1.0  # between the first jobs of the streams
# Chats are counted from here on: all streams of jobs have begun, and chats that were decoded where a job came are over.
WARM_UP_S = 11.0
TORCH_CHECK_EVERY = 5  # answers of torch; the others are checked for their length and end
TORCH = Shape(chats=6, chat_prompt=(40, 120), chat_answer=(24, 48), think_s=2.0, jobs=2, job_prompt=3600, job_answer=64)


@dataclass(frozen=True, slots=True)
class Layout:
    """How many workers of each kind."""

    name: str
    prefill: int
    decode: int


@dataclass
class Arm:
    """One load on one layout. tier: of the jobs."""

    part: str
    layout: Layout
    name: str
    chats: int
    jobs: int
    tier: str = "flex"
    chat: Times = field(default_factory=Times)
    job: Times = field(default_factory=Times)
    problems: list[str] = field(default_factory=list)
    checked: int = 0

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "part": self.part,
            "layout": self.layout.name,
            "prefill": self.layout.prefill,
            "decode": self.layout.decode,
            "arm": self.name,
            "job_tier": self.tier if self.jobs else None,
            "chats": self.chat.as_json() if self.chats else None,
            "jobs": self.job.as_json() if self.jobs else None,
            "answers_checked": self.checked,
            "problems": self.problems,
        }


def arms(part: str, layout: Layout, shape: Shape, *, tiers: Sequence[str]) -> list[Arm]:
    """Chats alone, jobs alone, both."""
    alone = [Arm(part, layout, "chats alone", shape.chats, 0), Arm(part, layout, "jobs alone", 0, shape.jobs, tiers[0])]
    return alone + [Arm(part, layout, f"both, {tier}", shape.chats, shape.jobs, tier) for tier in tiers]


# What every part has in common: clients that ask, wait, and ask again.

AskOnce = Callable[[str, Ask, str], Any]  # name, what, tier -> sent_at and times of tokens


async def drive(arm: Arm, shape: Shape, seconds: float, ask: AskOnce) -> None:
    """Run the load of an arm for so many seconds, and then to the end of every answer; chats go on until the last job is done.

    Counted are all jobs, and the chats' requests sent between the warm-up and the end of these seconds.
    """
    clock = asyncio.get_running_loop().time
    began, jobs_left = clock(), arm.jobs

    async def chat(index: int) -> None:
        chatter, number = Chatter(shape, index), 0
        await asyncio.sleep(chatter.first_pause_s)
        while clock() - began < seconds or jobs_left:
            number += 1
            sent_at, times = await ask(f"chat-{index}.{number}", chatter.next(), "default")
            if WARM_UP_S <= sent_at - began < seconds:
                arm.chat.add(sent_at, times)
            await asyncio.sleep(chatter.pause_s())

    async def job(index: int) -> None:
        nonlocal jobs_left
        summariser, number = Summariser(shape, index), 0
        await asyncio.sleep(index * JOB_EVERY_S)
        while clock() - began < seconds:
            number += 1
            arm.job.add(*await ask(f"job-{index}.{number}", summariser.next(), arm.tier))
        jobs_left -= 1

    async with asyncio.TaskGroup() as tasks:
        for index in range(arm.chats):
            tasks.create_task(chat(index))
        for index in range(arm.jobs):
            tasks.create_task(job(index))


# Modelled.


def modelled(arm: Arm, shape: Shape, profile: SimProfile, seconds: float) -> Arm:
    """One arm in modelled time, in a process of its own. Returns: the arm, filled."""

    async def run() -> None:
        fleet = ModelledFleet(profile, prefill=arm.layout.prefill, decode=arm.layout.decode, num_blocks=POOL_TOKENS // 16)

        async def ask(name: str, what: Ask, tier: str) -> tuple[float, Sequence[float]]:
            priority = Priority.BATCH if tier == "flex" else Priority.INTERACTIVE
            call = Call(name, what.prompt, priority, what.max_tokens)
            await fleet.ask(call)
            wanted = expected(what, fleet.allowed_token_ids)
            arm.checked += 1
            if call.tokens != wanted:
                arm.problems.append(f"{name}: wrong tokens")
            return call.sent_at, call.times

        async with asyncio.TaskGroup() as tasks:
            running = await fleet.run(tasks)
            await drive(arm, shape, seconds, ask)
            for task in running:
                task.cancel()

    run_virtual(run())
    return arm


def expected(what: Ask, allowed: Any) -> list[int]:
    """The sim's tokens after a prompt."""
    state, drawn = states(what.prompt)[-1:], []
    for position in range(len(what.prompt), len(what.prompt) + what.max_tokens):
        drawn.append(int(next_tokens(state, allowed)[0]))
        state = state + token_terms(np.array(drawn[-1:], dtype=np.uint32), np.array([position], dtype=np.uint64))
    return drawn


# Real processes.


@dataclass
class Sent:
    """A request over HTTP and what came back. lines: when each event came, and its bytes; read after the load."""

    what: Ask
    sent_at: float
    lines: list[tuple[float, bytes]] = field(default_factory=list)

    def tokens(self) -> tuple[list[int], list[float], str]:
        """Token ids, when each came, and what is wrong with the answer ("" if nothing is)."""
        ids: list[int] = []
        times: list[float] = []
        finish = None
        for at, line in self.lines[:-1]:
            for choice in json.loads(line).get("choices", ()):
                new = choice.get("token_ids") or []
                ids += new
                times += [at] * len(new)
                finish = choice.get("finish_reason") or finish
        is_whole = self.lines[-1][1] == b"[DONE]" and finish == "length" and len(ids) == self.what.max_tokens
        return ids, times, "" if is_whole else f"{len(ids)} of {self.what.max_tokens} tokens, at last {self.lines[-2:]}"


async def post(running: Cluster, what: Ask, tier: str) -> Sent:
    """One streamed completion. Raises: RuntimeError if it is refused."""
    body = {
        "model": running.options.served_name,
        "prompt": list(what.prompt),
        "max_tokens": what.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "service_tier": tier,
    }
    data = json.dumps(body).encode()
    sent = Sent(what, time.monotonic())
    headers = {"Content-Type": "application/json"}
    async with running.http.post(f"{running.url}/v1/completions", data=data, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: "):
                sent.lines.append((time.monotonic(), line[6:].strip()))
    return sent


async def measured(arm: Arm, shape: Shape, running: Cluster, seconds: float, wanted: Callable[[Sent], Any]) -> dict[str, Any]:
    """One arm over HTTP. wanted: token ids of an answer, None: not to be checked. Returns: facts about the machine meanwhile."""
    answers: list[tuple[str, Sent, list[int]]] = []

    async def ask(name: str, what: Ask, tier: str) -> tuple[float, Sequence[float]]:
        sent = await post(running, what, tier)
        ids, times, problem = sent.tokens()
        if problem:
            raise RuntimeError(f"{name}: {problem}")
        answers.append((name, sent, ids))
        return sent.sent_at, times

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)) as http:
        before, running.http = running.http, http
        try:
            async with asyncio.TaskGroup() as tasks:
                lags: list[float] = []
                watch = tasks.create_task(watch_lag(lags))
                await drive(arm, shape, seconds, ask)
                watch.cancel()
            for name, sent, ids in answers:
                tokens = await wanted(sent)
                if tokens is not None:
                    arm.checked += 1
                    if ids != tokens:
                        arm.problems.append(f"{name}: wrong tokens")
        finally:
            running.http = before
    return {"p50": round(quantile(lags, 0.5) * 1e3, 2), "p99": round(quantile(lags, 0.99) * 1e3, 2)}


async def watch_lag(lags: list[float]) -> None:
    """How much later than asked for this process is woken: what the machine, not the server, adds to any time measured here."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.02)
        lags.append(time.monotonic() - before - 0.02)


# Before the program starts, so that all its threads have it.
_PIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.argv[2], sys.argv[2:])"


@asynccontextmanager
async def processes(part: str, layout: Layout, folder: Path, profile: Path) -> AsyncIterator[Cluster]:
    """A Baton of real processes."""
    cores = sorted(os.sched_getaffinity(0))
    names = [f"prefill-{i}" for i in range(layout.prefill)] + [f"decode-{i}" for i in range(layout.decode)]

    def pinned(name: str, command: list[str]) -> list[str]:
        if name not in names:
            return command
        return [sys.executable, "-c", _PIN, str(cores[names.index(name) % len(cores)]), *command]

    async with cluster(
        folder,
        engine=part,
        profile=str(profile),
        model=roomy_model(folder / "model") if part == "sim" else None,
        prefill=layout.prefill,
        decode=layout.decode,
        change=pinned if part == "torch" else lambda name, command: command,
    ) as running:
        yield running


async def real(
    part: str, layout: Layout, shape: Shape, profile: Path, seconds: float, logs: Path | None
) -> list[tuple[Arm, dict[str, Any]]]:
    """All arms of one layout, on one cluster. logs: where its processes' logs stay; None: nowhere."""
    done = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = logs / f"{part}-{layout.decode}" if logs else Path(temporary)
        async with processes(part, layout, folder, profile) as running:
            allowed = read_sim_folder(running.options.model, SimModel()).allowed_token_ids
            again = 0

            async def wanted(sent: Sent) -> list[int] | None:
                nonlocal again
                if part == "sim":
                    return expected(sent.what, allowed)
                again += 1
                if again % TORCH_CHECK_EVERY:
                    return None
                return (await post(running, sent.what, "default")).tokens()[0]

            for arm in arms(part, layout, shape, tiers=["flex"]):
                lag = await measured(arm, replace(shape, seed=shape.seed + 1 + len(done)), running, seconds, wanted)
                print(line(arm), file=sys.stderr, flush=True)
                done.append((arm, lag))
    return done


# What is said about it.


def line(arm: Arm) -> str:
    """One arm, for people."""
    text = f"{arm.part:<9}{arm.layout.name:<15}{arm.name:<14}"
    chat = [(quantile(arm.chat.first_s, q), quantile(arm.chat.gap_s, q)) for q in (0.5, 0.99)]
    for index in (0, 1):
        text += "".join(f"{value[index] * 1e3:9.1f}" for value in chat) if arm.chats else " " * 18
    text += f"{len(arm.chat.total_s):7}" if arm.chats else " " * 7
    if arm.jobs:
        text += f"{sum(arm.job.total_s) / max(1, len(arm.job.total_s)):8.2f}{len(arm.job.total_s):6}"
    return text + ("  WRONG: " + arm.problems[0] if arm.problems else "")


HEADER = (
    f"{'part':<9}{'layout':<15}{'arm':<14}{'TTFT p50':>9}{'p99':>9}{'ITL p50':>9}{'p99':>9}{'chats':>7}{'job s':>8}{'jobs':>6}"
    "   (chats: ms)"
)


def ratios(found: Sequence[Arm]) -> list[dict[str, Any]]:
    """What the jobs do to the chats' p99, and the chats to the jobs' speed, for each layout and part."""
    rows = []
    for both in (arm for arm in found if arm.chats and arm.jobs):
        same = [arm for arm in found if (arm.part, arm.layout) == (both.part, both.layout)]
        chats = next(arm for arm in same if not arm.jobs)
        jobs = next(arm for arm in same if not arm.chats)
        rows.append(
            {
                "part": both.part,
                "layout": both.layout.name,
                "arm": both.name,
                "ttft_p99_ratio": _ratio(quantile(both.chat.first_s, 0.99), quantile(chats.chat.first_s, 0.99)),
                "itl_p99_ratio": _ratio(quantile(both.chat.gap_s, 0.99), quantile(chats.chat.gap_s, 0.99)),
                "ttft_mean_ratio": _ratio(_mean(both.chat.first_s), _mean(chats.chat.first_s)),
                "itl_mean_ratio": _ratio(_mean(both.chat.gap_s), _mean(chats.chat.gap_s)),
                "job_speed": _ratio(_mean(jobs.job.total_s), _mean(both.job.total_s)),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _ratio(one: float, other: float) -> float:
    return round(one / other, 3) if other else 0.0


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """For people."""
    names = f"{'part':<9}{'layout':<15}{'arm':<14}"
    head = f"{names}{'TTFT p99':>9}{'mean':>7}{'ITL p99':>9}{'mean':>7}{'job speed':>11}   (with / without the others)"
    table = [
        f"{row['part']:<9}{row['layout']:<15}{row['arm']:<14}{row['ttft_p99_ratio']:>9.2f}{row['ttft_mean_ratio']:>7.2f}"
        f"{row['itl_p99_ratio']:>9.2f}{row['itl_mean_ratio']:>7.2f}{row['job_speed']:>11.2f}"
        for row in rows
    ]
    targets = f"p99 ratios at most {TARGET_CHAT_RATIO}, job speed at least {TARGET_JOB_SPEED}"
    return "\n".join(["", head, *table, f"targets, disaggregated, flex, modelled: {targets}"])


def draw(found: Sequence[Arm], out: Path) -> None:
    """Distributions of the chats' TTFT and ITL: shares of all that took no longer than so many ms."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams.update(
        {"svg.hashsalt": "baton", "font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    parts = list(dict.fromkeys(arm.part for arm in found))
    figure, grid = plt.subplots(len(parts), 2, figsize=(8.5, 2.9 * len(parts)), squeeze=False, layout="constrained")
    colors = {"chats alone": "C0", "both, flex": "C3", "both, default": "C1"}
    for row, part in zip(grid, parts, strict=True):
        for arm in (arm for arm in found if arm.part == part and arm.chats):
            style = "-" if arm.layout.prefill else ":"
            label = f"{arm.layout.name}: {arm.name}"
            for axes, values in zip(row, (arm.chat.first_s, arm.chat.gap_s), strict=True):
                shares = np.linspace(0, 1, 501)
                axes.plot(np.quantile(values, shares) * 1e3, shares, style, color=colors[arm.name], label=label, linewidth=1)
        for axes, name in zip(row, ("TTFT", "ITL"), strict=True):
            axes.axhline(0.99, color="grey", linewidth=0.5, linestyle="--")
            axes.set_xscale("log")
            axes.set_title(f"{part}: {name} of the chats")
            axes.set_xlabel("ms")
        row[0].set_ylabel("share of all")
        row[1].legend(frameon=False, fontsize=6, loc="lower right")
    figure.savefig(out, metadata={"Date": None})


def scaled_profile(folder: Path) -> Path:
    """The profile as a file, for the workers."""
    profile = msgspec.structs.replace(load_profile("polynomial"), time_scale=TIME_SCALE)
    path = folder / "polynomial-slower.toml"
    path.write_text(toml_of(profile))
    return path


def toml_of(profile: SimProfile) -> str:
    """A profile as it is written in a file."""
    lines = [f"description = {json.dumps(profile.description)}", f"time_scale = {profile.time_scale}"]
    for name in ("prefill_ms", "decode_ms", "model"):
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in msgspec.structs.asdict(getattr(profile, name)).items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit code 1 if an answer was wrong or a target of the modelled part is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--prefill", type=int, default=3, help="of the disaggregated sim fleet")
    parser.add_argument("--decode", type=int, default=4, help="of the disaggregated sim fleet")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each arm on real processes in which requests are sent")
    parser.add_argument("--chats", type=int, default=Shape().chats, help="of modelled and sim")
    parser.add_argument("--jobs", type=int, default=Shape().jobs, help="streams of jobs of modelled and sim")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="for modelled arms at a time")
    parser.add_argument("--modelled-seconds", type=float, default=120.0, help="of each modelled arm, in its own time")
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs; else they are thrown away")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    facts = machine()
    shape = Shape(chats=options.chats, jobs=options.jobs)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    sim = [Layout("disaggregated", options.prefill, options.decode), Layout("all on decode", 0, options.prefill + options.decode)]
    layouts = {"sim": sim, "torch": [Layout("disaggregated", 1, 1), Layout("all on decode", 0, 2)]}
    found: list[Arm] = []
    lags: list[dict[str, Any]] = []
    print(HEADER, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        profile_file = scaled_profile(Path(temporary))
        profile = load_profile(str(profile_file))
        if "modelled" in parts:
            todo = [arm for layout in sim for arm in arms("modelled", layout, shape, tiers=["flex", "default"])]
            with ProcessPoolExecutor(options.processes) as pool:
                for arm in pool.map(modelled, todo, repeat(shape), repeat(profile), repeat(options.modelled_seconds)):
                    print(line(arm), file=sys.stderr, flush=True)
                    found.append(arm)
        settle()
        for part in [part for part in parts if part != "modelled"]:
            for layout in layouts[part]:
                load = shape if part == "sim" else TORCH
                done = asyncio.run(real(part, layout, load, profile_file, options.seconds, options.logs))
                found += [arm for arm, _ in done]
                lags += [{"part": part, "layout": layout.name, "arm": arm.name, "client_lag_ms": lag} for arm, lag in done]
    rows = ratios(found)
    text = "\n".join([HEADER, *map(line, found), verdict(rows)])
    print(text)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = "-".join(["chat-beside-summaries", *(parts if len(parts) < len(PARTS) else [])])
    path = options.out / f"{name}-{today}-{facts['num_cpus']}cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {"sim": asdict(shape), "torch": asdict(TORCH), "time_scale": TIME_SCALE, "pool_tokens": POOL_TOKENS}
    record = {"date": today, "machine": facts, "load": shapes, "ratios": rows, "arms": [arm.as_json() for arm in found], "lag": lags}
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".txt").write_text(text + "\n")
    draw(found, options.out / f"{name}.svg")
    print(path)
    judged = [row for row in rows if row["part"] == "modelled" and row["layout"] == "disaggregated" and row["arm"] == "both, flex"]
    is_met = all(max(r["ttft_p99_ratio"], r["itl_p99_ratio"]) <= TARGET_CHAT_RATIO and r["job_speed"] >= TARGET_JOB_SPEED for r in judged)
    return int(not is_met or any(arm.problems for arm in found))


if __name__ == "__main__":
    sys.exit(main())
