"""Reading and writing of long-lived gRPC client streams, with one exception for every way they can break."""

import asyncio
import traceback
from typing import Any

import grpc
from baton_runtime.rpc import split_address


class StreamBroken(Exception):
    """The stream is over: closed, reset, timed out, or the other side does not keep the protocol."""


async def read_message(call: Any) -> Any:
    """The next message. Raises: StreamBroken."""
    try:
        message = await call.read()
    except grpc.aio.AioRpcError as error:
        raise StreamBroken(f"{error.code().name}: {error.details()}") from error
    except asyncio.CancelledError:
        if is_task_cancelled():
            raise
        raise StreamBroken("call was cancelled") from None
    if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in the stubs
        raise StreamBroken("closed by the other side")
    return message


# A writer rests so long after each message, so that what comes meanwhile travels together: a message costs each side as much as 50 to 100
# tokens, and at some hundred requests per second nearly every one would have messages of its own. When little goes on nothing waits.
WRITE_PACE_S = 0.002


async def write_message(call: Any, message: Any) -> None:
    """Returns when the transport took the message. Raises: StreamBroken."""
    try:
        await call.write(message)
    except grpc.aio.AioRpcError as error:
        raise StreamBroken(f"{error.code().name}: {error.details()}") from error
    except asyncio.InvalidStateError as error:
        raise StreamBroken("call has ended") from error
    except asyncio.CancelledError:
        if is_task_cancelled():
            raise
        raise StreamBroken("call was cancelled") from None


def is_task_cancelled() -> bool:
    """Whether this task is being cancelled.

    grpc.aio raises CancelledError also for a call that was cancelled, and a TaskGroup whose child fails while the task is
    cancelled raises the child's error instead: neither the presence nor the absence of CancelledError tells.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def release_frames(error: BaseException) -> None:
    """Let go of what the frames hold that a handled exception went through, its group's and its causes' included.

    A TaskGroup keeps its children's exceptions, whose tracebacks keep its frames: a ring, with the session's channel in it (some 100 KB),
    which only the collector would free. It runs seldom here (`tune_gc`). Frames that still run keep what they hold: delete there.
    """
    traceback.clear_frames(error.__traceback__)
    members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for inner in (*members, error.__cause__, error.__context__):
        if inner is not None:
            release_frames(inner)


async def is_refused(address: str, timeout_s: float) -> bool:
    """Whether host:port answers that nobody listens there: the process is gone, not only out of reach."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host.strip("[]"), port)
    except ConnectionRefusedError:
        return True
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        pass
    return False
