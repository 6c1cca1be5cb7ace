"""The load of "chat beside summarisation": what is asked and when, as a function of the seed, and what came of it."""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_TOKEN_IDS = (10, 217)  # of prompts; ordinary ones of the demo model too


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in tokens, times in seconds.

    A chat is a person: a question of chat_prompt tokens (uniform), an answer of chat_answer tokens, a pause of think_s on average
    (exponential, between a fifth and three times that), and again. Every question is new, so nothing of it is cached. A job is one text of
    job_prompt tokens and a summary of job_answer tokens; a stream of jobs sends the next one at once.
    """

    chats: int = 64
    chat_prompt: tuple[int, int] = (100, 600)
    chat_answer: tuple[int, int] = (50, 150)
    think_s: float = 10.0
    jobs: int = 8
    job_prompt: int = 16384
    job_answer: int = 400
    seed: int = 1


@dataclass(slots=True)
class Ask:
    """One request to send."""

    prompt: "array[int]"
    max_tokens: int


class Chatter:
    """One chat's requests and pauses; the same for every arm."""

    def __init__(self, shape: Shape, number: int) -> None:
        self._shape = shape
        self._random = random.Random(f"{shape.seed} chat {number}")
        self.first_pause_s = self._random.uniform(0, shape.think_s)

    def next(self) -> Ask:
        """The next question."""
        return Ask(_tokens(self._random, self._random.randint(*self._shape.chat_prompt)), self._random.randint(*self._shape.chat_answer))

    def pause_s(self) -> float:
        """How long the person reads and types."""
        mean = self._shape.think_s
        return min(max(self._random.expovariate(1 / mean), mean / 5), 3 * mean)


class Summariser:
    """One stream of jobs."""

    def __init__(self, shape: Shape, number: int) -> None:
        self._shape = shape
        self._random = random.Random(f"{shape.seed} job {number}")

    def next(self) -> Ask:
        """The next text."""
        return Ask(_tokens(self._random, self._shape.job_prompt), self._shape.job_answer)


def _tokens(source: random.Random, count: int) -> "array[int]":
    return array("I", source.choices(range(*_TOKEN_IDS), k=count))


@dataclass
class Times:
    """Of one class of requests in one arm, seconds: first_s sent to first token, gap_s between tokens, total_s sent to last token."""

    first_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)

    def add(self, sent_at: float, times: Sequence[float]) -> None:
        """One whole answer: when it was asked for, and when its tokens came."""
        self.first_s.append(times[0] - sent_at)
        self.gap_s += [after - before for before, after in pairwise(times)]
        self.total_s.append(times[-1] - sent_at)

    def as_json(self) -> dict[str, object]:
        """Quantiles in ms, and how many."""
        return {
            "requests": len(self.total_s),
            "ttft_ms": _quantiles(self.first_s),
            "itl_ms": _quantiles(self.gap_s),
            "total_ms": _quantiles(self.total_s),
            "mean_total_ms": round(sum(self.total_s) / max(1, len(self.total_s)) * 1e3, 2),
        }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of them does not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {name: round(quantile(values, share) * 1e3, 2) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))}
