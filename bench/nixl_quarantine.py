"""What a nixl READ may still write after its reader has given it up, and what becomes of the other side.

    python bench/nixl_quarantine.py [--trials 20] [--json] [--out bench/results]

A reader begins to read 512 blocks of 64 KiB and its source is stopped (SIGSTOP) in the middle, or before the two have connected.
The reader then gives the read up in one of four ways, fills all destination blocks with a sentinel, wakes the source (SIGCONT) and
goes on letting UCX work for half a second. Blocks that differ from the sentinel then were written after the reader had given up:

    keep      goes on waiting (what is to be expected: everything is written)
    release   releases the transfer
    remove    releases the transfer and removes the remote agent
    destroy   ends its own agent

The other way round, a reader is killed, stopped and killed, or ends its agent, in the middle of reading from a source that runs.
"source died" counts sources that did not survive.

Both with UCX's own choice of transports (between processes of a host: reads by the kernel, "cma") and with UCX_TLS=tcp, where UCX
emulates reads: the source's software sends the bytes. Runs on nixl's Python API alone, without Baton.
"""

import argparse
import base64
import datetime
import gc
import json
import mmap
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
os.environ.setdefault("UCX_HANDLE_ERRORS", "none")  # a process that UCX aborts is gone at once
if not Path("/sys/class/infiniband").is_dir():
    os.environ.setdefault("UCX_MODULES", "^ib")
    os.environ.setdefault("UCX_NET_DEVICES", "lo")  # other interfaces may come and go meanwhile

import numpy as np
import numpy.typing as npt

try:
    from nixl_cu12._api import nixl_agent, nixl_agent_config
except ImportError:
    from nixl_cu13._api import nixl_agent, nixl_agent_config

BLOCK_BYTES, NUM_BLOCKS = 64 << 10, 512
SENTINEL = 0xEE
WATCH_S = 0.5
SETTINGS = {"default": {}, "tcp": {"UCX_TLS": "tcp"}}
WAYS = ("keep", "release", "remove", "destroy")
MOMENTS = ("in the middle", "before connecting")

Pool = npt.NDArray[np.uint8]
SHUFFLED = np.random.default_rng(0).permutation(NUM_BLOCKS).astype(np.int32)
IN_ORDER = np.arange(NUM_BLOCKS, dtype=np.int32)


@dataclass
class Case:
    """Counts over all trials of one case. late_blocks: written after the reader gave up; give_up_ms: how long giving up took."""

    transports: str
    event: str
    way: str
    trials: int = 0
    unfinished: int = 0
    late_trials: int = 0
    late_blocks: int = 0
    source_died: int = 0
    give_up_ms: list[float] = field(default_factory=list)


def make_pool(value: int) -> Pool:
    """Memory of all blocks."""
    pool = np.frombuffer(mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES), np.uint8).reshape(NUM_BLOCKS, BLOCK_BYTES)
    pool[:] = value
    return pool


def make_agent(name: str, pool: Pool) -> Any:
    """An agent without progress thread, the pool registered."""
    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False))
    agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")
    return agent


class ReaderFailed(Exception):
    """A reader's process did not get to read."""


