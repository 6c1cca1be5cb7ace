"""Errors as OpenAI's API words them: what the handlers raise, and the one table from BatonError to HTTP."""

import json
import math

from baton_runtime.errors import (
    BatonError,
    DeadlineExceeded,
    Draining,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    QueueFull,
    Unavailable,
)

from baton_frontend.request_errors import EngineCrash

_TYPES = {429: "rate_limit_error", 408: "timeout_error", 504: "timeout_error", 403: "permission_error"}
# Most special first: the first match wins.
STATUS_OF: tuple[tuple[type[BatonError], int, str], ...] = (
    (InvalidArgument, 400, "invalid_value"),
    (NotFound, 404, "not_found"),
    (PermissionDenied, 403, "permission_denied"),
    (QueueFull, 429, "queue_full"),
    (Draining, 503, "draining"),
    (Unavailable, 503, "unavailable"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (EngineCrash, 500, "engine_crash"),
)
DEFAULT_RETRY_AFTER_MS = 1000


class ApiError(Exception):
    """An answer other than 200, with what the client needs to do something about it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_ms: int = 0,
        is_final: bool = False,
    ) -> None:
        """is_final: the same call would fail again; OpenAI's clients, which send what got a 5xx twice more, are told not to."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_ms = retry_after_ms
        self.is_final = is_final

    @property
    def type(self) -> str:
        """OpenAI's error type."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> bytes:
        """The JSON body; also the payload of an error event in a stream. ASCII, so that it can stand in an SSE line."""
        body = {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        return json.dumps(body).encode()

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, rounded up, and in ms for clients that know it; X-Should-Retry where a client should not."""
        if not self.retry_after_ms:
            return {"X-Should-Retry": "false"} if self.is_final else {}
        return {"Retry-After": str(math.ceil(self.retry_after_ms / 1000)), "Retry-After-Ms": str(self.retry_after_ms)}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field and what to do about it."""
    return ApiError(400, message, param=param, code=code)


def from_baton_error(error: BatonError) -> ApiError:
    """Translate once, by table. Faults of ours (INTERNAL, DATA_LOSS, ...) become 500 and keep their text to the log."""
    for kind, status, code in STATUS_OF:
        if isinstance(error, kind):
            retry_after_ms = (error.retry_after_ms or DEFAULT_RETRY_AFTER_MS) if status in (429, 503) else 0
            param = error.field if isinstance(error, InvalidArgument) else None
            is_final = status >= 500 and not error.retryable
            return ApiError(status, str(error), param=param, code=code, retry_after_ms=retry_after_ms, is_final=is_final)
    return ApiError(500, "the server failed on this request; its log has the details under the request id", code=error.reason.lower())
