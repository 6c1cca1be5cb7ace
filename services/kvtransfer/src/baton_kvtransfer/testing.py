"""Records and reports for tests of kvtransfer and of those who talk to it."""

from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb

LAYOUT = discovery.KvLayout(block_tokens=16, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_bytes=4096, num_shards=1)
MODEL = discovery.Model(served_name="demo", fingerprint="f" * 16, hash_block_tokens=16, max_model_tokens=4096, vocab_size=100)
_ROLES = {
    "prefill": (discovery.SERVICE_PREFILL, [discovery.CAPABILITY_PREFILL_FOR]),
    "decode": (discovery.SERVICE_DECODE, [discovery.CAPABILITY_DECODE_FROM, discovery.CAPABILITY_WHOLE]),
}


def worker_record(instance_id: str, incarnation: str, transports: tuple[str, ...] = ("shm", "tcp")) -> discovery.Instance:
    """A record of "prefill-..." or "decode-..."."""
    service, capabilities = _ROLES[instance_id.partition("-")[0]]
    return discovery.Instance(
        service=service,
        instance_id=instance_id,
        incarnation=incarnation,
        grpc_address="127.0.0.1:1",
        model=MODEL,
        layout=LAYOUT,
        transports=[discovery.TransportOffer(name=name) for name in transports],
        capabilities=capabilities,
    )


def handoff_event(
    side: int,
    kind: int,
    peer_incarnation: str,
    decode_incarnation: str,
    held_bytes: int = 0,
    confirmed_bytes: int = 0,
    *,
    request_id: str = "r1",
    attempt: int = 1,
    outcome: int = pb.HANDOFF_OUTCOME_UNSPECIFIED,
    traceparent: str = "",
) -> pb.HandoffEvent:
    """One event."""
    event = pb.HandoffEvent(
        side=side,  # type: ignore[arg-type]  # enum values are ints at run time
        kind=kind,  # type: ignore[arg-type]
        peer_incarnation=peer_incarnation,
        held_bytes=held_bytes,
        confirmed_bytes=confirmed_bytes,
        outcome=outcome,  # type: ignore[arg-type]
        traceparent=traceparent,
    )
    event.handoff.request_id, event.handoff.attempt, event.handoff.decode_incarnation = request_id, attempt, decode_incarnation
    return event
