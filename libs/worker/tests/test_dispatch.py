"""Which way a Start goes, and that whatever happens gives one end with the right reason."""

import pytest
from baton_contracts.discovery.v1.instance_pb2 import Capability
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import BlocksReady, EndReason, SequenceKey, StepOutput, Work
from baton_engine.errors import EngineFailed
from baton_handoff.ids import EndReason as HandoffEndReason
from baton_handoff.ids import FailureCause, FetchEnd, FetchHint, FetchOutcome, HandoffEnd, PeerRef
from baton_runtime.errors import Draining, InvalidArgument, QueueFull
from baton_runtime.telemetry import configure_telemetry
from baton_worker import dispatch
from baton_worker.dispatch import Dispatcher
from baton_worker.metrics import WorkerMetrics
from baton_worker.starts import StartLimits
from baton_worker.testing import FakeEngine, FakeHandoffs, start_message
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

KEY = SequenceKey("f-1", 1)
EVERYTHING = (Capability.CAPABILITY_WHOLE, Capability.CAPABILITY_PREFILL_FOR, Capability.CAPABILITY_DECODE_FROM)
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Rig:
    def __init__(self, *, ends_cancelled: bool = True) -> None:
        self.engine = FakeEngine()
        self.handoffs = FakeHandoffs(ends_cancelled=ends_cancelled)
        self.registry = CollectorRegistry()
        self.spans = InMemorySpanExporter()
        self.telemetry = configure_telemetry("decode", "0", "decode-0", "d1", "", 1.0, exporter=self.spans)
        self.now = 100.0
        self.ends: dict[SequenceKey, pb.Finished] = {}
        self.dispatcher = Dispatcher(
            "decode-0",
            self.engine,
            self.handoffs,
            StartLimits(self.engine.info, 256, EVERYTHING),
            WorkerMetrics(self.registry),
            self.telemetry.tracer,
            clock=lambda: self.now,
        )
        self.dispatcher.on_end = self._on_end

    def _on_end(self, key: SequenceKey, finished: pb.Finished, now: float) -> None:
        assert key not in self.ends
        self.ends[key] = finished

    def start(self, work: str = "whole", **fields: object) -> None:
        start = start_message(0, "f-1", prompt=9)
        if work == "decode_from":
            start.decode_from.MergeFrom(pb.DecodeFrom(prefill_instance_id="p", prefill_incarnation="p1", prefill_address="h:1"))
        if work == "prefill_for":
            start.prefill_for.MergeFrom(pb.PrefillFor(decode_instance_id="d", decode_incarnation="d1"))
        for name, value in fields.items():
            setattr(start, name, value)
        self.dispatcher.start(start)

    def step(self, output: StepOutput) -> None:
        self.dispatcher.on_started(output)
        self.dispatcher.on_ended(output)

    def ended(self, reason: EndReason, **facts: object) -> None:
        self.step(self.engine.ended(KEY, reason, **facts))

    @property
    def reason(self) -> "pb.FinishReason":
        return self.ends[KEY].reason


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_whole_goes_to_the_engine_and_ends_as_the_engine_says(rig: Rig) -> None:
    rig.start()
    assert rig.engine.live[KEY].work is Work.WHOLE
    rig.now += 0.75
    rig.step(StepOutput(step=1, started=[KEY], duration_s=0.25))
    rig.ended(EndReason.LENGTH, output_tokens=3, cached_tokens=4)
    usage = rig.ends[KEY].usage
    assert rig.reason == pb.FINISH_REASON_LENGTH
    assert (usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.queue_us) == (9, 3, 4, 500_000)


def test_prefill_for_goes_to_the_handoffs_and_ends_when_they_say(rig: Rig) -> None:
    rig.start("prefill_for")
    held = rig.handoffs.held[KEY]
    assert (held.peer.incarnation, held.request.work) == ("d1", Work.PREFILL_ONLY)
    rig.engine.live[KEY] = held.request
    rig.ended(EndReason.PREFILLED)
    assert not rig.ends
    rig.handoffs.end(KEY, HandoffEnd(HandoffEndReason.PREFILLED, num_bytes=512, cached_tokens=4))
    assert (rig.reason, rig.ends[KEY].usage.handoff_bytes, rig.ends[KEY].usage.cached_tokens) == (pb.FINISH_REASON_PREFILLED, 512, 4)


def test_decode_from_starts_the_engine_once_the_kv_is_here(rig: Rig) -> None:
    rig.start("decode_from")
    assert not rig.engine.live
    rig.handoffs.complete(KEY, cached_tokens=8, handoff_bytes=1024, exposed_s=0.0025)
    assert rig.engine.live[KEY].work is Work.DECODE_ONLY
    rig.ended(EndReason.STOP, output_tokens=2)
    usage = rig.ends[KEY].usage
    assert (rig.reason, usage.cached_tokens, usage.handoff_bytes) == (pb.FINISH_REASON_STOP, 8, 1024)
    assert usage.exposed_handoff_us == 2500