class Reader:
    """An agent of this process with a source's pool prepared."""

    def __init__(self, pool: Pool, metadata: bytes, address: int) -> None:
        self.pool = pool  # stays mapped as long as it may be written
        self.agent = make_agent(f"reader-{os.getpid()}-{random.getrandbits(40)}", pool)
        try:
            self.remote = self.agent.add_remote_agent(metadata)
        except Exception as error:  # nixl's errors have no common base
            raise ReaderFailed(f"{type(error).__name__} when the source's agent was added") from error
        row = lambda start: np.array([[start, BLOCK_BYTES, 0, BLOCK_BYTES, NUM_BLOCKS]], np.uint64)  # noqa: E731
        self.here = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", row(pool.ctypes.data), "DRAM")
        self.there = self.agent.prep_xfer_dlist(self.remote, row(address), "DRAM")
        self.transfer: Any = None

    def post(self, num_blocks: int = NUM_BLOCKS) -> str:
        """Begin to read. Returns nixl's state, or the name of its error."""
        self.transfer = self.agent.make_prepped_xfer("READ", self.here, SHUFFLED[:num_blocks], self.there, IN_ORDER[:num_blocks])
        return self.look(self.agent.transfer)

    def look(self, call: Callable[[Any], str] | None = None) -> str:
        """The state of the read, or the name of its error."""
        try:
            return (call or self.agent.check_xfer_state)(self.transfer)
        except Exception as error:  # nixl's errors have no common base
            return type(error).__name__

    def wait(self, limit_s: float) -> str:
        """The state once it is over, or after so long."""
        ends_s = time.monotonic() + limit_s
        while (state := self.look()) == "PROC" and time.monotonic() < ends_s:
            pass
        return state

    def warm_up(self) -> None:
        """Have UCX connect."""
        state = self.post(4)
        if state == "PROC":
            state = self.wait(20.0)
        if state != "DONE":
            raise ReaderFailed(f"{state} instead of the first blocks")
        self.transfer.release()

    def give_up(self, way: str) -> None:
        """End the read in one of the ways."""
        if way in ("release", "remove"):
            self.transfer.release()
        if way == "remove":
            self.here.release()
            self.there.release()
            self.agent.remove_remote_agent(self.remote)
        if way == "destroy":
            self.transfer = self.here = self.there = self.agent = None
            gc.collect()


class Source:
    """A process whose pool is read."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        metadata, self.address = json.loads(self.line)
        self.metadata = base64.b64decode(metadata)

    def stop(self) -> None:
        """Send SIGSTOP and wait until it has worked."""
        self.process.send_signal(signal.SIGSTOP)
        while Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.0001)

    def has_died(self) -> bool:
        """Whether it is gone."""
        return self.process.poll() is not None

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


@contextmanager
def living_source(kept: list[Source]) -> Iterator[Source]:
    """The source of the trial before if it has lived through it, else a new one."""
    source = kept.pop() if kept else Source()
    yield source
    if source.has_died():
        source.end()
    else:
        kept.append(source)


def serve() -> None:
    """The source's process: lets UCX work until its standard input ends."""
    pool = make_pool(0x11)
    agent = make_agent(f"source-{os.getpid()}", pool)
    print(json.dumps([base64.b64encode(agent.get_agent_metadata()).decode(), pool.ctypes.data]), flush=True)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    while not ended.is_set():
        agent.get_new_notifs()
        time.sleep(0.00005)
    os._exit(0)


def read_on(way: str) -> None:
    """A reader's process: reads all the time from the source on its standard input; told so, it gives up in the middle."""
    metadata, address = json.loads(sys.stdin.readline())
    reader = Reader(make_pool(SENTINEL), base64.b64decode(metadata), address)
    reader.warm_up()
    told = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
    print("reading", flush=True)
    state = ""
    while not told.is_set():
        state = reader.post()
        while state == "PROC" and not told.is_set():
            state = reader.look()
    reader.give_up(way)
    print(state, flush=True)
    sys.stdin.readline()
    os._exit(0)


def stopped_source(case: Case, dest: Pool, source: Source, rng: random.Random) -> None:
    """One trial of a source that is stopped and woken."""
    reader = Reader(dest, source.metadata, source.address)
    if case.event == f"source stopped {MOMENTS[0]}":
        reader.warm_up()
        dest[:] = SENTINEL
        stopper = threading.Timer(rng.uniform(0.0002, 0.006), source.stop)
        stopper.start()
        state = reader.post()  # by cma the whole read happens in here
        while state == "PROC" and stopper.is_alive():
            state = reader.look()
        stopper.join()
    else:
        source.stop()
        reader.post()
    state = reader.wait(0.05)
    began_s = time.perf_counter()
    reader.give_up(case.way)
    case.give_up_ms.append((time.perf_counter() - began_s) * 1e3)
    other = make_agent(f"other-{random.getrandbits(40)}", dest) if case.way == "destroy" else reader.agent
    dest[:] = SENTINEL
    source.process.send_signal(signal.SIGCONT)
    ends_s = time.monotonic() + WATCH_S
    while time.monotonic() < ends_s:
        if case.way == "keep":
            reader.look()
        else:
            other.get_new_notifs()
        time.sleep(0.0002)
    late = int((dest != SENTINEL).any(axis=1).sum())
    case.trials += 1
    case.unfinished += state == "PROC"
    case.late_trials += late > 0
    case.late_blocks += late
    case.source_died += source.has_died()


