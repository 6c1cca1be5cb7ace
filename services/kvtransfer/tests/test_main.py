"""The wiring: it serves without etcd, and ends."""

import asyncio

from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2_grpc as pb_grpc
from baton_kvtransfer.config import KvTransferConfig
from baton_kvtransfer.main import KvTransferService
from baton_runtime.rpc import open_channel


async def scrape(address: str) -> bytes:
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    text = await reader.read()
    writer.close()
    await writer.wait_closed()
    return text


async def test_service_serves_with_etcd_down_drains_and_closes(monkeypatch):
    addresses = {}
    service = KvTransferService(KvTransferConfig(etcd="127.0.0.1:1"))
    monkeypatch.setattr(service, "log_ready", lambda **kwargs: addresses.update(kwargs))
    async with service.tasks:
        try:
            await service.start()
            async with open_channel(addresses["grpc_address"]) as channel:
                books = await pb_grpc.KvTransferServiceStub(channel).GetBooks(pb.GetBooksRequest(), timeout=5)
            assert books == pb.GetBooksResponse()
            assert b"baton_ledger_mismatch_bytes 0.0" in await scrape(addresses["metrics_address"])
            await service.drain()
        finally:
            await service.close()
