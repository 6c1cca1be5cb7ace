"""The state machine of one request and its attempts (docs/request.md): events in, actions out, no I/O and no clock.

Whatever a worker says belongs to one attempt. What arrives for an attempt that is over changes nothing, so an attempt ends
once whatever its two workers still say, positions go out once, and the request ends once.
"""

import enum
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_runtime.errors import BatonError, InvalidArgument, Unavailable

from baton_frontend.generation import EndReason, Generation, GenerationEnd
from baton_frontend.latency_budget import PhaseTimes
from baton_frontend.placement import Action, Ask, End, Placement, ReportPathDown, Role, StartAttempt, StopAttempt, Wake, Withdraw
from baton_frontend.request_errors import AttemptsExhausted, DeadlinePassed, EngineCrash, Overloaded

_PAIR_CAUSES = (worker_pb2.HANDOFF_FAILURE_CAUSE_PEER_FENCED, worker_pb2.HANDOFF_FAILURE_CAUSE_PATH_DOWN)
# Causes after which the same other side may be tried again by this request.
_PASSING_CAUSES = (worker_pb2.HANDOFF_FAILURE_CAUSE_PEER_CANCELLED, worker_pb2.HANDOFF_FAILURE_CAUSE_NOT_PINNED)
MIN_RETRY_S, MAX_RETRY_S = 0.05, 1.0


class Phase(enum.Enum):
    """States of the diagram in docs/request.md."""

    ROUTING = "routing"  # a question is open
    WAITING = "waiting"  # refused for now; asks again when woken
    RUNNING = "running"  # placed; workers may send
    CANCELLING = "cancelling"  # cancelled; waits shortly for decode's usage
    ENDED = "ended"


