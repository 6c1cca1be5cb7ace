"""Errors of the block manager and the engines. What a service must answer to its callers is the service's mapping.

CacheFull        not enough blocks; nothing was taken
IntegrityError   the block manager's own books are wrong: a bug
SequenceTooLong  the request can never run here
EngineFailed     the engine died or was closed
StepFailed       a step failed because of known sequences; raised by runners only
ProfileError     a sim profile or a model folder is not usable; names the field
"""

from collections.abc import Hashable, Iterable


class CacheFull(Exception):
    """Fewer blocks are free or evictable than asked for. Nothing was taken."""

    def __init__(self, needed: int, available: int) -> None:
        self.needed = needed
        self.available = available
        super().__init__(f"{needed} blocks needed, {available} free or evictable")


class IntegrityError(Exception):
    """The block manager contradicts itself."""


class SequenceTooLong(Exception):
    """The sequence does not fit into the model's length or the whole pool."""

    def __init__(self, num_tokens: int, limit_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.limit_tokens = limit_tokens
        super().__init__(f"{num_tokens} tokens and the first drawn one exceed the limit of {limit_tokens}")


class EngineFailed(Exception):
    """The engine has ended; every sequence it had was reported as ended."""


class StepFailed(Exception):
    """A step failed because of known sequences; the others may run again. message: for the log, no prompt text."""

    def __init__(self, keys: Iterable[Hashable], message: str) -> None:
        self.keys = frozenset(keys)
        super().__init__(message)


class ProfileError(Exception):
    """A configuration file cannot be used."""

    def __init__(self, source: str, field: str, problem: str) -> None:
        self.source = source
        self.field = field
        super().__init__(f"{source}: {field}: {problem}")
