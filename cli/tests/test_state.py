import os
from pathlib import Path

import click
import psutil
import pytest
from baton_cli import state


def make(pid: int, created_at: float) -> state.State:
    return state.State(pid, created_at, "127.0.0.1:1", "/baton/v1", "http://127.0.0.1:2", "m", True)


def test_a_written_state_is_read_again_while_its_supervisor_lives(tmp_path: Path) -> None:
    mine = make(os.getpid(), psutil.Process().create_time())
    state.write(tmp_path / "deep" / "folder", mine)
    assert state.read(tmp_path / "deep" / "folder") == mine
    assert state.require(tmp_path / "deep" / "folder") == mine


def test_a_state_whose_pid_was_given_to_another_process_counts_as_gone(tmp_path: Path) -> None:
    state.write(tmp_path, make(os.getpid(), psutil.Process().create_time() - 100))
    assert state.read(tmp_path) is None


@pytest.mark.parametrize("content", [None, "", "{", '{"pid": "x"}'])
def test_a_missing_or_broken_state_is_no_baton_and_the_error_says_what_to_do(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(click.ClickException, match="baton up"):
        state.require(tmp_path)


def test_a_removed_state_is_gone_and_removing_it_twice_is_fine(tmp_path: Path) -> None:
    state.write(tmp_path, make(os.getpid(), psutil.Process().create_time()))
    state.remove(tmp_path)
    state.remove(tmp_path)
    assert state.read(tmp_path) is None
