"""Runs the sequences of all frontends: gives each to the engine or to the handoffs, and says how it ended, once.

    whole         engine; before, the handoffs if blocks are to be fetched from another instance
    prefill_for   handoffs (which start the engine themselves, once decode has room)
    decode_from   handoffs until the KV is here, then engine

A plain synchronous class. Whatever ends an attempt goes through `_finish`, which takes it out of `_attempts`: what comes
later finds nothing and is dropped.
"""

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import EndReason, Engine, EngineRequest, SequenceEnd, SequenceKey, StepOutput, Work
from baton_handoff.ids import FetchEnd, FetchHint, HandoffComplete, HandoffEnd, PeerRef
from baton_runtime.errors import BatonError, Draining, InvalidArgument
from baton_runtime.telemetry import is_sampled
from opentelemetry.trace import Tracer

from baton_worker.cancels import CancelPhase, CancelTimes
from baton_worker.ends import FINISH_OF_END, error_detail, error_end
from baton_worker.metrics import WorkerMetrics
from baton_worker.spans import AttemptSpans
from baton_worker.starts import CheckedStart, StartLimits, check_start

SPARE_DEADLINES = 1024  # of attempts that are over, kept until then
# What the other side of a handoff is told, for its log.
_HANDOFF_CANCEL = {
    pb.FINISH_REASON_CANCELLED: "CLIENT_GONE",
    pb.FINISH_REASON_DEADLINE: "DEADLINE",
    pb.FINISH_REASON_STALE: "STALE",
    pb.FINISH_REASON_PREEMPTED: "DRAINING",
    pb.FINISH_REASON_ENGINE_ERROR: "ENGINE_ERROR",
}


class Handoffs(Protocol):
    """What the dispatcher needs of `baton_handoff.manager.HandoffManager`."""

    def start_prefill(
        self,
        request: EngineRequest,
        decode: PeerRef,
        traceparent: str,
        on_end: Callable[[HandoffEnd], None],
        fetch_from: FetchHint | None = None,
    ) -> None:
        """Queue it, offer it, fetch or compute it, hand it over; then on_end, once."""

    def start_fetch(self, request: EngineRequest, hint: FetchHint, traceparent: str, on_end: Callable[[FetchEnd], None]) -> None:
        """Fetch cached blocks of it; then on_end, once, in no more time than computing them would take. It never fails a sequence."""

    def start_decode(
        self,
        request: EngineRequest,
        prefill: PeerRef,
        traceparent: str,
        on_complete: Callable[[HandoffComplete], None],
        on_end: Callable[[HandoffEnd], None],
    ) -> None:
        """Wait for the offer, pull; then on_complete, once the KV lies in the sequence's blocks, or on_end."""

    def cancel(self, request_id: str, attempt: int, reason: str) -> None:
        """End the handoffs of these attempts, or refuse them when they come."""


@dataclass(slots=True)
class _Attempt:
    start: CheckedStart
    accepted_at: float
    spans: AttemptSpans | None
    is_in_engine: bool = False
    has_token: bool = False  # one was drawn
    cancel_reason: "pb.FinishReason | None" = None  # the frontend's: whatever happens, this is the end
    own_reason: "pb.FinishReason | None" = None  # ours: the end, unless the sequence ended by itself in the same step
    first_step_at: float = 0.0
    cached_tokens: int = 0
    handoff_bytes: int = 0
    fetched_tokens: int = 0
    exposed_s: float = 0.0


