"""The fault matrix in small: each way to strike, each kind of process, the transports by turns. The rest of the kinds: make test-slow; the
whole: make test-faults.

What is judged, and how: `strike`. A strike waits for a certain state of a handoff and hits many others beside it.
"""

from pathlib import Path

import fault_kinds as f
import pytest
from fault_kinds import Cell
from hosts import why_not
from judge import Result
from matrix import run_cells

pytestmark = pytest.mark.timeout(240)

PREFILL, DECODE, BROKER = "prefill-0", "decode-0", "kvtransfer-0"
# The fault, the state it waits for, and who or what is struck. A strike takes about 13 s.
CELLS = {
    "shm": [
        (f.KILL, ("sink", "moving"), PREFILL),
        (f.STOP_LONG, ("source", "computed"), "decode-1"),
        (f.CUT_LONG, ("sink", "draining"), "prefill-1"),
        (f.MUTE, ("source", "offered"), BROKER),
    ],
    "tcp": [
        (f.KILL, ("source", "offered"), DECODE),
        (f.KILL, ("sink", "pulling"), BROKER),
        (f.ONE_WAY, ("source", "computing"), "decode-1", "prefill-1"),
        (f.RESET, ("sink", "moving"), PREFILL),
    ],
}
SLOW_CELLS = {
    "shm": [
        (f.ONE_WAY, ("sink", "pulling"), PREFILL, DECODE),
        (f.STOP_SHORT, ("sink", "moving"), "prefill-1"),
    ],
    "tcp": [
        (f.STOP_LONG, ("sink", "draining"), "prefill-1"),
        (f.CUT_LONG, ("source", "computed"), DECODE),
    ],
}


@pytest.mark.parametrize("transport", CELLS)
@pytest.mark.parametrize("fields", [pytest.param(CELLS, id="quick"), pytest.param(SLOW_CELLS, id="slow", marks=pytest.mark.slow)])
async def test_laws_hold_when_processes_and_paths_are_struck_under_load(tmp_path: Path, fields: dict, transport: str) -> None:
    problem = why_not()
    chosen = [(fault, state, victims) for fault, state, *victims in fields[transport] if not (problem and fault.is_partition)]
    cells = [(Cell(fault, tuple(victims), transport), [state]) for fault, state, victims in chosen]
    found: list[Result] = []
    await run_cells(tmp_path, cells, 1, lambda _, results: found.extend(results), on_hosts=not problem)
    judged = [result for result in found if not result.is_void]
    broken = [f"{result.cell} ({result.target}): {what}" for result in judged for what in result.problems]
    assert not broken, "\n".join(broken)
    assert [result.cell for result in judged] == [cell.name for cell, _ in cells]
    assert all(result.requests["ok"] for result in judged)
    if problem:
        pytest.skip(f"processes were struck, but no partitions: {problem}")
