import time
from collections.abc import Sequence

import pytest
from baton_runtime import semconv, telemetry
from baton_runtime.children import free_port
from baton_runtime.telemetry import Telemetry, configure_telemetry, context_from, start_child, traceparent, traceparent_of
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-2] + "00"


def tracing(exporter: SpanExporter | None, ratio: float = 1.0) -> Telemetry:
    return configure_telemetry("router", "0.1.0", "router-0", "0" * 16, "", ratio, exporter)


async def test_spans_of_a_request_carry_who_made_them() -> None:
    exporter = InMemorySpanExporter()
    tracing_on = tracing(exporter)
    with tracing_on.tracer.start_as_current_span(semconv.SPAN_ROUTER_SELECT, context=context_from(SAMPLED)) as span:
        assert traceparent().split("-")[1] == SAMPLED.split("-")[1]
        assert traceparent().split("-")[2] == f"{span.get_span_context().span_id:016x}"
    await tracing_on.close()
    (finished,) = exporter.get_finished_spans()
    assert finished.parent is not None
    assert f"{finished.parent.span_id:016x}" == SAMPLED.split("-")[2]
    assert finished.resource.attributes["service.name"] == "baton-router"
    assert finished.resource.attributes["service.instance.id"] == "router-0"
    assert finished.resource.attributes["service.version"] == "0.1.0"


async def test_parents_decision_is_kept() -> None:
    exporter = InMemorySpanExporter()
    tracing_all = tracing(exporter, ratio=1.0)
    with tracing_all.tracer.start_as_current_span("a", context=context_from(UNSAMPLED)):
        assert traceparent().endswith("-00")
    await tracing_all.close()
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("parent", [UNSAMPLED, SAMPLED, ""])
async def test_a_child_is_sampled_exactly_if_its_parent_is(parent: str) -> None:
    exporter = InMemorySpanExporter()
    tracing_all = tracing(exporter)
    child = start_child(tracing_all.tracer, "a", context_from(parent), trace.SpanKind.CLIENT)
    child.end()
    await tracing_all.close()
    assert len(exporter.get_finished_spans()) == (parent != UNSAMPLED)
    assert telemetry.is_sampled(traceparent_of(child)) == (parent != UNSAMPLED)
    if parent:
        assert traceparent_of(child)[:36] == parent[:36]
        assert traceparent_of(child)[36:52] != parent[36:52]


async def test_a_span_left_out_can_be_exported_at_its_end_under_its_own_ids() -> None:
    exporter = InMemorySpanExporter()
    unsampled = tracing(exporter, ratio=0.0)
    parent = context_from(UNSAMPLED)
    with unsampled.tracer.start_as_current_span("a", context=parent) as span:
        assert unsampled.late is not None
        parent_span = trace.get_current_span(parent).get_span_context()
        unsampled.late.emit(span, "a", trace.SpanKind.SERVER, parent_span, 2.0, {"n": 1}, error="it broke", event_ago_s=0.5)
    await unsampled.close()
    (late,) = exporter.get_finished_spans()
    assert late.context.span_id == span.get_span_context().span_id
    assert late.parent == parent_span
    assert (late.attributes, late.status.description) == ({"n": 1}, "it broke")
    assert late.resource.attributes["service.name"] == "baton-router"
    assert (late.start_time or 0) + 2_000_000_000 == late.end_time
    assert encode_spans((late,)).resource_spans[0].scope_spans[0].spans[0].name == "a"
    assert [late.end_time - event.timestamp for event in late.events] == [500_000_000]


async def test_without_export_a_traceparent_goes_on_and_none_starts() -> None:
    silent = tracing(None)
    with silent.tracer.start_as_current_span("a", context=context_from(SAMPLED)):
        assert traceparent().startswith(SAMPLED[:35])
        assert traceparent().endswith("-01")
    with silent.tracer.start_as_current_span("a") as span:
        assert not span.is_recording()
    await silent.close()


def test_no_span_is_an_empty_traceparent() -> None:
    assert traceparent() == ""
    assert traceparent(context_from("")) == ""


@pytest.mark.parametrize("text", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é", SAMPLED[:-1]])
def test_malformed_traceparent_is_no_parent(text: str) -> None:
    assert not trace.get_current_span(context_from(text)).get_span_context().is_valid


def test_traceparent_survives_the_round_trip() -> None:
    assert traceparent(context_from(SAMPLED)) == SAMPLED


def test_no_global_provider_is_set() -> None:
    tracing(InMemorySpanExporter())
    assert type(trace.get_tracer_provider()).__name__ == "ProxyTracerProvider"


class Hanging(SpanExporter):
    """A receiver that takes its time."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        time.sleep(0.5)
        return SpanExportResult.FAILURE


async def test_close_does_not_wait_for_a_receiver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "FLUSH_LIMIT_S", 0.05)
    hanging = tracing(Hanging())
    hanging.tracer.start_span("a").end()
    began = time.monotonic()
    await hanging.close()
    await hanging.close()
    assert time.monotonic() - began < 0.4


async def test_close_is_quick_when_nobody_receives() -> None:
    dead = configure_telemetry("router", "0.1.0", "router-0", "0" * 16, f"127.0.0.1:{free_port()}", 1.0)
    dead.tracer.start_span("a").end()
    began = time.monotonic()
    await dead.close()
    assert time.monotonic() - began < telemetry.FLUSH_LIMIT_S + 0.5
