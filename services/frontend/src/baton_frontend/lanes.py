"""The slots of one Attach stream: who gets what a frame says. Synchronous; the hot path of the frontend."""

import sys
from collections.abc import Sequence
from typing import Protocol

from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_runtime.errors import QueueFull
from baton_runtime.log import get_logger

from baton_frontend.generation import TokenLogprob
from baton_frontend.placement import Role
from baton_frontend.stream_io import StreamBroken

assert sys.byteorder == "little", "columns are little-endian and read in place"

log = get_logger(__name__)

# A slot is an index, used again, below a generation that rises with each use: a late frame of an earlier use names nobody.
INDEX_BITS = 20
_MAX_INDEX = 1 << INDEX_BITS
_MAX_GENERATION = 1 << (32 - INDEX_BITS)

_LogprobsByPosition = dict[tuple[int, int], TokenLogprob]


class LaneOwner(Protocol):
    """Who a lane's news is for. Called synchronously from the reader; must not block."""

    def next_position(self) -> int:
        """First output position not seen yet; what a re-attach asks for."""

    def on_tokens(self, lane: "Lane", first_position: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """Tokens of consecutive positions; logprobs of all of them, or None."""

    def on_gap(self, lane: "Lane") -> None:
        """One frame names positions of the lane that are not consecutive."""

    def on_finished(self, lane: "Lane", finished: worker_pb2.Finished) -> None:
        """The worker's one end of the lane, after its last tokens. The slot is free already."""

    def on_lost(self, lane: "Lane", reason: str) -> None:
        """The worker is fenced; nothing more will come. `lane.is_sent` says whether it ever got the Start."""

    def on_owner_failed(self, lane: "Lane") -> None:
        """A call into the owner raised: a bug on this side. Ends the request."""


class Lane:
    """One attempt on one worker, named by a slot until the worker reported its end or its session ended."""

    __slots__ = ("attempt", "cancelled_at", "is_cancelled", "is_sent", "owner", "request_id", "role", "slot")

    def __init__(self, slot: int, owner: LaneOwner, request_id: str, attempt: int, role: Role) -> None:
        self.slot = slot
        self.owner = owner
        self.request_id = request_id
        self.attempt = attempt
        self.role = role
        self.is_sent = False  # the Start is in a message that was given to the stream
        self.is_cancelled = False
        self.cancelled_at = 0.0


class LaneTable:
    """Slots of one worker. A dict by the whole slot: one look-up also checks the generation."""

    def __init__(self, max_lanes: int = _MAX_INDEX) -> None:
        self._max_lanes = min(max_lanes, _MAX_INDEX)
        self._lanes: dict[int, Lane] = {}
        self._generations: list[int] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        """Slots in use, cancelled ones included."""
        return len(self._lanes)

    def lanes(self) -> list[Lane]:
        """All slots in use now, in order of their opening."""
        return list(self._lanes.values())

    def open(self, owner: LaneOwner, request_id: str, attempt: int, role: Role) -> Lane:
        """Take a slot. Raises: QueueFull."""
        if self._free:
            index = self._free.pop()
        elif len(self._generations) < self._max_lanes:
            index = len(self._generations)
            self._generations.append(0)
        else:
            raise QueueFull(depth=len(self._lanes), limit=self._max_lanes, retry_after_ms=1000)
        self._generations[index] = self._generations[index] % (_MAX_GENERATION - 1) + 1
        lane = Lane(self._generations[index] << INDEX_BITS | index, owner, request_id, attempt, role)
        self._lanes[lane.slot] = lane
        return lane

    def close(self, lane: Lane) -> None:
        """Give the slot back. Idempotent."""
        if self._lanes.pop(lane.slot, None) is not None:
            self._free.append(lane.slot % _MAX_INDEX)

    def get(self, slot: int) -> Lane | None:
        """The lane now named by this slot."""
        return self._lanes.get(slot)

    def dispatch(self, frame: worker_pb2.AttachResponse) -> None:
        """Give tokens and ends of one frame to their owners.

        Raises: StreamBroken if the columns do not fit each other; nothing was given then.
        """
        if frame.slots:
            self._dispatch_tokens(frame)
        for finished in frame.finished:
            lane = self._lanes.get(finished.slot)
            if lane is not None:
                self.close(lane)
                self._guarded_finish(lane, finished)

    def _dispatch_tokens(self, frame: worker_pb2.AttachResponse) -> None:
        slots, positions, token_ids = _column(frame.slots), _column(frame.positions), _column(frame.token_ids)
        if not len(slots) == len(positions) == len(token_ids):
            raise StreamBroken(f"columns of {len(slots)}, {len(positions)} and {len(token_ids)} entries")
        logprobs = _logprobs(frame) if frame.logprobs else None
        if logprobs is not None or len(set(slots)) != len(slots):
            self._dispatch_merged(slots, positions, token_ids, logprobs)
            return
        get = self._lanes.get
        for slot, position, token_id in zip(slots, positions, token_ids, strict=True):
            lane = get(slot)
            if lane is not None:
                try:
                    lane.owner.on_tokens(lane, position, (token_id,), None)
                except Exception:  # as in _give
                    self._owner_failed(lane)

    def _dispatch_merged(self, slots: list[int], positions: list[int], token_ids: list[int], logprobs: _LogprobsByPosition | None) -> None:
        """Several steps in one frame: what belongs to one slot goes out in one call."""
        merged: dict[int, tuple[list[int], list[int]]] = {}
        for slot, position, token_id in zip(slots, positions, token_ids, strict=True):
            columns = merged.get(slot)
            if columns is None:
                merged[slot] = ([position], [token_id])
            else:
                columns[0].append(position)
                columns[1].append(token_id)
        for slot, (at, ids) in merged.items():
            lane = self._lanes.get(slot)
            if lane is None:
                continue
            if at == list(range(at[0], at[0] + len(at))):
                self._give(lane, at[0], ids, logprobs)
            else:
                lane.owner.on_gap(lane)

    def _give(self, lane: Lane, first_position: int, token_ids: Sequence[int], logprobs: _LogprobsByPosition | None) -> None:
        try:
            if logprobs is None:
                lane.owner.on_tokens(lane, first_position, token_ids, None)
            else:
                found = [logprobs.get((lane.slot, first_position + i)) for i in range(len(token_ids))]
                complete = [x for x in found if x is not None]
                lane.owner.on_tokens(lane, first_position, token_ids, complete if len(complete) == len(found) else None)
        except Exception:
            # Supervisor: one broken receiver must not end the streams of all others.
            self._owner_failed(lane)

    def _guarded_finish(self, lane: Lane, finished: worker_pb2.Finished) -> None:
        try:
            lane.owner.on_finished(lane, finished)
        except Exception:  # as in _give
            self._owner_failed(lane)

    def _owner_failed(self, lane: Lane) -> None:
        log.exception("owner_failed", request_id=lane.request_id, attempt=lane.attempt)
        lane.owner.on_owner_failed(lane)


def _column(packed: bytes) -> list[int]:
    if len(packed) % 4:
        raise StreamBroken(f"column of {len(packed)} bytes")
    return memoryview(packed).cast("I").tolist()


def _logprobs(frame: worker_pb2.AttachResponse) -> _LogprobsByPosition:
    found: _LogprobsByPosition = {}
    for one in frame.logprobs:
        if len(one.top_logprobs) % 4:
            raise StreamBroken(f"column of {len(one.top_logprobs)} bytes")
        top = memoryview(one.top_logprobs).cast("f").tolist()
        found[(one.slot, one.position)] = TokenLogprob(one.logprob, _column(one.top_token_ids), top)
    return found
