"""Any interleaving of starts, steps, frames, acks, cancels, breaks and re-attaches: every position once, in order, one end."""

from collections import deque

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import SequenceKey
from baton_runtime.errors import Unavailable
from baton_worker.attach import AttachLimits, FrontendSession
from baton_worker.frontends import Frontends
from baton_worker.testing import FakeControl, FakeStream, FrontendModel, start_message, token_at
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

LIMITS = AttachLimits(window_frames=2, frame_bytes=12 * 7, ahead_tokens=16)
BEAT = pb.Beat()


class Wire(RuleBasedStateMachine):
    """A frontend and a worker with a queue of messages each way; a break loses both queues."""

    @initialize()
    def connect(self) -> None:
        self.now = 0.0
        self.control = FakeControl()
        self.frontends = Frontends("decode-0", "d1", self.control, LIMITS)
        self.control.frontends = self.frontends
        self.model = FrontendModel()
        self.up: deque[pb.AttachRequest] = deque()
        self.down: deque[pb.AttachResponse] = deque()
        self.session: FrontendSession | None = None
        self.next_slot = 0
        self.attempts: dict[str, int] = {}
        self.drawn_at_end: dict[SequenceKey, int] = {}
        self.first: dict[SequenceKey, int] = {}
        self._reattach()

    def _reattach(self) -> None:
        self.up.clear()
        self.down.clear()
        self.session = self.frontends.attach(self.model.hello(), FakeStream(), self.now)

    @property
    def is_attached(self) -> bool:
        return self.session is not None and self.session.stream is not None

    @precondition(lambda self: self.is_attached)
    @rule(request=st.sampled_from(["a", "b", "c", "d"]), delivered=st.integers(0, 3), same_attempt=st.booleans())
    def frontend_starts(self, request: str, delivered: int, same_attempt: bool) -> None:
        attempt = max(1, self.attempts.get(request, 0) + (not same_attempt))
        self.attempts[request] = attempt
        key = SequenceKey(request, attempt)
        if key in self.first:
            return  # a frontend numbers its attempts; doubles are in test_attach.py
        start = start_message(self.next_slot, request, attempt, delivered=delivered)
        self.next_slot += 1
        self.first[key] = delivered
        self.up.append(pb.AttachRequest(starts=[self.model.started(start)]))

    @precondition(lambda self: self.is_attached)
    @rule(request=st.sampled_from(["a", "b", "c", "d"]), attempt=st.integers(1, 4))
    def frontend_cancels(self, request: str, attempt: int) -> None:
        self.up.append(pb.AttachRequest(cancels=[pb.Cancel(request_id=request, attempt=attempt)]))

    @precondition(lambda self: self.is_attached)
    @rule()
    def frontend_acknowledges(self) -> None:
        self.up.append(pb.AttachRequest(ack_frame=self.model.processed_frame))

    @precondition(lambda self: self.is_attached and self.up)
    @rule()
    def worker_receives(self) -> None:
        request = self.up.popleft()
        self.session.receive(request, self.now)
        for start in request.starts:
            self.session.start(start, self.now)

    @precondition(lambda self: self.is_attached and self.down)
    @rule()
    def frontend_receives(self) -> None:
        self.model.process(self.down.popleft())

    @precondition(lambda self: self.is_attached)
    @rule()
    def worker_writes(self) -> None:
        frame = self.session.next_frame(BEAT, self.now)
        if frame is not None:
            self.down.append(frame)

    @precondition(lambda self: self.is_attached)
    @rule(
        num_steps=st.integers(0, 20),
        num_frames=st.integers(0, 3),
        num_read=st.integers(0, 3),
        acknowledges=st.booleans(),
        hears=st.booleans(),
    )
    def round(self, num_steps: int, num_frames: int, num_read: int, acknowledges: bool, hears: bool) -> None:
        """A stretch of ordinary traffic: without it, random single moves seldom get a token across."""
        while hears and self.up:
            self.worker_receives()
        self.control.step(num_steps=num_steps)
        for _ in range(num_frames):
            self.worker_writes()
        for _ in range(min(num_read, len(self.down))):
            self.frontend_receives()
        if acknowledges:
            self.frontend_acknowledges()

    @rule(num_steps=st.integers(1, 12))
    def engine_steps(self, num_steps: int) -> None:
        self.control.step(num_steps=num_steps)

    @precondition(lambda self: self.control.live)
    @rule(data=st.data())
    def engine_ends(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.control.live)))
        if key not in self.control.cancelled:
            self.drawn_at_end[key] = self.control.live[key]
        self.control.end(key, pb.FINISH_REASON_STOP, self.now)

    @rule()
    def engine_ends_cancelled(self) -> None:
        self.control.end_cancelled(self.now)

    @precondition(lambda self: self.is_attached)
    @rule()
    def stream_breaks(self) -> None:
        self.session.detach(self.now, Unavailable("gone"))
        self.up.clear()
        self.down.clear()

    @precondition(lambda self: not self.is_attached)
    @rule()
    def frontend_attaches_again(self) -> None:
        self._reattach()

    @precondition(lambda self: self.is_attached and len(self.down) > 1)
    @rule()
    def frontend_replaces_a_healthy_stream(self) -> None:
        self._reattach()

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.frontends.tick(self.now)
        if not self.is_attached:
            self.up.clear()
            self.down.clear()

    @invariant()
    def nobody_runs_far_ahead(self) -> None:
        for _, log in self.frontends._routes.values():
            assert log.first <= log.acked <= log.sent <= log.end
            assert log.unsent <= LIMITS.ahead_tokens + log.sent - log.acked + 2 * LIMITS.frame_bytes

    @invariant()
    def paused_are_exactly_those_ahead(self) -> None:
        for _, log in self.frontends._routes.values():
            if not log.is_cancelled:
                assert log.is_paused == (log.key in self.control.paused)
                assert log.is_paused or log.unsent < LIMITS.ahead_tokens

    def teardown(self) -> None:
        if self.session is None:
            return
        self._reattach()
        for key in sorted(self.control.live):
            if key not in self.control.cancelled:
                self.drawn_at_end[key] = self.control.live[key]
            self.control.end(key, pb.FINISH_REASON_STOP, self.now)
        while (frame := self.session.next_frame(BEAT, self.now)) is not None:
            self.model.process(frame)
            self.session.receive(pb.AttachRequest(ack_frame=self.model.processed_frame), self.now)
        assert self.frontends.num_live == 0
        assert self.session.num_sequences == 0
        assert self.model.finished.keys() == self.first.keys()
        for key, finished in self.model.finished.items():
            first, tokens = self.first[key], self.model.tokens[key]
            assert tokens == [token_at(position) for position in range(first, first + len(tokens))]
            if finished.reason == pb.FINISH_REASON_STOP:
                assert first + len(tokens) == self.drawn_at_end[key]


Wire.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestWire = Wire.TestCase
