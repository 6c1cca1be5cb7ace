"""gRPC channels and servers with Baton's settings: 64 MB messages, HTTP/2 keepalive, quick reconnects, health service."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton_runtime import tls
from baton_runtime.errors import ConfigError, ErrorInterceptor, HandlerRegistry
from baton_runtime.log import get_logger

MESSAGE_LIMIT_BYTES = 64 << 20
# How long close() waits, after grpc cancelled them, for handlers to finish their cleanup.
HANDLER_CLEANUP_LIMIT_S = 2.0

_WILDCARDS = frozenset({"0.0.0.0", "::", "[::]", "*", ""})
_MESSAGES = [
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
]
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # Without it a connection that swallows everything lives on for gRPC's own 60 s more (measured with 1.85).
    ("grpc.http2.ping_timeout_ms", 3_000),
]
CHANNEL_OPTIONS: list[tuple[str, object]] = [
    *_MESSAGES,
    *_KEEPALIVE,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's default backoff grows to two minutes: a restarted peer would stay unseen for that long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name: how long one attempt may take until the peer has spoken HTTP/2. Too short, and a busy peer is never reached.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # One connection per channel: two streams to one peer must be able to fail apart.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]
SERVER_OPTIONS = [
    *_MESSAGES,
    *_KEEPALIVE,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # With it a second process on the same port would silently share our connections instead of failing.
    ("grpc.so_reuseport", 0),
]

log = get_logger(__name__)


def open_channel(address: str, service: str = "") -> grpc.aio.Channel:
    """A channel to host:port; connects on first use. Close it with `await channel.close()`.

    service: with TLS, who must answer there, e.g. "router"; empty: any service of ours. Make a new channel for a new connection: this
    one shows the certificate of now for all of its life.
    """
    name = f"{service}.{tls.ANY_SERVICE}" if service else tls.ANY_SERVICE
    return tls.channel(address, CHANNEL_OPTIONS, name)


def split_address(address: str) -> tuple[str, int | None]:
    """("host", port) of "host:port", "[v6]:port" or "host" (port None). Raises ValueError for a port that is none."""
    host, colon, port = address.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):
        return address, None
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r}: {port!r} is not a port")
    return host, int(port)


def advertised_address(listen: str, bound_port: int, advertise: str) -> str:
    """What others dial: advertise with the bound port filled in if it names none, else the bound address.

    Raises: ConfigError if that would be a wildcard, which nobody can dial, or if an address does not parse.
    """
    try:
        host, port = split_address(advertise or listen)
    except ValueError as e:
        raise ConfigError("advertise" if advertise else "listen", str(e)) from e
    if host in _WILDCARDS:
        raise ConfigError("advertise", f"must name a host others can reach, because listen is the wildcard {listen!r}")
    if advertise and port:
        return advertise
    return f"{host}:{bound_port}"


def deadline_of(context: Any, margin_s: float = 0.0) -> float | None:
    """time.monotonic() at which the call served in context must be over, less a margin; None if it has no deadline.

    grpc.aio does not pass deadlines on: give the rest as timeout= to every call made on behalf of this one.
    """
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + float(remaining) - margin_s


async def open_responses(context: Any) -> bool:
    """Send the initial metadata of a stream. Call it once the stream is admitted and before anything writes to it that may be
    cancelled; False: the client has left.

    Else grpc.aio sends it with the first write, and if that one is cancelled under way sends it again with the status, which the core
    refuses (TOO_MANY_OPERATIONS): the client would wait for ever. Not before every handler, for a refusal that follows it meets the
    client's first write more often, and grpc.aio then hides its status (`errors.from_rpc_error`).
    """
    try:
        await context.send_initial_metadata(())
    except grpc.aio.InternalError:
        return False
    return True


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """grpc.health.v1 for the whole server (service name ""). Unlike the library's, its state is set synchronously."""

    def __init__(self) -> None:
        self._is_serving = False
        self._is_closed = False
        self._changed = asyncio.Event()

    def set_serving(self, is_serving: bool) -> None:
        """Answer SERVING or NOT_SERVING from now on, and tell the watchers."""
        self._is_serving = is_serving
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Answer NOT_SERVING and end the watches, which would else keep the server from stopping."""
        self._is_closed = True
        self.set_serving(False)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND for a named service."""
        if request.service:
            await context.abort(grpc.StatusCode.NOT_FOUND, "only the whole server has a health state")
        return self._response()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now and at every change, until the client leaves."""
        while True:
            changed = self._changed
            yield self._response() if not request.service else _status(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if self._is_closed:
                return
            await changed.wait()

    def _response(self) -> health_pb2.HealthCheckResponse:
        serving = health_pb2.HealthCheckResponse.SERVING
        return _status(serving if self._is_serving else health_pb2.HealthCheckResponse.NOT_SERVING)


def _status(status: int) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=status)


class GrpcServer:
    """A gRPC server with the error interceptor and a health service. Make it inside the running loop.

    Add servicers to `.server` before `start()`; see to `close()` even if `start()` is never reached.
    Reports SERVING from `start()` until `set_serving(False)` or `close()`.
    """

    def __init__(self, listen: str, advertise: str = "") -> None:
        self._listen = listen
        self._advertise = advertise
        self._registry = HandlerRegistry()
        self._health = HealthService()
        self._is_closed = False
        self.address = ""
        self.server: grpc.aio.Server = grpc.aio.server(interceptors=[ErrorInterceptor(self._registry)], options=SERVER_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    async def start(self) -> str:
        """Bind and serve. Returns: the advertised host:port.

        Raises: ConfigError if the address cannot be bound or the advertised one would be a wildcard.
        """
        try:
            port = self._bind()
        except ConfigError:
            await self.close()
            raise
        await self.server.start()
        self.address = advertised_address(self._listen, port, self._advertise)
        self._health.set_serving(True)
        return self.address

    def _bind(self) -> int:
        advertised_address(self._listen, 1, self._advertise)  # refuse a wildcard before anything is bound
        try:
            return tls.add_port(self.server, self._listen)
        except RuntimeError as e:
            raise ConfigError("listen", f"cannot bind {self._listen!r}: in use, not allowed, or not an address of this machine") from e

    def set_serving(self, is_serving: bool) -> None:
        """Set what the health service answers; False while draining. Does not refuse calls by itself."""
        self._health.set_serving(is_serving)

    async def close(self, grace_s: float = 0.0) -> None:
        """Refuse new calls, give running ones grace_s, cancel the rest, and wait (bounded) for their cleanup. Idempotent.

        Long-lived streams do not end by themselves: end them first, or this takes the whole grace_s.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._health.close()
        await self.server.stop(grace_s)
        if not await self._registry.wait_idle(HANDLER_CLEANUP_LIMIT_S):
            log.warning("handlers_still_running", num_handlers=self._registry.running)
