"""Structured logging: constant snake_case events, facts as keys, JSON lines on stderr unless it is a terminal.

    log = get_logger(__name__)
    log.info("handoff_confirmed", handoff_id=..., num_blocks=...)

Bind request_id once per request with `structlog.contextvars.bound_contextvars`; trace ids come from the current span. Records
of libraries that use the standard logging module take the same way out.
"""

import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "console")
# Chatty below this level, and nothing Baton's operators act on.
_QUIET = {"asyncio": logging.WARNING, "grpc": logging.WARNING, "opentelemetry": logging.ERROR, "urllib3": logging.WARNING}


def configure_logging(service: str, instance_id: str, incarnation: str, level: str = "info", fmt: str = "auto") -> None:
    """Set up logging for the process; calling it again replaces the set-up.

    level: one of LEVELS. fmt: "json", "console", or "auto" (console if stderr is a terminal).
    """
    facts = {"service": service, "instance_id": instance_id, "incarnation": incarnation}
    as_json = fmt == "json" or (fmt == "auto" and not sys.stderr.isatty())
    shared = _shared_processors(facts)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_renderers(as_json)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name, quiet_level in _QUIET.items():
        logging.getLogger(name).setLevel(max(quiet_level, root.level))
    # Our own lines do not pass through the standard library's records: each would cost four times as much.
    structlog.configure(
        processors=[*shared, *_renderers(as_json)[1:]],
        logger_factory=_StderrLogger,
        wrapper_class=structlog.make_filtering_bound_logger(root.level),
        cache_logger_on_first_use=False,
    )


class _StderrLogger:
    """Writes finished lines."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def msg(self, line: str) -> None:
        """Write a line; lose it where that fails (disk full, pipe closed): a log must not end what it tells of."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")

    debug = info = warning = error = critical = exception = msg


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger; may be made at import time, before `configure_logging`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def _shared_processors(facts: dict[str, str]) -> Sequence[Processor]:
    def add_facts(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {**facts, **event}

    return [
        structlog.contextvars.merge_contextvars,
        add_facts,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        _add_trace_ids,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _add_trace_ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event.setdefault("trace_id", f"{span.trace_id:032x}")
        event.setdefault("span_id", f"{span.span_id:016x}")
    return event


def _renderers(as_json: bool) -> list[Processor]:
    drop = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    # Without the values of variables, which both would show: prompts and secrets are among them.
    if not as_json:
        return [drop, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    tracebacks = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))
    return [drop, tracebacks, structlog.processors.JSONRenderer(serializer=_to_json)]


def _to_json(event: Any, **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()
