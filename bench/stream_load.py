"""Runs the load client of bench/stream_beside_peer.py, a C program built here, and reads what it counted."""

import json
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from baton_cli.bench.figures import Durations, Figures
from baton_cli.bench.stream import Options, Report, Watch

SOURCE = Path(__file__).with_name("stream_client.c")
ANSWER_LIMIT_S = 60.0


class LoadFailed(Exception):
    """The client could not be built, or did not end well."""


@dataclass(frozen=True)
class Load:
    """How much of it. seconds: in which requests are started; requests 0: no limit; open_per_s 0: at once.

    check_every: of so many requests one has a known answer whose text is compared; the others are prompts no server has seen.
    """

    connections: int
    seconds: float
    requests: int = 0
    open_per_s: float = 0.0
    check_every: int = 8


@dataclass
class Measured:
    """One side in one case, over all rounds. per_token_s: time between tokens, one value per answer. events_per_bin: of 100 ms each."""

    load_s: float = 0.0
    figures: Figures = field(default_factory=Figures)
    per_token_s: Durations = field(default_factory=Durations)
    texts_checked: int = 0
    cpu_s: Counter[str] = field(default_factory=Counter)
    rss_most: Counter[str] = field(default_factory=Counter)
    machine_busy_s: float = 0.0
    events_per_bin: list[int] = field(default_factory=list)

    def merge(self, other: "Measured") -> None:
        """Those of another round."""
        self.load_s += other.load_s
        most_open = max(self.figures.most_open, other.figures.most_open)
        self.figures.merge(other.figures)
        self.figures.most_open = most_open
        self.per_token_s.merge(other.per_token_s)
        self.texts_checked += other.texts_checked
        self.cpu_s.update(other.cpu_s)
        self.rss_most |= other.rss_most
        self.machine_busy_s += other.machine_busy_s
        self.events_per_bin += other.events_per_bin

    def us_per_token(self, name: str) -> float:
        """CPU of that process per token."""
        return self.cpu_s[name] / max(1, self.figures.tokens) * 1e6

    def us_per_request(self, name: str) -> float:
        """CPU of that process per request that was answered."""
        return self.cpu_s[name] / max(1, self.figures.complete) * 1e6

    @property
    def tokens_per_s(self) -> float:
        """Over the whole load, opening and end included."""
        return self.figures.tokens / max(self.load_s, 1e-9)

    @property
    def requests_per_s(self) -> float:
        """Whole answers."""
        return self.figures.complete / max(self.load_s, 1e-9)

    @property
    def tokens_per_event(self) -> float:
        """1 if nothing was merged; a token that is no whole character counts as merged with the next."""
        return self.figures.tokens / max(1, self.figures.events)

    @property
    def wrong(self) -> int:
        """Requests that were not answered wholly and rightly."""
        return self.figures.ended - self.figures.complete

    def as_json(self, options: Options, check: str) -> dict[str, Any]:
        """As `baton bench stream --json`, and what this benchmark adds."""
        report = Report(options, check, 1, 0.0, max(self.load_s, 1e-9), self.figures, []).as_json()
        for name in ("urls", "processes", "servers", "body", "began_at"):
            del report[name]
        return {
            **report,
            "texts_checked": self.texts_checked,
            "cpu_s": {name: round(seconds, 3) for name, seconds in self.cpu_s.items()},
            "cpu_us_per_token": {name: round(self.us_per_token(name), 3) for name in self.cpu_s},
            "cpu_us_per_request": {name: round(self.us_per_request(name), 1) for name in self.cpu_s},
            "rss_mib_most": {name: round(size / 2**20, 1) for name, size in self.rss_most.items()},
            "machine_busy": round(self.machine_busy_s / max(self.load_s, 1e-9) / (psutil.cpu_count() or 1), 3),
            "token_interval_ms": {name: round(self.per_token_s.quantile(share) * 1e3, 3) for name, share in (("p50", 0.5), ("p99", 0.99))},
            "events_per_100_ms": self.events_per_bin,
        }


def build(folder: Path) -> Path:
    """Compile the client. Raises: LoadFailed."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise LoadFailed("no C compiler (cc or gcc) on PATH: the load client is a C program")
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "stream_client"
    found = subprocess.run([compiler, "-O2", "-o", program, SOURCE, "-lm"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise LoadFailed(f"{SOURCE}: {found.stderr[-2000:]}")
    return program


def run(program: Path, host: str, port: int, prompts: Path, first: int, load: Load, pids: dict[str, int]) -> Measured:
    """One load. first: of the prompts with known answers; pids: processes of the server whose CPU is counted. Raises: LoadFailed."""
    values = (host, port, load.connections, load.seconds, load.open_per_s, load.requests, ANSWER_LIMIT_S, load.check_every, first, prompts)
    watch, busy = Watch(pids), _busy_s()
    deadline = time.monotonic() + load.seconds + 2 * ANSWER_LIMIT_S
    with subprocess.Popen([program, *map(str, values)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while True:
                try:
                    out, errors = process.communicate(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    watch.sample()
                    if time.monotonic() > deadline:
                        raise LoadFailed("the load client does not end") from None
        finally:
            process.kill()
    watched, busy = watch.ended(), _busy_s() - busy
    if process.returncode:
        raise LoadFailed(f"the load client ended with {process.returncode}: {errors[-500:]}")
    measured = _read(json.loads(out))
    measured.machine_busy_s = busy
    for server in watched:
        measured.cpu_s[server.name], measured.rss_most[server.name] = server.cpu_s, server.rss_most
    measured.cpu_s["client"] = measured.figures.cpu_s
    return measured


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _read(found: dict[str, Any]) -> Measured:
    figures = Figures(ends=Counter(found["ends"]), problems=found["problems"])
    for name in (
        "started",
        "tokens",
        "events",
        "same_read",
        "num_bytes",
        "reconnects",
        "without_usage",
        "most_open",
        "without_retry_after",
        "cpu_s",
    ):
        setattr(figures, name, found[name])
    for name in ("first_s", "gap_s", "total_s", "refused_s"):
        setattr(figures, name, _durations(found[name]))
    return Measured(
        load_s=found["load_s"],
        figures=figures,
        per_token_s=_durations(found["per_token_s"]),
        texts_checked=found["texts_checked"],
        events_per_bin=found["events_per_bin"],
    )


def _durations(found: dict[str, Any]) -> Durations:
    return Durations(Counter({int(bucket): count for bucket, count in found["buckets"].items()}), found["largest_s"])
