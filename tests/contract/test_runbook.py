"""Whoever is paged at night must find what the runbook names."""

import re
from pathlib import Path

from metric_names import exported

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/runbook.md").read_text()
SOURCES = "\n".join(path.read_text() for folder in ("libs", "services", "cli") for path in sorted((ROOT / folder).glob("*/src/**/*.py")))


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
    assert {word for word in named if not re.search(rf"\b{word}\b", SOURCES)} == set()


def test_files_that_the_runbook_sends_people_to_are_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert linked
    assert [link for link in linked if not (ROOT / "docs" / link).exists()] == []
    assert [path for path in re.findall(r"`((?:tests|compose|bench)/[^`]+)`", TEXT) if not (ROOT / path).exists()] == []
