"""What a worker tells Prometheus. Gauges read the engine at scrape time; nothing here is per request."""

from collections.abc import Callable
from functools import cache, partial

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import Engine, EngineRequest, StepOutput
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton_worker.cancels import CancelPhase
from baton_worker.spans import outcome

_STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.5, 1.0, 2.0, 4.0)
_WAIT_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_FREE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_BLOCK_STATES = ("free", "cached", "pinned", "reserved", "used")


class WorkerMetrics:
    """The worker's own metrics, in the process's registry; those of handoffs are exported by the handoff manager."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._steps = Counter("baton_engine_steps", "Steps done.", registry=registry)
        self._step_s = Histogram("baton_engine_step_seconds", "Length of a step.", registry=registry, buckets=_STEP_BUCKETS_S)
        self._tokens = Counter("baton_engine_tokens", "Tokens computed (prefill) and drawn (decode).", ["phase"], registry=registry)
        self._prefill_tokens = self._tokens.labels(phase="prefill")
        self._decode_tokens = self._tokens.labels(phase="decode")
        self._queue_s = Histogram(
            "baton_queue_wait_seconds",
            "From Start to the first step of the sequence.",
            ["work", "priority"],
            registry=registry,
            buckets=_WAIT_BUCKETS_S,
        )
        self._free_s = Histogram(
            "baton_cancel_to_free_seconds",
            "From a cancel (or deadline) to the last block of the attempt being free, by what it was doing.",
            ["phase"],
            registry=registry,
            buckets=_FREE_BUCKETS_S,
        )
        for phase in CancelPhase:
            self._free_s.labels(phase=phase.value)  # shown as 0 until one is cancelled there
        self._ended = Counter("baton_attempts", "Attempts that are over, by how they ended.", ["work", "outcome"], registry=registry)
        # Finding a labelled child takes the library longer than counting with it.
        self._queue_child = cache(lambda work, priority: self._queue_s.labels(work=work.value, priority=priority.name.lower()))
        self._ended_child = cache(lambda work, reason: self._ended.labels(work=work.value, outcome=outcome(reason)))

    def watch_engine(self, engine: Engine) -> None:
        """Export blocks by state and the sizes of queue and batch."""
        blocks = Gauge("baton_kv_blocks", "KV blocks by state; they sum to all blocks.", ["state"], registry=self._registry)
        for state in _BLOCK_STATES:
            blocks.labels(state=state).set_function(partial(_count, engine, state))
        self.watch("baton_kv_pool_blocks", "KV blocks of the pool.", lambda: engine.pool.num_blocks)
        self.watch("baton_kv_block_bytes", "Bytes of one KV block.", lambda: engine.pool.block_bytes)
        self.watch("baton_running_sequences", "Sequences in the running batch.", lambda: engine.stats().running_sequences)
        self.watch(
            "baton_waiting_prefill_tokens", "Prompt tokens in the engine still to compute.", lambda: engine.stats().waiting_prefill_tokens
        )

    def watch(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Export value() as a gauge."""
        Gauge(name, documentation, registry=self._registry).set_function(value)

    def step(self, output: StepOutput) -> None:
        """One step was done. Outputs that only report ends are no steps."""
        if not (output.prefill_tokens or output.keys):
            return
        self._steps.inc()
        self._step_s.observe(output.duration_s)
        self._prefill_tokens.inc(output.prefill_tokens)
        self._decode_tokens.inc(len(output.keys))

    def queue_wait(self, request: EngineRequest, waited_s: float) -> None:
        """A sequence was in a step for the first time."""
        self._queue_child(request.work, request.priority).observe(waited_s)

    def cancel_to_free(self, phase: CancelPhase, seconds: float) -> None:
        """See CancelObserver; from any thread."""
        self._free_s.labels(phase=phase.value).observe(seconds)

    def ended(self, request: EngineRequest, finished: pb.Finished) -> None:
        """An accepted attempt is over."""
        self._ended_child(request.work, finished.reason).inc()


def _count(engine: Engine, state: str) -> float:
    return float(getattr(engine.blocks.counts(), state))
