"""A steady stream of requests of several kinds, each of whose tokens is compared with what the sim engine must draw."""

import asyncio
import json
import random
from array import array
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
from baton_engine.sim_folder import read_sim_folder
from baton_engine.sim_pattern import next_tokens, states
from baton_engine.sim_profile import load_profile

ANSWER_LIMIT_S = 60.0
PAUSE_AFTER_FAILURE_S = 0.1


class Oracle:
    """What a sequence goes on with: a pure function of its tokens."""

    def __init__(self, profile: str, model: Path) -> None:
        self._allowed = read_sim_folder(model, load_profile(profile).model).allowed_token_ids

    def first_wrong(self, prompt: list[int], tokens: list[int]) -> int | None:
        """Position of the first token that is not the one to be drawn there."""
        if not tokens:
            return None
        sequence = states(array("I", prompt + tokens[:-1]))
        wrong = np.flatnonzero(next_tokens(sequence[len(prompt) - 1 :], self._allowed) != np.array(tokens, dtype=np.uint32))
        return int(wrong[0]) if len(wrong) else None


@dataclass(frozen=True)
class Kind:
    """Of clients. Lengths in tokens, from and to; leaves_after_s: they hang up some time before that; talks: they go on from the answer."""

    name: str
    clients: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    batch: bool = False
    leaves_after_s: float = 0.0
    talks: bool = False


@dataclass
class Outcome:
    """How one request ended for its client: "ok", "left" (by its own will), "refused" (429, 503), or "failed"; detail says why."""

    kind: str
    how: str
    detail: str = ""
    resumed: bool = False


@dataclass
class Tally:
    """All requests of one load."""

    outcomes: list[Outcome] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)  # streams with a wrong, missing or repeated token, or with two endings

    def count(self) -> Counter[str]:
        """Requests by how they ended, and those resumed."""
        found = Counter(outcome.how for outcome in self.outcomes)
        found["resumed"] = sum(outcome.resumed for outcome in self.outcomes)
        return found


class Load:
    """Clients that ask again and again until told to stop."""

    def __init__(self, http: aiohttp.ClientSession, url: str, model: str, oracle: Oracle, seed: int) -> None:
        self.url = url
        self.tally = Tally()
        self._http = http
        self._model = model
        self._oracle = oracle
        self._random = random.Random(seed)
        self._stopping = asyncio.Event()
        self._prefix = [10 + self._random.randrange(150) for _ in range(200)]

    @asynccontextmanager
    async def running(self, kinds: list[Kind]) -> AsyncIterator[None]:
        """Clients ask within the block; at its end no more is asked, and the last answers are waited for."""
        async with asyncio.TaskGroup() as group:
            for kind in kinds:
                for _ in range(kind.clients):
                    group.create_task(self._client(kind))
            try:
                yield
            finally:
                self._stopping.set()

    async def _client(self, kind: Kind) -> None:
        said: list[int] = []
        while not self._stopping.is_set():
            prompt = self._prompt(self._random.randint(*kind.prompt))
            outcome, answer = await self._ask(kind, [*said, *prompt])
            is_going_on = kind.talks and not said and outcome.how == "ok"
            said = [*prompt, *answer.token_ids] if is_going_on else []
            self.tally.outcomes.append(outcome)
            if outcome.how in ("refused", "failed"):
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    async def _ask(self, kind: Kind, prompt: list[int]) -> "tuple[Outcome, _Answer]":
        max_tokens = self._random.randint(*kind.answer)
        answer = _Answer()
        leave_s = self._random.uniform(0.0, kind.leaves_after_s) if kind.leaves_after_s else ANSWER_LIMIT_S
        try:
            async with asyncio.timeout(leave_s):
                await self._stream(answer, prompt, max_tokens, kind.batch)
        except TimeoutError:
            outcome = Outcome(kind.name, "left") if kind.leaves_after_s else Outcome(kind.name, "failed", f"no end in {leave_s:g} s")
        except aiohttp.ClientError as error:
            outcome = Outcome(kind.name, "failed", f"connection: {error or type(error).__name__}")
        else:
            outcome = answer.outcome(kind.name, max_tokens)
        outcome.resumed = answer.is_resumed
        self._check(answer, prompt, outcome)
        return outcome, answer

    def _prompt(self, length: int) -> list[int]:
        """Now and then one that begins as others do."""
        own = [10 + self._random.randrange(150) for _ in range(length)]
        return self._prefix[: length - 1] + own[:length] if self._random.random() < 0.3 else own

    async def _stream(self, answer: "_Answer", prompt: list[int], max_tokens: int, batch: bool) -> None:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "baton": {"class": "batch" if batch else "interactive"},
        }
        async with self._http.post(f"{self.url}/v1/completions", json=body) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = (await response.text())[:300]
                return
            async for line in response.content:
                if line.startswith(b"data: ") and answer.take(line[6:].strip()):
                    return

    def _check(self, answer: "_Answer", prompt: list[int], outcome: Outcome) -> None:
        wrong = self._oracle.first_wrong(prompt, answer.token_ids)
        if wrong is not None:
            self.tally.corrupt.append(f"token {wrong} of {len(answer.token_ids)} after {len(prompt)} is wrong ({outcome})")
        if answer.num_ends > 1:
            self.tally.corrupt.append(f"{answer.num_ends} endings ({outcome})")


class _Answer:
    """One stream as it comes."""

    def __init__(self) -> None:
        self.status = 0
        self.token_ids: list[int] = []
        self.num_ends = 0  # finish reasons and errors
        self.finish_reason = ""
        self.error = ""
        self.is_resumed = False
        self.is_done = False

    def take(self, data: bytes) -> bool:
        """One event. Returns: it was the last."""
        if data == b"[DONE]":
            self.is_done = True
            return True
        event = json.loads(data)
        if "error" in event:
            self.error = json.dumps(event["error"])
            self.num_ends += 1
        self.is_resumed |= bool(event.get("baton", {}).get("resumed"))
        for choice in event.get("choices", ()):
            self.token_ids += choice.get("token_ids") or []
            if choice.get("finish_reason"):
                self.finish_reason = choice["finish_reason"]
                self.num_ends += 1
        return False

    def outcome(self, kind: str, max_tokens: int) -> Outcome:
        """How it ended, the stream being over."""
        if self.status in (429, 503):
            return Outcome(kind, "refused", f"{self.status} {self.error}")
        if self.error or self.status != 200:
            return Outcome(kind, "failed", f"{self.status} {self.error}")
        if not self.is_done or self.finish_reason != "length" or len(self.token_ids) != max_tokens:
            return Outcome(kind, "failed", f"{len(self.token_ids)} of {max_tokens} tokens, {self.finish_reason!r}, done {self.is_done}")
        return Outcome(kind, "ok")
