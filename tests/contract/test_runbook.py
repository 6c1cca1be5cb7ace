"""Whoever is paged at night must find what the runbook names."""

import ast
import re
from pathlib import Path

import click
from baton_cli.main import main
from metric_names import exported

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/runbook.md").read_text()
SOURCES = [path for folder in ("libs", "services", "cli") for path in sorted((ROOT / folder).rglob("src/**/*.py"))]


def test_metrics_of_the_runbook_are_exported() -> None:
    known = exported()
    families = known | {name.removesuffix("_bucket") for name in known}
    named = set(re.findall(r"\bbaton_\w+", TEXT))
    assert len(named) > 15
    assert named - families == set()


def test_log_lines_and_settings_of_the_runbook_are_in_the_code() -> None:
    """In backticks, of several words: an event, a setting, an error's code."""
    named = {word for word in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEXT) if not word.startswith(("baton_", "process_"))}
    assert {"worker_fenced", "request_finished"} <= named
    assert named - words_of_the_code() == set()


def words_of_the_code() -> set[str]:
    """Whole strings, as events and codes are, and fields, as settings are. A word in a docstring or a comment is none."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def test_commands_of_the_runbook_can_be_given() -> None:
    lines = re.findall(r"`baton ([^`]+)`", TEXT)
    assert len(lines) > 3
    for line in lines:
        command: click.Command = main
        for word in line.split():
            if isinstance(command, click.Group):
                command = command.commands[word]
            elif word.startswith("--"):
                assert word in {name for parameter in command.params for name in parameter.opts}, line
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", TEXT)) - targets == set()


def test_files_that_the_runbook_sends_people_to_are_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert linked
    assert [link for link in linked if not (ROOT / "docs" / link).exists()] == []
    assert [path for path in re.findall(r"`((?:tests|compose|bench)/[^`]+)`", TEXT) if not (ROOT / path).exists()] == []
