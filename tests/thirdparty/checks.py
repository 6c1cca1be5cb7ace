"""Runs a third-party client's checks and prints one JSON line per check. Standard library only: it runs in the clients' own environment."""

import asyncio
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable

URL = os.environ["BATON_URL"]  # http://host:port
MODEL = os.environ["BATON_MODEL"]
LIMIT_TOKENS = int(os.environ["BATON_LIMIT_TOKENS"])  # the model's context length
MESSAGES = [{"role": "user", "content": "Tell me of the relay and who holds the baton."}]


def equal(got: object, wanted: object) -> None:
    """Raises: AssertionError with both."""
    assert got == wanted, f"got {got!r}, wanted {wanted!r}"


def text_with_border(pieces: list[str]) -> tuple[str, str]:
    """A stop string that begins in one token and ends in the next, not the first ones; and the text before its first appearance."""
    text = "".join(pieces)
    for index in range(3, len(pieces) - 1):
        stop = pieces[index][-1:] + pieces[index + 1][:1]
        if len(stop) == 2 and "\ufffd" not in stop and text.find(stop) > 0:
            return stop, text[: text.find(stop)]
    raise AssertionError(f"no two tokens in a row with text in {pieces!r}")


def run(*checks: Callable[[], object]) -> None:
    """Run all; exit status 1 if one failed."""
    failed = False
    for check in checks:
        start = time.monotonic()
        try:
            asyncio.run(check()) if inspect.iscoroutinefunction(check) else check()
            error = ""
        except Exception as problem:
            failed, error = True, f"{type(problem).__name__}: {problem}"[:400]
            traceback.print_exc()
        name = check.__name__.replace("_", " ")
        print(json.dumps({"check": name, "ok": not error, "error": error, "seconds": round(time.monotonic() - start, 2)}), flush=True)
    sys.exit(failed)
