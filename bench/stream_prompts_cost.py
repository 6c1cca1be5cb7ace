"""What prompts cost the frontend's loop: tokenizing a chat whose history is known, and how long the loop stands still for long prompts.

Measured on the real classes in this process, and, for the loop, by a probe against the real process as well.
"""

import asyncio
import http.client
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import uvloop
from baton_frontend.model_registry import LoadedModel, read_model
from baton_frontend.tokenizer import WorkPool
from machine import settle
from stream_model import VOCAB_SIZE, Prompts

SYSTEM_WORDS, TURNS, TURN_WORDS, NEW_WORDS = 2048, 8, 215, 64
LONG_PROMPT_TOKENS = 8192
PROBE_S = 0.002


def measure_prompts(folder: Path, prompts: Prompts, repeats: int = 300) -> dict[str, Any]:
    """Both, in this process. folder: of the model."""
    with WorkPool() as pool:
        model, _ = read_model(folder, VOCAB_SIZE, pool)
        settle()
        return {**uvloop.run(_known_chat(model, prompts, repeats)), **uvloop.run(_loop_gaps(model, prompts))}


async def _known_chat(model: LoadedModel, prompts: Prompts, repeats: int) -> dict[str, Any]:
    """A chat of 9,600 tokens with another last turn each time; then with nothing known."""
    assert model.template is not None
    history = [{"role": "system", "content": prompts.words(SYSTEM_WORDS)}]
    history += [{"role": ("user", "assistant")[index % 2], "content": prompts.words(TURN_WORDS)} for index in range(TURNS)]
    times_us, render_us, num_tokens = [], [], 0
    for index in range(repeats + 1):
        messages = [*history, {"role": "user", "content": prompts.words(NEW_WORDS)}]
        began = time.perf_counter()
        text = model.template.render(messages, add_generation_prompt=True, variables={})
        rendered = time.perf_counter()
        ids = (await model.tokenizer.encode([text], add_special_tokens=False))[0]
        if index:  # the first one makes the history known
            times_us.append((time.perf_counter() - rendered) * 1e6)
            render_us.append((rendered - began) * 1e6)
        num_tokens = len(ids)
    whole_us = []
    for _ in range(20):
        unknown = prompts.words(SYSTEM_WORDS + TURNS * TURN_WORDS)
        began = time.perf_counter()
        await model.tokenizer.encode([unknown], add_special_tokens=False)
        whole_us.append((time.perf_counter() - began) * 1e6)
    return {
        "chat_tokens": num_tokens,
        "known_chat_us": _shares(times_us),
        "render_us": _shares(render_us),
        "unknown_chat_us": _shares(whole_us),
    }


async def _loop_gaps(model: LoadedModel, prompts: Prompts) -> dict[str, Any]:
    """The time between two turns of a loop that always has a turn to take, while prompts of 8k tokens are encoded one after the other.

    And without them: what the machine's scheduler takes. A timer would not do: uvloop's have a grain of a millisecond.
    """
    assert model.template is not None
    words = await long_prompt_words(model, prompts)
    texts = [
        model.template.render([{"role": "user", "content": prompts.words(words)}], add_generation_prompt=True, variables={})
        for _ in range(100)
    ]
    gaps_ms: list[float] = []

    async def turn() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            gaps_ms.append((now - last) * 1e3)
            last = now

    turning = asyncio.create_task(turn())
    await asyncio.sleep(0.5)
    idle, gaps_ms[:] = _shares(gaps_ms), []
    for text in texts:
        await model.tokenizer.encode([text], add_special_tokens=False)
    turning.cancel()
    return {"long_prompt_words": words, "loop_gap_idle_ms": idle, "loop_gap_ms": _shares(gaps_ms)}


async def long_prompt_words(model: LoadedModel, prompts: Prompts) -> int:
    """Words of a prompt of about LONG_PROMPT_TOKENS tokens."""
    ids = (await model.tokenizer.encode([prompts.words(1000)], add_special_tokens=False))[0]
    return round(LONG_PROMPT_TOKENS / len(ids) * 1000)


class Probe:
    """GET /health every 2 ms on one connection, in a thread: how long a server's loop lets a cheap request wait."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=10.0)
        self._times_ms: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)

    def __enter__(self) -> "Probe":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while not self._is_over.wait(PROBE_S):
            began = time.perf_counter()
            self._connection.request("GET", "/health")
            self._connection.getresponse().read()
            self._times_ms.append((time.perf_counter() - began) * 1e3)

    def shares(self) -> dict[str, float]:
        """Round trips in ms."""
        return _shares(self._times_ms)


def _shares(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    if not values:
        return {}
    return {
        "p50": round(statistics.median(values), 3),
        "p99": round(values[int(len(values) * 0.99)], 3),
        "max": round(values[-1], 3),
        "count": len(values),
    }