class Dispatcher:
    """Every accepted attempt by key, until it is over. Implements `attach.SequenceControl`; times in seconds of `clock`."""

    def __init__(
        self,
        instance_id: str,
        engine: Engine,
        handoffs: Handoffs,
        limits: StartLimits,
        metrics: WorkerMetrics,
        tracer: Tracer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._instance_id = instance_id
        self._engine = engine
        self._handoffs = handoffs
        self._limits = limits
        self._metrics = metrics
        self._tracer = tracer
        self._clock = clock
        self._cancel_times = CancelTimes(engine.blocks, metrics, clock)
        self._attempts: dict[SequenceKey, _Attempt] = {}
        self._deadlines: list[tuple[float, SequenceKey]] = []
        self._waiting_prefills: dict[SequenceKey, int] = {}  # tokens to compute, while the engine has not heard of it
        self._is_draining = False
        self.on_end: Callable[[SequenceKey, pb.Finished, float], None] = _nobody

    @property
    def num_live(self) -> int:
        """Attempts that are not over."""
        return len(self._attempts)

    @property
    def is_draining(self) -> bool:
        """Whether new work is refused."""
        return self._is_draining

    def waiting_handoff_tokens(self) -> int:
        """Prompt tokens of sequences that wait for decode's room or for a fetch, and which the engine's own count lacks."""
        for key in [key for key in self._waiting_prefills if self._engine.blocks.has_table(key)]:
            del self._waiting_prefills[key]  # begun: the engine counts it from here on
        return sum(self._waiting_prefills.values())

    # ---- SequenceControl

    def start(self, start: pb.Start) -> None:
        """See SequenceControl.start. Raises: Draining, QueueFull, UnsupportedWork, InvalidArgument."""
        if self._is_draining:
            raise Draining(self._instance_id)
        checked = check_start(start, self._limits)
        key = checked.request.key
        if key in self._attempts:
            raise InvalidArgument("request_id", "belongs to a sequence of another frontend")
        spans = AttemptSpans(self._tracer, checked, self._instance_id) if is_sampled(checked.traceparent) else None
        attempt = self._attempts[key] = _Attempt(checked, self._clock(), spans)
        try:
            self._route(key, attempt)
        except BatonError:
            self._attempts.pop(key, None)
            raise
        if key in self._attempts and not attempt.is_in_engine and checked.request.work is not Work.DECODE_ONLY:
            self._waiting_prefills[key] = checked.request.num_kv_tokens
        if checked.deadline_s is not None:
            heapq.heappush(self._deadlines, (attempt.accepted_at + checked.deadline_s, key))
            if len(self._deadlines) > 2 * len(self._attempts) + SPARE_DEADLINES:
                # Of attempts that ended long before their deadline: at 1,000 requests/s and 600 s they would be 600,000.
                self._deadlines = [(at, live) for at, live in self._deadlines if live in self._attempts]
                heapq.heapify(self._deadlines)

    def cancel(self, key: SequenceKey, reason: "pb.FinishReason") -> None:
        """See SequenceControl.cancel."""
        attempt = self._attempts.get(key)
        if attempt is not None:
            self._watch(key, attempt)
            attempt.cancel_reason = reason
            self._cancel(key, attempt, reason)

    def forbid(self, request_id: str, attempt: int) -> None:
        """See SequenceControl.forbid."""
        self._handoffs.cancel(request_id, attempt, "CLIENT_GONE")

    def pause(self, key: SequenceKey) -> None:
        """See SequenceControl.pause."""
        self._engine.pause(key)

    def resume(self, key: SequenceKey) -> None:
        """See SequenceControl.resume."""
        self._engine.resume(key)

    def first_token(self, key: SequenceKey) -> None:
        """See SequenceControl.first_token."""
        attempt = self._attempts.get(key)
        if attempt is None:
            return
        attempt.has_token = True
        if attempt.spans is not None:
            attempt.spans.first_token()

    # ---- what happens

    def on_started(self, output: StepOutput) -> None:
        """Sequences that ran for the first time, prompts that came further. To be called before the step's tokens go to the frontends."""
        for key in output.started:
            attempt = self._attempts.get(key)
            if attempt is not None and not attempt.first_step_at:
                attempt.first_step_at = self._clock() - output.duration_s
                self._metrics.queue_wait(attempt.start.request, attempt.first_step_at - attempt.accepted_at)
                if attempt.spans is not None:
                    attempt.spans.first_step(output.duration_s)
        for ready in output.ready:
            attempt = self._attempts.get(ready.key)
            if attempt is not None and attempt.spans is not None:
                attempt.spans.chunk()

    def on_ended(self, output: StepOutput) -> None:
        """Ends of one step. To be called after the tokens of the step went to the frontends."""
        for end in output.ends:
            self._engine_ended(end)

    def tick(self, now: float) -> None:
        """End what is past its deadline."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, key = heapq.heappop(self._deadlines)
            self._end_ourselves(key, pb.FINISH_REASON_DEADLINE)

    def set_draining(self) -> None:
        """Refuse new work from now on."""
        self._is_draining = True

    def hand_back_all(self) -> None:
        """Time is up: every sequence ends with PREEMPTED, so that its frontend goes on elsewhere with the tokens so far."""
        for key in list(self._attempts):
            self._end_ourselves(key, pb.FINISH_REASON_PREEMPTED)

    def fail_all(self, error: BatonError) -> None:
        """The engine is gone: what it has not ended itself ends with ENGINE_ERROR, handoffs included."""
        for key, attempt in list(self._attempts.items()):
            # In this order: cancelling may report an end at once, which is then dropped.
            self._finish(key, attempt, pb.Finished(reason=pb.FINISH_REASON_ENGINE_ERROR, error=error_detail(error)))
            self._handoffs.cancel(key.request_id, key.attempt, "ENGINE_ERROR")

    def _route(self, key: SequenceKey, attempt: _Attempt) -> None:
        request, peer = attempt.start.request, attempt.start.peer
        traceparent, hint = attempt.start.traceparent, attempt.start.fetch_from
        if peer is None and hint is not None:
            return self._handoffs.start_fetch(request, hint, traceparent, lambda end: self._fetch_ended(key, end))
        if peer is None:
            attempt.is_in_engine = True
            return self._engine.start(request)
        if request.work is Work.PREFILL_ONLY:
            return self._handoffs.start_prefill(request, peer, traceparent, lambda end: self._handoff_ended(key, end), hint)
        self._handoffs.start_decode(
            request,
            peer,
            traceparent,
            lambda complete: self._handoff_completed(key, complete),
            lambda end: self._handoff_ended(key, end),
        )

    def _end_ourselves(self, key: SequenceKey, reason: "pb.FinishReason") -> None:
        attempt = self._attempts.get(key)
        if attempt is not None and attempt.own_reason is None:
            self._watch(key, attempt)
            attempt.own_reason = reason
            self._cancel(key, attempt, reason)

    def _watch(self, key: SequenceKey, attempt: _Attempt) -> None:
        """It is about to be cancelled: measure from now on, or go on measuring."""
        if attempt.cancel_reason is None and attempt.own_reason is None:
            self._cancel_times.cancelled(key, self._phase(key, attempt), is_in_engine=attempt.is_in_engine)

    def _phase(self, key: SequenceKey, attempt: _Attempt) -> CancelPhase:
        work, blocks = attempt.start.request.work, self._engine.blocks
        if attempt.has_token or (attempt.is_in_engine and work is Work.DECODE_ONLY):
            return CancelPhase.DECODING
        if self._cancel_times.fetches(key):
            return CancelPhase.TRANSFERRING
        if work is Work.WHOLE:
            return CancelPhase.COMPUTING if attempt.first_step_at else CancelPhase.QUEUED
        if blocks.has_table(key):
            return CancelPhase.COMPUTING if work is Work.PREFILL_ONLY else CancelPhase.TRANSFERRING
        return CancelPhase.TRANSFERRING if blocks.held(key) else CancelPhase.QUEUED

    def _cancel(self, key: SequenceKey, attempt: _Attempt, reason: "pb.FinishReason") -> None:
        if attempt.is_in_engine:
            self._engine.cancel(key)
        else:
            self._handoffs.cancel(key.request_id, key.attempt, _HANDOFF_CANCEL[reason])

    def _fetch_ended(self, key: SequenceKey, end: FetchEnd) -> None:
        """Whatever came of it, the engine finds what is cached and computes the rest."""
        attempt = self._attempts.get(key)
        if attempt is None:
            return  # over meanwhile
        attempt.fetched_tokens = end.num_tokens
        self._waiting_prefills.pop(key, None)
        reason = attempt.cancel_reason or attempt.own_reason
        if reason is not None:
            return self._finish(key, attempt, pb.Finished(reason=reason))
        attempt.is_in_engine = True
        try:
            self._engine.start(attempt.start.request)
        except BatonError as error:
            self._finish(key, attempt, error_end(error))

    def _handoff_completed(self, key: SequenceKey, complete: HandoffComplete) -> None:
        attempt = self._attempts.get(key)
        if attempt is None:
            return self._engine.blocks.release(key)  # ended here while the last confirm was on its way
        attempt.cached_tokens = complete.cached_tokens
        attempt.handoff_bytes = complete.handoff_bytes
        attempt.exposed_s = complete.exposed_s
        reason = attempt.cancel_reason or attempt.own_reason
        if reason is not None:
            self._engine.blocks.release(key)
            return self._finish(key, attempt, pb.Finished(reason=reason))
        attempt.is_in_engine = True
        try:
            self._engine.start(attempt.start.request)
        except BatonError as error:
            self._engine.blocks.release(key)  # the table is still ours
            self._finish(key, attempt, error_end(error))

    def _handoff_ended(self, key: SequenceKey, end: HandoffEnd) -> None:
        attempt = self._attempts.get(key)
        if attempt is None or attempt.is_in_engine:
            return
        attempt.handoff_bytes = end.num_bytes
        attempt.cached_tokens = end.cached_tokens
        attempt.fetched_tokens = end.fetched_tokens
        finished = pb.Finished(reason=self._reason(attempt, cast("pb.FinishReason", end.reason.value)))
        if finished.reason == pb.FINISH_REASON_HANDOFF_FAILED:
            finished.handoff_failure.peer_incarnation = end.peer_incarnation
            finished.handoff_failure.cause = cast("pb.HandoffFailureCause", end.cause.value if end.cause is not None else 0)
            finished.handoff_failure.confirmed_tokens = end.confirmed_tokens
        if end.error is not None:
            finished.error.CopyFrom(error_detail(end.error))
        self._finish(key, attempt, finished)

    def _engine_ended(self, end: SequenceEnd) -> None:
        attempt = self._attempts.get(end.key)
        if attempt is None or not attempt.is_in_engine:
            return  # prefill_for: the handoffs saw it and say when it is over
        self._cancel_times.ended(end.key)
        finished = pb.Finished(reason=self._reason(attempt, FINISH_OF_END[end.reason]))
        if finished.reason == pb.FINISH_REASON_STOP and end.stop_token_id is not None:
            finished.stop_token_id = end.stop_token_id
        if end.reason is EndReason.ENGINE_ERROR:
            finished.error.reason = "ENGINE_ERROR"
            finished.error.message = end.message
        if attempt.start.peer is None:
            attempt.cached_tokens = end.cached_tokens
        finished.usage.output_tokens = end.output_tokens
        self._finish(end.key, attempt, finished)

    @staticmethod
    def _reason(attempt: _Attempt, reason: "pb.FinishReason") -> "pb.FinishReason":
        if attempt.cancel_reason is not None:
            return attempt.cancel_reason
        if reason == pb.FINISH_REASON_CANCELLED and attempt.own_reason is not None:
            return attempt.own_reason
        return reason

    def _finish(self, key: SequenceKey, attempt: _Attempt, finished: pb.Finished) -> None:
        del self._attempts[key]
        self._waiting_prefills.pop(key, None)
        finished.usage.input_tokens = len(attempt.start.request.token_ids)
        finished.usage.cached_tokens = attempt.cached_tokens
        finished.usage.handoff_bytes = attempt.handoff_bytes
        finished.usage.fetched_tokens = min(attempt.fetched_tokens, attempt.cached_tokens)
        finished.usage.exposed_handoff_us = round(attempt.exposed_s * 1e6)
        if attempt.first_step_at:
            finished.usage.queue_us = int((attempt.first_step_at - attempt.accepted_at) * 1e6)
        self._metrics.ended(attempt.start.request, finished)
        if attempt.spans is not None:
            attempt.spans.end(finished)
        self.on_end(key, finished, self._clock())


def _nobody(key: SequenceKey, finished: pb.Finished, now: float) -> None:
    """Before the frontends are wired up there are no attempts."""
