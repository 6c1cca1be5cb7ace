"""The HTTP server process side: sockets, keep-alive, shutdown. What is served is in openai_http.py."""

import gc
from collections.abc import Callable

from aiohttp import web

from baton_frontend.openai_http import Handler, HttpSettings, OpenAIHandlers, openai_error_middleware

BACKLOG = 4096


class HttpServer:
    """Serves the handlers on one address. Several processes may share a port (reuse_port)."""

    def __init__(
        self, handlers: OpenAIHandlers, settings: HttpSettings, *, metrics: Callable[[], bytes] | None = None, close_timeout_s: float = 5.0
    ) -> None:
        """metrics: the text for GET /metrics; None: not served. close_timeout_s: for handlers still running at close."""
        app = web.Application(client_max_size=settings.max_body_bytes, middlewares=[openai_error_middleware])
        self.add_routes(app, handlers, metrics)
        # A client that leaves cancels its handler, in every phase.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=close_timeout_s)
        self._site: web.TCPSite | None = None

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
        self._site = web.TCPSite(self._runner, host.strip("[]") or None, int(port), backlog=BACKLOG, reuse_port=reuse_port)
        await self._site.start()
        bound = self._runner.addresses[0]
        return f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"

    async def stop_listening(self) -> None:
        """Refuse new connections; those that exist go on. Idempotent."""
        site, self._site = self._site, None
        if site is not None:
            await site.stop()

    async def close(self) -> None:
        """End everything: handlers get close_timeout_s, then they are cancelled. Idempotent."""
        await self._runner.cleanup()
        self._site = None


def _metrics_handler(metrics: Callable[[], bytes]) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    return handle


def tune_gc() -> None:
    """Call once after start: garbage is collected less often, for each collection looks at every open stream (facts of the hot path)."""
    gc.set_threshold(100_000, 50, 50)
