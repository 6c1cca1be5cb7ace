"""The frontend beside the peer's: tokens per second, CPU per token, latency; same client, same run, same model and prompts.

    make bench-stream                                                       # all of it, some six minutes; installs the peer first
    python bench/stream_beside_peer.py --no-peer --cases stream-256 --seconds 3
    python bench/stream_beside_peer.py --list

Ours is `baton up` with the sim engine, one decode worker and no prefill worker; the peer is NVIDIA Dynamo's frontend with its mock engine
(bench/peer.py). Both are up at the same time and are measured in turn; the one that waits uses some CPU, which is reported. Both serve one
model folder: a byte-level tokenizer of 8,192 tokens, one chat template.

The client is one process, written in C (stream_client.c): a client in Python takes more CPU per token than the servers. Its CPU per token
is reported too. Nothing is pinned to a core: servers, engines and client share the machine as the kernel decides, for both sides alike.
Every answer must have one end and the length asked for; of ours, one in eight is a prompt whose answer is known, and its text must be
equal. The other prompts differ from all before, so that no cache knows them. Cases are measured in two halves, ours first and the peer
first; those at a pace once: 1,024 streams opened at 512/s, so many answers each as fill the time.

CPU is that of the frontend's processes alone, user and system, by /proc. The peer routes inside its frontend, ours asks a router
process: what that takes is printed beside. The peer's engine returns no log probabilities when it is asked for them, ours does.

"paced-40" is 40 tokens/s for each of 1,024 streams: on ours a decode step of 25 ms, on the peer a speed of its engine that comes near (the
rate that was reached is printed). "-features" adds stop strings and log probabilities; usage is always on. "prompts" measures, in this
process, the frontend's own tokenizing of a known chat; "long-prompts" how long GET /health takes while prompts of 8k tokens arrive.
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from baton_cli.bench.stream import Options
from machine import machine
from peer import PACKAGE, PeerFailed, install
from stream_load import Load, LoadFailed, Measured, build, run
from stream_model import Asked, Prompts, make_model
from stream_prompts_cost import Probe, measure_prompts
from stream_sides import SETTINGS, Ours, Side, SideFailed, Theirs, frontends
from stream_targets import table, verdicts

BUILD = Path(__file__).parent.parent / "build"
PACED_CONNECTIONS, PACED_OPEN_PER_S = 1024, 512.0
FEATURES = (("stop", ["<|no such text|>", "\n\n\n###"]), ("logprobs", True))
NUM_CHECKED = 8192  # prompts with known answers; after so many the first comes again
LONG_WORDS = 3300  # about 8k tokens; stream_prompts_cost.py counts them


@dataclass(frozen=True)
class Case:
    """tokens_per_s: of each stream, None: as fast as it goes. load: from seconds per round. has_probe: GET /health meanwhile."""

    name: str
    asked: Asked
    load: Callable[[float], Load]
    tokens_per_s: int | None = None
    rounds: int = 2
    has_probe: bool = False


def _stream(connections: int) -> Case:
    return Case(f"stream-{connections}", Asked(), lambda seconds: Load(connections, seconds))


def _short(connections: int) -> Case:
    return Case(f"short-{connections}", Asked(is_stream=False, max_tokens=1), lambda seconds: Load(connections, seconds))


def _paced(tokens_per_s: int, suffix: str = "", body: tuple[tuple[str, Any], ...] = ()) -> Case:
    asked = Asked(body=body)

    def load(seconds: float) -> Load:
        answers = max(1, round(seconds * tokens_per_s / asked.max_tokens))
        return Load(PACED_CONNECTIONS, 60.0, requests=PACED_CONNECTIONS * answers, open_per_s=PACED_OPEN_PER_S)

    return Case(f"paced-{tokens_per_s}{suffix}", asked, load, tokens_per_s, rounds=1)


CASES = [
    _stream(32),
    _stream(256),
    _stream(1024),
    _short(16),
    _short(128),
    Case("long-prompts", Asked(is_stream=False, words=LONG_WORDS, max_tokens=1), lambda s: Load(2, s), rounds=1, has_probe=True),
    *(_paced(rate, suffix, body) for rate in (20, 40) for suffix, body in (("", ()), ("-features", FEATURES))),
    _paced(75),
]
WARM = Case("warming up", Asked(max_tokens=16), lambda _: Load(16, 20.0, requests=64), rounds=1)
PROMPTS = "prompts"  # in this process, without servers


@dataclass
class Found:
    """Of one case and side. probe, probe_idle: GET /health with and without the load."""

    case: Case
    side: str
    measured: Measured = field(default_factory=Measured)
    probe: dict[str, float] = field(default_factory=dict)
    probe_idle: dict[str, float] = field(default_factory=dict)
    steady_tokens_per_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For the results file."""
        load = self.case.load(1.0)
        asked = self.case.asked
        options = Options(
            urls=(),
            connections=load.connections,
            open_per_s=load.open_per_s,
            prompt_words=asked.words,
            max_tokens=asked.max_tokens,
            is_stream=asked.is_stream,
        )
        check = f"text of {self.measured.texts_checked} answers, ends and lengths of all" if self.side == Ours.name else "ends and lengths"
        processes = [name for name in self.measured.cpu_s if name.startswith("frontend")]
        found = {
            "case": self.case.name,
            "side": self.side,
            "paced_tokens_per_s": self.case.tokens_per_s,
            "body": dict(asked.body),
            "steady_tokens_per_s": round(self.steady_tokens_per_s, 1),
            "frontend_cpu_us_per_token": round(sum(map(self.measured.us_per_token, processes)), 3),
            "frontend_cpu_us_per_request": round(sum(map(self.measured.us_per_request, processes)), 1),
            **self.measured.as_json(options, check),
        }
        return {**found, "health_ms": self.probe, "health_idle_ms": self.probe_idle} if self.case.has_probe else found


