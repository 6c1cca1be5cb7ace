"""One HTTP connection: aiohttp's, with limits on what a client may take its time for, and errors in OpenAI's form.

aiohttp itself closes a connection that is idle for too long between requests; the time of a body is limited where it is read
(openai_http.py), that of a slow reader of a stream where it is written (event_writer.py).
"""

import asyncio
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from baton_runtime.log import get_logger

from baton_frontend.openai_errors import ApiError
from baton_frontend.openai_http import error_response

# How long a process that stops waits for the first request of a client that has just connected: it may have been sent already.
FIRST_REQUEST_S = 0.5

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """max_header_bytes: the request line, and each header. head_timeout_s: from the opening of a connection to the end of its first
    request's head, and from the first byte of a later one. idle_timeout_s: without a request, after an answer.
    slow_reader_timeout_s: without taking anything of an answer that waits."""

    max_header_bytes: int = 8190
    head_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0
    slow_reader_timeout_s: float = 30.0


class Connection(web.RequestHandler):
    """Between its client and the handlers. aiohttp's `_waiter` is pending exactly while the next head is awaited."""

    __slots__ = ("_head_timer", "_limits", "_reader_timer")

    def __init__(self, server: web.Server, limits: ConnectionLimits, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's own way to say none
            keepalive_timeout=limits.idle_timeout_s,
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
        )
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """A request is under way or about to be (a client that has just connected), or a part of its answer has not left this process."""
        if self.transport is None:
            return False
        if self._head_timer is not None:
            waited_s = self._loop.time() - (self._head_timer.when() - self._limits.head_timeout_s)
            if waited_s < FIRST_REQUEST_S:
                return True
        is_waiting = self._waiter is not None and not self._waiter.done()
        return not is_waiting or self.transport.get_write_buffer_size() > 0

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here: now it has to say what it wants."""
        super().connection_made(transport)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """A head that does not come in one piece gets a time limit."""
        super().data_received(data)
        if self._head_timer is None:
            if self._waiter is not None and not self._waiter.done():
                self._start_head_timer()
        elif self._messages:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        """The client does not keep up."""
        super().pause_writing()
        self._watch_reader(-1)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        for timer in (self._head_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._reader_timer = None
        super().connection_lost(exc)

    # --- aiohttp

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """A head that cannot be read: the client's fault, and no traceback in our log. The connection is closed after it."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        log.debug("http_bad_head", status=status, error=message)
        if isinstance(exc, LineTooLong):
            limit = f"{self._limits.max_header_bytes} bytes (frontend.max_header_bytes)"
            error = ApiError(431, f"the request line or a header is longer than {limit}; shorten it", code="header_too_large")
        else:
            error = ApiError(status, "the head of the request is not HTTP/1.1; check its lines and headers", code="invalid_head")
        response = error_response(error)
        response.force_close()
        return response

    # --- timers

    def _start_head_timer(self) -> None:
        self._head_timer = self._loop.call_later(self._limits.head_timeout_s, self._on_head_late)

    def _on_head_late(self) -> None:
        self._head_timer = None
        log.debug("http_head_timed_out", limit_s=self._limits.head_timeout_s)
        self.force_close()

    def _watch_reader(self, waiting_bytes: int) -> None:
        """Look again later. waiting_bytes: what waited for the client when we looked last; if no less does then, it took nothing."""
        self._reader_timer = None
        if self.transport is None:
            return
        now_waiting = self.transport.get_write_buffer_size()
        if waiting_bytes < 0 or now_waiting < waiting_bytes:
            self._reader_timer = self._loop.call_later(self._limits.slow_reader_timeout_s, self._watch_reader, now_waiting)
        else:
            log.debug("http_reader_timed_out", limit_s=self._limits.slow_reader_timeout_s, waiting_bytes=now_waiting)
            self.transport.abort()
