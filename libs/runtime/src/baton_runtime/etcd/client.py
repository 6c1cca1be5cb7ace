"""The calls of etcd v3 that discovery needs, over several endpoints.

One endpoint is used at a time; a call that fails there is tried once on each of the others before it fails. The answers of
etcd are returned as they are; what goes wrong becomes one of two errors: `EtcdUnavailable` (try again later) or `EtcdRefused`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grpc

from baton_runtime import tls
from baton_runtime.errors import BatonError, ConfigError, Unavailable
from baton_runtime.etcd import etcd_pb2 as pb
from baton_runtime.log import get_logger

CALL_TIMEOUT_S = 3.0
# etcd answers a ping more often than every 5 s, or one without a call, with GOAWAY: 10 s, and only while a call is open.
CHANNEL_OPTIONS: list[tuple[str, object]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # Without it a connection that swallows everything lives on for gRPC's own 60 s more (measured with 1.85).
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name: how long one attempt may take until the peer has spoken HTTP/2. Too short, and a busy peer is never reached.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 64 << 20),
]
# Ends streams of a member that has lost its cluster; without it they hang in silence.
_REQUIRE_LEADER = (("hasleader", "true"),)
_TRY_ELSEWHERE = (  # not an answer of etcd's own
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
Q = TypeVar("Q")
R = TypeVar("R")

log = get_logger(__name__)


class EtcdUnavailable(Unavailable):
    """No endpoint answered, or a stream broke."""

    reason = "ETCD_UNAVAILABLE"


class EtcdRefused(BatonError):
    """etcd answered no (unknown lease, no permission, no space, ...). Its own text is the message."""

    reason = "ETCD_REFUSED"
    status = grpc.StatusCode.FAILED_PRECONDITION


class WatchEnded(BatonError):
    """etcd ended a watch (compaction, no leader). List again and watch from there."""

    reason = "ETCD_WATCH_ENDED"
    status = grpc.StatusCode.ABORTED


def parse_endpoints(endpoints: str) -> list[str]:
    """["host:port", ...] of a comma-separated list; http:// and https:// are dropped (TLS settings decide). Raises: ConfigError."""
    found = [part.strip().removeprefix("http://").removeprefix("https://").rstrip("/") for part in endpoints.split(",") if part.strip()]
    if not found:
        raise ConfigError("etcd", "names no endpoint")
    for endpoint in found:
        if "://" in endpoint:
            raise ConfigError("etcd", f"{endpoint!r}: only host:port, http:// or https:// endpoints are supported")
        if not endpoint.rpartition(":")[2].isdecimal():
            raise ConfigError("etcd", f"{endpoint!r} is not host:port")
    return found


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys with that prefix, for range_end."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\0"


