"""Where the time of a request went: six phases that follow each other and add up to it (docs/tracing.md).

Durations only cross processes: what workers say is taken between two times of our own clock, and what they do not say is left in the
phase beside it.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(slots=True)
class PhaseTimes:
    """What the workers of the attempt that drew the first token said of it, in us; None: nothing."""

    prefill_queue_us: int | None = None  # prefill: from its Start to its first step
    decode_queue_us: int | None = None  # decode: from its Start to its first step; of a pair, the handoff is in it
    handoff_us: int = 0  # decode: of it, from the end of prefill's compute to the last confirm


class LatencyBudget(NamedTuple):
    """Seconds; None: there was none, or it is not known and part of the next phase.

    route: from admission to the Start that led to the first token, failed attempts before it included. queue: until the first step of
    whoever computes the prompt. prefill: computing it. pull: what the handoff took beyond that. first_step: until the first token is out,
    waiting for decode's running step included (without a pair: in prefill, whose last step draws it). stream: from there to the end.
    """

    route_s: float | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    pull_s: float | None = None
    first_step_s: float | None = None
    stream_s: float | None = None

    def in_ms(self) -> dict[str, float | None]:
        """By name and unit, "route_ms" and so on, as they stand in logs and responses."""
        return dict(zip(_NAMES_MS, [None if value is None else int(value * 1e6 + 0.5) / 1e3 for value in self], strict=True))


_NAMES_MS = ("route_ms", "queue_ms", "prefill_ms", "pull_ms", "first_step_ms", "stream_ms")


def milliseconds(seconds: float | None) -> float | None:
    """Rounded to a microsecond; round() takes three times as long, and this is done for every request."""
    return None if seconds is None else int(seconds * 1e6 + 0.5) / 1e3


def latency_budget(
    admitted_at: float, started_at: float | None, first_token_at: float | None, ended_at: float, times: PhaseTimes, *, is_pair: bool
) -> LatencyBudget:
    """All by one clock, in seconds; None: it did not come to that. is_pair: prefill and decode were two workers."""
    if started_at is None:
        return LatencyBudget(route_s=ended_at - admitted_at)
    route_s = started_at - admitted_at
    if first_token_at is None:
        return LatencyBudget(route_s)
    to_first_s, stream_s = first_token_at - started_at, ended_at - first_token_at
    queue_us = times.prefill_queue_us if is_pair else times.decode_queue_us
    # A worker's clock starts a little later than ours, when the Start arrives: nothing can be longer than what we saw.
    queue_s = None if queue_us is None else min(queue_us / 1e6, to_first_s)
    if not is_pair or times.decode_queue_us is None:
        return LatencyBudget(route_s, queue_s, to_first_s - (queue_s or 0.0), None, None, stream_s)
    to_first_step_s = min(times.decode_queue_us / 1e6, to_first_s)
    pull_s = min(times.handoff_us / 1e6, to_first_step_s)
    queue_s = None if queue_s is None else min(queue_s, to_first_step_s - pull_s)
    prefill_s = to_first_step_s - pull_s - (queue_s or 0.0)
    return LatencyBudget(route_s, queue_s, prefill_s, pull_s, to_first_s - to_first_step_s, stream_s)
