"""What a load client counted: small enough to be sent between processes and added up, precise to one percent."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_PER_E_FOLD = 100  # buckets per factor of e: one percent each
_SHORTEST_S = 1e-6


@dataclass
class Durations:
    """A histogram of seconds with buckets of one percent; everything below 1 us counts as 1 us."""

    buckets: Counter[int] = field(default_factory=Counter)
    largest_s: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.buckets[round(math.log(max(seconds, _SHORTEST_S) / _SHORTEST_S) * _PER_E_FOLD)] += 1
        self.largest_s = max(self.largest_s, seconds)

    def merge(self, other: "Durations") -> None:
        """Those of another process."""
        self.buckets.update(other.buckets)
        self.largest_s = max(self.largest_s, other.largest_s)

    @property
    def count(self) -> int:
        """How many."""
        return self.buckets.total()

    def quantile(self, share: float) -> float:
        """Seconds that this share of them does not exceed; 0 if there are none."""
        left = math.ceil(share * self.count)
        for seconds, count in self.steps():
            left -= count
            if left <= 0:
                return min(seconds, self.largest_s)
        return 0.0

    def steps(self) -> Iterable[tuple[float, int]]:
        """(seconds, how many), shortest first."""
        return ((_SHORTEST_S * math.exp(bucket / _PER_E_FOLD), count) for bucket, count in sorted(self.buckets.items()))


@dataclass
class Figures:
    """Of one process, or of all of them.

    ends: how requests ended: "complete", or why not ("http_429", "engine_crash", "hung", "wrong_text", ...).
    first_s: request sent to first text; gap_s: between events with text of one answer, 0 for those that came in one read, which are
    counted in `same_read`; total_s: request sent to the end of the answer; refused_s: to a 429. problems: the first few, in words.
    reconnects: requests sent again because a kept connection ended before the first byte of the answer. without_usage: answers that did
    not say how many tokens they have. most_open: streams open at one time; over several processes the sum of each one's most.
    """

    started: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    events: int = 0
    same_read: int = 0
    num_bytes: int = 0
    reconnects: int = 0
    without_usage: int = 0
    first_s: Durations = field(default_factory=Durations)
    gap_s: Durations = field(default_factory=Durations)
    total_s: Durations = field(default_factory=Durations)
    refused_s: Durations = field(default_factory=Durations)
    problems: list[str] = field(default_factory=list)
    most_open: int = 0
    without_retry_after: int = 0  # 429s that do not say when to come back
    cpu_s: float = 0.0  # of the clients themselves

    @property
    def complete(self) -> int:
        """Whole and right answers."""
        return self.ends["complete"]

    @property
    def ended(self) -> int:
        """Requests that have ended in any way."""
        return self.ends.total()

    def merge(self, other: "Figures") -> None:
        """Those of another process."""
        self.started += other.started
        self.ends.update(other.ends)
        for name in (
            "tokens",
            "events",
            "same_read",
            "num_bytes",
            "reconnects",
            "without_usage",
            "most_open",
            "without_retry_after",
            "cpu_s",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("first_s", "gap_s", "total_s", "refused_s"):
            getattr(self, name).merge(getattr(other, name))
        self.problems = (self.problems + other.problems)[:20]
