from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb
from baton_router.fleet import Fleet
from baton_router.index import BlockIndex
from baton_router.metrics import RouterMetrics
from prometheus_client import CollectorRegistry

NAME = "baton_router_predicted_decode_step_seconds"


def record(name: str, service: discovery.Service, life: int = 1) -> discovery.Instance:
    return discovery.Instance(service=service, instance_id=name, incarnation=f"{name}.{life}")


def load(active_kv_tokens: int, *steps: tuple[int, int]) -> worker_pb.WorkerLoad:
    """steps: KV tokens and duration in us."""
    samples = [worker_pb.StepSample(decode_sequences=1, kv_tokens=tokens, duration_us=us) for tokens, us in steps]
    return worker_pb.WorkerLoad(active_kv_tokens=active_kv_tokens, samples=samples)


def test_the_time_between_two_tokens_is_predicted_for_decodes_that_are_there() -> None:
    fleet, index, registry = Fleet(), BlockIndex(100), CollectorRegistry()
    RouterMetrics(registry, fleet, index)

    def predicted(name: str) -> float | None:
        return registry.get_sample_value(NAME, {"instance_id": name})

    busy = fleet.add(record("d0", discovery.SERVICE_DECODE), 0, 50.0)
    fleet.add(record("d1", discovery.SERVICE_DECODE), 1, 50.0)
    fleet.add(record("p0", discovery.SERVICE_PREFILL), 2, 50.0)
    busy.reported(load(3000, (1000, 10_000), (2000, 15_000)), now=1.0)
    assert predicted("d0") == 0.02  # 5 ms, and 5 us per KV token
    assert predicted("d1") == 0.0
    assert predicted("p0") is None
    again = fleet.add(record("d0", discovery.SERVICE_DECODE, life=2), 3, 50.0)
    again.heard(worker_pb.Beat(), 2.0)
    assert predicted("d0") == 0.0  # its newest life
    del fleet.workers["d0.1"], fleet.workers["d0.2"]
    assert predicted("d0") is None
