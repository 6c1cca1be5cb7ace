"""A worker's source side in a process of its own, for tests that kill or stop it. Not a test.

Arguments: incarnation, shared-memory directory, num_blocks, block_bytes, peer incarnation, secret (hex), and what to do in the
middle of the first pull after the third batch: "nothing", "kill" or "stop". Prints one JSON line per transport, then "ready";
answers every line on stdin with "pong".
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from baton_engine.pool import BlockLayout
from baton_handoff.transports import tcp_source
from baton_handoff.transports.segment import PoolMemory
from baton_handoff.transports.shm import ShmTransport
from baton_handoff.transports.tcp import TcpTransport
from baton_runtime.log import configure_logging

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def end_after_third_batch(number: int) -> None:
    sent = tcp_source.wire.send_views
    count = 0

    def send_views(sock, views, *rest):
        nonlocal count
        sent(sock, views, *rest)
        is_blocks = sum(view.nbytes for view in views) > 1000  # not a head
        count += is_blocks
        if is_blocks and count == 3:
            os.kill(os.getpid(), number)

    tcp_source.wire.send_views = send_views


async def main() -> None:
    configure_logging("prefill", "child", "", "error")  # stdout is the test's
    incarnation, directory, num_blocks, block_bytes, peer, secret, action = sys.argv[1:]
    layout = BlockLayout(1, 1, 1, int(block_bytes) // 8, "float32")
    pool, memory = PoolMemory.allocate(int(num_blocks), layout, incarnation, directory=Path(directory))
    pool.data[:] = (1 + (range_column(int(num_blocks)) % 251)).astype("uint8")
    shm = ShmTransport(memory, pool, Path(directory))
    tcp = TcpTransport(pool, incarnation, "127.0.0.1:0", "")
    await shm.open()
    await tcp.open()
    tcp.allow(peer, bytes.fromhex(secret))
    if action in SIGNALS:
        end_after_third_batch(SIGNALS[action])
    sys.stdout.write(f"{shm.offer().decode()}\n{tcp.offer().decode()}\nready\n")
    sys.stdout.flush()
    while await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write("pong\n")
        sys.stdout.flush()
    await tcp.close()
    await shm.close()
    memory.close()


def range_column(num_blocks: int):
    import numpy as np

    return np.arange(num_blocks)[:, None]


asyncio.run(main())
