"""Server-sent events written straight to the transport.

aiohttp parses requests and keeps connections; the bytes of a stream go past it: a write per token through
StreamResponse costs a wake-up of a coroutine, 5 us more than the direct write (measured).

A reader that does not keep up is noticed by the transport's write buffer. From then on the sinks hold their text and
merge it, until the buffer has drained (`drained`) or a limit is reached: then the connection is cut.
"""

import asyncio
import contextlib
from collections.abc import Callable

from aiohttp import web
from aiohttp.http import HttpVersion11

SLOW_BUFFER_BYTES = 64 * 1024  # asyncio's and uvloop's own high-water mark: pause_writing comes there too
_SIZE_LINES = tuple(b"%x\r\n" % size for size in range(4096))
_LAST_CHUNK = b"0\r\n\r\n"
_STREAM_CONTENT = b"Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"


class DirectResponse(web.StreamResponse):
    """A response whose bytes were written here; aiohttp only learns whether the connection can be kept."""

    def __init__(self, keep_alive: bool) -> None:
        super().__init__()
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing to send. aiohttp calls this after the handler."""
        self._req = request

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing to send."""
        self._eof_sent = True
        self._req = None


def write_json(request: web.Request, body: bytes, headers: bytes) -> DirectResponse:
    """Answer with 200 and a JSON body. headers: lines of ours, each ended by CRLF.

    Half the cost of a `web.Response`, whose headers are put together one by one.
    """
    is_kept = request.version >= HttpVersion11 and request.keep_alive
    head = _head(request, b"Content-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n" % len(body), headers, is_kept)
    if request.transport is not None:  # else the client is gone
        with contextlib.suppress(RuntimeError):  # uvloop: the transport is closed
            request.transport.write(head + body)
    return DirectResponse(is_kept)


def _head(request: web.Request, content: bytes, headers: bytes, is_kept: bool) -> bytes:
    version = b"HTTP/1.1" if request.version >= HttpVersion11 else b"HTTP/1.0"
    closing = b"" if is_kept else b"Connection: close\r\n"
    return b"".join((version, b" 200 OK\r\n", content, headers, closing, b"\r\n"))


class EventWriter:
    """The one stream of a response. All methods but `drained` return at once and never raise."""

    __slots__ = (
        "_chunked",
        "_limit_bytes",
        "_on_lost",
        "_on_slow",
        "_queued",
        "_request",
        "_transport",
        "_write",
        "held_bytes",
        "is_lost",
        "is_slow",
        "keep_alive",
        "started",
    )

    def __init__(
        self, request: web.Request, headers: bytes, *, limit_bytes: int, on_slow: Callable[[], None], on_lost: Callable[[], None]
    ) -> None:
        """headers: header lines of ours, each ended by CRLF; they leave with the first event.

        limit_bytes: text held for a slow reader before it is cut off. on_slow: the writer just became slow, await
        `drained`. on_lost: the connection is gone or was cut.
        """
        self._request = request
        self._transport = request.transport
        self._write: Callable[[bytes], None] | None = None if self._transport is None else self._transport.write
        self._chunked = request.version >= HttpVersion11
        self.keep_alive = self._chunked and request.keep_alive
        content = _STREAM_CONTENT + (b"Transfer-Encoding: chunked\r\n" if self._chunked else b"")
        self._queued = _head(request, content, headers, self.keep_alive)
        self._limit_bytes = limit_bytes
        self._on_slow = on_slow
        self._on_lost = on_lost
        self.started = False
        self.is_slow = False
        self.is_lost = self._transport is None
        self.held_bytes = 0

    def queue(self, event: bytes) -> None:
        """Write an event together with what comes next."""
        if event:
            self._queued += self._framed(event)

    def send_text(self, prefix: bytes, text: bytes, suffix: bytes) -> None:
        """Write the event prefix + text + suffix now."""
        size = len(prefix) + len(text) + len(suffix)
        if not self._chunked:
            self._send(b"".join((self._queued, prefix, text, suffix)))
        elif size < 4096:
            self._send(b"".join((self._queued, _SIZE_LINES[size], prefix, text, suffix, b"\r\n")))
        else:
            self._send(b"".join((self._queued, b"%x\r\n" % size, prefix, text, suffix, b"\r\n")))

    def flush(self) -> None:
        """Write what is queued now."""
        if self._queued:
            self._send(self._queued)

    def finish(self) -> None:
        """Write what is queued and the end of the stream."""
        if self._chunked:
            self._queued += _LAST_CHUNK
        self.flush()

    def hold(self, num_bytes: int) -> None:
        """A sink keeps this much more text because the reader is slow. Past the limit the reader is cut off."""
        self.held_bytes += num_bytes
        if self.held_bytes > self._limit_bytes:
            self.cut()

    def cut(self) -> None:
        """Drop the connection with all that was not sent. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
        self._lose()

    def close(self) -> None:
        """No more events: a late one must not get into the next response of the connection. Idempotent."""
        self.is_lost = True

    async def drained(self, timeout_s: float) -> None:
        """Wait until the reader has taken most of what was written; cut it off after timeout_s. Then it is not slow any more.

        Cancelling loses nothing.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._request.writer.drain()
        except (TimeoutError, ConnectionError):
            self.cut()
        self.is_slow = False
        self.held_bytes = 0

    def _framed(self, event: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(event), event) if self._chunked else event

    def _send(self, data: bytes) -> None:
        self._queued = b""
        if self.is_lost or self._write is None or self._transport is None:
            return
        self.started = True
        try:
            self._write(data)
        except RuntimeError:  # uvloop: the transport is closed; aiohttp cancels the handler a turn later
            self._lose()
            return
        if not self.is_slow and self._transport.get_write_buffer_size() > SLOW_BUFFER_BYTES:
            self.is_slow = True
            self._on_slow()

    def _lose(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._on_lost()
