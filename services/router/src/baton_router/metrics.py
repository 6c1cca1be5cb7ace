"""What the router exports to Prometheus."""

import time

from baton_contracts.router.v1 import router_service_pb2 as pb
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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

    def answered(self, answer: pb.Answer, duration_s: float) -> None:
        """One query was answered."""
        if answer.HasField("refusal"):
            self._placements.labels(answer.refusal.reason.lower()).inc()
        else:
            (self._pairs if answer.placement.HasField("prefill") else self._alone).inc()
        self._select_s.observe(duration_s)
