"""The Attach stream to one worker: one for all requests of this process, kept as long as the worker lives.

A broken stream is opened again, with the next position of every sequence; after 2 s, or once nobody listens at the worker's
address any more, or when its engine stands still, the worker is fenced: every lane is lost and its owner told. A fenced
worker is tried again in the background and counts as alive once its beats are sound.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from baton_contracts.discovery.v1 import instance_pb2
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_contracts.worker.v1 import worker_service_pb2_grpc as worker_grpc
from baton_runtime.log import get_logger
from baton_runtime.rpc import open_channel

from baton_frontend.generation import ModelInfo
from baton_frontend.lanes import Lane, LaneOwner, LaneTable
from baton_frontend.placement import Role
from baton_frontend.stream_io import WRITE_PACE_S, StreamBroken, is_refused, is_task_cancelled, read_message, release_frames, write_message

CONTRACT_VERSION = 1
# A message of starts is cut here, so that a Cancel never waits behind many long prompts.
START_BATCH_BYTES = 256 << 10
# Frames after which an acknowledgement leaves for its own sake; otherwise it rides on what leaves anyway, or with the next tick. The
# worker stops at three (docs/worker.md), so it need not wait. A message costs both sides as much as 50 to 100 tokens.
ACK_FRAMES = 2
STUCK_STEP_US, STUCK_FACTOR = 2_000_000, 4

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AttachTimes:
    """docs/handoff.md, "Times", in seconds. Tests shorten them."""

    beat_s: float = 0.2  # silence of ours after which a beat is sent; with the tick it stays below 250 ms
    suspect_s: float = 1.0
    fence_s: float = 2.0
    refused_s: float = 0.2  # a worker whose address refuses connections for this long is gone
    connect_s: float = 1.0
    first_retry_s: float = 0.05
    last_retry_s: float = 0.2
    fenced_retry_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this frontend is."""

    instance_id: str
    incarnation: str


class AttachObserver(Protocol):
    """Who hears of a worker's life and death."""

    def on_fenced(self, client: "AttachClient", reason: str) -> None:
        """The worker counts as dead. Its lanes' owners were told before."""

    def on_session(self, client: "AttachClient") -> None:
        """A stream was opened, or has ended."""

    def on_cancel_sent(self, waited_s: float) -> None:
        """A Cancel has left this process, so long after it was decided."""

    def on_cancelled_end(self, waited_s: float) -> None:
        """The worker said that a cancelled attempt is over there and holds nothing, so long after the cancel was decided."""


