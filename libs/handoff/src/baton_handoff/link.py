"""What both ends of a pair's channel share: the bounded queue to the peer, the writer that never falls silent, the owner.

One `HandoffService.Pair` stream per pair, opened by the sink (`pair_client`), served by the source (`pair_servicer`). The books
never see a stream: they see messages, link_up, link_down, and fences.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import grpc
from baton_engine.api import EngineBeat
from baton_runtime.errors import BatonError, QueueFull, Unavailable
from baton_runtime.streams import Outbox

from baton_handoff.ids import FailureCause, HandoffKey
from baton_handoff.messages import FromSink, FromSource, Message
from baton_handoff.peer_watch import FenceReason

BATCH_MESSAGES = 64
# What writing to a stream that has ended raises (the last at a server); its reader learns the status.
STREAM_ENDED = (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.InternalError)


def is_eof(message: object) -> bool:
    """Whether a read found the end of the stream."""
    return message is getattr(grpc.aio, "EOF")  # noqa: B009  # missing in the stubs


class LinkOwner(Protocol):
    """What the links tell the manager, on the event loop; each call returns at once."""

    def engine_beat(self) -> EngineBeat:
        """What every message carries."""

    def notice(self) -> float:
        """Something is about to be looked at: fence everybody first if our own loop stood still. Returns: now."""

    # Of links to sources.

    def source_link_opened(self, incarnation: str) -> None:
        """Our hello is the next thing a source hears; what is said from now on arrives after it."""

    def heard_source(self, incarnation: str, message: FromSource) -> None:
        """A source said something."""

    def source_failed(self, incarnation: str, cause: FailureCause, reason: FenceReason) -> None:
        """A source will not have us: everything with it ends."""

    # Of links from sinks.

    def sink_linked(self, incarnation: str, secret: bytes, listed: list[HandoffKey]) -> None:
        """A sink has opened or re-opened its link; our welcome is the next thing it hears."""

    def heard_sink(self, incarnation: str, message: FromSink) -> None:
        """A sink said something."""

    def is_sink_in_use(self, incarnation: str) -> bool:
        """Whether a sink has begun a handoff with us that is not over."""

    def sink_lost(self, incarnation: str, *, is_closed: bool) -> None:
        """A sink's link broke, or (is_closed) was closed by a sink that has no handoff with us."""


class MessageQueue:
    """Messages to one peer on one stream. A peer that lets it fill up is cut off: nothing of ours may grow without bound."""

    def __init__(self, limit: int) -> None:
        self._outbox: Outbox[Message] = Outbox(limit)
        self.is_overrun = asyncio.Event()

    def put(self, message: Message) -> None:
        """Queue it. If the queue is full or closed it is dropped: the link is about to break, and the next one says it again."""
        try:
            self._outbox.put(message)
        except QueueFull:
            self.is_overrun.set()
        except Unavailable:
            pass

    def close(self) -> None:
        """What is queued still goes out, then write_all returns."""
        self._outbox.close()

    async def write_all(self, write: Callable[[Message | None], Awaitable[None]], beat_s: float) -> None:
        """Write what is queued, in order, and None whenever nothing was for beat_s. Returns once closed and drained."""
        while True:
            try:
                async with asyncio.timeout(beat_s):
                    batch = await self._outbox.get_batch(BATCH_MESSAGES)
            except TimeoutError:
                await write(None)
                continue
            if not batch:
                return
            for message in batch:
                await write(message)


async def until_first(*works: Coroutine[Any, Any, object]) -> None:
    """Run coroutines until one ends, then cancel the others and wait for them.

    Raises: the one of STREAM_ENDED or the BatonError that ended it. Other exceptions are bugs: an ExceptionGroup.
    """
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_error_of(work), name="link") for work in works]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
    for task in tasks:
        error = None if task.cancelled() else task.result()
        if error is not None:
            raise error


async def _error_of(work: Coroutine[Any, Any, object]) -> Exception | None:
    # Returned, not raised: an error of a child that meets a cancellation of the whole would take its place in a TaskGroup.
    try:
        await work
    except (*STREAM_ENDED, BatonError) as error:
        return error
    return None
