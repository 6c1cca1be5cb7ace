"""What TLS costs on the stream between two services: CPU of both ends per message, plain and with TLS, in one process over loopback.

    python bench/tls_cost.py

Messages are as large as a step frame of 1, 64 and 512 sequences (about 12 bytes each); so many that a case takes a second or so.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import uvloop
from baton_cli import certificates
from baton_runtime import tls
from baton_runtime.rpc import GrpcServer, open_channel

NUM_MESSAGES = 20_000
NUM_ROUNDS = 3
NUM_CONNECTIONS = 200
SEQUENCES = (1, 64, 512)


async def frames(request: bytes, context: Any) -> Any:
    """As many frames as asked for, of the size asked for."""
    frame = bytes(int(request))
    for _ in range(NUM_MESSAGES):
        yield frame


async def stream_cpu_us(address: str, size_bytes: int) -> float:
    async with open_channel(address) as channel:
        call = channel.unary_stream("/bench.Tls/Frames")(str(size_bytes).encode(), timeout=120)
        received = call.__aiter__()
        await anext(received)
        began = time.process_time()
        async for _ in received:
            pass
        return (time.process_time() - began) / NUM_MESSAGES * 1e6


async def connect_cpu_ms(address: str) -> float:
    began = time.process_time()
    for _ in range(NUM_CONNECTIONS):
        async with open_channel(address) as channel:
            await channel.channel_ready()
    return (time.process_time() - began) / NUM_CONNECTIONS * 1e3


async def main() -> None:
    """Each case several times, plain and TLS in turn; the least of each."""
    with tempfile.TemporaryDirectory() as folder:
        certificates.make(Path(folder) / "c", names=["router"])
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(NUM_ROUNDS):
            for kind, files in (("plain", None), ("tls", certificates.files_in(Path(folder) / "c", "router"))):
                tls.use(files)
                server = GrpcServer("127.0.0.1:0")
                handlers = {"Frames": grpc.unary_stream_rpc_method_handler(frames)}
                server.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Tls", handlers),))
                address = await server.start()
                for sequences in SEQUENCES:
                    found.setdefault((f"frame of {sequences}, us", kind), []).append(await stream_cpu_us(address, 12 * sequences))
                found.setdefault(("new connection, ms", kind), []).append(await connect_cpu_ms(address))
                await server.close()
        for case in dict.fromkeys(case for case, _ in found):
            plain, secure = min(found[case, "plain"]), min(found[case, "tls"])
            print(f"{case:24} plain {plain:7.2f}   tls {secure:7.2f}   ratio {secure / plain:.2f}")


if __name__ == "__main__":
    uvloop.run(main())
