"""Errors of the block manager and the engines.

BatonError (runtime)       reason              status
|- CacheFull               CACHE_FULL          RESOURCE_EXHAUSTED   not enough blocks; nothing was taken
|- InvalidArgument
|  |- SequenceTooLong      SEQUENCE_TOO_LONG   INVALID_ARGUMENT     it can never run here
|  `- ConfigError
|     `- ProfileError      PROFILE_INVALID     INVALID_ARGUMENT     a sim profile is not usable
|- Unavailable
|  `- EngineFailed         ENGINE_FAILED       UNAVAILABLE          the engine died or was closed
|- ReceiveFailed           RECEIVE_FAILED      UNAVAILABLE          an engine's own handoff brought no KV
`- IntegrityError          KV_INTEGRITY        INTERNAL             the block manager's books are wrong: a bug
StepFailed                 never leaves the engine
"""

from collections.abc import Hashable, Iterable

import grpc
from baton_runtime.errors import BatonError, ConfigError, InvalidArgument, Unavailable


class CacheFull(BatonError):
    """Fewer blocks are free or evictable than asked for. Nothing was taken."""

    reason = "CACHE_FULL"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"{needed} blocks needed, {available} free or evictable", needed=needed, available=available)
        self.needed = needed
        self.available = available


class IntegrityError(BatonError):
    """The block manager contradicts itself."""

    reason = "KV_INTEGRITY"
    status = grpc.StatusCode.INTERNAL


class SequenceTooLong(InvalidArgument):
    """The sequence, and the first token drawn, do not fit into the model's length or the whole pool."""

    reason = "SEQUENCE_TOO_LONG"

    def __init__(self, num_tokens: int, limit_tokens: int) -> None:
        super().__init__("token_ids", f"{num_tokens} tokens, at most {limit_tokens} fit")
        self.num_tokens = num_tokens
        self.limit_tokens = limit_tokens


class ProfileError(ConfigError):
    """A sim profile cannot be used; names the file and the field."""

    reason = "PROFILE_INVALID"


class EngineFailed(Unavailable):
    """The engine has ended; every sequence it had was reported as ended."""

    reason = "ENGINE_FAILED"


class ReceiveFailed(BatonError):
    """The source's engine did not hand its KV over; nothing of it may be used. The message is the engine's own."""

    reason = "RECEIVE_FAILED"
    status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class StepFailed(Exception):
    """A step failed because of known sequences; the others may run again. message: for the log, no prompt text."""

    def __init__(self, keys: Iterable[Hashable], message: str) -> None:
        self.keys = frozenset(keys)
        super().__init__(message)