def leaving_reader(case: Case, source: Source, rng: random.Random) -> None:
    """One trial of a reader that goes while it reads."""
    reader = subprocess.Popen([sys.executable, __file__, "--read", case.way], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdin.write(source.line)
    reader.stdin.flush()
    if reader.stdout.readline() != b"reading\n":
        raise ReaderFailed(f"the reader ended with {reader.wait()} before it could read")
    time.sleep(rng.uniform(0.001, 0.05))
    if case.way == "destroy":
        reader.stdin.write(b"\n")
        reader.stdin.flush()
        case.unfinished += reader.stdout.readline().strip() == b"PROC"
    else:
        if case.way == "stopped, killed":  # what is under way fills the buffers between the two
            reader.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
        reader.kill()
        case.unfinished += 1
    case.trials += 1
    ends_s = time.monotonic() + WATCH_S
    while time.monotonic() < ends_s and not source.has_died():
        time.sleep(0.01)
    reader.kill()
    reader.wait()
    case.source_died += source.has_died()


def measure(transports: str, num_trials: int) -> list[Case]:
    """All cases with one setting of UCX, in this process."""
    rng, dest, kept, cases = random.Random(1), make_pool(SENTINEL), [], []
    for moment in MOMENTS:
        for way in WAYS:
            case = Case(transports, f"source stopped {moment}", way)
            cases.append(case)
            while case.trials < num_trials:
                with living_source(kept) as source:
                    try:
                        stopped_source(case, dest, source, rng)
                    except ReaderFailed as error:
                        print(f"not counted: {error}", file=sys.stderr)
                        source.end()
            print(table([asdict(case)]).splitlines()[1], file=sys.stderr)
    for way in ("killed", "stopped, killed", "destroy"):
        case = Case(transports, "reader leaves in the middle", way)
        cases.append(case)
        while case.trials < num_trials:
            source = Source()  # a new one each time: what the dead leave behind in it is not the question here
            try:
                leaving_reader(case, source, rng)
            except ReaderFailed as error:
                print(f"not counted: {error}", file=sys.stderr)
            finally:
                source.end()
        print(table([asdict(case)]).splitlines()[1], file=sys.stderr)
    for source in kept:
        source.end()
    return cases


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    head = ("UCX", "event", "the reader", "trials", "unfinished", "late", "blocks", "give-up ms", "source died")
    lines = [head]
    for row in rows:
        took = f"{max(row['give_up_ms']):.1f}" if row["give_up_ms"] else "-"
        counts = [str(row[name]) for name in ("trials", "unfinished", "late_trials", "late_blocks")]
        lines.append((row["transports"], row["event"], row["way"], *counts, took, str(row["source_died"])))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    justified = (
        [cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(cells) for cells in justified)


def main() -> None:
    """Measure each setting in a process of its own, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps([asdict(case) for case in measure(options.measure, options.trials)]), flush=True)
        os._exit(0)
    rows: list[dict[str, Any]] = []
    for name, environment in SETTINGS.items():
        command = [sys.executable, __file__, "--measure", name, "--trials", str(options.trials)]
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True)
        rows += json.loads(done.stdout)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    record = {"date": today, "kernel": platform.release(), "block_bytes": BLOCK_BYTES, "num_blocks": NUM_BLOCKS, "results": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"nixl-quarantine-{today}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".txt").write_text(table(rows) + "\n")
    print(json.dumps(record) if options.json else table(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve()
    elif sys.argv[1:2] == ["--read"]:
        read_on(sys.argv[2])
    else:
        main()
