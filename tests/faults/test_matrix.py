"""The fault matrix in small: each kind of fault of each kind of process once, the transports by turns. The whole: make test-faults.

What is judged, and how: `strike`. A strike waits for a rare state of a handoff and hits many others beside it.
"""

from pathlib import Path

import fault_kinds as f
import pytest
from fault_kinds import Cell
from hosts import why_not
from matrix import run_cells
from strike import Result

pytestmark = pytest.mark.timeout(240)

PREFILL, DECODE, BROKER = "prefill-0", "decode-0", "kvtransfer-0"
CELLS = {
    "shm": [
        (f.KILL, PREFILL),
        (f.STOP_LONG, "decode-1"),
        (f.CUT_LONG, "prefill-1"),
        (f.ONE_WAY, PREFILL, DECODE),
        (f.MUTE, BROKER),
        (f.STOP_SHORT, "prefill-1"),
    ],
    "tcp": [
        (f.KILL, DECODE),
        (f.STOP_LONG, "prefill-1"),
        (f.KILL, BROKER),
        (f.CUT_LONG, DECODE),
        (f.ONE_WAY, "decode-1", "prefill-1"),
        (f.RESET, PREFILL),
    ],
}


@pytest.mark.parametrize("transport", CELLS)
async def test_laws_hold_when_processes_and_paths_are_struck_under_load(tmp_path: Path, transport: str) -> None:
    cells = [Cell(fault, tuple(victims), transport) for fault, *victims in CELLS[transport]]
    problem = why_not()
    if problem:
        cells = [cell for cell in cells if not cell.fault.is_partition]
    found: list[Result] = []
    await run_cells(tmp_path, cells, 1, lambda _, results: found.extend(results), on_hosts=not problem)
    broken = [f"{result.cell} ({result.target}): {what}" for result in found for what in result.problems]
    assert not broken, "\n".join(broken)
    assert [result.cell for result in found] == [cell.name for cell in cells]
    assert all(result.requests["ok"] for result in found)
    if problem:
        pytest.skip(f"processes were struck, but no partitions: {problem}")
