"""FrontendSession and Frontends: windows, merging, pauses, breaks, re-attaches, cancels, stale attempts."""

from array import array

import pytest
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import SequenceKey, StepOutput, TokenLogprobs
from baton_runtime.errors import InvalidArgument, QueueFull
from baton_worker.attach import AttachLimits, FrontendSession, StaleSession
from baton_worker.frontends import Frontends
from baton_worker.testing import FakeControl, FakeStream, FrontendModel, start_message, token_at

BEAT = pb.Beat(step=1)
A1 = SequenceKey("a", 1)


class Rig:
    """A worker with a fake engine, and one frontend attached to it."""

    def __init__(self, limits: AttachLimits | None = None) -> None:
        self.control = FakeControl()
        self.frontends = Frontends("decode-0", "d1", self.control, limits)
        self.control.frontends = self.frontends
        self.model = FrontendModel()
        self.now = 0.0
        self.attach()

    def attach(self) -> FrontendSession:
        self.stream = FakeStream()
        self.session = self.frontends.attach(self.model.hello(), self.stream, self.now)
        return self.session

    def start(self, start: pb.Start) -> None:
        self.session.start(self.model.started(start), self.now)

    def frame(self) -> pb.AttachResponse | None:
        """The next frame with content, processed but not acknowledged."""
        if not self.session.has_output:
            return None
        frame = self.session.next_frame(BEAT, self.now)
        self.model.process(frame)
        return frame

    def ack(self) -> None:
        self.session.receive(pb.AttachRequest(ack_frame=self.model.processed_frame), self.now)

    def cancel(self, request_id: str, attempt: int = 1) -> None:
        self.session.receive(pb.AttachRequest(cancels=[pb.Cancel(request_id=request_id, attempt=attempt)]), self.now)

    def drain(self) -> None:
        while self.frame() is not None:
            self.ack()

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.frontends.tick(self.now)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def positions(frame: pb.AttachResponse) -> list[int]:
    return list(array("I", frame.positions))


def test_first_frame_carries_the_welcome_with_the_lower_version() -> None:
    frontends = Frontends("decode-0", "d1", FakeControl())
    hello = pb.AttachHello(contract_version=7, incarnation="f1", session=1)
    session = frontends.attach(hello, FakeStream(), 0.0)
    frame = session.next_frame(BEAT, 0.0)
    assert (frame.frame, frame.welcome.contract_version, frame.welcome.instance_id, frame.welcome.incarnation) == (1, 1, "decode-0", "d1")
    assert not session.next_frame(BEAT, 0.3).HasField("welcome")


def test_hello_without_version_session_or_incarnation_is_refused() -> None:
    frontends = Frontends("decode-0", "d1", FakeControl())
    for hello in (
        pb.AttachHello(incarnation="f1", session=1),
        pb.AttachHello(contract_version=1, session=1),
        pb.AttachHello(contract_version=1, incarnation="f1"),
    ):
        with pytest.raises(InvalidArgument):
            frontends.attach(hello, FakeStream(), 0.0)
    assert frontends.sessions == []


