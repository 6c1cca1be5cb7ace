"""Outbox: the bounded queue in front of the one task that writes to a gRPC stream.

gRPC buffers megabytes before a write blocks (100,000 small messages and more, pinned by
tests/test_grpc_facts.py), so a slow reader must be noticed here. Whatever was put while a write was under way leaves as
one batch: natural batches without a timer.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from baton_runtime.errors import QueueFull, Unavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OutboxStats:
    """Numbers of one outbox. depth, limit in items; refused: puts that raised QueueFull; batches, items: taken so far."""

    depth: int
    limit: int
    refused: int
    batches: int
    items: int


class Outbox(Generic[T]):
    """A bounded FIFO for one event loop; `put` from many, `get_batch` from one task.

    When full, `put` refuses; nothing waits and nothing is dropped.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}, must be at least 1")
        self._limit = limit
        self._urgent: deque[T] = deque()
        self._items: deque[T] = deque()
        self._wake = asyncio.Event()
        self._is_closed = False
        self._refused = 0
        self._batches = 0
        self._taken = 0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._items)

    def put(self, item: T, *, urgent: bool = False) -> None:
        """Queue an item. urgent: before all that are not (a Cancel overtakes a long Start), behind earlier urgent ones.

        Raises: QueueFull, nothing is queued then; Unavailable after close().
        """
        if self._is_closed:
            raise Unavailable("the stream is closed")
        if len(self) >= self._limit:
            self._refused += 1
            raise QueueFull(depth=len(self), limit=self._limit)
        (self._urgent if urgent else self._items).append(item)
        self._wake.set()

    async def get_batch(self, max_items: int) -> list[T]:
        """Wait for at least one item, then take up to max_items at once. Empty list: closed and drained.

        Cancelling it loses nothing.
        """
        while not self:
            if self._is_closed:
                return []
            self._wake.clear()
            await self._wake.wait()
        batch = [self._pop() for _ in range(min(max_items, len(self)))]
        self._batches += 1
        self._taken += len(batch)
        return batch

    def close(self) -> None:
        """Refuse further puts; get_batch still hands out what is queued, then empty lists. Idempotent."""
        self._is_closed = True
        self._wake.set()

    def stats(self) -> OutboxStats:
        """Numbers for metrics and people."""
        return OutboxStats(depth=len(self), limit=self._limit, refused=self._refused, batches=self._batches, items=self._taken)

    def _pop(self) -> T:
        return (self._urgent or self._items).popleft()