class AttachClient:
    """One worker life, seen from here. `run()` keeps the stream; everything else is synchronous."""

    def __init__(
        self,
        incarnation: str,
        address: str,
        identity: Identity,
        observer: AttachObserver,
        clock: Callable[[], float],
        times: AttachTimes,
        sessions: Iterator[int],
    ) -> None:
        """sessions: numbers that rise, of all streams of this frontend: a worker that was started again at the address of its former life
        is said hello by the clients of both, and takes none below the highest it has seen."""
        self.incarnation = incarnation
        self.address = address
        self.instance: instance_pb2.Instance | None = None  # its record; None: known only from a placement
        self.decodes: ModelInfo | None = None  # the model of its record, if it decodes
        self.is_listed = False  # discovery shows it now
        self.is_attached = False
        self.is_fenced = False
        self.is_gone = False  # another life answers at its address
        self._identity = identity
        self._observer = observer
        self._clock = clock
        self._times = times
        self._sessions = sessions
        self._lanes = LaneTable(on_cancelled_end=lambda lane: observer.on_cancelled_end(clock() - lane.cancelled_at))
        self._unsent: dict[int, tuple[Lane, worker_pb2.Start]] = {}
        self._cancels: list[tuple[worker_pb2.Cancel, float]] = []  # and when it was decided
        self._wake = asyncio.Event()
        self._break = asyncio.Event()
        self._break_reason = ""
        self._session_number = 0
        self._frame = self._acked_frame = 0
        self._last_heard = self._broken_since = self._last_sent = clock()

    # --- what others ask

    @property
    def num_lanes(self) -> int:
        """Slots in use."""
        return len(self._lanes)

    @property
    def has_pending(self) -> bool:
        """Whether starts or cancels wait for the stream."""
        return bool(self._unsent or self._cancels)

    @property
    def can_start(self) -> bool:
        """Whether a Start may be given to it; it may still wait for the stream to come back."""
        return not self.is_fenced and not self.is_gone

    @property
    def is_healthy(self) -> bool:
        """Attached, heard of within the last second, engine in motion."""
        return self.is_attached and not self.is_fenced and self._clock() - self._last_heard < self._times.suspect_s

    def start(self, owner: LaneOwner, role: Role, start: worker_pb2.Start) -> Lane:
        """Queue a Start for the stream; sets its slot. Call only if `can_start`. Raises: QueueFull."""
        lane = self._lanes.open(owner, start.request_id, start.attempt, role)
        start.slot = lane.slot
        self._unsent[lane.slot] = (lane, start)
        self._wake.set()
        return lane

    def cancel(self, lane: Lane) -> None:
        """End a lane. Its slot stays taken until the worker says so or the session ends; its owner may still hear of it. Idempotent."""
        if lane.is_cancelled or self._lanes.get(lane.slot) is not lane:
            return
        lane.is_cancelled, lane.cancelled_at = True, self._clock()
        if self._unsent.pop(lane.slot, None) is not None:
            self._lanes.close(lane)  # the worker never heard of it
            return
        self._cancels.append((worker_pb2.Cancel(request_id=lane.request_id, attempt=lane.attempt), lane.cancelled_at))
        self._wake.set()

    def tick(self, now: float) -> None:
        """Judge the worker by the clock, and see to our own beats. Call every 50 ms."""
        if self.is_attached:
            if now - self._last_heard >= self._times.fence_s:
                self._fence("silent")
                self.break_session("silent")
            elif self._frame > self._acked_frame or now - self._last_sent >= self._times.beat_s:
                self._wake.set()
        elif not self.is_fenced and now - self._broken_since >= self._times.fence_s:
            self._fence("not_back")

    def forgive(self, seconds: float) -> None:
        """This process did not listen for that long: silence of the worker in that time means nothing."""
        self._last_heard += seconds
        self._broken_since += seconds

    def break_session(self, reason: str) -> None:
        """End the stream and open it again."""
        if self.is_attached and not self._break.is_set():
            self._break_reason = reason
            self._break.set()

    # --- the stream

    async def run(self) -> None:
        """Keep the stream until cancelled."""
        retry_s = 0.0
        while not self.is_gone:
            began = self._clock()
            was_attached = await self._session()
            if is_task_cancelled():
                return  # the session's TaskGroup may have raised a broken stream in place of the cancellation
            if was_attached:
                retry_s = 0.0 if self._clock() - began > self._times.last_retry_s else self._times.first_retry_s
            elif await self._is_dead():
                self._fence("refused")
            if self.is_fenced:
                retry_s = self._times.fenced_retry_s
            await asyncio.sleep(retry_s)
            retry_s = min(max(2 * retry_s, self._times.first_retry_s), self._times.last_retry_s)

    async def _is_dead(self) -> bool:
        if self.is_fenced or self._clock() - self._broken_since < self._times.refused_s:
            return False
        return await is_refused(self.address, self._times.connect_s)

    async def _session(self) -> bool:
        """One stream, from hello to its break. Returns: whether the worker welcomed us."""
        self._break.clear()
        channel = open_channel(self.address)
        call = worker_grpc.WorkerServiceStub(channel).Attach()
        reason = ""
        try:
            async with asyncio.TaskGroup() as tasks:
                first = await self._open(call)
                tasks.create_task(self._write_loop(call), name=f"attach-write-{self.incarnation}")
                tasks.create_task(self._break_on_demand(), name=f"attach-break-{self.incarnation}")
                await self._read_loop(call, first)
        except* StreamBroken as group:
            reason = str(group.exceptions[0])
            release_frames(group)
        finally:
            del tasks  # it holds the exceptions, which hold this frame
            call.cancel()
            was_attached, self.is_attached = self.is_attached, False
            if was_attached:
                self._broken_since = self._clock()
            await channel.close(None)
        if was_attached:
            log.info("attach_broken", worker=self.incarnation, address=self.address, reason=reason)
            self._observer.on_session(self)
        else:
            log.debug("attach_failed", worker=self.incarnation, address=self.address, reason=reason)
        return was_attached

    async def _open(self, call: Any) -> worker_pb2.AttachResponse:
        try:
            async with asyncio.timeout(self._times.connect_s):
                await write_message(call, worker_pb2.AttachRequest(hello=self._hello()))
                first: worker_pb2.AttachResponse = await read_message(call)
        except TimeoutError as error:
            raise StreamBroken("no welcome in time") from error
        if not first.HasField("welcome") or first.welcome.contract_version != CONTRACT_VERSION:
            raise StreamBroken("no welcome, or another version of the protocol")
        if first.welcome.incarnation != self.incarnation:
            self.is_gone = True
            self._fence("replaced")
            raise StreamBroken(f"another life answers: {first.welcome.incarnation}")
        self._last_heard = self._last_sent = self._clock()
        self.is_attached = True
        log.info("attach_open", worker=self.incarnation, address=self.address, session=self._session_number, num_lanes=len(self._lanes))
        self._observer.on_session(self)
        return first

    def _hello(self) -> worker_pb2.AttachHello:
        """A new session starts clean: cancelled lanes are not listed, so the worker ends them, and their slots are free."""
        self._session_number = next(self._sessions)
        self._frame = self._acked_frame = 0
        self._cancels.clear()
        resumes = []
        for lane in self._lanes.lanes():
            if lane.is_cancelled:
                self._lanes.close(lane)
            elif lane.is_sent:
                resumes.append(
                    worker_pb2.Resume(
                        slot=lane.slot, request_id=lane.request_id, attempt=lane.attempt, next_position=lane.owner.next_position()
                    )
                )
        return worker_pb2.AttachHello(
            contract_version=CONTRACT_VERSION,
            instance_id=self._identity.instance_id,
            incarnation=self._identity.incarnation,
            session=self._session_number,
            resumes=resumes,
        )

    async def _read_loop(self, call: Any, frame: worker_pb2.AttachResponse) -> None:
        """The one reader; everything a frame causes happens before the next one is read."""
        while True:
            self._last_heard = self._clock()
            if self._is_sound(frame.beat):
                self._lanes.dispatch(frame)
            self._frame = max(self._frame, frame.frame)
            if self._frame - self._acked_frame >= ACK_FRAMES:
                self._wake.set()
            frame = await read_message(call)

    def _is_sound(self, beat: worker_pb2.Beat) -> bool:
        """Fence by the age of the running step, or forgive once it moves again. False: fenced, what it says is not wanted."""
        is_stuck = beat.running_step_age_us > max(STUCK_STEP_US, STUCK_FACTOR * beat.predicted_step_us)
        if is_stuck and not self.is_fenced:
            self._fence("step_stuck")
        elif self.is_fenced and not is_stuck and not self._break.is_set():
            self.is_fenced = False
            log.info("worker_back", worker=self.incarnation, address=self.address)
        return not self.is_fenced

    async def _write_loop(self, call: Any) -> None:
        """The one writer: what came together while a write was under way leaves as one message."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._last_sent = self._clock()
            cancels, self._cancels = self._cancels, []
            await write_message(call, self._next_message([cancel for cancel, _ in cancels]))
            for _, decided_at in cancels:
                self._observer.on_cancel_sent(self._clock() - decided_at)
            if self._unsent or self._cancels:
                self._wake.set()
            await asyncio.sleep(WRITE_PACE_S)

    def _next_message(self, cancels: list[worker_pb2.Cancel]) -> worker_pb2.AttachRequest:
        self._acked_frame = self._frame
        message = worker_pb2.AttachRequest(ack_frame=self._frame, cancels=cancels)
        num_bytes = 0
        while self._unsent and num_bytes < START_BATCH_BYTES:
            lane, start = self._unsent.pop(next(iter(self._unsent)))
            lane.is_sent = True
            num_bytes += len(start.token_ids)
            message.starts.append(start)
        return message

    async def _break_on_demand(self) -> None:
        await self._break.wait()
        raise StreamBroken(self._break_reason)

    def _fence(self, reason: str) -> None:
        """From now on the worker is dead to us, whatever still arrives of this session."""
        if self.is_fenced:
            return
        self.is_fenced = True
        self.break_session(reason)
        lost = self._lanes.lanes()
        log.warning("worker_fenced", worker=self.incarnation, address=self.address, reason=reason, num_lanes=len(lost))
        for lane in lost:
            self._lanes.close(lane)
        self._unsent.clear()
        self._cancels.clear()
        for lane in lost:
            lane.owner.on_lost(lane, reason)
        self._observer.on_fenced(self, reason)
