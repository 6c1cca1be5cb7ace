"""Spans of one handoff: only of sampled requests, with the figures of all its operations, and an error type when it failed."""

from baton_handoff.ids import HandoffComplete, HandoffKey
from baton_handoff.spans import HandoffTrace
from baton_handoff.transports.base import PullStats
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

KEY = HandoffKey("r", 2, "d" * 16)
SAMPLED = f"00-{'a' * 32}-{'b' * 16}-01"


def emitted(trace: HandoffTrace, outcome: str, complete: HandoffComplete | None = None) -> dict[str, ReadableSpan]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.emit(provider.get_tracer("test"), KEY, outcome, complete)
    return {span.name: span for span in exporter.get_finished_spans()}


def sink_trace(traceparent: str = SAMPLED) -> HandoffTrace:
    trace = HandoffTrace(traceparent)
    trace.pull.opened()
    trace.pulled("tcp", "shm is not offered", PullStats(3_000_000, 4, 0.001), is_retry=False)
    trace.pulled("tcp", "shm is not offered", PullStats(1_000_000, 2, 0.001), is_retry=True)
    trace.asked(10.0)
    trace.confirmed(10.0025)
    return trace


def test_pull_and_confirm_tell_all_operations_and_the_exposed_time() -> None:
    spans = emitted(sink_trace(), "confirmed", HandoffComplete(0, 4_000_000, 0.0042, 1_000_000))
    assert spans.keys() == {"kv.pull", "kv.confirm"}
    pull, confirm = dict(spans["kv.pull"].attributes or {}), dict(spans["kv.confirm"].attributes or {})
    common = {"baton.request_id": "r", "baton.attempt": 2, "baton.outcome": "confirmed"}
    assert pull == common | {
        "baton.bytes": 4_000_000,
        "baton.gigabytes_per_second": 2.0,
        "baton.operations": 2,
        "baton.copies": 6,
        "baton.retries": 1,
        "baton.transport": "tcp",
        "baton.transport_reason": "shm is not offered",
    }
    assert confirm == common | {"baton.round_trip_ms": 2.5, "baton.exposed_ms": 4.2, "baton.last_chunk_bytes": 1_000_000}
    parent = spans["kv.pull"].parent
    assert parent is not None
    assert f"{parent.span_id:016x}" == "b" * 16


def test_begin_tells_what_the_sink_had() -> None:
    trace = HandoffTrace(SAMPLED)
    trace.begin.opened()
    trace.accepted(7)
    (span,) = emitted(trace, "confirmed").values()
    assert (span.name, (span.attributes or {})["baton.first_block"]) == ("kv.begin", 7)


def test_a_failed_handoff_has_an_error_type_and_a_cancelled_one_has_none() -> None:
    for outcome, error in (("data_loss", "data_loss"), ("cancelled", None), ("confirmed", None)):
        span = emitted(sink_trace(), outcome)["kv.pull"]
        assert (span.attributes or {}).get("error.type") == error


def test_requests_that_are_not_sampled_cost_no_span() -> None:
    for traceparent in ("", "nonsense", SAMPLED[:-1] + "0"):
        assert emitted(sink_trace(traceparent), "confirmed") == {}
