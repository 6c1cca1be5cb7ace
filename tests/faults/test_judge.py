"""The judge of the fault matrix finds what it is there to find. Histories by hand."""

import json
from pathlib import Path

import fault_kinds as f
import pytest
from fault_kinds import Cell
from history import History
from judge import Result, judge_blocks
from load import Oracle, _Answer
from starvation import StarvationWatch, waited_s
from strike import PROFILE

P_LIFE, D_LIFE = "aa", "dd"
T0 = 100.0  # the strike


def history(folder: Path, *, prefill: list[tuple] = (), decode: list[tuple] = ()) -> History:  # type: ignore[assignment]
    """Rows: time, side, state, blocks held; or time alone: a step ended."""
    for name, life, peer, rows in (("prefill-0", P_LIFE, D_LIFE, prefill), ("decode-0", D_LIFE, P_LIFE, decode)):
        lines: list[dict] = [{"t": 0.0, "life": life, "pid": 1}]
        for t, *fact in rows:
            if fact:
                side, state, held = fact
                lines.append({"t": t, "request": "r", "attempt": 1, "side": side, "state": state, "held": held, "peer": peer})
            else:
                lines.append({"t": t, "step": 1})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = History(folder)
    made.read()
    return made


def judged(made: History, fault: f.Fault, *victims: str) -> Result:
    cell = Cell(fault, victims, "shm")
    result = Result(cell.name, "shm", fault.name, list(victims))
    judge_blocks(made, cell, result, T0, T0 + fault.lasts_s)
    return result


@pytest.mark.parametrize(
    ("freed_at", "free_s", "is_kept"), [(101.0, 1.0, True), (104.9, 4.9, True), (105.2, 5.2, False), (None, None, False)]
)
def test_blocks_of_a_dead_peer_must_be_free_after_5_s(tmp_path: Path, freed_at: float | None, free_s: float | None, is_kept: bool) -> None:
    rows: list[tuple] = [(99.0, "sink", "pulling", 7)]
    if freed_at is not None:
        rows.append((freed_at, "sink", "over", 0))
    result = judged(history(tmp_path, decode=rows), f.KILL, "prefill-0")
    assert (result.num_held, result.free_s, not result.problems) == (1, free_s, is_kept)


def test_what_the_block_manager_still_holds_after_the_end_counts(tmp_path: Path) -> None:
    rows = [(99.0, "sink", "pulling", 7), (101.0, "sink", "over", 7), (107.0, "sink", "over", 0)]
    assert judged(history(tmp_path, decode=rows), f.KILL, "prefill-0").problems


def test_blocks_taken_after_the_strike_count(tmp_path: Path) -> None:
    rows = [(99.0, "source", "offered", 0), (100.1, "source", "computing", 5)]
    assert judged(history(tmp_path, prefill=rows), f.CUT_LONG, "prefill-0", "decode-0").problems


def test_a_sequence_that_decodes_needs_prefill_no_more(tmp_path: Path) -> None:
    rows = [(99.0, "sink", "pulling", 7), (100.5, "sink", "decoding", 7)]
    result = judged(history(tmp_path, decode=rows), f.KILL, "prefill-0")
    assert (result.num_held, result.free_s, result.problems) == (1, 0.5, [])


def test_a_decode_without_its_frontend_must_let_go_of_what_it_decodes(tmp_path: Path) -> None:
    rows = [(99.0, "sink", "decoding", 7), (104.1, "sink", "over", 0)]
    assert judged(history(tmp_path, decode=rows), f.KILL, "frontend-0").free_s == 4.1
    assert judged(history(tmp_path, decode=rows[:1]), f.CUT_VERY_LONG, "decode-0").problems


def test_nothing_must_be_given_up_in_a_short_fault_or_without_a_worker(tmp_path: Path) -> None:
    made = history(tmp_path, decode=[(99.0, "sink", "pulling", 7)])
    for fault, victim in ((f.STOP_SHORT, "prefill-0"), (f.KILL, "kvtransfer-0"), (f.CUT_LONG, "decode-1")):
        assert not judged(made, fault, victim).problems