class Stream(Generic[Q, R]):
    """A bidirectional stream whose every way of ending is EtcdUnavailable."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def write(self, message: Q) -> None:
        """Send one message."""
        with _stream_errors():
            await self._call.write(message)

    async def read(self, timeout_s: float | None) -> R:
        """The next message. After a timeout the stream is over (grpc.aio cancels the call with the read)."""
        with _stream_errors():
            async with asyncio.timeout(timeout_s):
                message = await self._call.read()
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in the stubs
            raise EtcdUnavailable("etcd ended the stream")
        answer: R = message
        return answer


class KeepAlive:
    """Renews leases, one question and one answer at a time."""

    def __init__(self, stream: Stream[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) -> None:
        self._stream = stream

    async def renew(self, lease: int, timeout_s: float) -> int:
        """Returns: seconds the lease has left now; 0 or less: it is gone. Raises: EtcdUnavailable."""
        await self._stream.write(pb.LeaseKeepAliveRequest(ID=lease))
        while lease != (answer := await self._stream.read(timeout_s)).ID:
            pass
        return answer.TTL


class Watch:
    """Changes below a prefix, in order, without gaps until an error ends it."""

    def __init__(self, stream: Stream[pb.WatchRequest, pb.WatchResponse]) -> None:
        self._stream = stream

    async def create(self, request: pb.WatchCreateRequest, timeout_s: float) -> None:
        """Open the watch; returns when etcd has accepted it."""
        await self._stream.write(pb.WatchRequest(create_request=request))
        first = await self._stream.read(timeout_s)
        if first.canceled or not first.created:
            raise WatchEnded(_why(first))

    async def events(self) -> Sequence[pb.Event]:
        """The next changes, as long as it takes. Raises: EtcdUnavailable, WatchEnded; list again then."""
        while True:
            # No timeout: the connection's keepalive (10 s + 3 s) ends the stream of a peer that is silent.
            message = await self._stream.read(None)
            if message.canceled:
                raise WatchEnded(_why(message))
            if message.events:
                return message.events


class EtcdClient:
    """etcd over grpc.aio. Make and use it on one event loop."""

    def __init__(self, endpoints: str, call_timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._endpoints = parse_endpoints(endpoints)
        self._call_timeout_s = call_timeout_s
        self._current = 0
        self._channels: dict[str, tuple[grpc.aio.Channel, tls.Material | None]] = {}

    @property
    def endpoint(self) -> str:
        """The endpoint in use now, host:port."""
        return self._endpoints[self._current]

    async def close(self) -> None:
        """Close every connection; calls under way end as cancelled. Idempotent."""
        channels, self._channels = self._channels, {}
        for channel, _ in channels.values():
            await channel.close(None)

    async def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        """Read keys; linearizable unless the request says otherwise."""
        return await self._call("KV/Range", request, pb.RangeResponse)

    async def list_prefix(self, prefix: bytes) -> pb.RangeResponse:
        """All keys with that prefix, and the revision at which that was so."""
        return await self.range(pb.RangeRequest(key=prefix, range_end=prefix_end(prefix)))

    async def get(self, key: bytes) -> pb.KeyValue | None:
        """One key, or None."""
        found = (await self.range(pb.RangeRequest(key=key))).kvs
        return found[0] if found else None

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> None:
        """Write one key."""
        await self._call("KV/Put", pb.PutRequest(key=key, value=value, lease=lease), pb.PutResponse)

    async def put_if_unchanged(self, key: bytes, value: bytes, lease: int, mod_revision: int) -> bool:
        """Write one key if it was last changed at mod_revision (0: if it does not exist). Returns: whether it was written.

        After an error it may have been written all the same: read it again.
        """
        compare = pb.Compare(target=pb.Compare.MOD, result=pb.Compare.EQUAL, key=key, mod_revision=mod_revision)
        success = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))
        return (await self._call("KV/Txn", pb.TxnRequest(compare=[compare], success=[success]), pb.TxnResponse)).succeeded

    async def delete(self, key: bytes) -> bool:
        """Delete one key. Returns: whether it was there."""
        return (await self._call("KV/DeleteRange", pb.DeleteRangeRequest(key=key), pb.DeleteRangeResponse)).deleted > 0

    async def compact(self, revision: int) -> None:
        """Forget history below a revision (tests)."""
        await self._call("KV/Compact", pb.CompactionRequest(revision=revision, physical=True), pb.CompactionResponse)

    async def grant(self, ttl_s: int) -> pb.LeaseGrantResponse:
        """A new lease; etcd may grant a longer TTL than asked."""
        return await self._call("Lease/LeaseGrant", pb.LeaseGrantRequest(TTL=ttl_s), pb.LeaseGrantResponse)

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys."""
        await self._call("Lease/LeaseRevoke", pb.LeaseRevokeRequest(ID=lease), pb.LeaseRevokeResponse)

    @contextlib.asynccontextmanager
    async def keepalive(self) -> AsyncIterator[KeepAlive]:
        """A stream to renew leases on. EtcdUnavailable out of the block moves on to the next endpoint."""
        async with self._stream("Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse) as stream:
            yield KeepAlive(stream)

    @contextlib.asynccontextmanager
    async def watch(self, prefix: bytes, start_revision: int) -> AsyncIterator[Watch]:
        """Changes below a prefix from a revision on. EtcdUnavailable out of the block moves on to the next endpoint."""
        async with self._stream("Watch/Watch", pb.WatchRequest, pb.WatchResponse) as stream:
            create = pb.WatchCreateRequest(key=prefix, range_end=prefix_end(prefix), start_revision=start_revision)
            watch = Watch(stream)
            await watch.create(create, self._call_timeout_s)
            yield watch

    async def _call(self, path: str, request: Any, response: type[R]) -> R:
        last: grpc.aio.AioRpcError | None = None
        for _ in self._endpoints:
            endpoint = self.endpoint
            channel = self._channel(endpoint)  # held until the call is over
            method = channel.unary_unary(
                f"/etcdserverpb.{path}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=response.FromString,  # type: ignore[attr-defined]  # every R is a protobuf message
            )
            try:
                answer: R = await method(request, timeout=self._call_timeout_s)
                return answer
            except grpc.aio.AioRpcError as e:
                if not _is_gap(e):
                    raise EtcdRefused(e.details() or e.code().name) from e
                last = e
                self._rotate(endpoint, e)
            except grpc.aio.UsageError as e:  # the channel was closed by close()
                raise EtcdUnavailable("etcd client is closed") from e
        raise EtcdUnavailable(f"etcd does not answer at {','.join(self._endpoints)}") from last

    @contextlib.asynccontextmanager
    async def _stream(self, path: str, request: type[Q], response: type[R]) -> AsyncIterator[Stream[Q, R]]:
        endpoint = self.endpoint
        channel = self._channel(endpoint)  # held until the call is over
        method = channel.stream_stream(
            f"/etcdserverpb.{path}",
            request_serializer=request.SerializeToString,  # type: ignore[attr-defined]
            response_deserializer=response.FromString,  # type: ignore[attr-defined]
        )
        call = method(None, metadata=_REQUIRE_LEADER)
        try:
            yield Stream(call)
        except EtcdUnavailable as e:
            self._rotate(endpoint, e)
            raise
        finally:
            call.cancel()

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        """One channel per endpoint and certificate. One with an old certificate closes when its last call lets go of it."""
        identity = tls.identity()
        material = identity.material() if identity is not None else None
        if endpoint not in self._channels or self._channels[endpoint][1] is not material:
            self._channels[endpoint] = tls.channel(endpoint, CHANNEL_OPTIONS), material
        return self._channels[endpoint][0]

    def _rotate(self, failed: str, error: Exception) -> None:
        """Move on from an endpoint, unless another caller already did."""
        if self.endpoint == failed:
            self._current = (self._current + 1) % len(self._endpoints)
            log.debug("etcd_endpoint_failed", endpoint=failed, next=self.endpoint, error=_brief(error))


@contextlib.contextmanager
def _stream_errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as e:
        raise EtcdUnavailable(f"etcd stream broke: {_brief(e)}") from e
    except asyncio.InvalidStateError as e:  # the call is over already
        raise EtcdUnavailable("etcd stream is over") from e
    except TimeoutError as e:
        raise EtcdUnavailable("etcd stream is silent") from e
    except asyncio.CancelledError as e:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise EtcdUnavailable("etcd stream was cancelled") from e  # the channel was closed under it


def _is_gap(e: grpc.aio.AioRpcError) -> bool:
    return e.code() in _TRY_ELSEWHERE


def _brief(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {(error.details() or '')[:200]}"
    return str(error)


def _why(message: pb.WatchResponse) -> str:
    if message.compact_revision:
        return f"history below {message.compact_revision} is compacted"
    return message.cancel_reason or "cancelled by etcd"
