"""The errors of Baton, and their one mapping to gRPC.

    BatonError                 reason                status               retryable
    |- InvalidArgument         INVALID_ARGUMENT      INVALID_ARGUMENT     no
    |  `- ConfigError          CONFIG_INVALID        INVALID_ARGUMENT     no
    |- NotFound                NOT_FOUND             NOT_FOUND            no
    |- QueueFull               QUEUE_FULL            RESOURCE_EXHAUSTED   yes
    |- Unavailable             UNAVAILABLE           UNAVAILABLE          yes
    |  `- Draining             DRAINING              UNAVAILABLE          yes
    |- StaleIncarnation        STALE_INCARNATION     FAILED_PRECONDITION  yes
    |- StaleAttempt            STALE_ATTEMPT         ABORTED              yes
    |- DataLoss                DATA_LOSS             DATA_LOSS            yes
    |- PermissionDenied        PERMISSION_DENIED     PERMISSION_DENIED    no
    |- DeadlineExceeded        DEADLINE_EXCEEDED     DEADLINE_EXCEEDED    no
    |- Cancelled               CANCELLED             CANCELLED            no
    `- Internal                INTERNAL              INTERNAL             no

retryable: another placement of the same request may succeed (never: the same call to the same instance will).
Over the wire an error is its status plus one google.rpc.ErrorInfo: reason, domain (the proto package of the called
service) and metadata (the facts). Services add children of these; `from_rpc_error` finds a child by its reason again.
"""

import asyncio
import contextlib
import inspect
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, ClassVar, TypeVar

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from baton_runtime.log import get_logger

RETRY_AFTER_KEY = "retry_after_ms"
log = get_logger(__name__)


class BatonError(Exception):
    """Root of all errors Baton raises on purpose.

    facts: quantities and names behind the message, as strings, for logs and ErrorInfo.metadata; never prompts or secrets.
    retry_after_ms: when to try again, in ms; 0: no advice.
    """

    reason: ClassVar[str] = "UNKNOWN"
    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    retryable: ClassVar[bool] = False

    retry_after_ms: int = 0
    facts: dict[str, str]

    def __init__(self, message: str, *, retry_after_ms: int = 0, **facts: object) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms
        self.facts = {name: str(value) for name, value in facts.items()}

    @property
    def message(self) -> str:
        """What happened, for people."""
        return str(self.args[0]) if self.args else ""


class InvalidArgument(BatonError):
    """The caller's input is wrong; trying again will not help."""

    reason = "INVALID_ARGUMENT"
    status = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field)

    @property
    def field(self) -> str:
        """Name of the wrong field; empty if the peer named none."""
        return self.facts.get("field", "")


class ConfigError(InvalidArgument):
    """A setting is wrong: the process must not start. field is `<service>.<field>`."""

    reason = "CONFIG_INVALID"


class NotFound(BatonError):
    """Nothing has that name here."""

    reason = "NOT_FOUND"
    status = grpc.StatusCode.NOT_FOUND

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"no {kind} {name!r}", kind=kind, name=name)


class QueueFull(BatonError):
    """A bounded queue refused an item; nothing was queued."""

    reason = "QUEUE_FULL"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True

    def __init__(self, depth: int, limit: int, retry_after_ms: int = 0) -> None:
        super().__init__(f"queue is full: {depth} of {limit}", retry_after_ms=retry_after_ms, depth=depth, limit=limit)


class Unavailable(BatonError):
    """The other side is gone or not ready; nothing was executed, or the call is idempotent."""

    reason = "UNAVAILABLE"
    status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class Draining(Unavailable):
    """The instance finishes its work and takes nothing new."""

    reason = "DRAINING"

    def __init__(self, instance_id: str = "") -> None:
        super().__init__(f"{instance_id or 'instance'} is draining", instance_id=instance_id)


class StaleIncarnation(BatonError):
    """The message was meant for another life of the receiver, or comes from one that is over."""

    reason = "STALE_INCARNATION"
    status = grpc.StatusCode.FAILED_PRECONDITION
    retryable = True

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"incarnation is {expected}, not {got}", expected=expected, got=got)


