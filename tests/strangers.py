"""Who asks a gRPC server over TLS, rightly or not: for the tests of processes and of containers."""

from pathlib import Path

import grpc
from baton_cli import certificates
from baton_runtime.etcd import etcd_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

ASK_LIMIT_S = 10.0


async def ask(channel: grpc.aio.Channel, *, is_etcd: bool = False) -> None:
    """One call that every server of the kind answers. Raises: AioRpcError."""
    async with channel:
        if is_etcd:
            method = channel.unary_unary(
                "/etcdserverpb.KV/Range",
                request_serializer=etcd_pb2.RangeRequest.SerializeToString,
                response_deserializer=etcd_pb2.RangeResponse.FromString,
            )
            await method(etcd_pb2.RangeRequest(key=b"x"), timeout=ASK_LIMIT_S)
        else:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=ASK_LIMIT_S)


def secure(address: str, folder: Path, name: str, *, believed: Path) -> grpc.aio.Channel:
    """A channel that shows the certificate of a name in folder and believes the server of believed's CA; name "": shows none."""
    files = certificates.files_in(folder, name)
    shown = (files.key.read_bytes(), files.certificate.read_bytes()) if name else (None, None)
    credentials = grpc.ssl_channel_credentials((believed / "ca" / "ca.pem").read_bytes(), *shown)
    # Every certificate carries this name; the address of a container is in none.
    return grpc.aio.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", "localhost")])


async def welcomed(address: str, ours: Path, foreign: Path, *, is_etcd: bool = False) -> list[str]:
    """Which of those a server answers that it must refuse: it should be none. ours, foreign: folders of `baton certificates`."""
    strangers = {
        "plain": grpc.aio.insecure_channel(address),
        "no certificate": secure(address, ours, "", believed=ours),
        "foreign certificate": secure(address, foreign, "cli", believed=ours),
    }
    found = []
    for kind, channel in strangers.items():
        try:
            await ask(channel, is_etcd=is_etcd)
        except grpc.aio.AioRpcError as refused:
            if refused.code() is grpc.StatusCode.UNAVAILABLE:
                continue
        found.append(kind)
    return found
