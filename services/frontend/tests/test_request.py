"""The state machine of a request: single decisions, then arbitrary orders."""

from array import array

import pytest
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_frontend.generation import Crashes, Generation, GenerationEnd
from baton_frontend.placement import Action, Ask, End, Placement, ReportPathDown, Role, StartAttempt, StopAttempt, Target, Wake, Withdraw
from baton_frontend.request import Phase, Request, RequestLimits
from baton_frontend.request_errors import EngineCrash
from baton_runtime.errors import DeadlineExceeded, InvalidArgument, QueueFull, Unavailable
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

P0, P1 = Target("prefill-0", "p0", "h:1"), Target("prefill-1", "p1", "h:2")
D0, D1 = Target("decode-0", "d0", "h:3"), Target("decode-1", "d1", "h:4")
PAIR = Placement(D0, P0)
LIMITS = RequestLimits()
NOW = 1000.0
EARLY = [
    pb.FINISH_REASON_PREEMPTED,
    pb.FINISH_REASON_UNKNOWN,
    pb.FINISH_REASON_STALE,
    pb.FINISH_REASON_CANCELLED,
    pb.FINISH_REASON_UNSPECIFIED,
]


def generation(max_tokens: int = 8, **fields: object) -> Generation:
    return Generation(model="m", prompt_token_ids=array("I", [1, 2, 3]), max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


def running(placement: Placement = PAIR, **fields: object) -> Request:
    request = Request(generation(**fields), LIMITS)  # type: ignore[arg-type]
    assert request.admit() == [Ask(1, (), is_resume=False)]
    assert request.placed(1, placement) == [StartAttempt(1, placement)]
    return request


def finish(reason: int, cause: int | None = None, peer: str = "", **fields: object) -> pb.Finished:
    message = pb.Finished(reason=reason, **fields)  # type: ignore[arg-type]
    if cause is not None:
        message.handoff_failure.CopyFrom(pb.HandoffFailure(cause=cause, peer_incarnation=peer))
    return message


def ended(request: Request, role: Role, message: pb.Finished, *, healthy: bool = True, attempt: int | None = None) -> list[Action]:
    return request.finished(attempt or request.attempt, role, message, NOW, lambda _: healthy)


def end_of(actions: list[Action]) -> GenerationEnd:
    (end,) = [action.end for action in actions if isinstance(action, End)]
    return end


def next_ask(actions: list[Action]) -> Ask:
    (ask,) = [action for action in actions if isinstance(action, Ask)]
    return ask


# --- the undisturbed way


def test_tokens_go_out_and_stop_ends() -> None:
    request = running()
    assert request.take(1, Role.DECODE, 0, (7,)) == (7,)
    assert request.take(1, Role.DECODE, 1, [8, 9]) == [8, 9]
    assert ended(request, Role.PREFILL, finish(pb.FINISH_REASON_PREFILLED)) == []
    usage = pb.Usage(input_tokens=3, cached_tokens=2, output_tokens=3, exposed_handoff_us=2500)
    actions = ended(request, Role.DECODE, finish(pb.FINISH_REASON_STOP, usage=usage, stop_token_id=9))
    assert actions[0] == StopAttempt(1)
    assert end_of(actions) == GenerationEnd("stop", None, 3, 2, 3, 0, 9, exposed_handoff_s=0.0025)


def test_length_ends() -> None:
    request = running(max_tokens=1)
    request.take(1, Role.DECODE, 0, (7,))
    assert end_of(ended(request, Role.DECODE, finish(pb.FINISH_REASON_LENGTH))).reason == "length"


def test_prefilled_only_frees_its_side() -> None:
    request = running()
    assert ended(request, Role.PREFILL, finish(pb.FINISH_REASON_PREFILLED)) == []
    assert request.lost(1, Role.PREFILL, NOW, has_run=True) == []
    assert request.phase is Phase.RUNNING


# --- positions


def test_tokens_sent_again_are_dropped() -> None:
    request = running()
    request.take(1, Role.DECODE, 0, [5, 6])
    assert request.take(1, Role.DECODE, 0, [5, 6]) == []
    assert request.take(1, Role.DECODE, 1, [6, 7, 8]) == [7, 8]
    assert list(request.output) == [5, 6, 7, 8]


def test_gap_is_not_taken_and_ends_the_attempt() -> None:
    request = running()
    assert request.take(1, Role.DECODE, 1, [6]) is None
    actions = request.gap(1, Role.DECODE)
    assert actions == [StopAttempt(1), Ask(2, ("d0",), is_resume=True)]


def test_what_a_request_computed_itself_is_no_prefix_hit_of_its_resume() -> None:
    request = running()
    request.take(1, Role.DECODE, 0, [5])
    request.lost(1, Role.DECODE, NOW, has_run=True)  # it died without a word on usage
    request.placed(2, PAIR)
    usage = pb.Usage(cached_tokens=3)
    end = end_of(ended(request, Role.DECODE, finish(pb.FINISH_REASON_STOP, usage=usage), attempt=2))
    assert (end.resumed, end.cached_tokens) == (1, 0)


def test_tokens_beyond_max_tokens_are_not_delivered() -> None:
    request = running(max_tokens=2)
    assert request.take(1, Role.DECODE, 0, [5, 6, 7]) == [5, 6]


def test_tokens_of_prefill_or_of_an_old_attempt_are_dropped() -> None:
    request = running()
    assert request.take(1, Role.PREFILL, 0, [5]) == ()
    request.lost(1, Role.DECODE, NOW, has_run=True)
    request.placed(2, Placement(D1))
    assert request.take(1, Role.DECODE, 0, [5]) == ()
    assert request.take(2, Role.DECODE, 0, [6]) == [6]


# --- failures of attempts


@pytest.mark.parametrize(
    "reason",
    [
        pb.FINISH_REASON_PREEMPTED,
        pb.FINISH_REASON_UNKNOWN,
        pb.FINISH_REASON_STALE,
        pb.FINISH_REASON_CANCELLED,
        pb.FINISH_REASON_UNSPECIFIED,
    ],
)
def test_attempt_that_ends_early_is_resumed_from_the_delivered_tokens(reason: int) -> None:
    request = running()
    request.take(1, Role.DECODE, 0, [5, 6])
    assert ended(request, Role.DECODE, finish(reason)) == [StopAttempt(1), Ask(2, (), is_resume=True)]
    request.placed(2, Placement(D1))
    assert request.first_position == 2
    assert request.take(2, Role.DECODE, 2, [7]) == [7]
    assert end_of(ended(request, Role.DECODE, finish(pb.FINISH_REASON_LENGTH))).resumed == 1


def test_dead_decode_is_excluded() -> None:
    request = running()
    assert request.lost(1, Role.DECODE, NOW, has_run=True) == [StopAttempt(1), Ask(2, ("d0",), is_resume=True)]


def test_dead_prefill_before_the_first_token_ends_the_attempt() -> None:
    request = running()
    assert next_ask(request.lost(1, Role.PREFILL, NOW, has_run=True)).excluded == ("p0",)


def test_dead_prefill_after_the_first_token_changes_nothing() -> None:
    request = running()
    request.take(1, Role.DECODE, 0, [5])
    assert request.lost(1, Role.PREFILL, NOW, has_run=True) == []
    assert ended(request, Role.PREFILL, finish(pb.FINISH_REASON_UNKNOWN)) == []


def test_both_sides_report_and_the_attempt_ends_once() -> None:
    request = running()
    failed = finish(pb.FINISH_REASON_HANDOFF_FAILED, pb.HANDOFF_FAILURE_CAUSE_PEER_CANCELLED)
    assert next_ask(ended(request, Role.DECODE, failed, attempt=1)).attempt == 2
    assert ended(request, Role.PREFILL, finish(pb.FINISH_REASON_ENGINE_ERROR), attempt=1) == []
    assert request.attempt == 2


@pytest.mark.parametrize("cause", [pb.HANDOFF_FAILURE_CAUSE_PATH_DOWN, pb.HANDOFF_FAILURE_CAUSE_PEER_FENCED])
def test_peer_fenced_while_we_reach_it_is_a_pair_without_path(cause: int) -> None:
    actions = ended(running(), Role.DECODE, finish(pb.FINISH_REASON_HANDOFF_FAILED, cause), healthy=True)
    assert actions == [ReportPathDown("p0", "d0"), StopAttempt(1), Ask(2, ("p0",), is_resume=True)]


def test_peer_fenced_while_we_do_not_reach_it_either_is_its_death() -> None:
    request = running()
    actions = ended(request, Role.DECODE, finish(pb.FINISH_REASON_HANDOFF_FAILED, pb.HANDOFF_FAILURE_CAUSE_PEER_FENCED), healthy=False)
    assert actions == [StopAttempt(1), Ask(2, ("p0",), is_resume=True)]


def test_prefill_that_lost_a_dead_decode_excludes_decode() -> None:
    failed = finish(pb.FINISH_REASON_HANDOFF_FAILED, pb.HANDOFF_FAILURE_CAUSE_PEER_FENCED)
    assert next_ask(ended(running(), Role.PREFILL, failed, healthy=False)).excluded == ("d0",)


def test_two_deaths_under_a_request_fail_it() -> None:
    request = running()
    request.lost(1, Role.DECODE, NOW, has_run=True)
    request.placed(2, Placement(D1))
    end = end_of(request.lost(2, Role.DECODE, NOW, has_run=True))
    assert end.error is not None
    assert end.error.reason == "ENGINE_CRASH"


def choices_on(*placements: Placement) -> list[Request]:
    """Choices of one prompt, each running where it says."""
    crashes = Crashes()
    return [running(placement, choice=index, crashes=crashes) for index, placement in enumerate(placements)]


def test_two_deaths_under_choices_of_one_prompt_fail_it() -> None:
    """It may be the prompt that kills: n choices must not cost two workers each."""
    first, second = choices_on(Placement(D0), Placement(D1))
    assert next_ask(first.lost(1, Role.DECODE, NOW, has_run=True)).attempt == 2
    error = end_of(second.lost(1, Role.DECODE, NOW, has_run=True)).error
    assert isinstance(error, EngineCrash)
    assert error.facts == {"num_crashes": "2"}


def test_one_death_under_several_choices_is_one() -> None:
    for request in choices_on(PAIR, PAIR, Placement(D0)):
        assert next_ask(request.lost(1, Role.DECODE, NOW, has_run=True)).attempt == 2


def test_a_pair_that_dies_together_under_several_choices_is_one_death() -> None:
    first, second = choices_on(PAIR, PAIR)
    told = finish(pb.FINISH_REASON_HANDOFF_FAILED, pb.HANDOFF_FAILURE_CAUSE_PEER_FENCED)
    assert next_ask(ended(first, Role.DECODE, told, healthy=False)).excluded == ("p0",)
    assert next_ask(second.lost(1, Role.DECODE, NOW, has_run=True)).excluded == ("d0",)
    assert first.died("p0") == []


def test_a_worker_that_never_got_the_start_did_not_die_under_the_request() -> None:
    request = running()
    request.lost(1, Role.DECODE, NOW, has_run=False)
    request.placed(2, Placement(D1))
    assert next_ask(request.lost(2, Role.DECODE, NOW, has_run=True)).attempt == 3


def test_placements_that_never_start_cost_time_not_attempts() -> None:
    request = running()
    request.lost(1, Role.DECODE, NOW, has_run=True)
    now = NOW
    while now < NOW + LIMITS.resume_patience_s - 2:
        assert request.phase is Phase.ROUTING
        request.placed(request.attempt, Placement(D1))
        actions = request.lost(request.attempt, Role.DECODE, now, has_run=False)
        if isinstance(actions[-1], Wake):
            now = actions[-1].at
            request.woken(now)
    assert 20 < request.attempt < 60
    request.placed(request.attempt, Placement(D1))
    late = request.lost(request.attempt, Role.DECODE, now + LIMITS.resume_patience_s, has_run=False)
    assert isinstance(end_of(late).error, Unavailable)


def test_death_a_peer_told_of_counts_once_we_see_it_too() -> None:
    request = running()
    ended(request, Role.DECODE, finish(pb.FINISH_REASON_HANDOFF_FAILED, pb.HANDOFF_FAILURE_CAUSE_PEER_FENCED), healthy=False)
    assert request.died("p0") == []
    request.placed(2, Placement(D1))
    assert end_of(request.lost(2, Role.DECODE, NOW, has_run=True)).reason == "failed"


def test_both_workers_of_one_attempt_dying_together_is_one_crash() -> None:
    request = running()
    request.lost(1, Role.DECODE, NOW, has_run=True)
    assert request.lost(1, Role.PREFILL, NOW, has_run=True) == []
    assert request.died("p0") == []
    assert request.phase is Phase.ROUTING


def test_attempts_are_bounded() -> None:
    request = running()
    for attempt in range(1, LIMITS.max_attempts):
        assert next_ask(ended(request, Role.DECODE, finish(pb.FINISH_REASON_PREEMPTED))).attempt == attempt + 1
        request.placed(attempt + 1, Placement(D0))
    end = end_of(ended(request, Role.DECODE, finish(pb.FINISH_REASON_PREEMPTED)))
    assert end.error is not None
    assert end.error.reason == "ATTEMPTS_EXHAUSTED"


def test_lost_last_word_after_the_last_token_is_the_end() -> None:
    request = running(max_tokens=2)
    request.take(1, Role.DECODE, 0, [5, 6])
    assert end_of(request.lost(1, Role.DECODE, NOW, has_run=True)).reason == "length"


def test_lost_last_word_after_a_stop_token_is_the_end() -> None:
    request = running(end_token_ids=frozenset({6}))
    request.take(1, Role.DECODE, 0, [5, 6])
    end = end_of(request.lost(1, Role.DECODE, NOW, has_run=True))
    assert (end.reason, end.stop_token_id) == ("stop", 6)


def test_invalid_is_not_tried_again() -> None:
    error = pb.ErrorDetail(reason="TOO_LONG", message="too long")
    end = end_of(ended(running(), Role.DECODE, finish(pb.FINISH_REASON_INVALID, error=error)))
    assert isinstance(end.error, InvalidArgument)


# --- refusals


def test_refused_is_tried_elsewhere_at_once() -> None:
    refused = finish(pb.FINISH_REASON_REFUSED, error=pb.ErrorDetail(reason="QUEUE_FULL", retry_after_ms=100))
    request = running()
    assert ended(request, Role.DECODE, refused) == [StopAttempt(1), Ask(2, ("d0",), is_resume=True)]


def test_refused_everywhere_waits_its_time_then_asks_without_exclusions() -> None:
    refused = finish(pb.FINISH_REASON_REFUSED, error=pb.ErrorDetail(reason="QUEUE_FULL", retry_after_ms=300))
    request = running()
    ended(request, Role.DECODE, refused)
    assert request.refused(2, "NO_INSTANCE", "none", 0, NOW) == [Wake(NOW + 0.3)]
    assert request.woken(NOW + 0.1) == []
    assert request.woken(NOW + 0.3) == [Ask(2, (), is_resume=True)]


def test_refused_for_too_long_ends_with_429() -> None:
    refused = finish(pb.FINISH_REASON_REFUSED, error=pb.ErrorDetail(reason="QUEUE_FULL", retry_after_ms=100))
    request = running()
    ended(request, Role.DECODE, refused)
    request.placed(2, PAIR)
    late = request.finished(2, Role.DECODE, refused, NOW + LIMITS.new_patience_s + 1, lambda _: True)
    assert isinstance(end_of(late).error, QueueFull)


def test_router_overload_refuses_new_work_at_once() -> None:
    request = Request(generation(), LIMITS)
    request.admit()
    error = end_of(request.refused(1, "OVERLOADED", "full", 500, NOW)).error
    assert isinstance(error, QueueFull)
    assert error.retry_after_ms == 500


def test_router_overload_makes_a_resume_wait() -> None:
    request = running()
    request.lost(1, Role.DECODE, NOW, has_run=True)
    assert request.refused(2, "OVERLOADED", "full", 200, NOW) == [Wake(NOW + 0.2)]


def test_no_instance_is_waited_for_and_then_a_503() -> None:
    request = Request(generation(), LIMITS)
    request.admit()
    now = NOW
    while request.phase is not Phase.ENDED:
        actions = request.refused(1, "NO_INSTANCE", "none", 0, now)
        if isinstance(actions[0], Wake):
            now = actions[0].at
            request.woken(now)
    assert isinstance(end_of(actions).error, Unavailable)
    assert 0.5 * LIMITS.new_patience_s < now - NOW <= LIMITS.new_patience_s


# --- cancel and deadline


def test_cancel_while_routing_withdraws() -> None:
    request = Request(generation(), LIMITS)
    request.admit()
    actions = request.cancel(NOW)
    assert actions[0] == Withdraw(1)
    assert end_of(actions).reason == "cancelled"
    assert request.placed(1, PAIR) == []


def test_cancel_while_running_cancels_both_and_takes_the_usage_along() -> None:
    request = running()
    request.take(1, Role.DECODE, 0, [5])
    assert request.cancel(NOW) == [StopAttempt(1), Wake(NOW + LIMITS.cancel_wait_s)]
    assert request.take(1, Role.DECODE, 1, [6]) == ()
    end = end_of(ended(request, Role.DECODE, finish(pb.FINISH_REASON_CANCELLED, usage=pb.Usage(cached_tokens=2))))
    assert (end.reason, end.cached_tokens, end.output_tokens) == ("cancelled", 2, 1)


def test_silent_worker_does_not_hold_a_cancel_back() -> None:
    request = running()
    request.cancel(NOW)
    assert end_of(request.woken(NOW + LIMITS.cancel_wait_s)).reason == "cancelled"


def test_deadline_fails_in_every_phase() -> None:
    fresh = Request(generation(), LIMITS)
    fresh.admit()
    for request in (fresh, running()):
        assert isinstance(end_of(request.expire()).error, DeadlineExceeded)
        assert request.expire() == []


# --- arbitrary orders


def token_at(position: int) -> int:
    return 100 + 7 * position


FINISHES = st.sampled_from([*pb.FinishReason.values()])
CAUSES = st.sampled_from([*pb.HandoffFailureCause.values()])
ROLES = st.sampled_from([Role.DECODE, Role.PREFILL])
PLACEMENTS = st.sampled_from([Placement(D0), Placement(D1), Placement(D0, P0), Placement(D1, P0), Placement(D0, P1)])


class AnyOrder(RuleBasedStateMachine):
    """Workers, router and client say anything about any attempt at any time, early, late and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.request = Request(generation(max_tokens=12), LIMITS)
        self.now = NOW
        self.delivered: list[int] = []
        self.ends: list[GenerationEnd] = []
        self.stopped: set[int] = set()
        self.started: list[int] = []
        self.is_cancelled = False
        self.do(self.request.admit())

    def do(self, actions: list[Action]) -> None:
        assert not (actions and self.ends), "nothing happens after the end"
        for index, action in enumerate(actions):
            match action:
                case Ask():
                    assert action.attempt == self.request.attempt
                    assert all(attempt in self.stopped for attempt in self.started), "the old attempt is stopped first"
                case StartAttempt():
                    assert action.attempt not in self.started
                    assert not self.started or action.attempt > max(self.started)
                    self.started.append(action.attempt)
                case StopAttempt():
                    assert action.attempt in self.started
                    assert action.attempt not in self.stopped
                    self.stopped.add(action.attempt)
                case End():
                    assert index == len(actions) - 1
                    self.ends.append(action.end)

    def attempt(self, back: int) -> int:
        return max(1, self.request.attempt - back)

    @rule(back=st.integers(0, 2), role=ROLES, first=st.integers(-4, 3), count=st.integers(1, 4))
    def tokens(self, back: int, role: Role, first: int, count: int) -> None:
        position = max(0, len(self.request.output) + first)
        ids = [token_at(p) for p in range(position, position + count)]
        was_over = self.is_cancelled or bool(self.ends)
        new = self.request.take(self.attempt(back), role, position, ids)
        if new is None:
            self.do(self.request.gap(self.attempt(back), role))
        else:
            assert not (new and was_over), "no token after a cancel or an end"
            self.delivered += new

    @rule(back=st.integers(0, 2), role=ROLES, reason=FINISHES, cause=CAUSES, healthy=st.booleans())
    def finished(self, back: int, role: Role, reason: int, cause: int, healthy: bool) -> None:
        message = finish(reason, cause, usage=pb.Usage(cached_tokens=1))
        self.do(self.request.finished(self.attempt(back), role, message, self.now, lambda _: healthy))

    @rule(back=st.integers(0, 2), role=ROLES, has_run=st.booleans())
    def lost(self, back: int, role: Role, has_run: bool) -> None:
        self.do(self.request.lost(self.attempt(back), role, self.now, has_run=has_run))

    @rule(incarnation=st.sampled_from(["p0", "p1", "d0", "d1"]))
    def died(self, incarnation: str) -> None:
        self.do(self.request.died(incarnation))

    @rule(back=st.integers(0, 2), placement=PLACEMENTS)
    def placed(self, back: int, placement: Placement) -> None:
        self.do(self.request.placed(self.attempt(back), placement))

    @rule(back=st.integers(0, 1), reason=st.sampled_from(["NO_INSTANCE", "OVERLOADED", "MODEL_UNKNOWN"]), retry=st.integers(0, 500))
    def refused(self, back: int, reason: str, retry: int) -> None:
        self.do(self.request.refused(self.attempt(back), reason, "", retry, self.now))

    @rule(seconds=st.floats(0, 1))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.request.woken(self.now))

    @precondition(lambda self: self.request.attempt > 2)
    @rule()
    def cancelled(self) -> None:
        self.is_cancelled = True
        self.do(self.request.cancel(self.now))

    @precondition(lambda self: self.request.attempt > 2)
    @rule()
    def expired(self) -> None:
        self.do(self.request.expire())

    @invariant()
    def every_position_once(self) -> None:
        assert self.delivered == [token_at(p) for p in range(len(self.delivered))]
        assert list(self.request.output) == self.delivered
        assert len(self.delivered) <= 12

    @invariant()
    def one_end(self) -> None:
        assert len(self.ends) <= 1
        assert (self.request.phase is Phase.ENDED) == bool(self.ends)
        assert all(end.output_tokens == len(self.delivered) for end in self.ends)
        if self.ends:
            assert set(self.started) == self.stopped

    def teardown(self) -> None:
        """Whatever happened: silence of everybody and the clock bring it to its end."""
        for _ in range(1000):
            if self.ends:
                return
            self.now += 0.1
            if self.request.phase is Phase.ROUTING:
                self.do(self.request.refused(self.request.attempt, "NO_INSTANCE", "", 0, self.now))
            elif self.request.phase is Phase.RUNNING:
                self.do(self.request.lost(self.request.attempt, Role.DECODE, self.now, has_run=False))
            else:
                self.do(self.request.woken(self.now))
        raise AssertionError("the request does not end")


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