def test_failed_handoff_says_who_why_and_how_far_it_got(rig: Rig) -> None:
    rig.start("decode_from")
    rig.handoffs.end(KEY, HandoffEnd(HandoffEndReason.HANDOFF_FAILED, FailureCause.PATH_DOWN, "p1", confirmed_tokens=4))
    failure = rig.ends[KEY].handoff_failure
    assert rig.reason == pb.FINISH_REASON_HANDOFF_FAILED
    assert (failure.peer_incarnation, failure.cause, failure.confirmed_tokens) == ("p1", pb.HANDOFF_FAILURE_CAUSE_PATH_DOWN, 4)


def test_handoff_that_refuses_in_its_end_carries_the_advice(rig: Rig) -> None:
    rig.start("prefill_for")
    rig.handoffs.end(KEY, HandoffEnd(HandoffEndReason.REFUSED, error=QueueFull(1, 1, retry_after_ms=30)))
    assert (rig.reason, rig.ends[KEY].error.retry_after_ms) == (pb.FINISH_REASON_REFUSED, 30)


@pytest.mark.parametrize("work", ["prefill_for", "decode_from"])
def test_full_handoff_queue_refuses_the_start_and_keeps_nothing(rig: Rig, work: str) -> None:
    rig.handoffs.refuse = QueueFull(1, 1)
    with pytest.raises(QueueFull):
        rig.start(work)
    assert rig.dispatcher.num_live == 0


def test_full_engine_queue_refuses_the_start_and_keeps_nothing(rig: Rig) -> None:
    rig.engine.refuse = QueueFull(1, 1)
    with pytest.raises(QueueFull):
        rig.start()
    assert rig.dispatcher.num_live == 0


def test_engine_that_refuses_after_the_handoff_gives_the_blocks_back(rig: Rig) -> None:
    rig.start("decode_from")
    rig.engine.blocks.acquire(KEY, [], 2)
    rig.engine.refuse = EngineFailed("gone")
    rig.handoffs.complete(KEY)
    assert rig.reason == pb.FINISH_REASON_REFUSED
    assert rig.engine.blocks.counts().free == 64


def test_cancel_in_the_engine_ends_as_cancelled_even_if_the_engine_finished_first(rig: Rig) -> None:
    rig.start()
    rig.dispatcher.cancel(KEY, pb.FINISH_REASON_CANCELLED)
    assert rig.engine.cancelled == [KEY]
    rig.ended(EndReason.STOP)
    assert rig.reason == pb.FINISH_REASON_CANCELLED


def test_cancel_in_the_handoff_is_passed_on_with_its_reason(rig: Rig) -> None:
    rig.start("decode_from")
    rig.dispatcher.cancel(KEY, pb.FINISH_REASON_STALE)
    assert rig.handoffs.cancelled == [("f-1", 1, "STALE")]
    assert rig.reason == pb.FINISH_REASON_STALE


def test_completion_that_crosses_a_cancel_does_not_reach_the_engine() -> None:
    rig = Rig(ends_cancelled=False)
    rig.start("decode_from")
    rig.engine.blocks.acquire(KEY, [], 2)
    rig.dispatcher.cancel(KEY, pb.FINISH_REASON_CANCELLED)
    rig.handoffs.complete(KEY)
    assert rig.reason == pb.FINISH_REASON_CANCELLED
    assert not rig.engine.live
    assert rig.engine.blocks.counts().free == 64


def test_cancel_of_a_start_that_never_came_reaches_the_handoffs(rig: Rig) -> None:
    rig.dispatcher.forbid("f-9", 3)
    assert rig.handoffs.cancelled == [("f-9", 3, "CLIENT_GONE")]


def test_deadline_ends_the_attempt_wherever_it_is(rig: Rig) -> None:
    rig.start("decode_from", deadline_ms=1000)
    rig.dispatcher.tick(100.9)
    assert not rig.ends
    rig.dispatcher.tick(101.0)
    assert rig.handoffs.cancelled == [("f-1", 1, "DEADLINE")]
    assert rig.reason == pb.FINISH_REASON_DEADLINE


def test_sequence_that_ended_by_itself_in_the_step_of_its_deadline_keeps_its_end(rig: Rig) -> None:
    rig.start(deadline_ms=1000)
    rig.dispatcher.tick(101.0)
    rig.ended(EndReason.STOP)
    assert rig.reason == pb.FINISH_REASON_STOP


