"""One frontend incarnation's side of Attach, without I/O: slots, frames, acknowledgements, breaks, re-attaches.

    attached --stream broken, or silent 2 s--> detached --re-attach (newer session)--> attached
                                               detached --2 s--> expired: everything cancelled, the session is forgotten

The worker never waits for a frontend: tokens go into each sequence's OutputLog, a frame is "everything not sent yet", and at
most three frames are unacknowledged. A sequence 256 tokens ahead of what was sent is paused in the engine until the frontend
catches up. Contract: proto/baton/worker/v1/worker_service.proto; docs/worker.md.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import SequenceKey, TokenLogprobs
from baton_runtime.errors import BatonError, InvalidArgument, Unavailable

from baton_worker.attempts import Attempts
from baton_worker.ends import error_end
from baton_worker.output_log import FINISHED_FRAME_BYTES, FrameColumns, OutputLog, f32_bytes, u32_bytes

CONTRACT_VERSION = 1


@dataclass(frozen=True, slots=True)
class AttachLimits:
    """Bounds of one Attach stream; the defaults are those of docs/worker.md.

    window_frames: frames with content that may be unacknowledged. frame_bytes: columns and logprobs of one frame, on the
    wire. ahead_tokens: unsent tokens at which a sequence is paused; it goes on at half of that. beat_s: longest silence of
    ours, below the promised 250 ms. silent_s: silence of the frontend that counts as a broken stream. stuck_s: time a frame
    may stay unacknowledged by a frontend that is not silent, before that counts as broken as well. kept_s: how long sequences
    outlive a broken stream.
    """

    window_frames: int = 3
    frame_bytes: int = 1 << 20
    ahead_tokens: int = 256
    beat_s: float = 0.2
    silent_s: float = 2.0
    stuck_s: float = 10.0
    kept_s: float = 2.0


class StaleSession(BatonError):
    """A newer Attach stream of the same frontend incarnation was seen."""

    reason = "STALE_SESSION"
    status = grpc.StatusCode.FAILED_PRECONDITION
    retryable = False

    def __init__(self, newest: int, got: int) -> None:
        super().__init__(f"session {got} is not above {newest}", newest=newest, got=got)


class SequenceControl(Protocol):
    """Whoever runs the sequences. Every method returns at once; ends are reported through `Frontends.end`, also from within."""

    def start(self, start: pb.Start) -> None:
        """Run a sequence; exactly one end follows. Raises: BatonError, then nothing was kept and no end follows."""

    def cancel(self, key: SequenceKey, reason: "pb.FinishReason") -> None:
        """End a live sequence with this reason, soon; its end follows."""

    def forbid(self, request_id: str, attempt: int) -> None:
        """Attempts up to this one were cancelled and none of them lives here: refuse what others offer for them."""

    def pause(self, key: SequenceKey) -> None:
        """Leave the sequence out of steps."""

    def resume(self, key: SequenceKey) -> None:
        """Take the sequence into steps again."""

    def first_token(self, key: SequenceKey) -> None:
        """The first token of the attempt was drawn."""


class Stream(Protocol):
    """The gRPC stream a session is attached to now, as the session sees it."""

    def wake(self) -> None:
        """There may be a frame to write."""

    def end(self, error: BatonError) -> None:
        """The session let go of this stream: end it with this status."""


@dataclass(slots=True)
class _SentFrame:
    number: int
    sent_at: float
    sent: list[tuple[OutputLog, int]] = field(default_factory=list)  # log, end position carried
    finished: list[OutputLog] = field(default_factory=list)


Routes = dict[SequenceKey, tuple["FrontendSession", OutputLog]]


class FrontendSession:
    """Everything this worker does for one frontend incarnation.

    State: `_by_slot`, the sequences whose end the frontend has not acknowledged; `_newest`, the live ones by request;
    `_dirty`, those with something unsent, in the order of frames; `_unacked`, frames with content; the stream, or since
    when there is none. `routes` is shared with the other sessions: the live sequences by key.
    """

    def __init__(
        self,
        instance_id: str,
        incarnation: str,
        welcome: pb.AttachWelcome,
        control: SequenceControl,
        attempts: Attempts,
        routes: Routes,
        limits: AttachLimits,
    ) -> None:
        self.instance_id = instance_id
        self.incarnation = incarnation
        self._own_welcome = welcome
        self._control = control
        self._attempts = attempts
        self._routes = routes
        self._limits = limits
        self._by_slot: dict[int, OutputLog] = {}
        self._newest: dict[str, OutputLog] = {}
        self._dirty: dict[OutputLog, None] = {}
        self._unacked: deque[_SentFrame] = deque()
        self._stream: Stream | None = None
        self._session = 0
        self._welcome: pb.AttachWelcome | None = None
        self._frame = 0
        self._last_frame_at = 0.0
        self._last_heard_at = 0.0
        self._detached_at = 0.0
        self.is_expired = False

    # ---- the stream

    @property
    def stream(self) -> Stream | None:
        """The stream attached now."""
        return self._stream

    @property
    def num_sequences(self) -> int:
        """Sequences whose end the frontend has not acknowledged."""
        return len(self._by_slot)

    @property
    def has_output(self) -> bool:
        """Whether a frame with content could be written now."""
        return bool(self._dirty) and len(self._unacked) < self._limits.window_frames

    def attach(self, hello: pb.AttachHello, stream: Stream, now: float) -> None:
        """Go on with a new stream. The stream before it, if any, is ended.

        Raises: StaleSession, InvalidArgument; nothing has changed then.
        """
        if hello.session <= self._session:
            raise StaleSession(self._session, hello.session)
        if len({resume.slot for resume in hello.resumes}) != len(hello.resumes):
            raise InvalidArgument("hello.resumes", "names a slot twice")
        if self._stream is not None:
            self.detach(now, Unavailable("a newer stream took over"))
        self._session = hello.session
        self._stream = stream
        self._last_heard_at = self._last_frame_at = now
        self._frame = 0
        self._welcome = pb.AttachWelcome()
        self._welcome.CopyFrom(self._own_welcome)
        self._welcome.contract_version = min(CONTRACT_VERSION, hello.contract_version)
        self._resume(hello, now)
        stream.wake()

    def detach(self, now: float, error: BatonError) -> None:
        """The stream is broken or given up: end it, and keep the sequences for a while. Idempotent."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        self._detached_at = now
        self._unacked.clear()
        self._dirty.clear()
        for log in self._by_slot.values():
            log.rewind(log.acked)
            if log.is_cancelled:
                log.drop_unsent()
            self._settle(log)
        stream.end(error)

    def detach_from(self, stream: Stream, now: float, error: BatonError) -> None:
        """As detach, unless a newer stream has taken over meanwhile."""
        if self._stream is stream:
            self.detach(now, error)

    def fence(self, now: float) -> None:
        """Our own loop stood still: the frontend has given us up at the time it last was heard plus the limit."""
        self.detach(min(now, self._last_heard_at + self._limits.silent_s), Unavailable("the worker's loop stood still"))

    def tick(self, now: float) -> None:
        """Notice silence and the end of the time sequences are kept."""
        if self._stream is not None and now - self._last_heard_at >= self._limits.silent_s:
            self.detach(now, Unavailable("the frontend was silent"))
        elif self._stream is not None and self._unacked and now - self._unacked[0].sent_at >= self._limits.stuck_s:
            self.detach(now, Unavailable("the frontend does not acknowledge frames"))
        elif self._stream is None and now - self._detached_at >= self._limits.kept_s:
            self._expire()

    def _expire(self) -> None:
        self.is_expired = True
        logs = list(self._by_slot.values())
        self._by_slot.clear()
        self._dirty.clear()
        for log in logs:
            self._end_live(log, pb.FINISH_REASON_CANCELLED)

    def _resume(self, hello: pb.AttachHello, now: float) -> None:
        """Match what the frontend wants with what is here; everything else of this incarnation ends."""
        before, self._by_slot = self._by_slot, {}
        self._dirty.clear()
        for resume in hello.resumes:
            key = SequenceKey(resume.request_id, resume.attempt)
            log = before.get(resume.slot)
            if log is None or log.key != key or not (log.is_cancelled or log.can_resend_from(resume.next_position)):
                log = OutputLog(resume.slot, key, resume.next_position)
                log.finished = pb.Finished(slot=resume.slot, reason=pb.FINISH_REASON_UNKNOWN)
            else:
                del before[resume.slot]
                if not log.is_cancelled:
                    log.rewind(resume.next_position)
            self._by_slot[resume.slot] = log
            self._settle(log)
        for log in before.values():
            self._end_live(log, pb.FINISH_REASON_CANCELLED)

    # ---- up: what the frontend says

    def receive(self, request: pb.AttachRequest, now: float) -> None:
        """Take in everything of a message but its starts, which the caller hands to `start` one by one afterwards.

        Raises: InvalidArgument for what breaks the protocol; the stream must end then.
        """
        self._last_heard_at = now
        self._acknowledge(request.ack_frame)
        for cancel in request.cancels:
            self._cancel(cancel.request_id, cancel.attempt, now)

    def start(self, start: pb.Start, now: float) -> None:
        """Run a sequence. What is wrong with it, or why not now, becomes its one Finished.

        Raises: InvalidArgument if the slot stands for another sequence whose end was not reported; the stream must end then.
        """
        key = SequenceKey(start.request_id, start.attempt)
        occupant = self._by_slot.get(start.slot)
        if occupant is not None:
            if occupant.key == key:
                return  # said twice: one sequence, one end
            if not occupant.finished_frame:
                raise InvalidArgument("starts.slot", f"slot {start.slot} is in use")
            # Its end was sent and the slot is used again: that acknowledges it.
        log = OutputLog(start.slot, key, max(0, len(start.token_ids) // 4 - start.num_prompt_tokens))
        self._by_slot[start.slot] = log
        if not start.request_id or start.attempt < 1:
            return self._finish(log, error_end(InvalidArgument("request_id" if start.attempt else "attempt", "is missing")))
        if not self._attempts.start(start.request_id, start.attempt):
            return self._finish(log, pb.Finished(reason=pb.FINISH_REASON_STALE))
        older = self._newest.get(start.request_id)
        if older is not None:
            self._end_live(older, pb.FINISH_REASON_STALE)
        self._newest[start.request_id] = log
        self._routes[key] = (self, log)
        try:
            self._control.start(start)
        except BatonError as error:
            self.end(log, error_end(error), now)

    def _acknowledge(self, frame: int) -> None:
        if frame > self._frame:
            raise InvalidArgument("ack_frame", f"{frame} was not sent, the last one is {self._frame}")
        while self._unacked and self._unacked[0].number <= frame:
            acknowledged = self._unacked.popleft()
            for log, end in acknowledged.sent:
                log.acknowledge(end)
            for log in acknowledged.finished:
                if self._by_slot.get(log.slot) is log:
                    del self._by_slot[log.slot]
        if self._stream is not None and self.has_output:
            self._stream.wake()

    def _cancel(self, request_id: str, attempt: int, now: float) -> None:
        self._attempts.cancel(request_id, attempt, now)
        log = self._newest.get(request_id)
        if log is not None and log.key.attempt <= attempt:
            self._end_live(log, pb.FINISH_REASON_CANCELLED)
        else:
            self._control.forbid(request_id, attempt)

    # ---- down: what becomes of the sequences

    def append(self, log: OutputLog, position: int, token_ids: Sequence[int]) -> None:
        """Tokens were drawn. A position out of order is the engine's fault and ends the sequence with ENGINE_ERROR."""
        if log.is_cancelled:
            return
        if position != log.end:
            return self._end_live(log, pb.FINISH_REASON_ENGINE_ERROR)
        if position == log.start:
            self._control.first_token(log.key)
        log.append(token_ids)
        self._dirty[log] = None
        if log.end - log.sent >= self._limits.ahead_tokens and not log.is_paused:
            log.is_paused = True
            self._control.pause(log.key)

    def append_logprobs(self, log: OutputLog, logprobs: TokenLogprobs) -> None:
        """Log probabilities of a token that was appended in the same step."""
        if not log.is_cancelled:
            log.append_logprobs(logprobs)

    def end(self, log: OutputLog, finished: pb.Finished, now: float) -> None:
        """The one end of a live sequence."""
        del self._routes[log.key]
        if self._newest.get(log.key.request_id) is log:
            del self._newest[log.key.request_id]
        self._attempts.end(log.key.request_id, now)
        self._finish(log, finished)

    def _finish(self, log: OutputLog, finished: pb.Finished) -> None:
        if self._by_slot.get(log.slot) is not log:
            return  # nobody asks any more
        finished.slot = log.slot
        log.finished = finished
        self._settle(log)
        if self._stream is not None:
            self._stream.wake()

    def next_frame(self, beat: pb.Beat, now: float) -> pb.AttachResponse | None:
        """The frame to write now; None if there is nothing to say, or the window is closed, and no beat is due."""
        if not self.has_output and self._welcome is None and now - self._last_frame_at < self._limits.beat_s:
            return None
        self._frame += 1
        self._last_frame_at = now
        frame = pb.AttachResponse(frame=self._frame, beat=beat, welcome=self._welcome)
        self._welcome = None
        if self.has_output:
            self._fill(frame, now)
        return frame

    def beat_due_s(self, now: float) -> float:
        """Seconds until a frame must be written even if there is nothing to say."""
        return max(0.0, self._last_frame_at + self._limits.beat_s - now)

    def _fill(self, frame: pb.AttachResponse, now: float) -> None:
        sent = _SentFrame(frame.frame, now)
        columns = FrameColumns()
        budget = self._limits.frame_bytes
        cut: list[OutputLog] = []
        dirty, self._dirty = self._dirty, {}
        for log in dirty:
            if budget <= 0:
                self._dirty[log] = None  # the frame is full; these come first next time
                continue
            if log.end > log.sent:
                count, size = log.affordable(budget)
                if log.has_logprobs:
                    _add_logprobs(frame, log, count)
                columns.add(log, count)
                sent.sent.append((log, log.sent))
                budget -= size
            if log.is_paused:
                self._resume_if_caught_up(log)
            if log.end > log.sent:
                cut.append(log)
            elif log.finished is not None:
                frame.finished.append(log.finished)
                log.finished_frame = frame.frame
                sent.finished.append(log)
                budget -= FINISHED_FRAME_BYTES
        self._dirty.update(dict.fromkeys(cut))
        columns.write_to(frame)
        self._unacked.append(sent)

    def _settle(self, log: OutputLog) -> None:
        """Bring `_dirty` and the pause in line with the log after it was rewound or ended."""
        if log.unsent or log.finished is not None:
            self._dirty[log] = None
        if not log.is_paused and self._is_running(log) and log.unsent >= self._limits.ahead_tokens:
            log.is_paused = True
            self._control.pause(log.key)
        self._resume_if_caught_up(log)

    def _resume_if_caught_up(self, log: OutputLog) -> None:
        if log.is_paused and log.unsent <= self._limits.ahead_tokens // 2 and self._is_running(log):
            log.is_paused = False
            self._control.resume(log.key)

    def _is_running(self, log: OutputLog) -> bool:
        return not log.is_cancelled and log.key in self._routes

    def _end_live(self, log: OutputLog, reason: "pb.FinishReason") -> None:
        if not self._is_running(log):
            return
        log.is_cancelled = True
        log.drop_unsent()
        self._dirty.pop(log, None)
        self._control.cancel(log.key, reason)


def _add_logprobs(frame: pb.AttachResponse, log: OutputLog, count: int) -> None:
    for entry in log.logprobs(log.sent, log.sent + count):
        frame.logprobs.add(
            slot=log.slot,
            position=entry.position,
            logprob=entry.logprob,
            top_token_ids=u32_bytes(entry.top_token_ids),
            top_logprobs=f32_bytes(entry.top_logprobs),
        )
