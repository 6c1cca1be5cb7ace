"""What kvtransfer exports to Prometheus, read from the broker when scraped."""

import time
from collections.abc import Callable, Iterator

from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton_kvtransfer.books import Agreement, outcome_name
from baton_kvtransfer.broker import Broker

_SIDES: dict[int, str] = {pb.SIDE_SOURCE: "source", pb.SIDE_SINK: "sink"}
_KINDS: dict[int, str] = {
    pb.HANDOFF_EVENT_KIND_BEGUN: "begun",
    pb.HANDOFF_EVENT_KIND_PROGRESS: "progress",
    pb.HANDOFF_EVENT_KIND_ENDED: "ended",
}


class BooksCollector(Collector):
    """baton_ledger_mismatch_bytes and baton_books_*."""

    def __init__(self, registry: CollectorRegistry, broker: Broker, clock: Callable[[], float] = time.monotonic) -> None:
        self._broker = broker
        self._clock = clock
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """All families."""
        broker, books = self._broker, self._broker.books
        source_bytes, sink_bytes = broker.held_bytes()
        yield _gauge(
            "baton_ledger_mismatch_bytes",
            "Difference between the workers' block managers and the books, summed over workers; normally 0.",
            broker.mismatch_bytes(self._clock()),
        )
        yield _gauge("baton_books_stranded_bytes", "baton_kv_stranded_bytes, summed over the workers that report.", broker.stranded_bytes())
        yield _gauge("baton_books_live_handoffs", "Handoffs not over on both sides.", broker.num_live())
        yield _gauge("baton_books_workers", "Workers that report.", len(broker.reporting()))
        yield _gauge("baton_books_links", "Links that workers pull over.", sum(len(a.links) for a in books.accounts.values()))
        yield _gauge("baton_books_watchers", "Open watches of handoffs.", len(broker.watches))
        yield _counter("baton_books_watch_dropped", "Changes that slow watchers were not told.", broker.watches.num_dropped)
        held = GaugeMetricFamily("baton_books_held_bytes", "Bytes held for handoffs by the books.", labels=["side"])
        held.add_metric(["source"], source_bytes)
        held.add_metric(["sink"], sink_bytes)
        yield held
        yield _counter("baton_books_confirmed_bytes", "Bytes confirmed, as sinks ended.", books.confirmed_bytes)
        yield _counter("baton_books_reports", "Messages of workers.", broker.num_reports)
        yield _counter("baton_books_malformed_events", "Events that contradict themselves and were left out.", books.num_malformed)
        yield from self._labelled()

    def _labelled(self) -> Iterator[Metric]:
        broker, books = self._broker, self._broker.books
        agreements = CounterMetricFamily("baton_books_handoffs", "Handoffs both sides ended, by agreement.", labels=["agreement"])
        for agreement in Agreement:
            agreements.add_metric([agreement.value], books.agreements[agreement])
        yield agreements
        events = CounterMetricFamily("baton_books_events", "Events booked.", labels=["side", "kind"])
        for (side, kind), count in books.events.items():
            events.add_metric([_SIDES[side], _KINDS[kind]], count)
        yield events
        ended = CounterMetricFamily("baton_books_ended", "Sides of handoffs that ended, by outcome.", labels=["side", "outcome"])
        for (side, outcome), count in books.outcomes.items():
            ended.add_metric([_SIDES[side], outcome_name(outcome)], count)
        yield ended
        pairs = CounterMetricFamily("baton_books_introductions", "Pairs introduced or refused.", labels=["result"])
        pairs.add_metric(["introduced"], broker.num_introduced)
        pairs.add_metric(["refused"], broker.num_refused)
        yield pairs
        deaths = CounterMetricFamily("baton_books_peers_down", "Deaths told to workers.", labels=["reason"])
        for reason, count in broker.deaths.items():
            deaths.add_metric([reason.lower()], count)
        yield deaths


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