def test_deadline_of_an_ended_attempt_does_nothing(rig: Rig) -> None:
    rig.start(deadline_ms=1000)
    rig.ended(EndReason.STOP)
    rig.dispatcher.tick(200.0)
    assert rig.engine.cancelled == []


def test_deadlines_of_ended_attempts_are_not_kept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "SPARE_DEADLINES", 10)
    rig.start(deadline_ms=1000)
    for number in range(100):
        rig.start(request_id=f"g-{number}", deadline_ms=600_000)
        rig.step(rig.engine.ended(SequenceKey(f"g-{number}", 1), EndReason.STOP))
    assert len(rig.dispatcher._deadlines) <= 14
    rig.dispatcher.tick(101.0)
    assert rig.engine.cancelled == [KEY]


def test_draining_refuses_new_work_and_hands_the_rest_back_as_preempted(rig: Rig) -> None:
    rig.start()
    rig.dispatcher.set_draining()
    with pytest.raises(Draining):
        rig.start(request_id="f-2")
    rig.dispatcher.hand_back_all()
    rig.ended(EndReason.CANCELLED)
    assert rig.reason == pb.FINISH_REASON_PREEMPTED


def test_engine_error_says_what_the_engine_says(rig: Rig) -> None:
    rig.start()
    rig.ended(EndReason.ENGINE_ERROR, message="activations are not finite")
    assert (rig.reason, rig.ends[KEY].error.message) == (pb.FINISH_REASON_ENGINE_ERROR, "activations are not finite")


def test_dead_engine_ends_handoffs_too() -> None:
    rig = Rig(ends_cancelled=False)
    rig.start("decode_from")
    rig.dispatcher.fail_all(EngineFailed("the engine died"))
    assert (rig.reason, rig.ends[KEY].error.reason) == (pb.FINISH_REASON_ENGINE_ERROR, "ENGINE_FAILED")
    assert rig.dispatcher.num_live == 0
    rig.handoffs.end(KEY, HandoffEnd(HandoffEndReason.CANCELLED))  # late: dropped


def test_sequence_id_of_another_frontend_is_invalid(rig: Rig) -> None:
    rig.start()
    with pytest.raises(InvalidArgument):
        rig.start()


def test_waiting_prefill_tokens_are_counted_until_the_engine_has_them(rig: Rig) -> None:
    rig.start("prefill_for")
    assert rig.dispatcher.waiting_handoff_tokens() == 8
    rig.engine.blocks.acquire(KEY, [], 2)
    assert rig.dispatcher.waiting_handoff_tokens() == 0


def test_ended_attempts_are_counted_by_outcome(rig: Rig) -> None:
    rig.start()
    rig.ended(EndReason.STOP)
    assert rig.registry.get_sample_value("baton_attempts_total", {"work": "whole", "outcome": "stop"}) == 1


def span_names(rig: Rig) -> list[str]:
    rig.telemetry._provider.force_flush()
    return [span.name for span in rig.spans.get_finished_spans()]


@pytest.mark.parametrize(
    ("work", "names"),
    [
        ("whole", ["decode.queue", "prefill.execute", "decode.generate"]),
        ("decode_from", ["decode.queue", "decode.generate"]),
        ("prefill_for", ["prefill.queue", "prefill.execute"]),
    ],
)
def test_sampled_attempt_leaves_its_phases_under_the_frontends_span(rig: Rig, work: str, names: list[str]) -> None:
    rig.start(work, traceparent=SAMPLED)
    if work == "decode_from":
        rig.handoffs.complete(KEY)
    rig.step(StepOutput(step=1, started=[KEY]))
    if work == "prefill_for":
        for step in (2, 3):
            rig.step(StepOutput(step=step, ready=[BlocksReady(KEY, step - 2, [step], 0, 0.0)]))
        rig.handoffs.end(KEY, HandoffEnd(HandoffEndReason.PREFILLED))
    else:
        rig.dispatcher.first_token(KEY)
        rig.ended(EndReason.STOP)
    assert span_names(rig) == names
    last = rig.spans.get_finished_spans()[-1]
    assert f"{last.parent.span_id:016x}" == "b7ad6b7169203331"
    assert (last.attributes["baton.request_id"], last.attributes["baton.attempt"]) == ("f-1", 1)
    assert [event.name for event in last.events] == (["prefill.chunk"] * 2 if work == "prefill_for" else ["first_token"])


def test_attempt_that_never_ran_leaves_only_its_queue_span(rig: Rig) -> None:
    rig.start("decode_from", traceparent=SAMPLED)
    rig.dispatcher.cancel(KEY, pb.FINISH_REASON_CANCELLED)
    assert span_names(rig) == ["decode.queue"]


