"""Clients of the soak: every request is a function of (seed, number), and every token is compared with what the sim engine must draw."""

import asyncio
import json
import random
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
from baton_engine.sim_folder import read_sim_folder
from baton_engine.sim_pattern import next_tokens, states
from baton_engine.sim_profile import load_profile

MODEL = "test-model"  # as tests/cluster.py serves it
VOCABULARY = range(10, 200)  # of the demo model
NUM_SYSTEM_PROMPTS, SYSTEM_TOKENS = 40, 48  # shared beginnings: some blocks are found in caches
ANSWER_LIMIT_S = 60.0  # no request may hang for longer
PAUSE_S = 0.2  # after a refusal
# What an honest server may answer while processes die: nothing else counts as an end.
HONEST = {"engine_crash", "unavailable", "queue_full", "no_model"}


@dataclass(frozen=True)
class Spec:
    """One request. leaves_after_s: when its client hangs up, if it does."""

    prompt: list[int]
    max_tokens: int
    is_stream: bool
    is_batch: bool
    leaves_after_s: float | None


def spec_of(seed: int, number: int) -> Spec:
    """The request of that number."""
    source = random.Random(f"{seed}:{number}")
    shared = random.Random(f"{seed}:system:{source.randrange(NUM_SYSTEM_PROMPTS)}").choices(VOCABULARY, k=SYSTEM_TOKENS)
    prompt = [*(shared if source.random() < 0.7 else []), *source.choices(VOCABULARY, k=source.randint(4, 150))]
    leaves = source.uniform(0.0, 0.15) if source.random() < 0.05 else None
    return Spec(prompt, source.randint(1, 8), source.random() < 0.25, source.random() < 0.2, leaves)


class Oracle:
    """What a sequence goes on with: a pure function of its tokens."""

    def __init__(self, profile: str, model: Path) -> None:
        self._allowed = read_sim_folder(model, load_profile(profile).model).allowed_token_ids

    def is_right(self, prompt: list[int], tokens: list[int]) -> bool:
        """Whether every one of the tokens is the one to be drawn there."""
        if not tokens:
            return True
        drawn = next_tokens(states(array("I", prompt + tokens[:-1]))[len(prompt) - 1 :], self._allowed)
        return bool(np.array_equal(drawn, np.array(tokens, dtype=np.uint32)))


@dataclass
class Tally:
    """How the requests ended. wrong: numbers of requests whose tokens, or whose ends, are not what they must be; and why.

    ends: "complete", "left", or the code of an error.
    """

    started: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """Requests that have ended."""
        return sum(self.ends.values())


@dataclass
class _Seen:
    tokens: list[int] = field(default_factory=list)
    finishes: int = 0
    error: str = ""
    is_done: bool = False
    resumed: bool = False


class Clients:
    """A number of clients that ask one request after another until told to stop."""

    def __init__(self, url: str, seed: int, oracle: Oracle, is_over: Callable[[], bool]) -> None:
        self.tally = Tally()
        self._url = f"{url}/v1/completions"
        self._seed = seed
        self._oracle = oracle
        self._is_over = is_over

    async def run(self, num_clients: int) -> None:
        """Until is_over; returns when every request has ended."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http, asyncio.TaskGroup() as tasks:
            for index in range(num_clients):
                tasks.create_task(self._client(http), name=f"client {index}")

    async def _client(self, http: aiohttp.ClientSession) -> None:
        while not self._is_over():
            number = self.tally.started
            self.tally.started += 1
            end = await self._request(http, number)
            self.tally.ends[end] += 1
            if end not in ("complete", "left"):
                await asyncio.sleep(PAUSE_S)

    async def _request(self, http: aiohttp.ClientSession, number: int) -> str:
        spec, seen = spec_of(self._seed, number), _Seen()
        try:
            async with asyncio.timeout(spec.leaves_after_s if spec.leaves_after_s is not None else ANSWER_LIMIT_S):
                await self._ask(http, spec, seen)
        except TimeoutError:
            if spec.leaves_after_s is None:
                self.tally.wrong.append(f"{number}: no answer within {ANSWER_LIMIT_S:g} s, {len(seen.tokens)} tokens")
                return "hung"
            self._check_tokens(number, spec, seen)
            return "left"
        except aiohttp.ClientError as error:
            self.tally.wrong.append(f"{number}: the frontend broke the connection: {error!r}")
            return "broken"
        self._check_tokens(number, spec, seen)
        self.tally.resumed += seen.resumed
        return self._end_of(number, spec, seen)

    def _check_tokens(self, number: int, spec: Spec, seen: _Seen) -> None:
        if len(seen.tokens) > spec.max_tokens or not self._oracle.is_right(spec.prompt, seen.tokens):
            self.tally.wrong.append(f"{number}: wrong tokens {seen.tokens}")

    def _end_of(self, number: int, spec: Spec, seen: _Seen) -> str:
        """The one end it has. Anything but all tokens and one finish, or one honest error, is wrong."""
        if seen.error:
            if seen.error not in HONEST or seen.finishes:
                self.tally.wrong.append(f"{number}: error {seen.error}, {seen.finishes} finishes")
            return seen.error
        if seen.finishes != 1 or len(seen.tokens) != spec.max_tokens or not seen.is_done:
            self.tally.wrong.append(f"{number}: {seen.finishes} finishes, {len(seen.tokens)} of {spec.max_tokens} tokens")
        return "complete"

    async def _ask(self, http: aiohttp.ClientSession, spec: Spec, seen: _Seen) -> None:
        body = {"model": MODEL, "prompt": spec.prompt, "max_tokens": spec.max_tokens, "ignore_eos": True, "return_token_ids": True}
        body |= {"stream": True} if spec.is_stream else {}
        body |= {"baton": {"class": "batch"}} if spec.is_batch else {}
        async with http.post(self._url, json=body) as response:
            if response.status != 200:
                seen.error = (await response.json())["error"].get("code") or f"http_{response.status}"
            elif spec.is_stream:
                await self._read_stream(response, seen)
            else:
                _take(seen, await response.json())
                seen.is_done = True

    @staticmethod
    async def _read_stream(response: aiohttp.ClientResponse, seen: _Seen) -> None:
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                seen.is_done = True
            elif line.startswith(b"data: "):
                _take(seen, json.loads(line[6:]))


def _take(seen: _Seen, event: dict) -> None:
    if "error" in event:
        seen.error = event["error"].get("code") or "unnamed"
    seen.resumed = seen.resumed or bool(event.get("baton", {}).get("resumed"))
    for choice in event.get("choices", ()):
        seen.tokens += choice.get("token_ids") or []
        seen.finishes += choice.get("finish_reason") is not None
