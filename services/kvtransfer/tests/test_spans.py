"""One span per handoff, below the span that began it."""

import pytest
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_kvtransfer.books import Books
from baton_kvtransfer.spans import BookSpans
from baton_kvtransfer.testing import handoff_event
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

PARENT = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
BEGUN, ENDED = pb.HANDOFF_EVENT_KIND_BEGUN, pb.HANDOFF_EVENT_KIND_ENDED


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def books(exporter):
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    made = Books(BookSpans(provider.get_tracer("test"), {"p1": "prefill-0", "d1": "decode-0"}.get))
    made.open_account("p1", 0)
    made.open_account("d1", 0)
    return made


def source(kind, **kwargs):
    return handoff_event(pb.SIDE_SOURCE, kind, "d1", "d1", **kwargs)


def test_source_side_becomes_one_span_with_its_parent_and_facts(books, exporter):
    books.apply("p1", [source(BEGUN, held_bytes=5, traceparent=PARENT)], 0)
    assert exporter.get_finished_spans() == ()
    books.apply("p1", [source(ENDED, confirmed_bytes=900, outcome=pb.HANDOFF_OUTCOME_CONFIRMED)], 0)
    (span,) = exporter.get_finished_spans()
    assert span.name == "books.handoff"
    assert span.parent.span_id == int("cd" * 8, 16)
    assert span.context.trace_id == int("ab" * 16, 16)
    assert dict(span.attributes) == {
        "baton.request_id": "r1",
        "baton.attempt": 1,
        "baton.prefill.instance_id": "prefill-0",
        "baton.decode.instance_id": "decode-0",
        "baton.outcome": "confirmed",
        "baton.bytes": 900,
        "baton.transport": "",
    }


def test_sink_side_writes_no_span(books, exporter):
    for kind in (BEGUN, ENDED):
        books.apply("d1", [handoff_event(pb.SIDE_SINK, kind, "p1", "d1", traceparent=PARENT)], 0)
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("traceparent", ["", "garbage", PARENT[:-2] + "00"])
def test_request_that_is_not_traced_writes_no_span(books, exporter, traceparent):
    for kind in (BEGUN, ENDED):
        books.apply("p1", [source(kind, traceparent=traceparent)], 0)
    assert exporter.get_finished_spans() == ()


def test_span_of_a_source_that_is_gone_ends_too(books, exporter):
    books.apply("p1", [source(BEGUN, traceparent=PARENT)], 0)
    books.close_account("p1", 0)
    assert exporter.get_finished_spans()[0].attributes["baton.outcome"] == "unknown"


def test_span_names_the_transport_the_sink_used(books, exporter):
    books.apply("p1", [source(BEGUN, traceparent=PARENT)], 0)
    event = handoff_event(pb.SIDE_SINK, pb.HANDOFF_EVENT_KIND_PROGRESS, "p1", "d1", 5)
    event.transport = "tcp"
    books.apply("d1", [event], 0)
    books.apply("p1", [source(ENDED, outcome=pb.HANDOFF_OUTCOME_CONFIRMED)], 0)
    (span,) = exporter.get_finished_spans()
    assert span.attributes["baton.transport"] == "tcp"


def test_handoff_known_from_a_snapshot_joins_its_trace_too(books, exporter):
    """kvtransfer was restarted in the middle of it."""
    books.apply("p1", [source(pb.HANDOFF_EVENT_KIND_PROGRESS, held_bytes=5, traceparent=PARENT)], 0)
    books.apply("p1", [source(ENDED, outcome=pb.HANDOFF_OUTCOME_CONFIRMED)], 0)
    (span,) = exporter.get_finished_spans()
    assert span.context.trace_id == int("ab" * 16, 16)
