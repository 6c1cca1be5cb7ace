"""One request under way: its state machine, its slots at the workers, its question at the router, its sink and its span."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from baton_contracts.router.v1 import router_service_pb2 as router_pb2
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_runtime.errors import BatonError, Internal, QueueFull
from baton_runtime.log import get_logger
from opentelemetry.context import Context

from baton_frontend import messages
from baton_frontend.attach_client import AttachClient
from baton_frontend.generation import Generation, GenerationEnd, ModelInfo, TokenLogprob, TokenSink
from baton_frontend.lanes import Lane
from baton_frontend.placement import Action, Ask, End, Placement, ReportPathDown, Role, StartAttempt, StopAttempt, Wake, Withdraw
from baton_frontend.request import Phase, Request
from baton_frontend.request_report import RequestReport
from baton_frontend.route_client import RouterLink

if TYPE_CHECKING:
    from baton_frontend.requests import RequestManager

log = get_logger(__name__)
RETURN_CHECK_S = 0.02


class ActiveRequest:
    """Carries out the actions of one `Request`. Is the handle its client holds, and the owner of its slots and questions."""

    __slots__ = (
        "_deadline",
        "_deadline_timer",
        "_generation",
        "_lanes",
        "_manager",
        "_model",
        "_placed_by",
        "_placement",
        "_query",
        "_query_at",
        "_report",
        "_request_id",
        "_sampling",
        "_sink",
        "_wake_timer",
        "_wants_logprobs",
        "request",
    )

    def __init__(
        self,
        manager: "RequestManager",
        request_id: str,
        generation: Generation,
        seed: int,
        model: ModelInfo,
        sink: TokenSink,
        trace_context: Context | None,
    ) -> None:
        self.request = Request(generation, manager.settings.limits)
        self._manager = manager
        self._request_id = request_id
        self._generation = generation
        self._wants_logprobs = generation.top_logprobs is not None
        self._model = model
        self._sink = sink
        self._sampling = messages.sampling_of(generation, seed)
        self._lanes: list[tuple[AttachClient, Lane]] = []  # of the running attempt
        self._placement: Placement | None = None  # the last one, for the log
        self._query: tuple[RouterLink, int] | None = None  # open
        self._placed_by: tuple[RouterLink, int] | None = None  # whose load counts the running attempt
        self._query_at = 0.0
        deadline_s = manager.settings.default_deadline_s if generation.deadline_s is None else generation.deadline_s
        self._deadline = manager.clock() + deadline_s
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._wake_timer: asyncio.TimerHandle | None = None
        self._report = RequestReport(request_id, generation, manager.tracer, manager.metrics, manager.log, manager.clock, trace_context)

    # --- GenerationHandle

    @property
    def request_id(self) -> str:
        """See `GenerationHandle`."""
        return self._request_id

    def cancel(self) -> None:
        """See `GenerationHandle`."""
        self._do(self.request.cancel(self._manager.clock()))

    # --- life

    def begin(self) -> None:
        """Admitted: ask for a place."""
        if self._generation.deadline_s is not None:
            self._deadline_timer = self._manager.call_later(self._generation.deadline_s, self._on_deadline)
        self._do(self.request.admit())

    def abort(self, error: BatonError) -> None:
        """The frontend gives it up."""
        self._do(self.request.abort(error))

    def _on_deadline(self) -> None:
        self._do(self.request.expire())

    def _on_wake(self, at: float) -> None:
        # A loop's timers fire up to a millisecond early; there is only this one call.
        self._do(self.request.woken(max(at, self._manager.clock())))

    # --- LaneOwner

    def next_position(self) -> int:
        """See `LaneOwner`."""
        return len(self.request.output)

    def on_tokens(self, lane: Lane, first_position: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """See `LaneOwner`. The hot path."""
        if logprobs is None and self._wants_logprobs:
            self.on_gap(lane)
            return
        new = self.request.take(lane.attempt, lane.role, first_position, token_ids)
        if not new:
            if new is None:
                self.on_gap(lane)
            return
        if logprobs is not None:
            skipped = len(self.request.output) - len(new) - first_position
            logprobs = logprobs[skipped : skipped + len(new)] if self._wants_logprobs else None
        self._report.on_tokens(len(new))
        self._sink.on_tokens(new, logprobs)

    def on_gap(self, lane: Lane) -> None:
        """See `LaneOwner`."""
        actions = self.request.gap(lane.attempt, lane.role)
        if actions:
            log.error("positions_missing", request_id=self._request_id, attempt=lane.attempt, expected=len(self.request.output))
        self._do(actions)

    def on_finished(self, lane: Lane, finished: worker_pb2.Finished) -> None:
        """See `LaneOwner`."""
        if lane.is_cancelled:
            self._manager.metrics.cancel_to_freed.observe(self._manager.clock() - lane.cancelled_at)
        self._do(self.request.finished(lane.attempt, lane.role, finished, self._manager.clock(), self._manager.workers.is_healthy))

    def on_lost(self, lane: Lane, reason: str) -> None:
        """See `LaneOwner`."""
        self._do(self.request.lost(lane.attempt, lane.role, self._manager.clock(), has_run=lane.is_sent))

    def on_owner_failed(self, lane: Lane) -> None:
        """See `LaneOwner`."""
        self.abort(Internal(self._request_id))

    def on_worker_died(self, incarnation: str) -> None:
        """A worker is fenced that may have had an earlier attempt."""
        self._do(self.request.died(incarnation))

    # --- QueryOwner

    def on_answer(self, query_id: int, answer: router_pb2.Answer, link: RouterLink) -> None:
        """See `QueryOwner`."""
        self._query = None
        self._report.close_question()
        if answer.HasField("placement"):
            self._placed_by = (link, query_id)
            self._place(messages.placement_of(answer.placement))
        else:
            refusal = answer.refusal
            self._do(
                self.request.refused(self.request.attempt, refusal.reason, refusal.message, refusal.retry_after_ms, self._manager.clock())
            )

    def on_query_lost(self, query_id: int) -> None:
        """See `QueryOwner`."""
        self._query = None
        self._report.close_question()
        if self.request.phase is Phase.ROUTING:
            self.ask_now(self.request.question())

    # --- placing

    def ask_now(self, ask: Ask) -> None:
        """Ask the router, or without one see to it ourselves. Nothing if the question is out of date."""
        if self.request.phase is not Phase.ROUTING or ask.attempt != self.request.attempt or self._query is not None:
            return
        manager = self._manager
        link = manager.routes.choose(self._generation.model)
        if link is None:
            # Never at once: the caller may be `submit`, which calls no sink.
            manager.call_later(RETURN_CHECK_S if manager.routes.is_returning() else 0.0, lambda: self._fall_back(ask))
            return
        now = manager.clock()
        query_id = manager.routes.next_query_id()
        self._query, self._query_at = (link, query_id), now
        query = messages.query_message(
            query_id,
            ask,
            self._request_id,
            self._generation,
            len(self.request.output),
            manager.block_hashes(self._model, self._generation.prompt_token_ids, self.request.output),
            messages.remaining_ms(self._deadline, now),
            self._report.open_question(ask.attempt),
        )
        link.ask(query, self)

    def check_limits(self, now: float) -> None:
        """Give up a question no router answers, and a request that is past the default deadline, which has no timer of its own."""
        if now >= self._deadline:
            self._on_deadline()
        elif self._query is not None and now - self._query_at >= self._manager.settings.route_limit_s:
            self._withdraw()
            self._do(self.request.refused(self.request.attempt, "OVERLOADED", "no placement in time", 0, now))

    def _fall_back(self, ask: Ask) -> None:
        if self.request.phase is not Phase.ROUTING or ask.attempt != self.request.attempt or self._query is not None:
            return
        if self._manager.routes.choose(self._generation.model) is not None or self._manager.routes.is_returning():
            self.ask_now(ask)
            return
        placement = self._manager.workers.fallback(self._generation.model, ask.excluded)
        if placement is None:
            reason = "no router, and no decode instance can be reached"
            self._do(self.request.refused(ask.attempt, "NO_INSTANCE", reason, 0, self._manager.clock()))
            return
        self._manager.metrics.fallbacks.inc()
        self._place(placement)

    def _place(self, placement: Placement) -> None:
        num_tokens = len(self._generation.prompt_token_ids) + len(self.request.output)
        self._placement = self._manager.usable(placement, num_tokens)
        self._do(self.request.placed(self.request.attempt, self._placement))

    # --- actions

    def _do(self, actions: Sequence[Action]) -> None:
        if not actions:
            return
        pending = deque(actions)
        while pending:
            action = pending.popleft()
            match action:
                case Ask():
                    self._manager.pace(self, action)
                case Withdraw():
                    self._withdraw()
                case StartAttempt():
                    pending.extend(self._start(action))
                case StopAttempt():
                    self._stop()
                case Wake():
                    self._wake(action.at)
                case ReportPathDown():
                    self._manager.workers.bar(action.prefill_incarnation, action.decode_incarnation)
                    self._manager.routes.path_down(action.prefill_incarnation, action.decode_incarnation)
                case End():
                    self._end(action.end)

    def _withdraw(self) -> None:
        if self._query is not None:
            link, query_id = self._query
            self._query = None
            link.withdraw(query_id)
        self._report.close_question()

    def _start(self, action: StartAttempt) -> list[Action]:
        """Start to decode, then to prefill. Returns what follows if one of them cannot take it."""
        now = self._manager.clock()
        for role in (Role.DECODE, Role.PREFILL):
            target = action.placement.target(role)
            if target is None:
                continue
            client = self._manager.workers.client_for(target)
            if client is None:
                return self.request.lost(action.attempt, role, now, has_run=False)
            try:
                self._lanes.append((client, client.start(self, role, self._start_message(role, action, now))))
            except QueueFull:
                return self.request.lost(action.attempt, role, now, has_run=False)
        return []

    def _start_message(self, role: Role, action: StartAttempt, now: float) -> worker_pb2.Start:
        return messages.start_message(
            role,
            action.placement,
            self._request_id,
            action.attempt,
            self._generation,
            self.request.output,
            self._sampling,
            self._manager.cache_root(self._model),
            messages.remaining_ms(self._deadline, now),
            self._report.traceparent,
        )

    def _stop(self) -> None:
        lanes, self._lanes = self._lanes, []
        for client, lane in lanes:
            client.cancel(lane)
        if self._placed_by is not None:
            link, query_id = self._placed_by
            self._placed_by = None
            link.end(query_id)

    def _wake(self, at: float) -> None:
        if self._wake_timer is not None:
            self._wake_timer.cancel()
        self._wake_timer = self._manager.call_later(max(0.0, at - self._manager.clock()), lambda: self._on_wake(at))

    def _end(self, end: GenerationEnd) -> None:
        for timer in (self._deadline_timer, self._wake_timer):
            if timer is not None:
                timer.cancel()
        self._deadline_timer = self._wake_timer = None
        self._stop()
        self._manager.ended(self)
        self._report.close(end, self._placement, self.request.attempt)
        try:
            self._sink.on_end(end)
        except Exception:
            # Supervisor: a broken receiver must not end the streams of others.
            log.exception("sink_failed", request_id=self._request_id)
