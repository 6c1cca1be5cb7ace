"""Prometheus endpoint of a process: GET /metrics, and GET /health for load balancers.

    server = MetricsServer()
    bytes_total = Counter("baton_handoff_bytes", "Bytes pulled and confirmed.", registry=server.registry)

Metrics are named baton_*, with units; no per-request labels. The registry belongs to the process, not to the module
prometheus_client, so that two services in one test do not meet.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from baton_runtime.errors import ConfigError
from baton_runtime.rpc import advertised_address, split_address
from baton_runtime.tls import add_expiry_metric

REQUEST_LIMIT_S = 5.0
CLOSE_LIMIT_S = 0.5
_MAX_HEAD_BYTES = 16 << 10


class Series:
    """What was observed under one set of labels of a `HotHistogram`."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last is beyond all bounds
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """So many observations of one value."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times


class HotHistogram(Collector):
    """A Prometheus histogram for what happens per token: observed on one thread, without the library's locks and per-bucket objects, and
    put into its form when scraped."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry) -> None:
        """bounds: upper ones of the buckets, rising, without infinity."""
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._bounds = tuple(bounds)
        self._series: dict[tuple[str, ...], Series] = {}
        registry.register(self)

    def series(self, *labels: str) -> Series:
        """The one of these labels' values, to be kept by whoever observes."""
        return self._series.setdefault(labels, Series(self._bounds))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for labels, series in self._series.items():
            buckets, below = [], 0
            for name, count in zip(names, series.counts, strict=True):
                below += count
                buckets.append((name, below))
            family.add_metric(labels, buckets, series.total)
        yield family


class MetricsServer:
    """A small HTTP/1.1 server: one answer per connection, bounded in time and in bytes read."""

    def __init__(self, registry: CollectorRegistry | None = None, advertise: str = "") -> None:
        if registry is None:
            registry = CollectorRegistry()
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
        add_expiry_metric(registry)
        self.registry = registry
        self._advertise = advertise
        self._server: asyncio.Server | None = None

    async def start(self, listen: str) -> str:
        """Serve. Returns: host:port for others (of advertise only the host is used).

        Raises: ConfigError if listen cannot be bound, or is a wildcard while no host is advertised.
        """
        try:
            host, port = split_address(listen)
            self._server = await asyncio.start_server(self._answer, host.strip("[]"), port or 0, limit=_MAX_HEAD_BYTES)
        except (OSError, ValueError) as e:
            raise ConfigError("metrics_listen", f"cannot bind {listen!r}: {e}") from e
        bound_port = self._server.sockets[0].getsockname()[1]
        try:
            return advertised_address(f"{host}:{port or 0}", bound_port, split_address(self._advertise)[0])
        except ConfigError:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop serving. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await server.wait_closed()
        except TimeoutError:
            pass  # a client that is still connected; its own time limit ends it

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head.decode("latin-1")))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # a client that is slow, gone or talks nonsense gets no answer
        finally:
            writer.close()

    def _response(self, head: str) -> bytes:
        request_line, *header_lines = head.split("\r\n")
        method, path, *_ = [*request_line.split(" "), "", ""]
        if method != "GET":
            return _http("405 Method Not Allowed", "text/plain", b"only GET\n")
        match path.partition("?")[0]:
            case "/metrics":
                headers = dict(line.lower().split(":", 1) for line in header_lines if ":" in line)
                encode, content_type = choose_encoder(headers.get("accept", "").strip())
                return _http("200 OK", content_type, encode(self.registry))
            case "/health":
                return _http("200 OK", "text/plain", b"ok\n")
        return _http("404 Not Found", "text/plain", b"/metrics or /health\n")


def _http(status: str, content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1") + body
