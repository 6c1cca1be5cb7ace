"""Errors of the engine."""

from collections.abc import Iterable

from baton_engine.api import SequenceKey


class StepFailed(Exception):
    """A step failed because of known sequences; the others may run again."""

    def __init__(self, keys: Iterable[SequenceKey], message: str) -> None:
        self.keys = frozenset(keys)
        super().__init__(message)
