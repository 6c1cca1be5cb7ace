"""A worker's nixl transport in a process of its own, for tests that kill or stop it. Not a test.

Arguments: role, own incarnation, peer incarnation, secret (hex), num_blocks, block_bytes, UCX transports ("" for UCX's choice).

source   prints its offer; answers every line on stdin: "forbid" forbids the peer, "cpu" says how many seconds of CPU were used, all
         others are answered with "pong"
sink     reads an offer, opens the peer, prints "open"; then pulls all blocks over and over
"""

import asyncio
import os
import sys

import numpy as np
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import BlockLayout
from baton_handoff.transports.nixl import NixlTransport
from baton_handoff.transports.nixl_config import NixlConfig
from baton_handoff.transports.segment import PoolMemory
from baton_runtime.log import configure_logging


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def serve(transport, peer: str) -> None:
    say(transport.offer().decode())
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        if line == "forbid":
            transport.forbid(peer)
        say(str(sum(os.times()[:2])) if line == "cpu" else "pong")


async def read(transport, own: str, peer: str, secret: bytes, num_blocks: int) -> None:
    offer = (await asyncio.to_thread(sys.stdin.readline)).strip().encode()
    opened = await transport.open_peer(Instance(incarnation=peer), offer, secret, own)
    say("open")
    ids = list(range(num_blocks))
    while True:
        await opened.pull(ids, ids[::-1])


async def main() -> None:
    configure_logging("prefill", "child", "", "critical")  # stdout is the test's
    role, own, peer, secret, num_blocks, block_bytes, transports = sys.argv[1:]
    layout = BlockLayout(1, 1, 1, int(block_bytes) // 8, "float32")
    pool, _ = PoolMemory.allocate(int(num_blocks), layout, own, shared=False)
    pool.data[:] = (1 + np.arange(int(num_blocks)) % 251).astype(np.uint8)[:, None]
    config = NixlConfig(emulation=True, ucx=(("TLS", transports),)) if transports else None
    transport = NixlTransport(pool, own, "127.0.0.1:0", "", config)
    await transport.open()
    transport.allow(peer, bytes.fromhex(secret))
    if role == "source":
        await serve(transport, peer)
    else:
        await read(transport, own, peer, bytes.fromhex(secret), int(num_blocks))
    await transport.close()


asyncio.run(main())
sys.stdout.flush()
os._exit(0)  # as workers do