class StaleAttempt(BatonError):
    """A higher attempt of the request was seen before."""

    reason = "STALE_ATTEMPT"
    status = grpc.StatusCode.ABORTED
    retryable = True

    def __init__(self, request_id: str, attempt: int, highest: int) -> None:
        super().__init__(
            f"attempt {attempt} of {request_id} is older than {highest}", request_id=request_id, attempt=attempt, highest=highest
        )


class DataLoss(BatonError):
    """KV bytes or their tag are not what they should be. Recompute, and alert."""

    reason = "DATA_LOSS"
    status = grpc.StatusCode.DATA_LOSS
    retryable = True


class PermissionDenied(BatonError):
    """The caller may not do this."""

    reason = "PERMISSION_DENIED"
    status = grpc.StatusCode.PERMISSION_DENIED


class DeadlineExceeded(BatonError):
    """The time the caller gave ran out."""

    reason = "DEADLINE_EXCEEDED"
    status = grpc.StatusCode.DEADLINE_EXCEEDED

    def __init__(self, message: str = "deadline exceeded") -> None:
        super().__init__(message)


class Cancelled(BatonError):
    """The other side ended the call, or an internal cancellation escaped a handler."""

    reason = "CANCELLED"
    status = grpc.StatusCode.CANCELLED

    def __init__(self, message: str = "cancelled") -> None:
        super().__init__(message)


class Internal(BatonError):
    """A bug. error_id is also in the log of the process that failed."""

    reason = "INTERNAL"
    status = grpc.StatusCode.INTERNAL

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}", error_id=error_id)


E = TypeVar("E", bound=BatonError)

_CLASS_OF_STATUS: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: StaleIncarnation,
    grpc.StatusCode.ABORTED: StaleAttempt,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def to_status(error: BatonError, domain: str) -> Any:
    """The error as grpc.Status (code, details, trailing_metadata with one google.rpc.ErrorInfo)."""
    metadata = dict(error.facts)
    if error.retry_after_ms:
        metadata[RETRY_AFTER_KEY] = str(error.retry_after_ms)
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=domain, metadata=metadata))
    return rpc_status.to_status(status_pb2.Status(code=error.status.value[0], message=error.message, details=[detail]))


def from_rpc_error(e: grpc.aio.AioRpcError) -> BatonError:
    """The error the server meant: class by ErrorInfo.reason, else by status; facts and retry_after_ms as sent.

    Raise it `from e`. A status without a class of its own (UNKNOWN, INTERNAL, UNIMPLEMENTED, ...) becomes Internal, but for the one
    with which grpc.aio hides the server's own when a stream ends while we write to it: that is Unavailable.
    """
    info = _error_info(e)
    base = Unavailable if _is_masked(e) else _CLASS_OF_STATUS.get(e.code(), Internal)
    found = _class_of_reason(info.reason) if info is not None else None
    cls = found if found is not None and found.status is e.code() else base
    facts = dict(info.metadata) if info is not None else {}
    retry_after = facts.pop(RETRY_AFTER_KEY, "0")
    return _rebuilt(cls, e.details() or e.code().name, int(retry_after) if retry_after.isdecimal() else 0, facts)


def _is_masked(e: grpc.aio.AioRpcError) -> bool:
    return e.code() is grpc.StatusCode.INTERNAL and e.details() == "Internal error from Core"


