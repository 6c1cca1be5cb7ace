"""What Prometheus sees."""

from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_kvtransfer.books import Books
from baton_kvtransfer.broker import Broker
from baton_kvtransfer.metrics import BooksCollector
from baton_kvtransfer.spans import BookSpans
from baton_kvtransfer.testing import handoff_event, worker_record
from opentelemetry.trace import NoOpTracer
from prometheus_client import CollectorRegistry


def test_families_tell_what_was_booked():
    registry, broker = CollectorRegistry(), Broker(Books(BookSpans(NoOpTracer(), str)))
    BooksCollector(registry, broker, clock=lambda: 0.0)
    assert registry.get_sample_value("baton_ledger_mismatch_bytes") == 0
    sessions = {i: broker.hello(worker_record(name, i), 0.0)[0] for name, i in (("prefill-0", "p1"), ("decode-0", "d1"))}
    begun = handoff_event(pb.SIDE_SOURCE, pb.HANDOFF_EVENT_KIND_BEGUN, "d1", "d1", 300)
    ended = handoff_event(pb.SIDE_SINK, pb.HANDOFF_EVENT_KIND_ENDED, "p1", "d1", 0, 800, outcome=pb.HANDOFF_OUTCOME_FENCED)
    broker.report("p1", sessions["p1"], pb.BooksRequest(events=[begun], sums=pb.BooksSums(pinned_bytes=310, stranded_bytes=10)), 0.0)
    for now_s in (0.5, 1.0):
        broker.report("p1", sessions["p1"], pb.BooksRequest(sums=pb.BooksSums(pinned_bytes=310, stranded_bytes=10)), now_s)
    broker.report("d1", sessions["d1"], pb.BooksRequest(events=[ended]), 0.0)
    broker.stream_ended("d1", sessions["d1"], 0.0)
    broker.tick(1.0)
    expected = {
        ("baton_ledger_mismatch_bytes",): 10,
        ("baton_books_stranded_bytes",): 10,
        ("baton_books_live_handoffs",): 1,
        ("baton_books_workers",): 1,
        ("baton_books_held_bytes", "side", "source"): 300,
        ("baton_books_held_bytes", "side", "sink"): 0,
        ("baton_books_confirmed_bytes_total",): 800,
        ("baton_books_malformed_events_total",): 0,
        ("baton_books_handoffs_total", "agreement", "disagreed"): 0,
        ("baton_books_events_total", "side", "sink", "kind", "ended"): 1,
        ("baton_books_ended_total", "side", "sink", "outcome", "fenced"): 1,
        ("baton_books_introductions_total", "result", "introduced"): 1,
        ("baton_books_peers_down_total", "reason", "stream_broken"): 1,
    }
    for (name, *labels), value in expected.items():
        assert registry.get_sample_value(name, dict(zip(labels[::2], labels[1::2], strict=True))) == value, name
