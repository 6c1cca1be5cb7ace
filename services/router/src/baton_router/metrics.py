"""What the router exports to Prometheus."""

import time
from collections.abc import Iterator

from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.router.v1 import router_service_pb2 as pb
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from baton_router.fleet import Fleet
from baton_router.index import BlockIndex

SELECT_BUCKETS_S = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)


class RouterMetrics:
    """Counters fed by the service; gauges read when scraped."""

    def __init__(self, registry: CollectorRegistry, fleet: Fleet, index: BlockIndex) -> None:
        self._placements = Counter("baton_router_placements", "Queries answered, by result.", ["result"], registry=registry)
        self._pairs, self._alone = self._placements.labels("pair"), self._placements.labels("decode_alone")
        self._select_s = Histogram("baton_router_select_seconds", "Time to choose, per query.", buckets=SELECT_BUCKETS_S, registry=registry)
        for name, text, read in (
            ("baton_router_index_blocks", "Block hashes in the index.", lambda: len(index)),
            ("baton_router_blocks_not_indexed", "Block hashes left out because the index was full.", lambda: index.not_indexed),
            ("baton_router_workers", "Workers known.", lambda: len(fleet.workers)),
            ("baton_router_open_workers", "Workers that may get new work now.", lambda: fleet.num_open(time.monotonic())),
        ):
            Gauge(name, text, registry=registry).set_function(read)
        registry.register(_PredictedSteps(fleet))

    def answered(self, answer: pb.Answer, duration_s: float) -> None:
        """One query was answered."""
        if answer.HasField("refusal"):
            self._placements.labels(answer.refusal.reason.lower()).inc()
        else:
            (self._pairs if answer.placement.HasField("prefill") else self._alone).inc()
        self._select_s.observe(duration_s)


class _PredictedSteps(Collector):
    """One sample per decode instance that is there, so that those which left leave nothing behind."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """As the registry asks for it at each scrape."""
        text = "Time between two tokens at a decode instance, predicted from its KV tokens; 0: it has none."
        family = GaugeMetricFamily("baton_router_predicted_decode_step_seconds", text, labels=["instance_id"])
        decodes = [known for known in self._fleet.workers.values() if known.record.service == discovery.SERVICE_DECODE]
        newest = {known.record.instance_id: known for known in sorted(decodes, key=lambda known: known.heard_at)}
        for instance_id, known in newest.items():
            family.add_metric([instance_id], known.predicted_step_us / 1e6)
        yield family
