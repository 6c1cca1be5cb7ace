"""A small OTLP receiver: what Jaeger would get, as a list of spans."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Span:
    """One received span; start_s and end_s in seconds since the epoch, by the clock of the process that made it."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str  # "" for a root
    attributes: dict[str, object]
    start_s: float
    end_s: float
    events: list[tuple[str, float]]  # name, seconds since the epoch


@dataclass
class OtlpReceiver(pb_grpc.TraceServiceServicer):
    """gRPC server on a free loopback port; spans lie in .spans in order of arrival."""

    spans: list[Span] = field(default_factory=list)
    address: str = ""

    def __enter__(self) -> "OtlpReceiver":
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2))
        pb_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def Export(self, request: pb.ExportTraceServiceRequest, _context: grpc.ServicerContext) -> pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            service = next((a.value.string_value for a in resource.resource.attributes if a.key == "service.name"), "")
            for scope in resource.scope_spans:
                self.spans += [_span(service, span) for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> list[Span]:
        """Spans of one trace."""
        return [span for span in self.spans if span.trace_id == trace_id]


def _span(service: str, span: object) -> Span:
    attributes = {a.key: getattr(a.value, a.value.WhichOneof("value") or "string_value") for a in span.attributes}
    ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
    events = [(event.name, event.time_unix_nano / 1e9) for event in span.events]
    return Span(service, span.name, *ids, attributes, span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9, events)