# Looking a member up in its enum costs as much as the rest of `Request.take` (CPython 3.11).
_DECODE, _RUNNING = Role.DECODE, Phase.RUNNING


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may cost before it is failed.

    max_attempts: placements that failed, refusals not counted. max_crashes: attempts during which a worker died, or workers that died
    under choices of the same prompt.
    new_patience_s, resume_patience_s: how long a request that never ran, or one that did, keeps asking while it is refused.
    cancel_wait_s: how long a cancelled request waits for decode's usage.
    deadline_s: from admission to the end, for requests that do not say their own.
    """

    max_attempts: int = 8
    max_crashes: int = 2
    new_patience_s: float = 2.0
    resume_patience_s: float = 30.0
    cancel_wait_s: float = 0.25
    deadline_s: float = 600.0


class Request:
    """One request: owned by this frontend from admission to its one end.

    Methods are events; each returns the actions to perform, in order. `now` is any monotonic clock in seconds. attempt is
    that of the slot or question the news is about.
    """

    __slots__ = (
        "_cached_tokens",
        "_crashed_attempts",
        "_excluded",
        "_exposed_handoff_us",
        "_failures",
        "_generation",
        "_limits",
        "_max_tokens",
        "_open",
        "_patience_until",
        "_retry_after_s",
        "_suspects",
        "_waits",
        "_wake_at",
        "attempt",
        "first_position",
        "has_started",
        "output",
        "phase",
        "placement",
        "resumed",
        "times",
    )

    def __init__(self, generation: Generation, limits: RequestLimits) -> None:
        self._generation = generation
        self._max_tokens = generation.max_tokens
        self._limits = limits
        self.phase = Phase.ROUTING
        self.attempt = 1
        self.placement: Placement | None = None
        self.output = array("I")  # delivered tokens
        self.first_position = 0  # first output position of this attempt
        self.times = PhaseTimes()  # of the last attempt that began without any token
        self.has_started = False  # some attempt was placed
        self.resumed = 0
        self._open: set[Role] = set()  # sides of this attempt that have not ended
        self._excluded: dict[str, None] = {}  # incarnations, in order of their failure
        # incarnation a peer called dead -> attempt, its workers; counts once we fence it too
        self._suspects: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._crashed_attempts: set[int] = set()
        self._failures = 0
        self._waits = 0  # since an attempt last ran
        self._retry_after_s = 0.0
        self._patience_until: float | None = None
        self._cached_tokens: int | None = None
        self._exposed_handoff_us = 0  # of all attempts
        self._wake_at = 0.0

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV nobody had to compute, as far as known."""
        return min(self._cached_tokens or 0, len(self._generation.prompt_token_ids))

    @property
    def remaining_tokens(self) -> int:
        """Output tokens still wanted."""
        return self._max_tokens - len(self.output)

    @property
    def deadline_s(self) -> float:
        """From admission to the end, in seconds."""
        return self._limits.deadline_s if self._generation.deadline_s is None else self._generation.deadline_s

    # --- placing

    def admit(self) -> list[Action]:
        """First event."""
        return [self._ask()]

    def question(self) -> Ask:
        """The open question again, for another router."""
        assert self.phase is Phase.ROUTING
        return self._ask()

    def placed(self, attempt: int, placement: Placement) -> list[Action]:
        """The router (or the fallback) chose."""
        if self.phase is not Phase.ROUTING or attempt != self.attempt:
            return []
        self.phase, self.placement = Phase.RUNNING, placement
        self._open = {Role.DECODE} if placement.prefill is None else {Role.DECODE, Role.PREFILL}
        self.first_position = len(self.output)
        if self.has_started and not self.output:
            self.times = PhaseTimes()
        self.has_started = True
        return [StartAttempt(attempt, placement)]

    def refused(self, attempt: int, reason: str, message: str, retry_after_ms: int, now: float) -> list[Action]:
        """The router (or the fallback) found no place."""
        if self.phase is not Phase.ROUTING or attempt != self.attempt:
            return []
        if reason == "TOO_LONG":
            return self._fail(InvalidArgument("messages" if self._generation.operation == "chat" else "prompt", message))
        retry_after_s = max(retry_after_ms / 1000, self._retry_after_s)
        self._retry_after_s = 0.0
        if reason == "OVERLOADED":
            error: BatonError = Overloaded(message, round(retry_after_s * 1000))
            if not self.has_started:
                return self._fail(error)
        else:
            error = Unavailable(message or reason, retry_after_ms=round(retry_after_s * 1000))
            self._excluded.clear()  # better an instance that failed us before than none
        return self._wait(retry_after_s, error, now)

    # --- running

    def take(self, attempt: int, role: Role, first_position: int, token_ids: Sequence[int]) -> Sequence[int] | None:
        """Tokens arrived for positions first_position, first_position + 1, ...

        Returns: those to deliver now, each position once; empty if none is new; None if positions are missing before them
        (a bug of the worker): nothing was taken, call `gap`.
        """
        if attempt != self.attempt or self.phase is not _RUNNING or role is not _DECODE:
            return ()
        output = self.output
        expected = len(output)
        if first_position != expected:
            if first_position > expected:
                return None
            token_ids = token_ids[expected - first_position :]
        if expected + len(token_ids) > self._max_tokens:
            token_ids = token_ids[: self._max_tokens - expected]
        output.extend(token_ids)
        return token_ids

    def gap(self, attempt: int, role: Role) -> list[Action]:
        """Positions or log probabilities are missing: end the attempt and go on from what was delivered."""
        if attempt != self.attempt or self.phase is not Phase.RUNNING or role is not _DECODE:
            return []
        return self._attempt_failed("protocol_error", exclude=self._incarnation(Role.DECODE))

    def finished(
        self, attempt: int, role: Role, finished: worker_pb2.Finished, now: float, is_healthy: Callable[[str], bool]
    ) -> list[Action]:
        """A worker ended its side. is_healthy(incarnation): whether our own stream to that worker is alive."""
        if attempt != self.attempt or role not in self._open or self.phase not in (Phase.RUNNING, Phase.CANCELLING):
            return []
        self._open.discard(role)
        self._note_usage(role, finished)
        if self.phase is Phase.CANCELLING:
            return self._finish("cancelled") if role is Role.DECODE else []
        if role is Role.PREFILL and (finished.reason == worker_pb2.FINISH_REASON_PREFILLED or len(self.output) > self.first_position):
            return []  # decode has every block; what becomes of prefill now does not matter
        return self._ended_by(role, finished, now, is_healthy)

    def _ended_by(self, role: Role, finished: worker_pb2.Finished, now: float, is_healthy: Callable[[str], bool]) -> list[Action]:
        reason, message = finished.reason, finished.error.message
        match reason:
            case worker_pb2.FINISH_REASON_STOP if role is Role.DECODE:
                token = finished.stop_token_id if finished.HasField("stop_token_id") else None
                return self._finish("stop", stop_token_id=token)
            case worker_pb2.FINISH_REASON_LENGTH if role is Role.DECODE:
                return self._finish("length")
            case worker_pb2.FINISH_REASON_DEADLINE:
                return self._fail(self._deadline_passed())
            case worker_pb2.FINISH_REASON_INVALID:
                return self._fail(InvalidArgument("request", message or finished.error.reason))
            case worker_pb2.FINISH_REASON_REFUSED:
                return self._attempt_refused(role, finished.error.retry_after_ms, now)
            case worker_pb2.FINISH_REASON_HANDOFF_FAILED:
                return self._handoff_failed(role, finished.handoff_failure, is_healthy)
            case worker_pb2.FINISH_REASON_ENGINE_ERROR:
                return self._attempt_failed("engine_error", exclude=self._incarnation(role), has_crashed=True)
            case _:
                return self._attempt_failed(reason_name(reason))

    def lost(self, attempt: int, role: Role, now: float, *, has_run: bool) -> list[Action]:
        """The worker of this side is fenced, or cannot take the Start. has_run: the Start had left for it."""
        if attempt != self.attempt or role not in self._open or self.phase not in (Phase.RUNNING, Phase.CANCELLING):
            return []
        self._open.discard(role)
        if self.phase is Phase.CANCELLING:
            return self._finish("cancelled") if role is Role.DECODE else []
        if role is Role.PREFILL and len(self.output) > self.first_position:
            return []
        if not has_run:
            return self._place_elsewhere(role, 0.0, Unavailable("the chosen worker cannot be reached"), now)
        return self._attempt_failed("worker_lost", exclude=self._incarnation(role), has_crashed=True)

    def died(self, incarnation: str) -> list[Action]:
        """We have fenced this worker: if a peer of it said so first, the attempt it was running counts as crashed now."""
        suspect = self._suspects.pop(incarnation, None)
        if suspect is None or self.phase is Phase.ENDED:
            return []
        self._note_crash(incarnation, *suspect)
        if self._num_crashes < self._limits.max_crashes or self.phase is Phase.CANCELLING:
            return []
        return self._fail(EngineCrash(self._num_crashes))

    # --- ending from outside

    def cancel(self, now: float) -> list[Action]:
        """The client left, or has enough."""
        if self.phase in (Phase.ENDED, Phase.CANCELLING):
            return []
        if self.phase is not Phase.RUNNING or Role.DECODE not in self._open:
            return self._finish("cancelled")
        self.phase, self._wake_at = Phase.CANCELLING, now + self._limits.cancel_wait_s
        return [StopAttempt(self.attempt), Wake(self._wake_at)]

    def expire(self) -> list[Action]:
        """The deadline passed."""
        if self.phase is Phase.ENDED:
            return []
        if self.phase is Phase.CANCELLING:
            return self._finish("cancelled")
        return self._fail(self._deadline_passed())

    def abort(self, error: BatonError) -> list[Action]:
        """The frontend itself gives the request up."""
        return [] if self.phase is Phase.ENDED else self._fail(error)

    def woken(self, now: float) -> list[Action]:
        """A `Wake` is due. Early and doubled calls are harmless."""
        if now < self._wake_at:
            return []
        if self.phase is Phase.WAITING:
            self.phase = Phase.ROUTING
            return [self._ask()]
        if self.phase is Phase.CANCELLING:
            return self._finish("cancelled")
        return []

    # --- decisions

    def _deadline_passed(self) -> DeadlinePassed:
        setting = "frontend.default_deadline_s" if self._generation.deadline_s is None else "baton.deadline_s"
        return DeadlinePassed(self.deadline_s, setting)

    def _ask(self) -> Ask:
        return Ask(self.attempt, tuple(self._excluded), is_resume=self.has_started)

    def _incarnation(self, role: Role) -> str:
        target = self.placement.target(role) if self.placement is not None else None
        return target.incarnation if target is not None else ""

    def _pair(self) -> tuple[str, ...]:
        """Incarnations of this attempt."""
        return tuple(filter(None, (self._incarnation(Role.DECODE), self._incarnation(Role.PREFILL))))

    def _note_crash(self, incarnation: str, attempt: int, pair: tuple[str, ...]) -> None:
        if attempt not in self._crashed_attempts:
            self._crashed_attempts.add(attempt)
            self._generation.crashes.note(incarnation, pair)

    @property
    def _num_crashes(self) -> int:
        """Of this choice, or of all that share its prompt."""
        return max(len(self._crashed_attempts), len(self._generation.crashes.incarnations))

    def _note_usage(self, role: Role, finished: worker_pb2.Finished) -> None:
        # Only before the first failure is it the client's prefix hit: later attempts also find what this request computed itself, and
        # one that died said nothing. Decode's word goes before prefill's of the same attempt.
        if not finished.HasField("usage"):
            return
        self._exposed_handoff_us += finished.usage.exposed_handoff_us
        if self.first_position == 0:
            if role is Role.PREFILL:
                self.times.prefill_queue_us = finished.usage.queue_us
            else:
                self.times.decode_queue_us, self.times.handoff_us = finished.usage.queue_us, finished.usage.exposed_handoff_us
        if self.resumed == 0 and (self._cached_tokens is None or role is Role.DECODE):
            self._cached_tokens = finished.usage.cached_tokens

    def _handoff_failed(self, role: Role, failure: worker_pb2.HandoffFailure, is_healthy: Callable[[str], bool]) -> list[Action]:
        prefill, decode = self._incarnation(Role.PREFILL), self._incarnation(Role.DECODE)
        peer = prefill if role is Role.DECODE else decode
        cause = "handoff_" + worker_pb2.HandoffFailureCause.Name(failure.cause).removeprefix("HANDOFF_FAILURE_CAUSE_").lower()
        if failure.cause in _PASSING_CAUSES:
            return self._attempt_failed(cause)
        if failure.cause not in _PAIR_CAUSES:
            return self._attempt_failed(cause, exclude=prefill)
        if not is_healthy(peer):
            self._suspects[peer] = self.attempt, self._pair()
            return self._attempt_failed(cause, exclude=peer)
        actions: list[Action] = [ReportPathDown(prefill, decode)] if prefill else []
        # Of a pair that cannot reach each other, decode is worth keeping: it has what was confirmed.
        return actions + self._attempt_failed(cause, exclude=prefill)

    def _attempt_refused(self, role: Role, retry_after_ms: int, now: float) -> list[Action]:
        error = Overloaded("", max(retry_after_ms, round(MIN_RETRY_S * 1000)))
        return self._place_elsewhere(role, retry_after_ms / 1000, error, now)

    def _place_elsewhere(self, role: Role, retry_after_s: float, error: BatonError, now: float) -> list[Action]:
        """A placement came to nothing: not a failure, and bounded in time, not in number.

        First elsewhere at once; only where it was turned away before, or nowhere else, after a while.
        """
        incarnation = self._incarnation(role)
        has_been_there = incarnation in self._excluded
        stop = StopAttempt(self.attempt)
        self._next_attempt(incarnation)
        self.phase = Phase.WAITING
        self._retry_after_s = max(retry_after_s, self._retry_after_s)
        if has_been_there:
            return [stop, *self._wait(self._retry_after_s, error, now)]
        if self._is_out_of_patience(now):
            return [stop, *self._fail(error)]
        self.phase = Phase.ROUTING
        return [stop, self._ask()]

    def _attempt_failed(self, cause: str, exclude: str = "", has_crashed: bool = False) -> list[Action]:
        if has_crashed:
            self._note_crash(exclude, self.attempt, self._pair())
        if (done := self._complete_already()) is not None:
            return done
        if has_crashed and self._num_crashes >= self._limits.max_crashes:
            return self._fail(EngineCrash(self._num_crashes))
        self._failures += 1
        if self._failures >= self._limits.max_attempts:
            return self._fail(AttemptsExhausted(self._failures, cause))
        stop = StopAttempt(self.attempt)
        self._patience_until, self._waits = None, 0
        self.resumed += 1
        self._next_attempt(exclude)
        self.phase = Phase.ROUTING
        return [stop, self._ask()]

    def _complete_already(self) -> list[Action] | None:
        """The end if every token was delivered and only the worker's last word is missing."""
        generation = self._generation
        if self.remaining_tokens <= 0:
            return self._finish("length")
        if self.output and self.output[-1] in generation.end_token_ids and len(self.output) > generation.min_tokens:
            return self._finish("stop", stop_token_id=self.output[-1])
        return None

    def _next_attempt(self, exclude: str) -> None:
        self.attempt += 1
        self.placement = None
        self._open = set()
        if exclude:
            self._excluded[exclude] = None

    def _is_out_of_patience(self, now: float, delay_s: float = 0.0) -> bool:
        if self._patience_until is None:
            ran = len(self.output) > 0 or self._failures > 0
            self._patience_until = now + (self._limits.resume_patience_s if ran else self._limits.new_patience_s)
        return now + delay_s > self._patience_until

    def _wait(self, retry_after_s: float, error: BatonError, now: float) -> list[Action]:
        delay_s = min(MAX_RETRY_S, max(MIN_RETRY_S * 2 ** min(self._waits, 10), retry_after_s))
        self._waits += 1
        if self._is_out_of_patience(now, delay_s):
            return self._fail(error)
        self.phase, self._wake_at = Phase.WAITING, now + delay_s
        return [Wake(self._wake_at)]

    # --- the one end

    def _fail(self, error: BatonError) -> list[Action]:
        return self._finish("failed", error=error)

    def _finish(self, reason: EndReason, *, error: BatonError | None = None, stop_token_id: int | None = None) -> list[Action]:
        was, self.phase = self.phase, Phase.ENDED
        actions: list[Action] = []
        if was is Phase.ROUTING:
            actions.append(Withdraw(self.attempt))
        elif was is Phase.RUNNING:
            actions.append(StopAttempt(self.attempt))
        end = GenerationEnd(
            reason=reason,
            error=error,
            prompt_tokens=len(self._generation.prompt_token_ids),
            cached_tokens=self.cached_tokens,
            output_tokens=len(self.output),
            resumed=self.resumed,
            stop_token_id=stop_token_id,
            exposed_handoff_s=self._exposed_handoff_us / 1e6,
        )
        return [*actions, End(end)]


def reason_name(reason: int) -> str:
    """FinishReason as a word for logs and metrics: "preempted"."""
    name = worker_pb2.FinishReason.Name(reason) if reason in worker_pb2.FinishReason.values() else "FINISH_REASON_UNSPECIFIED"
    return name.removeprefix("FINISH_REASON_").lower()
