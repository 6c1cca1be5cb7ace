"""Where an attempt runs, and what the state machine of a request asks its manager to do. Plain data, no I/O."""

import enum
from dataclasses import dataclass, replace

from baton_frontend.generation import GenerationEnd


class Role(enum.IntEnum):
    """Which side of an attempt a worker has."""

    DECODE = 0
    PREFILL = 1


@dataclass(frozen=True, slots=True)
class Target:
    """One life of one worker."""

    instance_id: str
    incarnation: str
    address: str  # host:port
    cached_tokens: int = 0  # the router's belief, a hint


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one attempt runs. prefill None: decode does all of it."""

    decode: Target
    prefill: Target | None = None
    predicted_queue_us: int = 0
    predicted_prefill_us: int = 0
    predicted_transfer_us: int = 0
    fetch_from: Target | None = None  # where the one that prefills may fetch leading blocks; a hint
    predicted_fetch_us: int = 0

    def target(self, role: Role) -> Target | None:
        """The worker that has this role."""
        return self.decode if role is Role.DECODE else self.prefill

    def whole(self) -> "Placement":
        """The same decode instance, with the prefill done there too."""
        return replace(self, prefill=None)


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask for a placement of this attempt. is_resume: before new work, and paced."""

    attempt: int
    excluded: tuple[str, ...]
    is_resume: bool


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The open question of this attempt is not wanted any more."""

    attempt: int


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """Send Start to decode, then to prefill."""

    attempt: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class StopAttempt:
    """Cancel on every worker that got a Start of this attempt and has not ended it; the placement is over for the router."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Call `Request.woken` at this time (clock of the `now` arguments, seconds), unless the request has ended by then."""

    at: float


@dataclass(frozen=True, slots=True)
class ReportPathDown:
    """Both workers live, but not for each other: bar the pair."""

    prefill_incarnation: str
    decode_incarnation: str


@dataclass(frozen=True, slots=True)
class End:
    """The one end of the request."""

    end: GenerationEnd


Action = Ask | Withdraw | StartAttempt | StopAttempt | Wake | ReportPathDown | End
