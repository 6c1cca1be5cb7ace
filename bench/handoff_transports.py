"""GB/s of the transports between two processes on this machine, as a ratio to a paged copy in one process.

    python bench/handoff_transports.py [--rounds 5] [--num-blocks 2048] [--out bench/results]

Each case pulls all blocks of a pool in random order into random blocks ("scattered") or in order ("contiguous"), in operations of
at most 32 MiB, one after the other. Rounds go through all cases in turn, so that other load on the machine meets all of them;
the best round counts, the median is printed beside it. Every case's bytes are compared once.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import BlockLayout, KvPool
from baton_handoff.transports.base import MAX_OPERATION_BYTES, PeerPool, Transport
from baton_handoff.transports.segment import PoolMemory
from baton_handoff.transports.shm import ShmTransport
from baton_handoff.transports.tcp import TcpTransport
from baton_handoff.transports.tcp_wire import TcpConfig

SOURCE, SINK, SECRET = "5" * 16, "d" * 16, bytes(16)
BLOCK_KIB = (16, 64, 256)


def make_pool(num_blocks: int, block_bytes: int, incarnation: str) -> tuple[KvPool, PoolMemory]:
    """A pool in shared memory whose blocks are pairwise different."""
    pool, memory = PoolMemory.allocate(num_blocks, BlockLayout(1, 16, 1, block_bytes // 128, "float32"), incarnation)
    pool.data.reshape(num_blocks, -1).view(np.uint64)[:] = np.arange(num_blocks, dtype=np.uint64)[:, None] * np.uint64(2654435761)
    return pool, memory


async def serve(num_blocks: int, block_bytes: int) -> None:
    """The source's process: prints its two offers, ends with stdin."""
    pool, memory = make_pool(num_blocks, block_bytes, SOURCE)
    transports: list[Transport] = [ShmTransport(memory, pool), TcpTransport(pool, SOURCE, "127.0.0.1:0", "")]
    for transport in transports:
        await transport.open()
        transport.allow(SINK, SECRET)
        print(transport.offer().decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for transport in transports:
        await transport.close()
    memory.close()


def copy_paged(dest: KvPool, source: KvPool, dest_ids: list[int], source_ids: list[int]) -> None:
    """What the ratio is to: numpy, block by block, one process, one thread."""
    for dest_id, source_id in zip(dest_ids, source_ids, strict=True):
        dest.data[dest_id] = source.data[source_id]


async def pull_all(peer: PeerPool, source_ids: list[int], dest_ids: list[int], block_bytes: int) -> None:
    """All blocks, in operations as large as allowed."""
    step = max(1, MAX_OPERATION_BYTES // block_bytes)
    for first in range(0, len(source_ids), step):
        await peer.pull(source_ids[first : first + step], dest_ids[first : first + step])


async def measure(block_kib: int, num_blocks: int, rounds: int) -> list[dict[str, object]]:
    """All cases of one block size."""
    block_bytes = block_kib << 10
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--serve", str(num_blocks), str(block_bytes)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    offers = [(await child.stdout.readline()).strip() for _ in range(2)]
    source, source_memory = make_pool(num_blocks, block_bytes, "a" * 16)
    dest, memory = make_pool(num_blocks, block_bytes, SINK)
    shm, tcp = ShmTransport(memory, dest), TcpTransport(dest, SINK, "127.0.0.1:0", "")
    plain = TcpTransport(dest, SINK, "127.0.0.1:0", "", TcpConfig(checksum=False))
    peers: dict[str, PeerPool] = {}
    for name, transport, offer in (("shm", shm, offers[0]), ("tcp", tcp, offers[1]), ("tcp without checksum", plain, offers[1])):
        await transport.open()
        peers[name] = await transport.open_peer(Instance(incarnation=SOURCE), offer, SECRET, SINK)
    ids = {"scattered": shuffled(num_blocks), "contiguous": (list(range(num_blocks)),) * 2}
    cases: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        for order, (source_ids, dest_ids) in ids.items():
            began_s = time.perf_counter()
            copy_paged(dest, source, dest_ids, source_ids)
            cases.setdefault(("memcpy paged", order), []).append(time.perf_counter() - began_s)
            for name, peer in peers.items():
                if number == 0:
                    dest.data[:] = 0xFF
                began_s = time.perf_counter()
                await pull_all(peer, source_ids, dest_ids, block_bytes)
                cases.setdefault((name, order), []).append(time.perf_counter() - began_s)
                if number == 0:
                    assert np.array_equal(dest.data[dest_ids], source.data[source_ids]), (name, order)
    for transport in (shm, tcp, plain):
        await transport.close()
    for segment in (source_memory, memory):
        segment.close()
    child.stdin.close()
    await child.wait()
    num_bytes = num_blocks * block_bytes
    base_s = min(cases[("memcpy paged", "scattered")])
    return [
        {
            "block_kib": block_kib,
            "case": name,
            "order": order,
            "best_gb_per_s": round(num_bytes / min(durations_s) / 1e9, 3),
            "median_gb_per_s": round(num_bytes / statistics.median(durations_s) / 1e9, 3),
            "ratio_to_memcpy": round(base_s / min(durations_s), 3),
        }
        for (name, order), durations_s in cases.items()
    ]


def shuffled(num_blocks: int) -> tuple[list[int], list[int]]:
    """Two permutations, the same in every run."""
    draw: Callable[[int], list[int]] = lambda seed: random.Random(seed).sample(range(num_blocks), num_blocks)  # noqa: E731
    return draw(1), draw(2)


def machine() -> dict[str, object]:
    """What the figures were measured on; no names."""
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "num_cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_average_before": os.getloadavg()[0],
    }


async def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-blocks", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    facts = machine()
    results = []
    for block_kib in BLOCK_KIB:
        results += await measure(block_kib, options.num_blocks, options.rounds)
    print(f"{'KiB':>5} {'case':<22} {'order':<11} {'best GB/s':>10} {'median':>8} {'ratio':>7}")
    for row in results:
        print(
            f"{row['block_kib']:>5} {row['case']:<22} {row['order']:<11} {row['best_gb_per_s']:>10} {row['median_gb_per_s']:>8} "
            f"{row['ratio_to_memcpy']:>7}"
        )
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = options.out / f"handoff-transports-{today}-{facts['num_cpus']}cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"date": today, "machine": facts, "num_blocks": options.num_blocks, "rounds": options.rounds, "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve(int(sys.argv[2]), int(sys.argv[3])))
    else:
        asyncio.run(main())