def test_unsampled_attempt_leaves_no_spans(rig: Rig) -> None:
    rig.start(traceparent=SAMPLED[:-1] + "0")
    rig.ended(EndReason.STOP)
    assert span_names(rig) == []


def fetch_from(num_tokens: int = 8) -> pb.FetchFrom:
    return pb.FetchFrom(instance_id="decode-1", incarnation="d2", address="h:2", num_tokens=num_tokens)


def start_with_fetch(rig: Rig, work: str = "whole") -> None:
    start = start_message(0, "f-1", prompt=9)
    start.fetch_from.CopyFrom(fetch_from())
    if work == "prefill_for":
        start.prefill_for.MergeFrom(pb.PrefillFor(decode_instance_id="d", decode_incarnation="d1"))
    if work == "decode_from":
        start.decode_from.MergeFrom(pb.DecodeFrom(prefill_instance_id="p", prefill_incarnation="p1", prefill_address="h:1"))
    rig.dispatcher.start(start)


HINT = FetchHint(PeerRef("decode-1", "d2", "h:2"), 8)


def test_whole_work_with_a_hint_fetches_before_the_engine_hears_of_it(rig: Rig) -> None:
    start_with_fetch(rig)
    assert rig.handoffs.fetches[KEY][0] == HINT
    assert KEY not in rig.engine.live
    assert rig.dispatcher.waiting_handoff_tokens() == 8
    rig.handoffs.end_fetch(KEY, FetchEnd(FetchOutcome.FETCHED, 8, 100))
    assert rig.engine.live[KEY].work is Work.WHOLE
    assert rig.dispatcher.waiting_handoff_tokens() == 0
    rig.step(rig.engine.ended(KEY, EndReason.LENGTH, output_tokens=3, cached_tokens=8))
    usage = rig.ends[KEY].usage
    assert (usage.cached_tokens, usage.fetched_tokens, usage.output_tokens) == (8, 8, 3)


@pytest.mark.parametrize("outcome", [FetchOutcome.TIMEOUT, FetchOutcome.FENCED, FetchOutcome.NO_SOURCE, FetchOutcome.NOT_FOUND])
def test_fetch_that_comes_to_nothing_leaves_the_engine_to_compute(rig: Rig, outcome: FetchOutcome) -> None:
    start_with_fetch(rig)
    rig.handoffs.end_fetch(KEY, FetchEnd(outcome))
    assert KEY in rig.engine.live
    assert not rig.ends


def test_prefill_work_hands_the_hint_to_the_handoffs(rig: Rig) -> None:
    start_with_fetch(rig, "prefill_for")
    assert rig.handoffs.held[KEY].fetch_from == HINT
    assert not rig.handoffs.fetches
    rig.handoffs.end(KEY, HandoffEnd(HandoffEndReason.PREFILLED, cached_tokens=8, fetched_tokens=4))
    assert (rig.ends[KEY].usage.cached_tokens, rig.ends[KEY].usage.fetched_tokens) == (8, 4)


def test_decode_work_ignores_the_hint(rig: Rig) -> None:
    start_with_fetch(rig, "decode_from")
    assert rig.handoffs.held[KEY].fetch_from is None


def test_cancel_while_fetching_ends_it_and_never_reaches_the_engine(rig: Rig) -> None:
    start_with_fetch(rig)
    rig.dispatcher.cancel(KEY, pb.FINISH_REASON_CANCELLED)
    assert rig.ends[KEY].reason == pb.FINISH_REASON_CANCELLED
    assert KEY not in rig.engine.live
    assert rig.dispatcher.num_live == 0


def test_deadline_while_fetching_is_the_end(rig: Rig) -> None:
    start = start_message(0, "f-1", prompt=9)
    start.fetch_from.CopyFrom(fetch_from())
    start.deadline_ms = 1000
    rig.dispatcher.start(start)
    rig.dispatcher.tick(rig.now + 1.1)
    assert rig.ends[KEY].reason == pb.FINISH_REASON_DEADLINE


def test_engine_that_refuses_after_the_fetch_ends_it_once(rig: Rig) -> None:
    start_with_fetch(rig)
    rig.engine.refuse = QueueFull(1, 1, retry_after_ms=50)
    rig.handoffs.end_fetch(KEY, FetchEnd(FetchOutcome.FETCHED, 8, 100))
    assert rig.ends[KEY].reason == pb.FINISH_REASON_REFUSED
    assert rig.ends[KEY].error.retry_after_ms == 50


def test_fetch_that_ends_after_the_engine_died_is_dropped(rig: Rig) -> None:
    start_with_fetch(rig)
    rig.dispatcher.fail_all(EngineFailed("dead"))
    assert rig.ends[KEY].reason == pb.FINISH_REASON_ENGINE_ERROR
    assert KEY not in rig.engine.live
