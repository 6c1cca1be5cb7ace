"""Whether a peer is alive, judged from when it was last heard and from what its beats say. Local, needs no agreement."""

import enum
from dataclasses import dataclass

from baton_handoff.config import Times


class PeerState(enum.Enum):
    """OK: offers go out. SUSPECT: no new offers. FENCED: all its handoffs on this link end."""

    OK = "ok"
    SUSPECT = "suspect"
    FENCED = "fenced"


class FenceReason(enum.StrEnum):
    """Why a peer was fenced; the values go into PeerDown.reason, except the last two: they say nothing about the peer."""

    SILENT = "SILENT"
    STEP_STUCK = "STEP_STUCK"
    STREAM_BROKEN = "STREAM_BROKEN"
    REPLACED = "REPLACED"
    LOOP_STALL = "LOOP_STALL"
    CLOSING = "CLOSING"


@dataclass(frozen=True, slots=True)
class Beat:
    """As baton.worker.v1.Beat, in seconds."""

    step: int = 0
    running_step_age_s: float = 0.0
    predicted_step_s: float = 0.0


class PeerWatch:
    """One link's judgement of its peer.

    All its state: when the peer was last heard, when its link was lost (None: it is up), its newest beat, and whether somebody
    else said after that that it is dead. What others say only shortens the time from our own suspicion to the fence.
    """

    def __init__(self, times: Times, now: float) -> None:
        self._times = times
        self._heard_at = now
        self._lost_at: float | None = None
        self._beat = Beat()
        self.is_rumoured = False  # somebody else says that the peer is dead, and it was not heard since

    def heard(self, beat: Beat, now: float) -> None:
        """A message arrived."""
        self._heard_at = now
        self._beat = beat
        self.is_rumoured = False

    def linked(self, now: float) -> None:
        """The link is up (again)."""
        self._heard_at = now
        self._lost_at = None
        self.is_rumoured = False

    def rumoured(self) -> None:
        """Somebody else says that the peer is dead; true until it is heard again."""
        self.is_rumoured = True

    def lost(self, now: float) -> None:
        """The link broke; the first break counts."""
        if self._lost_at is None:
            self._lost_at = now

    def silent_s(self, now: float) -> float:
        """Time since the peer was last heard."""
        return now - self._heard_at

    def reopen_due(self) -> float:
        """When a lost link will be given up; infinity while it is up."""
        return self._lost_at + self._times.reopen_s if self._lost_at is not None else float("inf")

    def judge(self, now: float) -> tuple[PeerState, FenceReason | None]:
        """State now, and with FENCED why."""
        if self._lost_at is not None and now - self._lost_at >= self._times.reopen_s:
            return PeerState.FENCED, FenceReason.STREAM_BROKEN
        if self.silent_s(now) >= self._times.fenced_s:
            return PeerState.FENCED, FenceReason.SILENT
        if self._beat.running_step_age_s > max(self._times.fenced_s, 4 * self._beat.predicted_step_s):
            return PeerState.FENCED, FenceReason.STEP_STUCK
        if self._lost_at is not None or self.silent_s(now) >= self._times.suspect_s:
            if self.is_rumoured:
                return PeerState.FENCED, FenceReason.STREAM_BROKEN
            return PeerState.SUSPECT, None
        return PeerState.OK, None