@pytest.mark.parametrize(
    ("steps", "freed_at", "is_kept"), [((), 104.2, True), ((104.1, 104.9), 104.9, True), ((104.1, 104.5, 104.9), 104.9, False)]
)
def test_a_woken_worker_lets_go_within_a_step(tmp_path: Path, steps: tuple[float, ...], freed_at: float, is_kept: bool) -> None:
    """Woken at 103.5, it writes for the first time at 104."""
    rows: list[tuple] = [
        (99.0, "source", "computing", 7),
        (104.0, "source", "over", 7),
        *((t,) for t in steps),
        (freed_at, "source", "over", 0),
    ]
    made = history(tmp_path, prefill=sorted(rows, key=lambda row: row[0]))
    result = judged(made, f.STOP_LONG, "prefill-0")
    assert (result.woken_free_s, not result.problems) == (round(freed_at - 104.0, 3), is_kept)


def test_a_strike_is_void_only_if_a_law_seems_broken_while_a_process_had_no_processor(tmp_path: Path) -> None:
    result = judged(history(tmp_path), f.KILL, "prefill-0")
    result.starved_s = 1.5
    assert not result.is_void
    result.problems.append("something")
    assert result.is_void
    result.starved_s = 0.5
    assert not result.is_void


def test_starvation_is_the_most_that_one_process_waited_within_two_seconds() -> None:
    waited = {1: 0.0, 2: 0.0}
    watch = StarvationWatch(lambda: waited, lambda pid: waited[pid])
    for now, first, second in ((0.0, 0.0, 5.0), (1.0, 0.4, 5.0), (2.0, 0.8, 5.1), (3.0, 1.2, 5.2), (4.0, 1.2, 5.2), (9.0, 1.2, 5.2)):
        waited.update({1: first, 2: second})
        watch.look(now)
    assert watch.worst_s(since=0.0) == pytest.approx(0.8)
    assert watch.worst_s(since=3.5) == pytest.approx(0.4)
    assert watch.worst_s(since=9.0) == 0.0


def test_threads_of_a_process_wait_together_and_one_that_is_gone_waits_no_more(tmp_path: Path) -> None:
    for task, line in (("10", "100 1500000000 7"), ("11", "100 250000000 7")):
        (tmp_path / "10" / "task" / task).mkdir(parents=True)
        (tmp_path / "10" / "task" / task / "schedstat").write_text(line)
    assert waited_s(10, tmp_path) == pytest.approx(1.75)
    assert waited_s(12, tmp_path) == 0.0


def test_the_oracle_finds_a_wrong_a_missing_and_a_repeated_token(tmp_path: Path, roomy_model: Path) -> None:
    profile = tmp_path / "profile.toml"
    profile.write_text(PROFILE)
    oracle = Oracle(str(profile), roomy_model)
    right: list[int] = []
    while len(right) < 6:
        guess = [*right, 0]
        at = oracle.first_wrong([7, 8, 9], guess)
        assert at == len(right), "token 0 is special: never drawn"
        right.append(next(token for token in range(300) if oracle.first_wrong([7, 8, 9], [*right, token]) is None))
    assert oracle.first_wrong([7, 8, 9], right) is None
    assert oracle.first_wrong([7, 8, 9], [*right[:3], 0, *right[4:]]) == 3
    assert oracle.first_wrong([7, 8, 9], [*right[:2], *right[3:]]) == 2
    assert oracle.first_wrong([7, 8, 9], [*right[:3], *right[2:]]) == 3


def test_a_stream_that_stops_early_or_ends_twice_is_seen() -> None:
    answer = _Answer()
    answer.status = 200
    answer.take(b'{"choices": [{"token_ids": [1, 2], "finish_reason": "length"}]}')
    assert answer.outcome("short", 2).how == "failed", "no [DONE]"
    assert answer.take(b"[DONE]")
    assert answer.outcome("short", 2).how == "ok"
    assert answer.outcome("short", 3).how == "failed"
    answer.take(b'{"error": {"message": "late"}}')
    assert answer.num_ends == 2
