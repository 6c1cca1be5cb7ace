"""The tokens of one sequence on their way to its frontend."""

import sys
from array import array
from collections import deque
from collections.abc import Iterable, Sequence

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import SequenceKey, TokenLogprobs

# Acknowledged tokens are cut off in pieces of this size, so that a long answer does not pay for it at each step.
_TRIM_TOKENS = 512

TOKEN_FRAME_BYTES = 12  # one entry in each of three u32 columns
LOGPROBS_FRAME_BYTES = 24  # fixed part of a Logprobs message, on the wire
FINISHED_FRAME_BYTES = 64


class OutputLog:
    """Tokens of one sequence by output position, kept until the frontend has acknowledged them.

        first <= acked <= sent <= end        all are output positions, half-open
        [first, acked)  acknowledged, cut off sooner or later
        [acked, sent)   in frames that are not acknowledged
        [sent, end)     not sent

    finished is the one terminal record, sent in or after the frame that carries position end - 1.
    """

    __slots__ = (
        "_first",
        "_logprobs",
        "_tokens",
        "acked",
        "end",
        "finished",
        "finished_frame",
        "is_cancelled",
        "is_paused",
        "key",
        "sent",
        "slot",
        "start",
    )

    def __init__(self, slot: int, key: SequenceKey, next_position: int) -> None:
        self.slot = slot
        self.key = key
        self.start = next_position
        self._first = next_position
        self._tokens = array("I")
        self._logprobs: deque[TokenLogprobs] = deque()
        self.acked = next_position
        self.sent = next_position
        self.end = next_position
        self.finished: pb.Finished | None = None
        self.finished_frame = 0  # number of the frame that carries finished; 0: in none
        self.is_paused = False
        self.is_cancelled = False  # only the end is of interest

    @property
    def first(self) -> int:
        """Lowest position that can still be sent again."""
        return self._first

    @property
    def unsent(self) -> int:
        """Tokens not sent."""
        return self.end - self.sent

    @property
    def has_logprobs(self) -> bool:
        """Whether any token here has them."""
        return bool(self._logprobs)

    def append(self, token_ids: Sequence[int]) -> None:
        """The tokens from position `end` on."""
        self._tokens.extend(token_ids)
        self.end += len(token_ids)

    def append_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Of a token appended before or after; positions rise."""
        self._logprobs.append(logprobs)

    def token(self, position: int) -> int:
        """The token at a position."""
        return self._tokens[position - self._first]

    def tokens(self, start: int, stop: int) -> "array[int]":
        """Tokens at positions [start, stop), type code "I"."""
        return self._tokens[start - self._first : stop - self._first]

    def logprobs(self, start: int, stop: int) -> list[TokenLogprobs]:
        """Logprobs of positions [start, stop); empty if the sequence did not ask for them."""
        if not self._logprobs:
            return []
        return [entry for entry in self._logprobs if start <= entry.position < stop]

    def affordable(self, budget_bytes: int) -> tuple[int, int]:
        """How many unsent tokens fit into budget_bytes of a frame, and their size there. At least one if the budget is positive."""
        if not self._logprobs:
            count = min(self.end - self.sent, -(-budget_bytes // TOKEN_FRAME_BYTES))
            return count, count * TOKEN_FRAME_BYTES
        sizes = {entry.position: LOGPROBS_FRAME_BYTES + 8 * len(entry.top_token_ids) for entry in self._logprobs}
        count = size = 0
        while count < self.unsent and size < budget_bytes:
            size += TOKEN_FRAME_BYTES + sizes.get(self.sent + count, 0)
            count += 1
        return count, size

    def acknowledge(self, position: int) -> None:
        """The frontend has everything below position: drop it, in pieces."""
        if position <= self.acked:
            return
        self.acked = position
        while self._logprobs and self._logprobs[0].position < position:
            self._logprobs.popleft()
        if position - self._first >= _TRIM_TOKENS:
            del self._tokens[: position - self._first]
            self._first = position

    def can_resend_from(self, position: int) -> bool:
        """Whether every token from position on is still here."""
        return self.acked <= position <= self.end and position >= self._first

    def rewind(self, position: int) -> None:
        """Send again from position on, and the end after it. The frontend has what is below."""
        self.acknowledge(position)
        self.sent = position
        self.finished_frame = 0

    def drop_unsent(self) -> None:
        """Nobody wants the rest: the end may follow at once."""
        self.end = self.sent
        del self._tokens[self.end - self._first :]
        self._logprobs = deque(entry for entry in self._logprobs if entry.position < self.end)


class FrameColumns:
    """The u32 columns slots, positions, token_ids of a frame while it is filled."""

    __slots__ = ("_positions", "_slots", "_token_ids")

    def __init__(self) -> None:
        self._slots, self._positions, self._token_ids = array("I"), array("I"), array("I")

    def add(self, log: OutputLog, count: int) -> None:
        """The next count unsent tokens of a sequence; they count as sent from here on."""
        position = log.sent
        if count == 1:  # the common case: one step
            self._slots.append(log.slot)
            self._positions.append(position)
            self._token_ids.append(log.token(position))
        else:
            self._slots.extend([log.slot] * count)
            self._positions.extend(range(position, position + count))
            self._token_ids.extend(log.tokens(position, position + count))
        log.sent = position + count

    def write_to(self, frame: pb.AttachResponse) -> None:
        """Put the columns into a frame."""
        frame.slots, frame.positions, frame.token_ids = u32_bytes(self._slots), u32_bytes(self._positions), u32_bytes(self._token_ids)


def u32_bytes(column: Iterable[int]) -> bytes:
    """A column as it travels: little-endian u32."""
    return _little_endian(column if isinstance(column, array) else array("I", column))


def f32_bytes(column: Iterable[float]) -> bytes:
    """A column as it travels: little-endian f32."""
    return _little_endian(array("f", column))


def _little_endian(column: "array[int] | array[float]") -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()
