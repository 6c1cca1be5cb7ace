"""What clients see of what escapes a handler, on a real server."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from baton_runtime import errors
from baton_runtime.errors import BatonError, ErrorInterceptor, from_rpc_error
from baton_runtime.testing import wait_until


class PoolFull(errors.QueueFull):
    """A service's own child."""

    reason = "POOL_FULL"


async def drained(call: Any) -> None:
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await drained(call)
    return error.value


def raising(error: BaseException) -> Any:
    async def method(request: bytes, context: Any) -> bytes:
        raise error

    return method


async def call_failing(probe: Any, error: BaseException) -> grpc.aio.AioRpcError:
    async with probe(unary=[raising(error)], interceptors=[ErrorInterceptor()]) as p:
        return await failure(p.unary("method")(b"", timeout=5))


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgument("seed", "is negative"),
        errors.NotFound("handoff", "r-1"),
        errors.QueueFull(depth=64, limit=64, retry_after_ms=50),
        errors.Draining("decode-0"),
        errors.Unavailable("not ready"),
        errors.StaleIncarnation("a", "b"),
        errors.StaleAttempt("r-1", 1, 2),
        errors.DataLoss("tag differs"),
        errors.PermissionDenied("unknown pair"),
        errors.DeadlineExceeded(),
        errors.Cancelled(),
        errors.Internal("1234"),
        PoolFull(depth=1, limit=2),
    ],
    ids=lambda e: e.reason,
)
async def test_error_arrives_with_class_status_and_facts(probe: Any, error: BatonError) -> None:
    seen = await call_failing(probe, error)
    back = from_rpc_error(seen)
    assert seen.code() is error.status
    assert type(back) is type(error)
    assert (back.message, back.facts, back.retry_after_ms) == (error.message, error.facts, error.retry_after_ms)
    assert errors._error_info(seen).domain == "baton.probe.v1"  # type: ignore[union-attr]


async def test_text_of_an_unknown_exception_stays_here(probe: Any) -> None:
    seen = await call_failing(probe, ValueError("a secret"))
    assert seen.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in f"{seen.details()}{seen.debug_error_string()}{seen.trailing_metadata()}"
    assert from_rpc_error(seen).facts["error_id"] in (seen.details() or "")


async def test_group_with_a_known_error_is_that_error(probe: Any) -> None:
    group = ExceptionGroup("tasks", [ValueError("x"), ExceptionGroup("more", [errors.NotFound("request", "r")])])
    assert isinstance(from_rpc_error(await call_failing(probe, group)), errors.NotFound)


async def test_group_of_unknown_errors_is_internal(probe: Any) -> None:
    assert (await call_failing(probe, ExceptionGroup("tasks", [ValueError("x")]))).code() is grpc.StatusCode.INTERNAL


async def test_internal_cancellation_is_answered(probe: Any) -> None:
    assert (await call_failing(probe, asyncio.CancelledError())).code() is grpc.StatusCode.INTERNAL


async def test_abort_passes_through(probe: Any) -> None:
    async def aborts(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "as said")
        return b""

    async with probe(unary=[aborts], interceptors=[ErrorInterceptor()]) as p:
        seen = await failure(p.unary("aborts")(b"", timeout=5))
    assert (seen.code(), seen.details()) == (grpc.StatusCode.OUT_OF_RANGE, "as said")
    assert isinstance(from_rpc_error(seen), errors.Internal)


async def test_every_kind_of_handler_is_covered(probe: Any) -> None:
    async def generates(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        raise errors.NotFound("a", "b")

    async def writes(request: bytes, context: Any) -> None:
        await context.write(b"one")
        raise errors.NotFound("a", "b")

    async def echoes(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
        raise errors.NotFound("a", "b")

    async def collects(requests: AsyncIterator[bytes], context: Any) -> bytes:
        async for _ in requests:
            pass
        raise errors.NotFound("a", "b")

    async def two() -> AsyncIterator[bytes]:
        yield b"1"
        yield b"2"

    interceptor = ErrorInterceptor()
    async with probe(stream=[generates, writes], both=[echoes], up=[collects], interceptors=[interceptor]) as p:
        for call in (
            p.stream("generates")(b"", timeout=5),
            p.stream("writes")(b"", timeout=5),
            p.both("echoes")(two(), timeout=5),
            p.up("collects")(two(), timeout=5),
        ):
            assert (await failure(call)).code() is grpc.StatusCode.NOT_FOUND
        await wait_until(lambda: interceptor.registry.running == 0)


async def test_status_hidden_by_a_write_that_failed_under_way_is_unavailable() -> None:
    def failed(details: str) -> BatonError:
        metadata = grpc.aio.Metadata()
        return from_rpc_error(grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, metadata, metadata, details=details))

    assert isinstance(failed("Internal error from Core"), errors.Unavailable)
    assert isinstance(failed("something else"), errors.Internal)


async def test_good_answers_are_untouched(probe: Any) -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    async def twice(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        yield request

    async with probe(unary=[echo], stream=[twice], interceptors=[ErrorInterceptor()]) as p:
        assert await p.unary("echo")(b"x", timeout=5) == b"x"
        assert [m async for m in p.stream("twice")(b"x", timeout=5)] == [b"x", b"x"]


async def test_a_call_the_client_cancels_leaves_no_handler(probe: Any) -> None:
    async def waits(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"ready"
        await asyncio.Event().wait()

    interceptor = ErrorInterceptor()
    async with probe(stream=[waits], interceptors=[interceptor]) as p:
        call = p.stream("waits")(b"", timeout=10)
        await call.read()
        assert interceptor.registry.running == 1
        call.cancel()
        await wait_until(lambda: interceptor.registry.running == 0)
        assert await interceptor.registry.wait_idle(1)


async def test_unknown_method_is_unimplemented(probe: Any) -> None:
    async with probe(unary=[raising(ValueError())], interceptors=[ErrorInterceptor()]) as p:
        assert (await failure(p.unary("nothing")(b"", timeout=5))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_dead_server_is_unavailable(probe: Any) -> None:
    async with probe(unary=[raising(ValueError())]) as p:
        await p.server.stop(0)
        assert isinstance(from_rpc_error(await failure(p.unary("method")(b"", timeout=5))), errors.Unavailable)


def test_domain_is_the_proto_package() -> None:
    assert errors._domain("/baton.router.v1.RouterService/Route") == "baton.router.v1"


def test_reasons_are_unique() -> None:
    def tree(cls: type[BatonError]) -> list[type[BatonError]]:
        return [cls, *(c for child in cls.__subclasses__() for c in tree(child))]

    reasons = [cls.reason for cls in tree(BatonError) if "reason" in vars(cls) and cls.__module__.startswith("baton_")]
    assert len(reasons) == len(set(reasons))
