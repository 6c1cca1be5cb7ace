"""The fault matrix: every fault of every process, in every state of the handoff, on every transport.

    python tests/faults/matrix.py --transports shm,tcp,nixl --json bench/results/fault-matrix.json --markdown docs/faults.md

Each field is struck until every state of the two state machines was hit, at most --strikes times: about an hour per transport.
"""

import argparse
import asyncio
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path

import structlog

if __name__ == "__main__":  # pytest adds these itself
    REPOSITORY = Path(__file__).parents[2]
    sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "bench")]

from cluster import roomy_model
from fault_kinds import Cell, all_cells
from history import STATES
from hosts import why_not
from judge import Result
from strike import House, open_house

MAX_VOID = 3
State = tuple[str, str]  # side and state
# The rare ones are waited for first: the others are there anyway.
_RARE = [
    ("sink", "draining"),
    ("source", "fetching"),
    ("source", "offered"),
    ("source", "computed"),
    ("sink", "moving"),
    ("sink", "pulling"),
]
RAREST_FIRST: list[State] = [*_RARE, *(state for state in STATES if state not in _RARE)]


async def run_cell(house: House, cell: Cell, states: Sequence[State], most: int) -> list[Result]:
    """Strike until every one of these states was hit, at most so many times; each strike waits for one that is missing. A void one is
    repeated, a few times."""
    results: list[Result] = []
    num_void = 0
    missing = list(states)
    while missing and len(results) < most:
        target = missing.pop(0)
        result = await house.strike(cell, target)
        results.append(result)
        if result.is_void and num_void < MAX_VOID:
            num_void += 1
            most += 1
            missing.insert(0, target)
            continue
        if result.problems:
            break
        missing = [state for state in (*missing, target) if " ".join(state) not in result.states]
    return results


async def run_cells(
    folder: Path,
    cells: Sequence[tuple[Cell, Sequence[State]]],
    most: int,
    on_results: Callable[[Cell, list[Result]], None],
    *,
    on_hosts: bool = True,
) -> None:
    """Cells of one transport with the states to be hit, in one house; a new one after a problem, so that no field spoils the next."""
    model, left, number = roomy_model(folder / "model"), list(cells), 0
    while left:
        number += 1
        async with open_house(folder / f"house-{number}", model, left[0][0].transport, on_hosts=on_hosts) as house:
            while left:
                cell, states = left.pop(0)
                try:
                    results = await run_cell(house, cell, states, most)
                except* AssertionError as group:  # what the harness waited for has not come: as bad as a broken law
                    why = "; ".join(_messages(group))
                    results = [Result(cell.name, cell.transport, cell.fault.name, list(cell.victims), problems=[f"not judged: {why}"])]
                on_results(cell, results)
                if any(result.problems for result in results):
                    break


def _messages(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return [message for inner in error.exceptions for message in _messages(inner)]
    return [str(error)]


class Progress:
    """Says on the terminal how it goes, and keeps the file up to date: the matrix may be interrupted."""

    def __init__(self, file: Path | None, num_cells: int) -> None:
        from machine import machine

        self.report: dict = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "results": []}
        self._file = file
        self._num_cells = num_cells
        self._num_done = 0
        self.num_unjudged = 0  # fields all of whose strikes are void
        self._began = time.monotonic()

    def take(self, cell: Cell, results: list[Result]) -> None:
        """One field is done."""
        self._num_done += 1
        self.report["results"] += [{**asdict(result), "is_void": result.is_void} for result in results]
        hit = {state for result in results for state in result.states}
        missing = [" ".join(state) for state in STATES if " ".join(state) not in hit]
        problems = [("void: " if result.is_void else "") + problem for result in results for problem in result.problems]
        took = (time.monotonic() - self._began) / 60
        where = f"{self._num_done}/{self._num_cells} after {took:.1f} min"
        say(f"{where}  {cell.name}: {len(results)} strikes, not hit: {', '.join(missing) or 'none'}")
        for problem in problems:
            say(f"    {problem}")
        if all(result.is_void for result in results):
            self.num_unjudged += 1
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self.report, indent=1) + "\n")

    @property
    def num_problems(self) -> int:
        """Of all results so far."""
        return sum(len(result["problems"]) for result in self.report["results"] if not result["is_void"])


def say(text: str) -> None:
    """To the terminal."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def main() -> int:
    """Run it. Exit status 1 if a law was broken, 2 if partitions cannot be made here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transports", default="shm,tcp,nixl", help="comma-separated")
    parser.add_argument("--strikes", type=int, default=4, help="at most, per field")
    parser.add_argument("--only", default="", help="fields whose name has one of these, comma-separated")
    parser.add_argument("--json", type=Path, help="where the results go, brought up to date after each field")
    parser.add_argument("--markdown", type=Path, help="where the tables go, at the end")
    parser.add_argument("--folder", type=Path, help="for logs and histories; kept if given")
    chosen = parser.parse_args()
    if problem := why_not():
        say(f"the fault matrix cannot run here: {problem}")
        return 2
    if chosen.markdown is not None and chosen.json is None:
        parser.error("--markdown needs --json: the tables are made from that file")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    if chosen.folder is not None and chosen.folder.exists() and any(chosen.folder.iterdir()):
        parser.error(f"--folder {chosen.folder}: is not empty")
    by_transport = {
        transport: [c for c in all_cells(transport) if _is_chosen(c, chosen.only)] for transport in chosen.transports.split(",")
    }
    progress = Progress(chosen.json, sum(len(cells) for cells in by_transport.values()))
    with tempfile.TemporaryDirectory(prefix="baton-faults-") as temporary:
        folder = chosen.folder or Path(temporary)
        try:
            for transport, cells in by_transport.items():
                asyncio.run(
                    _until_told(run_cells(folder / transport, [(cell, RAREST_FIRST) for cell in cells], chosen.strikes, progress.take))
                )
        except asyncio.CancelledError:
            say("told to stop")
            return 3
    if chosen.markdown is not None:
        from matrix_report import markdown

        chosen.markdown.write_text(markdown([chosen.json]))
    say(f"{progress.num_problems} problems, {progress.num_unjudged} fields not judged")
    return 1 if progress.num_problems or progress.num_unjudged else 0


async def _until_told(work: Coroutine[None, None, None]) -> None:
    """SIGTERM ends it as Ctrl-C does: no process and no namespace is left."""
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await work


def _is_chosen(cell: Cell, only: str) -> bool:
    return not only or any(part.strip() in cell.name for part in only.split(","))


if __name__ == "__main__":
    sys.exit(main())