def test_tokens_of_a_step_leave_in_one_frame_and_the_end_after_the_last(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.start(start_message(1, "b"))
    rig.control.step()
    rig.control.end(A1, pb.FINISH_REASON_STOP)
    frame = rig.frame()
    assert (list(array("I", frame.slots)), positions(frame)) == ([0, 1], [0, 0])
    assert [f.slot for f in frame.finished] == [0]
    assert rig.model.finished[A1].reason == pb.FINISH_REASON_STOP


def test_beyond_three_unacknowledged_frames_columns_are_merged(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    for _ in range(3):
        rig.control.step()
        assert rig.frame() is not None
    rig.control.step(num_steps=5)
    assert rig.frame() is None
    assert rig.session.next_frame(BEAT, rig.now) is None
    rig.ack()
    assert positions(rig.frame()) == [3, 4, 5, 6, 7]


def test_beats_go_on_while_the_window_is_closed_and_carry_nothing(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    for _ in range(4):
        rig.control.step()
        rig.frame()
    beat = rig.session.next_frame(BEAT, rig.now + 0.25)
    assert (beat.beat.step, beat.token_ids) == (1, b"")
    assert rig.session.beat_due_s(rig.now + 0.25) == pytest.approx(0.2)


def test_acknowledging_a_frame_that_was_not_sent_is_refused(rig: Rig) -> None:
    with pytest.raises(InvalidArgument, match="ack_frame"):
        rig.session.receive(pb.AttachRequest(ack_frame=9), 0.0)


def test_a_frame_is_bounded_in_bytes_and_the_rest_follows_in_turn() -> None:
    rig = Rig(AttachLimits(frame_bytes=12 * 10))
    for slot, name in enumerate("ab"):
        rig.start(start_message(slot, name))
    rig.control.step(num_steps=8)
    first = rig.frame()
    assert len(first.token_ids) == 40
    second = rig.frame()
    assert set(array("I", second.slots)) == {1}
    assert rig.model.tokens[A1] == rig.model.tokens[SequenceKey("b", 1)] == [token_at(p) for p in range(8)]


def test_logprobs_travel_with_their_tokens_and_count_against_the_bound() -> None:
    rig = Rig(AttachLimits(frame_bytes=200))
    rig.start(start_message(0, "a"))
    for position in range(4):
        entry = TokenLogprobs(A1, position, -0.5, [7, 8], [-0.5, -1.5])
        rig.frontends.on_output(StepOutput(step=1, keys=[A1], positions=[position], token_ids=[7], logprobs=[entry]))
    frame = rig.frame()
    assert [entry.position for entry in frame.logprobs] == positions(frame) == [0, 1, 2, 3]
    assert list(array("f", frame.logprobs[0].top_logprobs)) == [-0.5, -1.5]
    rig.control.live[A1] = 4
    for position in range(4, 12):
        entry = TokenLogprobs(A1, position, -0.5, [7, 8], [-0.5, -1.5])
        rig.frontends.on_output(StepOutput(step=1, keys=[A1], positions=[position], token_ids=[7], logprobs=[entry]))
    frame = rig.frame()
    assert [entry.position for entry in frame.logprobs] == positions(frame) == [4, 5, 6, 7]


def test_sequence_256_ahead_is_paused_and_resumed_when_the_frontend_catches_up(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    for _ in range(2):
        rig.control.step()
        rig.frame()
    rig.control.step(num_steps=400)
    assert rig.control.paused == {A1}
    assert rig.control.live[A1] == 2 + 256
    rig.ack()
    rig.frame()
    assert rig.control.paused == set()


def test_detached_sequence_is_paused_at_256_unacknowledged_tokens(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.control.step(num_steps=100)
    rig.frame()
    rig.session.detach(rig.now, QueueFull(0, 0))
    rig.control.step(num_steps=400)
    assert rig.control.live[A1] == 256
    assert rig.control.paused == {A1}


def test_fifty_sequences_go_on_after_a_reattach_without_gap_or_repeat(rig: Rig) -> None:
    for slot in range(50):
        rig.start(start_message(slot, f"r{slot}"))
    rig.control.step(num_steps=3)
    rig.frame()  # the frontend has it, the worker does not know
    rig.control.step(num_steps=2)
    rig.session.next_frame(BEAT, rig.now)  # lost with the stream
    rig.session.detach(rig.now, QueueFull(0, 0))
    rig.control.step(num_steps=4)
    rig.tick(1.9)
    rig.attach()
    rig.model.process(rig.session.next_frame(BEAT, rig.now))
    rig.control.step()
    for key in list(rig.control.live):
        rig.control.end(key, pb.FINISH_REASON_LENGTH)
    rig.ack()
    rig.drain()
    assert len(rig.model.finished) == 50
    assert all(tokens == [token_at(p) for p in range(10)] for tokens in rig.model.tokens.values())
    assert not rig.control.cancelled


def test_end_that_was_sent_but_not_acknowledged_comes_again_after_a_reattach(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.control.step()
    rig.control.end(A1, pb.FINISH_REASON_STOP)
    rig.session.next_frame(BEAT, rig.now)  # lost
    rig.session.detach(rig.now, QueueFull(0, 0))
    rig.attach()
    rig.drain()
    assert rig.model.tokens[A1] == [0]
    assert rig.model.finished[A1].reason == pb.FINISH_REASON_STOP


def test_resume_of_a_sequence_not_here_is_answered_unknown(rig: Rig) -> None:
    rig.model.started(start_message(3, "lost"))
    rig.attach()
    rig.drain()
    assert rig.model.finished[SequenceKey("lost", 1)].reason == pb.FINISH_REASON_UNKNOWN


def test_resume_beyond_what_was_drawn_is_unknown_and_the_sequence_ends(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.model.next_position[0] = 5
    rig.attach()
    rig.drain()
    assert rig.model.finished[A1].reason == pb.FINISH_REASON_UNKNOWN
    assert rig.control.cancelled == {A1: pb.FINISH_REASON_CANCELLED}


def test_sequences_not_named_in_the_hello_are_cancelled(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.start(start_message(1, "b"))
    del rig.model.keys[0]
    rig.attach()
    assert list(rig.control.cancelled) == [A1]
    rig.control.end_cancelled()
    assert rig.session.num_sequences == 1


def test_newer_session_ends_the_older_stream_and_an_older_one_is_refused(rig: Rig) -> None:
    old = rig.stream
    rig.attach()
    assert old.error is not None
    with pytest.raises(StaleSession):
        rig.frontends.attach(pb.AttachHello(contract_version=1, incarnation="f1", session=1), FakeStream(), rig.now)
    assert rig.stream.error is None


def test_silent_frontend_is_detached_after_two_seconds_and_cancelled_after_four(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.tick(1.9)
    assert rig.stream.error is None
    rig.tick(0.1)
    assert rig.stream.error is not None
    rig.tick(1.9)
    assert not rig.control.cancelled
    rig.tick(0.2)
    assert rig.control.cancelled == {A1: pb.FINISH_REASON_CANCELLED}
    assert rig.frontends.sessions == []
    rig.control.end_cancelled()
    assert rig.frontends.num_live == 0


def test_frontend_that_talks_but_acknowledges_nothing_is_detached_after_ten_seconds(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.control.step()
    rig.frame()
    for _ in range(9):
        rig.tick(1.0)
        rig.session.receive(pb.AttachRequest(), rig.now)
    assert rig.stream.error is None
    rig.tick(1.0)
    assert rig.stream.error is not None


def test_reattach_after_expiry_is_told_unknown(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.tick(2.0)
    rig.tick(2.0)
    rig.attach()
    rig.drain()
    assert rig.model.finished[A1].reason == pb.FINISH_REASON_UNKNOWN


def test_own_stall_breaks_every_stream_and_ends_what_was_silent_too_long(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.now += 10.0
    rig.frontends.fence_all(rig.now)
    assert rig.stream.error is not None
    assert rig.control.cancelled == {A1: pb.FINISH_REASON_CANCELLED}


def test_cancel_gives_one_end_and_drops_unsent_tokens(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.control.step(num_steps=3)
    rig.cancel("a")
    rig.control.step(num_steps=3)
    assert rig.frame() is None
    rig.control.end_cancelled()
    frame = rig.frame()
    assert (frame.token_ids, [f.reason for f in frame.finished]) == (b"", [pb.FINISH_REASON_CANCELLED])
    rig.cancel("a")
    assert rig.frame() is None


def test_cancel_after_the_end_leaves_the_end_as_it_was(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.control.step()
    rig.control.end(A1, pb.FINISH_REASON_STOP)
    rig.cancel("a")
    rig.drain()
    assert rig.model.finished[A1].reason == pb.FINISH_REASON_STOP
    assert rig.model.tokens[A1] == [0]


def test_cancel_before_its_start_makes_the_start_stale(rig: Rig) -> None:
    rig.cancel("a")
    assert rig.control.forbidden == [("a", 1)]
    rig.start(start_message(0, "a"))
    rig.drain()
    assert rig.model.finished[A1].reason == pb.FINISH_REASON_STALE
    assert not rig.control.live


def test_cancel_of_a_lower_attempt_leaves_the_higher_one_alone(rig: Rig) -> None:
    rig.start(start_message(0, "a", attempt=2))
    rig.cancel("a", attempt=1)
    assert not rig.control.cancelled


def test_tombstone_is_forgotten_after_sixty_seconds(rig: Rig) -> None:
    rig.cancel("a")
    rig.now += 61.0
    rig.frontends.tick(rig.now)
    rig.attach()
    rig.start(start_message(0, "a"))
    assert A1 in rig.control.live


def test_higher_attempt_ends_the_lower_one_first(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.start(start_message(1, "a", attempt=2, delivered=3))
    assert rig.control.cancelled == {A1: pb.FINISH_REASON_STALE}
    rig.control.end_cancelled()
    rig.control.step()
    rig.drain()
    assert rig.model.finished[A1].reason == pb.FINISH_REASON_STALE
    assert rig.model.tokens[SequenceKey("a", 2)] == [token_at(3)]


def test_equal_attempt_on_another_slot_is_stale(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.session.start(start_message(1, "a"), rig.now)
    frame = rig.session.next_frame(BEAT, rig.now)
    assert [(f.slot, f.reason) for f in frame.finished] == [(1, pb.FINISH_REASON_STALE)]


def test_start_said_twice_on_its_slot_is_one_sequence(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.session.start(start_message(0, "a"), rig.now)
    rig.control.step()
    rig.control.end(A1, pb.FINISH_REASON_STOP)
    rig.drain()
    assert rig.model.finished[A1].reason == pb.FINISH_REASON_STOP


def test_slot_of_a_live_sequence_given_to_another_breaks_the_protocol(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    with pytest.raises(InvalidArgument, match="slot 0 is in use"):
        rig.session.start(start_message(0, "b"), rig.now)


def test_slot_is_free_again_once_its_end_was_sent(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.control.end(A1, pb.FINISH_REASON_STOP)
    rig.frame()
    rig.start(start_message(0, "b"))
    rig.ack()
    rig.control.step()
    rig.drain()
    assert rig.model.tokens[SequenceKey("b", 1)] == [0]


def test_refused_start_ends_with_the_advice_to_come_again(rig: Rig) -> None:
    rig.control.refuse = QueueFull(depth=8, limit=8, retry_after_ms=70)
    rig.start(start_message(0, "a"))
    rig.drain()
    end = rig.model.finished[A1]
    assert (end.reason, end.error.reason, end.error.retry_after_ms) == (pb.FINISH_REASON_REFUSED, "QUEUE_FULL", 70)
    assert rig.frontends.num_live == 0


def test_invalid_start_names_its_field(rig: Rig) -> None:
    rig.control.refuse = InvalidArgument("sampling.top_p", "2 is above 1")
    rig.start(start_message(0, "a"))
    rig.drain()
    assert rig.model.finished[A1].reason == pb.FINISH_REASON_INVALID
    assert "sampling.top_p" in rig.model.finished[A1].error.message


@pytest.mark.parametrize("start", [start_message(0, "", 1), start_message(0, "a", 0)])
def test_start_without_identity_is_invalid(rig: Rig, start: pb.Start) -> None:
    rig.start(start)
    rig.drain()
    assert [f.reason for f in rig.model.finished.values()] == [pb.FINISH_REASON_INVALID]


def test_position_out_of_order_ends_the_sequence_with_engine_error(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    rig.frontends.on_output(StepOutput(step=1, keys=[A1], positions=[4], token_ids=[1]))
    assert rig.control.cancelled == {A1: pb.FINISH_REASON_ENGINE_ERROR}


def test_tokens_and_ends_of_unknown_sequences_are_dropped(rig: Rig) -> None:
    rig.frontends.on_output(StepOutput(step=1, keys=[A1], positions=[0], token_ids=[1]))
    rig.frontends.end(A1, pb.Finished(reason=pb.FINISH_REASON_STOP), rig.now)
    assert rig.frame() is None


def test_dead_engine_ends_every_sequence_once(rig: Rig) -> None:
    for slot in range(3):
        rig.start(start_message(slot, f"r{slot}"))
    rig.frontends.end_all(pb.Finished(reason=pb.FINISH_REASON_ENGINE_ERROR), rig.now)
    rig.drain()
    assert {f.reason for f in rig.model.finished.values()} == {pb.FINISH_REASON_ENGINE_ERROR}
    assert len(rig.model.finished) == 3
    assert rig.frontends.num_live == 0


def test_long_answer_is_cut_off_below_what_was_acknowledged(rig: Rig) -> None:
    rig.start(start_message(0, "a"))
    for _ in range(3000):
        rig.control.step()
        rig.frame()
        rig.ack()
    _, log = rig.frontends._routes[A1]
    assert (log.end, log.end - log.first < 600) == (3000, True)
    assert rig.model.tokens[A1] == [token_at(p) for p in range(3000)]
