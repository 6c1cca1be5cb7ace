"""Tracing: one tracer per process, exported over OTLP gRPC by a thread of its own, and W3C traceparent in and out.

No global tracer provider is set: hand `Telemetry.tracer` down. Attribute names: `baton_runtime.semconv`.
"""

import asyncio
import threading

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from baton_runtime import semconv
from baton_runtime.log import get_logger

FLUSH_LIMIT_S = 2.0
_EXPORT_TIMEOUT_S = 2
_SCHEDULE_DELAY_MS = 500
_MAX_QUEUED_SPANS = 4096
_MAX_BATCH_SPANS = 512
_FLUSH_POLL_S = 0.01
_PROPAGATOR = TraceContextTextMapPropagator()

log = get_logger(__name__)


class Telemetry:
    """The process's tracer and what must be closed with it."""

    def __init__(self, provider: TracerProvider, service: str, version: str) -> None:
        self._provider = provider
        self._is_closed = False
        self.tracer: trace.Tracer = provider.get_tracer(f"baton.{service}", version, semconv.SEMCONV_SCHEMA_URL)

    async def close(self) -> None:
        """Send what is queued, at most 2 s; spans for a receiver that does not answer are lost. Idempotent, never blocks the loop."""
        if self._is_closed:
            return
        self._is_closed = True
        # A daemon thread, not an executor's: one that waits for a dead receiver must not keep the process from exiting.
        flush = threading.Thread(target=self._provider.shutdown, name="telemetry-flush", daemon=True)
        flush.start()
        deadline = asyncio.get_running_loop().time() + FLUSH_LIMIT_S
        while flush.is_alive():
            if asyncio.get_running_loop().time() > deadline:
                log.warning("telemetry_flush_timed_out", limit_s=FLUSH_LIMIT_S)
                return
            await asyncio.sleep(_FLUSH_POLL_S)


def configure_telemetry(
    service: str,
    version: str,
    instance_id: str,
    incarnation: str,
    otlp_endpoint: str = "",
    sample_ratio: float = 0.01,
    exporter: SpanExporter | None = None,
) -> Telemetry:
    """Make the process's tracer.

    otlp_endpoint: "host:port" or "http(s)://host:port"; empty: nothing is exported and no trace starts here, though a traceparent that
    comes in goes on. sample_ratio: share of traces sampled when there is no parent; a parent's decision is always kept.
    exporter: used instead of OTLP (tests, other back ends).
    """
    if exporter is None and otlp_endpoint:
        exporter = _otlp_exporter(otlp_endpoint)
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(sample_ratio if exporter is not None else 0.0)),
        resource=_resource(service, version, instance_id, incarnation),
        shutdown_on_exit=False,
    )
    if exporter is not None:
        provider.add_span_processor(
            # every limit given, because the defaults come from environment variables
            BatchSpanProcessor(
                exporter,
                max_queue_size=_MAX_QUEUED_SPANS,
                schedule_delay_millis=_SCHEDULE_DELAY_MS,
                max_export_batch_size=_MAX_BATCH_SPANS,
                export_timeout_millis=_EXPORT_TIMEOUT_S * 1000,
            )
        )
    return Telemetry(provider, service, version)


def traceparent(context: Context | None = None) -> str:
    """W3C traceparent of the span in context (default: the current one); "" if there is no valid span."""
    span = trace.get_current_span(context).get_span_context()
    if not span.is_valid:
        return ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"


def is_sampled(traceparent: str) -> bool:
    """Whether spans under this W3C traceparent would be recorded; saves the cost of making them where not."""
    return len(traceparent) == 55 and traceparent[-1] in "13579bdf"


def context_from(traceparent: str) -> Context:
    """Context with the span of a traceparent as remote parent; an empty context if it is empty or malformed."""
    if not traceparent:
        return Context()
    return _PROPAGATOR.extract({"traceparent": traceparent}, context=Context())


def _otlp_exporter(endpoint: str) -> SpanExporter:
    is_secure = endpoint.startswith("https://")
    return OTLPSpanExporter(endpoint=endpoint, insecure=not is_secure, timeout=_EXPORT_TIMEOUT_S)


def _resource(service: str, version: str, instance_id: str, incarnation: str) -> Resource:
    return Resource(
        {
            semconv.SERVICE_NAME: f"baton-{service}",
            semconv.SERVICE_VERSION: version,
            semconv.SERVICE_INSTANCE_ID: instance_id,
            semconv.BATON_INCARNATION: incarnation,
            "telemetry.sdk.language": "python",
            "telemetry.sdk.name": "opentelemetry",
        },
        semconv.SEMCONV_SCHEMA_URL,
    )
