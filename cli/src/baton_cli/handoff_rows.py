"""What a watch of handoffs tells, and what is known of them now."""

import time
from collections import deque
from collections.abc import Callable

import msgspec
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb

LINGER_S = 3.0  # how long a handoff that is over is still shown
MAX_ENDED_SHOWN = 20

_BEGUN, _ENDED = pb.HANDOFF_EVENT_KIND_BEGUN, pb.HANDOFF_EVENT_KIND_ENDED


class Row(msgspec.Struct):
    """One handoff, for people and machines. Fields of a side that has not reported are null."""

    request_id: str
    attempt: int
    kind: str  # "handoff" or "fetch"
    source: str | None
    sink: str | None
    state: str
    source_state: str | None
    sink_state: str | None
    source_held_bytes: int | None
    sink_held_bytes: int | None
    confirmed_bytes: int
    pulled_bytes: int
    gb_per_s: float | None  # of its pull operations; null before the first
    age_s: float
    transport: str | None
    transport_reason: str | None
    is_live: bool


def row_of(view: pb.HandoffView) -> Row:
    """What a view says."""
    source, sink = _reported(view.source), _reported(view.sink)
    return Row(
        request_id=view.handoff.request_id,
        attempt=view.handoff.attempt,
        kind="fetch" if view.handoff.is_fetch else "handoff",
        source=view.source.instance_id or None,
        sink=view.sink.instance_id or None,
        state=state_of(view),
        source_state=_side_state(source),
        sink_state=_side_state(sink),
        source_held_bytes=source.held_bytes if source is not None else None,
        sink_held_bytes=sink.held_bytes if sink is not None else None,
        confirmed_bytes=sink.confirmed_bytes if sink is not None else source.confirmed_bytes if source is not None else 0,
        pulled_bytes=view.pulled_bytes,
        gb_per_s=round(view.pulled_bytes / view.pull_us / 1e3, 3) if view.pull_us else None,
        age_s=view.age_us / 1e6,
        transport=view.transport or None,
        transport_reason=view.transport_reason or None,
        is_live=view.is_live,
    )


def state_of(view: pb.HandoffView) -> str:
    """One word for both sides."""
    sides = [side for side in (_reported(view.sink), _reported(view.source)) if side is not None]
    if not view.is_live:
        lost = [side for side in sides if side.kind != _ENDED]
        return "lost" if lost or not sides else _outcome(sides[0])
    ended = [side for side in sides if side.kind == _ENDED]
    if any(side.held_bytes for side in ended):
        return "draining"
    if ended:
        return "ending"
    if view.pulled_bytes or any(side.confirmed_bytes for side in sides):
        return "pulling"
    return "computing" if _reported(view.source) is not None else "begun"


def _reported(side: pb.HandoffSide) -> pb.HandoffSide | None:
    return side if side.kind else None


def _side_state(side: pb.HandoffSide | None) -> str | None:
    if side is None:
        return None
    if side.kind == _ENDED:
        return _outcome(side)
    return "dead" if side.is_down else "begun" if side.kind == _BEGUN else "running"


def _outcome(side: pb.HandoffSide) -> str:
    names = pb.HandoffOutcome.DESCRIPTOR.values_by_number
    return names[side.outcome].name.removeprefix("HANDOFF_OUTCOME_").lower() if side.outcome in names else "unknown"


class Board:
    """What one watch has told so far. Ages go on by our own clock between two messages."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.kvtransfer = ""
        self.left_out = 0
        self.dropped_changes = 0
        self._clock = clock
        self._live: dict[tuple[str, int, str, bool], tuple[float, Row]] = {}  # when told, by identity
        self._ended: deque[tuple[float, Row]] = deque(maxlen=MAX_ENDED_SHOWN)  # the newest last

    def hear(self, kvtransfer: str, message: pb.WatchHandoffsResponse) -> list[Row]:
        """Take in a message. Returns: what it tells, in its order."""
        self.kvtransfer = kvtransfer
        if message.HasField("snapshot"):
            self._live.clear()
            self.left_out = message.snapshot.left_out
            self.dropped_changes += message.snapshot.dropped_changes
        views = message.snapshot.handoffs if message.HasField("snapshot") else message.delta.handoffs
        return [self._hear(view) for view in views]

    def live(self) -> list[Row]:
        """Live handoffs, the oldest first: what hangs is on top."""
        now = self._clock()
        rows = [msgspec.structs.replace(row, age_s=row.age_s + now - told_at) for told_at, row in self._live.values()]
        return sorted(rows, key=lambda row: (-row.age_s, row.request_id))

    def ended(self) -> list[Row]:
        """Those that ended a moment ago, the last one first."""
        now = self._clock()
        return [row for told_at, row in reversed(self._ended) if now - told_at <= LINGER_S]

    def _hear(self, view: pb.HandoffView) -> Row:
        row, id_ = row_of(view), view.handoff
        key = (id_.request_id, id_.attempt, id_.decode_incarnation, id_.is_fetch)
        if row.is_live:
            self._live[key] = (self._clock(), row)
        else:
            self._live.pop(key, None)
            self._ended.append((self._clock(), row))
        return row
