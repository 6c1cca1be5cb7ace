"""What we rely on in grpc.aio, pinned: if a release changes one of these, a rule of ours changes with it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from baton_runtime.testing import wait_until


class Endless:
    """A handler that streams for ever and records how it ended."""

    def __init__(self, size_bytes: int = 8) -> None:
        self.sent = 0
        self.ended: list[str] = []
        self.message = b"x" * size_bytes

    def handler(self) -> Any:
        async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
            try:
                while True:
                    yield self.message
                    self.sent += 1
                    await asyncio.sleep(0)
            except asyncio.CancelledError:
                self.ended.append("cancelled")
                raise
            finally:
                await asyncio.sleep(0.01)
                self.ended.append("cleaned up")

        return endless


async def test_client_cancel_reaches_the_handler_and_its_cleanup_completes(probe: Any) -> None:
    endless = Endless()
    async with probe(stream=[endless.handler()]) as p:
        call = p.stream("endless")(b"", timeout=10)
        await call.read()
        call.cancel()
        await wait_until(lambda: "cleaned up" in endless.ended)


async def test_cancel_while_a_generator_yields_closes_it_from_another_task(probe: Any) -> None:
    """Why nothing task-bound (TaskGroup, timeout) may span a yield: GeneratorExit, and not in the handler's task."""
    tasks: list[object] = []
    blocked = asyncio.Event()

    async def stuck(request: bytes, context: Any) -> AsyncIterator[bytes]:
        tasks.append(asyncio.current_task())
        try:
            while True:
                blocked.set()
                yield b"x" * (1 << 20)  # soon blocks: nobody reads
        except GeneratorExit:
            tasks.append(asyncio.current_task())
            raise

    async with probe(stream=[stuck]) as p:
        call = p.stream("stuck")(b"", timeout=10)
        await blocked.wait()
        call.cancel()
        await wait_until(lambda: len(tasks) == 2)
        assert tasks[0] is not tasks[1]


async def test_cancel_reaches_a_handler_that_writes_in_its_own_task_as_cancelled_error_or_failed_write(probe: Any) -> None:
    """Why long-lived handlers with tasks of their own are coroutines that use context.write(), and why they catch InternalError there:
    a write that meets the end of the call fails with it before the cancellation arrives."""
    ended: list[BaseException] = []
    running = asyncio.Event()

    async def writes(request: bytes, context: Any) -> None:
        try:
            while True:
                running.set()
                await context.write(b"x" * (1 << 20))
        except asyncio.CancelledError as e:
            ended.append(e)
            raise
        except grpc.aio.InternalError as e:
            ended.append(e)

    async with probe(stream=[writes]) as p:
        call = p.stream("writes")(b"", timeout=10)
        await running.wait()
        call.cancel()
        await wait_until(lambda: ended)


async def test_deadline_reaches_the_handler_and_the_client(probe: Any) -> None:
    endless = Endless()
    async with probe(stream=[endless.handler()]) as p:
        call = p.stream("endless")(b"", timeout=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in call:
                pass
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await wait_until(lambda: "cleaned up" in endless.ended)


async def test_leaving_the_loop_without_cancel_leaks_the_stream(probe: Any) -> None:
    """Why every client stream has `finally: call.cancel()`."""
    endless = Endless()
    async with probe(stream=[endless.handler()]) as p:
        call = p.stream("endless")(b"", timeout=10)
        async for _ in call:
            break
        before = endless.sent
        await wait_until(lambda: endless.sent > before + 100)
        assert endless.ended == []
        call.cancel()
        await wait_until(lambda: endless.ended)


async def test_transport_buffers_megabytes_before_a_slow_reader_is_felt(probe: Any) -> None:
    """Why flow control for tokens is our own queue's."""
    endless = Endless(size_bytes=64 << 10)
    async with probe(stream=[endless.handler()]) as p:
        call = p.stream("endless")(b"", timeout=10)
        await call.read()
        await wait_until(lambda: endless.sent > 32)
        call.cancel()


async def test_internal_cancellation_hangs_the_client(probe: Any) -> None:
    """Why the interceptor turns it into a status."""

    async def cancels(request: bytes, context: Any) -> bytes:
        raise asyncio.CancelledError

    async with probe(unary=[cancels]) as p:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await p.unary("cancels")(b"", timeout=0.3)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_handler_task_counts_the_cancellations_grpc_makes(probe: Any) -> None:
    """How the interceptor tells a call that was cancelled from an internal cancellation."""
    seen: list[int] = []

    async def waits(request: bytes, context: Any) -> bytes:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            seen.append(task.cancelling())
            raise
        return b""

    async with probe(unary=[waits]) as p:
        with pytest.raises(grpc.aio.AioRpcError):
            await p.unary("waits")(b"", timeout=0.1)
        await wait_until(lambda: seen == [1])


async def test_text_of_an_exception_goes_to_the_client(probe: Any) -> None:
    """Why the interceptor answers INTERNAL with an id."""

    async def fails(request: bytes, context: Any) -> bytes:
        raise ValueError("secret")

    async with probe(unary=[fails]) as p:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await p.unary("fails")(b"", timeout=5)
        assert error.value.code() is grpc.StatusCode.UNKNOWN
        assert "secret" in (error.value.details() or "")


async def test_abort_raises_an_ordinary_exception(probe: Any) -> None:
    caught: list[BaseException] = []

    async def aborts(request: bytes, context: Any) -> bytes:
        try:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no")
        except Exception as e:
            caught.append(e)
            raise
        return b""

    async with probe(unary=[aborts]) as p:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await p.unary("aborts")(b"", timeout=5)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        await wait_until(lambda: caught)
        assert isinstance(caught[0], grpc.aio.AbortError)


async def test_deadline_is_not_inherited_by_nested_calls(probe: Any) -> None:
    """Why every call gets timeout= explicitly."""
    remaining: list[float | None] = []

    async def inner(request: bytes, context: Any) -> bytes:
        remaining.append(context.time_remaining())
        return b""

    async def outer(request: bytes, context: Any) -> bytes:
        assert context.time_remaining() is not None
        answer: bytes = await p.unary("inner")(b"")
        return answer

    async with probe(unary=[inner, outer]) as p:
        await p.unary("outer")(b"", timeout=5)
    assert remaining == [None]


async def test_stop_returns_before_the_handlers_cleanup_ends(probe: Any) -> None:
    """Why GrpcServer counts its handlers."""
    running, ended = asyncio.Event(), asyncio.Event()

    async def waits(request: bytes, context: Any) -> bytes:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.2)
            ended.set()
        return b""

    async with probe(unary=[waits]) as p:
        call = p.unary("waits")(b"", timeout=10)
        await running.wait()
        await p.server.stop(0)
        assert not ended.is_set()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        await asyncio.wait_for(ended.wait(), 5)