class Bench:
    """Runs cases on the sides that are up."""

    def __init__(self, program: Path, prompts: Prompts, folder: Path, seconds: float) -> None:
        self._program, self._prompts, self._folder, self._seconds = program, prompts, folder, seconds
        self._first = 0  # prompts with known answers are not asked again before all have been

    def measure(self, case: Case, sides: Sequence[Side]) -> list[Found]:
        """The case on each side, in turn, as many rounds as it has."""
        found = {side.name: Found(case, side.name) for side in sides}
        files = {side.name: self._folder / f"{side.name}.prompts" for side in sides}
        for side in sides:
            self._prompts.write(files[side.name], case.asked, f"{side.host}:{side.port}", known=side.name == Ours.name)
            if case.has_probe:
                with Probe(side.host, side.port) as probe:
                    time.sleep(1.0)
                found[side.name].probe_idle = probe.shares()
        for index in range(case.rounds):
            for side in sides if index % 2 == 0 else sides[::-1]:
                self._round(case, side, [other for other in sides if other is not side], files[side.name], found[side.name])
        return list(found.values())

    def _round(self, case: Case, side: Side, others: Sequence[Side], prompts: Path, found: Found) -> None:
        load = case.load(self._seconds / case.rounds)
        waiting = [psutil.Process(pid) for other in others for pid in other.pids.values()]
        before = _cpu_s(waiting)
        with ExitStack() as stack:
            probe = stack.enter_context(Probe(side.host, side.port)) if case.has_probe else None
            measured = run(self._program, side.host, side.port, prompts, self._first, load, side.pids)
        measured.cpu_s["waiting side"] = _cpu_s(waiting) - before
        self._first += measured.texts_checked
        found.measured.merge(measured)
        found.probe = probe.shares() if probe is not None else {}
        if load.open_per_s:
            per_bin = sorted(measured.events_per_bin[int(10 * load.connections / load.open_per_s) : -10])
            found.steady_tokens_per_s = 10 * per_bin[len(per_bin) // 2] * measured.tokens_per_event if per_bin else 0.0
        name = frontends(side.pids)
        say(
            f"{case.name:<18} {side.name:<6} {measured.tokens_per_s:>9,.0f} tokens/s {measured.requests_per_s:>7,.0f} requests/s "
            f"{sum(map(measured.us_per_token, name)):>7.2f} us/token {measured.tokens_per_event:.2f} tokens/event"
            + (f"  {dict(measured.figures.ends)} {measured.figures.problems[:2]}" if measured.wrong else "")
        )


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def sides_for(tokens_per_s: int | None, model: Path, folder: Path, *, with_peer: bool) -> list[Side]:
    """Those to start for cases of that pace."""
    return [Ours(model, folder, tokens_per_s), *([Theirs(model, folder, tokens_per_s)] if with_peer else [])]


def measure(cases: Sequence[Case], options: argparse.Namespace, model: Path, prompts: Prompts, program: Path) -> list[Found]:
    """All cases, those of one pace on the same processes."""
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(program, prompts, folder, options.seconds)
        for pace in dict.fromkeys(case.tokens_per_s for case in cases):
            with ExitStack() as stack:
                sides = sides_for(pace, model, folder, with_peer=options.peer)
                for side in sides:
                    say(f"starting {side.name}, {f'{pace} tokens/s per stream' if pace else 'instant'}")
                    stack.callback(side.stop)
                    side.start()
                bench.measure(WARM, sides)
                for case in cases:
                    if case.tokens_per_s == pace:
                        found += bench.measure(case, sides)
    return found


def main() -> int:
    """Measure, print, write. Exit code 1 if an answer was wrong, 2 if nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="names with commas; default: all")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--seconds", type=float, default=5.0, help="per case and side")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="ours alone")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table, and write no files")
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs; else they are thrown away")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    names = [case.name for case in CASES] + [PROMPTS]
    if options.list:
        print("\n".join(names))
        return 0
    chosen = options.cases.split(",") if options.cases else names
    if unknown := set(chosen) - set(names):
        parser.error(f"--cases: {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    facts = machine()
    try:
        if options.peer:
            install()
        say("making the model and prompts")
        model, program = make_model(BUILD / "bench-model"), build(BUILD)
        prompts = Prompts(model, NUM_CHECKED)
        found = measure([case for case in CASES if case.name in chosen], options, model, prompts, program)
        cost = measure_prompts(model, prompts) if PROMPTS in chosen else {}
    except (PeerFailed, SideFailed, LoadFailed) as error:
        print(error, file=sys.stderr)
        return 2
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    record = {"date": today, "machine": facts, "seconds": options.seconds, "results": [one.as_json() for one in found], "prompts": cost}
    record |= {"peer": PACKAGE if options.peer else None, "settings": SETTINGS}
    record["targets"] = verdicts(record)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        text = table(record)
        print(text)
        path = options.out / f"stream-beside-peer-{today}-{facts['num_cpus']}cpu.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".txt").write_text(text + "\n")
        print(path)
    return 1 if any(one.measured.wrong for one in found if one.side == Ours.name) else 0


if __name__ == "__main__":
    sys.exit(main())
