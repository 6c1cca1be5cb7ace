import contextlib
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from baton_runtime.log import configure_logging, get_logger
from opentelemetry.sdk.trace import TracerProvider


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_event_is_one_json_line_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    log = get_logger("baton_x")  # before the configuration, as modules do
    configure_logging("decode", "decode-0", "ab" * 8, "info", "json")
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        log.info("handoff_confirmed", num_blocks=3, data=b"\x00")
    (line,) = lines(capsys)
    assert line.pop("timestamp")
    assert line == {
        "event": "handoff_confirmed",
        "num_blocks": 3,
        "data": "AA==",
        "request_id": "r-1",
        "service": "decode",
        "instance_id": "decode-0",
        "incarnation": "ab" * 8,
        "level": "info",
        "logger": "baton_x",
    }


def test_facts_of_the_event_win_over_those_of_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "decode-0", "ab" * 8, "info", "json")
    get_logger("x").info("peer_fenced", instance_id="prefill-3")
    assert lines(capsys)[0]["instance_id"] == "prefill-3"


def test_levels_below_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "decode-0", "ab" * 8, "warning", "json")
    get_logger("x").info("no")
    get_logger("x").warning("yes")
    assert [line["event"] for line in lines(capsys)] == ["yes"]


def test_libraries_that_use_logging_come_out_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "decode-0", "ab" * 8, "info", "json")
    logging.getLogger("some.library").warning("odd %s", "thing")
    (line,) = lines(capsys)
    assert (line["event"], line["service"], line["level"]) == ("odd thing", "decode", "warning")


def test_exception_is_structured(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "decode-0", "ab" * 8, "info", "json")
    try:
        raise ValueError("what happened")
    except ValueError:
        get_logger("x").exception("step_failed")
    assert "what happened" in json.dumps(lines(capsys)[0]["exception"])


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_values_of_variables_are_not_written_with_an_exception(capsys: pytest.CaptureFixture[str], fmt: str) -> None:
    """Prompts, secrets of pairs and keys of users are in them."""
    configure_logging("decode", "decode-0", "ab" * 8, "info", fmt)

    def fails(prompt: str) -> None:
        raise ValueError(f"a prompt of {len(prompt)} characters")

    try:
        fails("-".join(["my", "secret"]))
    except ValueError:
        get_logger("x").exception("step_failed")
    written = capsys.readouterr().err
    assert "a prompt of 9 characters" in written
    assert "fails" in written
    assert "my-secret" not in written


def test_trace_ids_come_from_the_span(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "decode-0", "ab" * 8, "info", "json")
    with TracerProvider(shutdown_on_exit=False).get_tracer("x").start_as_current_span("a") as span:
        get_logger("x").info("yes")
    assert lines(capsys)[0]["trace_id"] == f"{span.get_span_context().trace_id:032x}"


def test_second_configuration_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "decode-0", "ab" * 8, "info", "json")
    configure_logging("decode", "decode-1", "ab" * 8, "info", "json")
    get_logger("x").info("once")
    (line,) = lines(capsys)
    assert line["instance_id"] == "decode-1"


def test_console_format_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "decode-0", "ab" * 8, "info", "console")
    get_logger("x").info("hello")
    assert "hello" in capsys.readouterr().err


def test_a_line_that_cannot_be_written_is_lost_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    configure_logging("decode", "decode-0", "ab" * 8, "info", "json")
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:
        monkeypatch.setattr("sys.stderr", full)
        get_logger("x").info("disk_full")
        get_logger("x").exception("still_running")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