def _error_info(e: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo | None:
    """The ErrorInfo of a failed call; None if the peer sent none, or something that does not parse."""
    trailing: Any = e.trailing_metadata() or ()  # its stub is wrong: pairs of (str, str | bytes)
    for key, value in trailing:
        if key != "grpc-status-details-bin":
            continue
        try:
            rich = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
        except ValueError:  # protobuf's DecodeError is one
            return None
        for detail in rich.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
                return info
    return None


def _class_of_reason(reason: str) -> type[BatonError] | None:
    pending: list[type[BatonError]] = [BatonError]
    while pending:
        cls = pending.pop()
        if cls.reason == reason:
            return cls
        pending.extend(cls.__subclasses__())
    return None


def _rebuilt(cls: type[E], message: str, retry_after_ms: int, facts: dict[str, str]) -> E:
    # Constructors take facts as arguments and build the message; here both came ready-made from the peer.
    error = cls.__new__(cls)
    BatonError.__init__(error, message, retry_after_ms=retry_after_ms, **facts)
    return error


class HandlerRegistry:
    """Counts the handlers that run in a server, their cleanup included; `grpc.aio.Server.stop()` does not wait for that."""

    def __init__(self) -> None:
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Handlers that have not ended."""
        return self._running

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Count one handler for the length of the block."""
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """True once no handler runs; False if some still do after timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """Turns what escapes a handler into a status: the only place where that is decided.

    BatonError: its status and ErrorInfo. An ExceptionGroup: the BatonError in it, if any. `context.abort()`: as it is. A
    CancelledError while the call itself was not cancelled: INTERNAL (grpc.aio would answer nothing and the client would hang).
    Anything else: INTERNAL with an id that is also in our log; its text never leaves the process.
    Handlers must be coroutine functions or async generator functions; others are left alone.
    A handler whose writes may be cancelled calls `rpc.open_responses` first.
    """

    def __init__(self, registry: HandlerRegistry | None = None) -> None:
        self.registry = registry if registry is not None else HandlerRegistry()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler grpc found, keeping its kind and its serializers."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = ("stream" if handler.request_streaming else "unary") + "_" + ("stream" if handler.response_streaming else "unary")
        inner = getattr(handler, kind)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            self._wrapped(inner, handler_call_details.method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _wrapped(self, inner: Callable[..., Any], method: str) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(inner):

            async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
                with self.registry.entered():
                    try:
                        async with contextlib.aclosing(inner(request, context)) as responses:
                            async for response in responses:
                                yield response
                    except (Exception, asyncio.CancelledError) as escaped:
                        await self._end(escaped, context, method)

            return generate
        if inspect.iscoroutinefunction(inner):

            async def call(request: Any, context: Any) -> Any:
                with self.registry.entered():
                    try:
                        return await inner(request, context)
                    except (Exception, asyncio.CancelledError) as escaped:
                        return await self._end(escaped, context, method)

            return call
        return inner

    async def _end(self, escaped: BaseException, context: Any, method: str) -> None:
        """Raises, always: what escaped if it is not ours to translate, else AbortError."""
        if isinstance(escaped, asyncio.CancelledError) and _is_task_cancelled():
            raise escaped  # the client left, its deadline passed, or the server stops: grpc's own cancellation
        single = _single(escaped)
        if isinstance(single, grpc.aio.AbortError):
            raise single
        if not isinstance(single, BatonError):
            error_id = secrets.token_hex(8)
            log.error("handler_failed", method=method, error_id=error_id, exc_info=escaped)
            single = Internal(error_id)
        status = to_status(single, _domain(method))
        await context.abort(status.code, status.details, status.trailing_metadata)


def _is_task_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _single(escaped: BaseException) -> BaseException:
    """Of a group: an AbortError (the status is sent already), else a bug, else a BatonError; the group if it has none."""
    if not isinstance(escaped, BaseExceptionGroup):
        return escaped
    leaves = list(_leaves(escaped))
    for wanted in (grpc.aio.AbortError, BatonError):
        for leaf in leaves:
            if isinstance(leaf, wanted):
                return leaf
    return escaped


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for inner in group.exceptions:
        if isinstance(inner, BaseExceptionGroup):
            yield from _leaves(inner)
        else:
            yield inner


def _domain(method: str) -> str:
    """ "/baton.router.v1.RouterService/Route" -> "baton.router.v1"."""
    return method.strip("/").partition("/")[0].rpartition(".")[0]
