"""The HTTP server process side: sockets, keep-alive, shutdown. What is served is in openai_http.py, one connection in connections.py."""

import asyncio
import gc
from collections.abc import Callable

from aiohttp import web

from baton_frontend.connections import Connection, ConnectionLimits
from baton_frontend.openai_http import Handler, OpenAIHandlers, openai_error_middleware

BACKLOG = 4096
IDLE_POLL_S = 0.02


class HttpServer:
    """Serves the handlers on one address. Several processes may share a port (reuse_port)."""

    def __init__(
        self,
        handlers: OpenAIHandlers,
        limits: ConnectionLimits | None = None,
        *,
        metrics: Callable[[], bytes] | None = None,
        close_timeout_s: float = 5.0,
    ) -> None:
        """metrics: the text for GET /metrics; None: not served. close_timeout_s: for handlers still running at close."""
        app = web.Application(middlewares=[openai_error_middleware])
        self.add_routes(app, handlers, metrics)
        self._limits = limits or ConnectionLimits()
        # A client that leaves cancels its handler, in every phase.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=close_timeout_s)
        self._server: asyncio.Server | None = None

    @staticmethod
    def add_routes(app: web.Application, handlers: OpenAIHandlers, metrics: Callable[[], bytes] | None) -> None:
        """All that is served; openapi.py describes each."""
        app.add_routes(handlers.routes())
        if metrics is not None:
            app.router.add_get("/metrics", _metrics_handler(metrics))

    async def start(self, listen: str, *, reuse_port: bool = False) -> str:
        """Listen on "host:port" (port 0: any). Returns the bound "host:port".

        Raises: OSError (address in use, ...).
        """
        host, _, port = listen.rpartition(":")
        await self._runner.setup()
        loop, server, limits = asyncio.get_running_loop(), self._runner.server, self._limits
        assert server is not None, "made by setup"
        self._server = await loop.create_server(
            lambda: Connection(server, limits, loop), host.strip("[]") or None, int(port), backlog=BACKLOG, reuse_port=reuse_port or None
        )
        bound = self._server.sockets[0].getsockname()
        return f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"

    async def stop_listening(self) -> None:
        """Refuse new connections; those that exist go on. Idempotent."""
        if self._server is not None:
            # Turns of the loop that take in connections the kernel has made already: it would reset them.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def wait_idle(self) -> None:
        """Returns when no request is under way and all that was answered has left this process."""
        while any(connection.is_busy for connection in self._connections()):  # noqa: ASYNC110  # a transport does not say when it is empty
            await asyncio.sleep(IDLE_POLL_S)

    async def close(self) -> None:
        """End everything: handlers get close_timeout_s, then they are cancelled. Idempotent."""
        await self.stop_listening()
        await self._runner.cleanup()

    def _connections(self) -> list[Connection]:
        server = self._runner.server
        return [] if server is None else [connection for connection in server.connections if isinstance(connection, Connection)]


def _metrics_handler(metrics: Callable[[], bytes]) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    return handle


def tune_gc() -> None:
    """Call once after start: garbage is collected less often, for each collection looks at every open stream (facts of the hot path)."""
    gc.set_threshold(100_000, 50, 50)
