"""GB/s of the transports between two processes on this machine, as ratios to a paged copy and to what a transport is made of.

    python bench/handoff_transports.py [--rounds 9] [--num-blocks 2048] [--only shm,tcp] [--no-pin] [--json] [--out bench/results]

Each case brings all blocks of one pool, in random order, into random blocks of another ("scattered"), or all in order
("contiguous"); transports in operations of at most 32 MiB, two in flight, as a worker runs them per peer. What they are
compared with:

    memcpy      numpy, block by block, within one process
    raw socket  two processes, one blocking thread each, sendmsg from and recvmsg_into the same blocks; the lists of pieces are
                made beforehand, there is no protocol, no checksum, no event loop
    by hand     nixl's own Python API, all blocks in one prepared transfer, asked all the time (nixl_by_hand.py)

nixl is measured as UCX chooses (between processes of a host: copies by the kernel) and by UCX's tcp, which workers do not use.

Rounds go through all cases, each time in another order, so that other load on the machine meets all of them. A ratio is the
median of the ratios within each round; GB/s are the best and the median round's. Every case's bytes are compared once.
The two processes are kept on different processors unless --no-pin: on a machine with two the scheduler puts both on one now and then,
and the ratios say more about it than about transports.
"""

import argparse
import asyncio
import datetime
import json
import os
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import nixl_by_hand
import numpy as np
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import BlockLayout, KvPool
from baton_handoff.transports.base import MAX_OPERATION_BYTES, PeerPool, Transport
from baton_handoff.transports.nixl import NixlTransport
from baton_handoff.transports.nixl_config import NixlConfig
from baton_handoff.transports.nixl_library import NixlMissing, load_nixl
from baton_handoff.transports.segment import PoolMemory
from baton_handoff.transports.shm import ShmTransport
from baton_handoff.transports.tcp import TcpTransport
from baton_handoff.transports.tcp_wire import TcpConfig
from baton_runtime.log import configure_logging
from machine import machine, settle

SOURCE, SINK, SECRET = "5" * 16, "d" * 16, bytes(16)
BLOCK_KIB = (16, 64, 256)
IN_FLIGHT = 2
MEMCPY, RAW, RAW_LATE = "memcpy", "raw socket", "raw socket, woken late"
BASE_NAMES = {MEMCPY: "memcpy", RAW: "raw"}  # for the table
_RAW_CALL_BYTES, _RAW_CALL_VIEWS, _WAKE_BYTES = 1 << 20, 64, 1 << 19
Ids = tuple[list[int], list[int]]
Case = Callable[[str], Awaitable[None]]  # brings all blocks in the order named


@dataclass(frozen=True)
class Kind:
    """A transport to measure. make: over own memory, pool and incarnation; offered_by: the kind whose offer it opens."""

    make: Callable[[PoolMemory, KvPool, str], Transport]
    offered_by: str = ""
    baseline: str = MEMCPY
    targets: tuple[tuple[int, float], ...] = ()  # (block KiB, ratio to the baseline)
    by_hand: nixl_by_hand.Settings | None = None  # of UCX, for nixl's own baseline


def _tcp(_: PoolMemory, pool: KvPool, incarnation: str, *, checksum: bool = True) -> Transport:
    return TcpTransport(pool, incarnation, "127.0.0.1:0", "", TcpConfig(checksum=checksum))


def _nixl_kind(name: str, settings: nixl_by_hand.Settings) -> Kind:
    config = NixlConfig(emulation=bool(settings), ucx=settings, operation_limit_s=60.0)
    targets = ((16, 0.9), (64, 0.9), (256, 0.9))
    return Kind(
        lambda _, pool, incarnation: NixlTransport(pool, incarnation, "127.0.0.1:0", "", config),
        baseline=f"{name}, by hand",
        targets=targets,
        by_hand=settings,
    )


# To measure another transport add it here.
KINDS = {
    "shm": Kind(lambda memory, pool, _: ShmTransport(memory, pool), targets=((16, 0.75), (64, 0.85), (256, 0.85))),
    "tcp": Kind(_tcp, baseline=RAW, targets=((16, 0.9), (64, 0.9), (256, 0.9))),
    "tcp without checksum": Kind(partial(_tcp, checksum=False), offered_by="tcp", baseline=RAW),
}
try:
    load_nixl()
except NixlMissing as missing:
    print(f"nixl is not measured: {missing}", file=sys.stderr)
else:
    KINDS |= {name: _nixl_kind(name, settings) for name, settings in (("nixl", ()), ("nixl UCX tcp", (("TLS", "tcp"),)))}


# Both sides.


def make_pool(num_blocks: int, block_bytes: int, incarnation: str) -> tuple[KvPool, PoolMemory]:
    """A pool in shared memory whose blocks are pairwise different."""
    pool, memory = PoolMemory.allocate(num_blocks, BlockLayout(1, 16, 1, block_bytes // 128, "float32"), incarnation)
    pool.data.reshape(num_blocks, -1).view(np.uint64)[:] = np.arange(num_blocks, dtype=np.uint64)[:, None] * np.uint64(2654435761)
    return pool, memory


def orders(num_blocks: int) -> dict[str, Ids]:
    """Source and destination ids of each order; the same in every run and process."""
    scattered = [random.Random(seed).sample(range(num_blocks), num_blocks) for seed in (1, 2)]
    return {"scattered": (scattered[0], scattered[1]), "contiguous": (list(range(num_blocks)), list(range(num_blocks)))}


def raw_calls(pool: KvPool, ids: Sequence[int]) -> list[list[memoryview]]:
    """The blocks as pieces for sendmsg or recvmsg_into, neighbours merged."""
    size, memory = pool.block_bytes, pool.data.reshape(-1).data
    calls: list[list[memoryview]] = []
    left_bytes, expected, start = 0, -1, 0
    for block_id in ids:
        if not left_bytes or (len(calls[-1]) == _RAW_CALL_VIEWS and block_id != expected):
            calls.append([])
            left_bytes, expected = _RAW_CALL_BYTES, -1
        if block_id == expected:
            calls[-1][-1] = memory[start : (block_id + 1) * size]
        else:
            start = block_id * size
            calls[-1].append(memory[start : start + size])
        left_bytes, expected = left_bytes - size, block_id + 1
    return calls


def rest(pieces: list[memoryview], done_bytes: int) -> list[memoryview]:
    """What is left after a call moved so much."""
    if done_bytes == sum(map(len, pieces)):  # nearly always
        return []
    while pieces and done_bytes >= pieces[0].nbytes:
        done_bytes -= pieces[0].nbytes
        pieces = pieces[1:]
    return [pieces[0][done_bytes:], *pieces[1:]] if done_bytes else pieces


# The source's process.


def serve_raw(listener: socket.socket, pool: KvPool) -> None:
    """Answers a byte (which order) with all blocks, until the other side hangs up."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    calls = [raw_calls(pool, source_ids) for source_ids, _ in orders(pool.num_blocks).values()]
    while order := connection.recv(1):
        for pieces in calls[order[0]]:
            while pieces:
                pieces = rest(pieces, connection.sendmsg(pieces))


async def serve(options: argparse.Namespace) -> None:
    """Prints how its transports can be reached, ends with stdin."""
    num_blocks, block_bytes = options.serve
    pool, memory = make_pool(num_blocks, block_bytes, SOURCE)
    offers = {}
    async with AsyncExitStack() as stack:
        stack.callback(memory.close)
        for name in {KINDS[name].offered_by or name for name in options.only}:
            transport = KINDS[name].make(memory, pool, SOURCE)
            await transport.open()
            stack.push_async_callback(transport.close)
            transport.allow(SINK, SECRET)
            offers[name] = transport.offer().decode()
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=serve_raw, args=(listener, pool), daemon=True).start()
        by_hand = {name: nixl_by_hand.serve(pool, kind.by_hand) for name in options.only if (kind := KINDS[name]).by_hand is not None}
        settle()
        print(json.dumps({"offers": offers, "port": listener.getsockname()[1], "by_hand": by_hand}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


# The sink's process.


@dataclass
class Bench:
    """One block size: both pools, and what there is to measure by name."""

    num_blocks: int
    block_kib: int
    source: KvPool  # equal to the source's; here for the copy and the comparison
    dest: KvPool
    ids: dict[str, Ids]
    cases: dict[str, Case] = field(default_factory=dict)
    durations_s: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    async def copy_paged(self, order: str) -> None:
        """What a copy costs within one process."""
        source, dest = self.source.data, self.dest.data
        for source_id, dest_id in zip(*self.ids[order], strict=True):
            dest[dest_id] = source[source_id]

    async def pull(self, peer: PeerPool, order: str) -> None:
        """All blocks, in operations as large as allowed."""
        source_ids, dest_ids = self.ids[order]
        step = max(1, MAX_OPERATION_BYTES // self.dest.block_bytes)
        free = asyncio.Semaphore(IN_FLIGHT)

        async def operation(first: int) -> None:
            async with free:
                await peer.pull(source_ids[first : first + step], dest_ids[first : first + step])

        async with asyncio.TaskGroup() as group:
            for first in range(0, len(source_ids), step):
                group.create_task(operation(first))

    async def run(self, rounds: int) -> None:
        """Measure all cases, `rounds` times each."""
        todo = [(name, order) for name in self.cases for order in self.ids]
        for number in range(rounds):
            print(f"\r{self.block_kib} KiB: round {number + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
            for name, order in random.Random(number).sample(todo, len(todo)):
                if not number:
                    self.dest.data[:] = 0xFF
                began_s = time.perf_counter()
                await self.cases[name](order)
                self.durations_s.setdefault((name, order), []).append(time.perf_counter() - began_s)
                if not number:
                    source_ids, dest_ids = self.ids[order]
                    assert np.array_equal(self.dest.data[dest_ids], self.source.data[source_ids]), (name, order)
        print(file=sys.stderr)

    def rows(self) -> list[dict[str, object]]:
        """One per case and order."""
        num_bytes = self.num_blocks * self.dest.block_bytes
        rows = []
        for order, name in ((order, name) for order in self.ids for name in self.cases):
            durations_s = self.durations_s[name, order]
            kind = KINDS.get(name)
            baseline = kind.baseline if kind is not None else MEMCPY
            ratios = {base: self._ratio(base, name, order) for base in {MEMCPY, RAW, baseline}}
            target = dict(kind.targets).get(self.block_kib) if kind is not None and order == "scattered" else None
            rows.append(
                {
                    "block_kib": self.block_kib,
                    "case": name,
                    "order": order,
                    "best_gb_per_s": round(num_bytes / min(durations_s) / 1e9, 3),
                    "median_gb_per_s": round(num_bytes / statistics.median(durations_s) / 1e9, 3),
                    "ratio_to_memcpy": ratios[MEMCPY][0],
                    "ratio_to_raw_socket": ratios[RAW][0],
                    "ratio_of_best_rounds_to_memcpy": ratios[MEMCPY][1],
                    "ratio_of_best_rounds_to_raw_socket": ratios[RAW][1],
                    "baseline": baseline,
                    "ratio_to_baseline": ratios[baseline][0],
                    "ratio_of_best_rounds_to_baseline": ratios[baseline][1],
                    "target": target,
                    "is_met": None if target is None else ratios[baseline][0] >= target,
                }
            )
        return rows

    def _ratio(self, base: str, name: str, order: str) -> tuple[float, float]:
        """Speed of a case over that of its baseline: median of the rounds, and of the best rounds."""
        mine, others = self.durations_s[name, order], self.durations_s[base, order]
        paired = statistics.median(other / own for own, other in zip(mine, others, strict=True))
        return round(paired, 3), round(min(others) / min(mine), 3)


def raw_cases(stack: AsyncExitStack, port: int, dest: KvPool) -> dict[str, Case]:
    """The raw socket, as it comes, and woken late: where a part of tcp's speed comes from."""
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ids = orders(dest.num_blocks)
    calls = {order: (index, raw_calls(dest, dest_ids)) for index, (order, (_, dest_ids)) in enumerate(ids.items())}

    def receive(order: str, wake_bytes: int) -> None:
        index, batches = calls[order]
        left_bytes = dest.data.nbytes
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_bytes)
        connection.sendall(bytes([index]))
        for pieces in batches:
            left_bytes -= sum(map(len, pieces))
            if left_bytes < wake_bytes:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            while pieces:
                pieces = rest(pieces, connection.recvmsg_into(pieces, 0, socket.MSG_WAITALL)[0])

    return {
        RAW: lambda order: asyncio.to_thread(receive, order, 1),
        RAW_LATE: lambda order: asyncio.to_thread(receive, order, _WAKE_BYTES),
    }


async def measure(block_kib: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """All cases of one block size."""
    num_blocks, block_bytes = options.num_blocks, block_kib << 10
    arguments = ["--serve", str(num_blocks), str(block_bytes), "--only", ",".join(options.only), "--pin" if options.pin else "--no-pin"]
    async with AsyncExitStack() as stack:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, *arguments), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        stack.push_async_callback(child.wait)
        assert child.stdout is not None
        assert child.stdin is not None
        stack.callback(child.stdin.close)
        reached = json.loads(await child.stdout.readline())
        source, source_memory = make_pool(num_blocks, block_bytes, "a" * 16)
        dest, memory = make_pool(num_blocks, block_bytes, SINK)
        stack.callback(source_memory.close)
        stack.callback(memory.close)
        bench = Bench(num_blocks, block_kib, source, dest, orders(num_blocks))
        bench.cases = {MEMCPY: bench.copy_paged, **raw_cases(stack, reached["port"], dest)}
        for name in options.only:
            transport = KINDS[name].make(memory, dest, SINK)
            await transport.open()
            stack.push_async_callback(transport.close)
            offer = reached["offers"][KINDS[name].offered_by or name].encode()
            bench.cases[name] = partial(bench.pull, await transport.open_peer(Instance(incarnation=SOURCE), offer, SECRET, SINK))
            if (by_hand := KINDS[name].by_hand) is not None:
                reader = nixl_by_hand.Reader(dest, reached["by_hand"][name], by_hand, bench.ids)
                bench.cases[KINDS[name].baseline] = partial(asyncio.to_thread, reader.read)
        settle()
        await bench.run(options.rounds)
        return bench.rows()


# What is printed.


def table(results: list[dict[str, object]]) -> str:
    """For people: figures, a bar as long as the ratio to a paged copy, and what was aimed at."""
    lines = [f"{'KiB':>4} {'case':<24} {'best GB/s':>9} {'median':>7} {'x memcpy':>8} {'x raw':>6}  {'of what was aimed at':<28} x memcpy"]
    order = ""
    for row in sorted(results, key=lambda row: row["order"] != "scattered"):
        if row["order"] != order:
            order = str(row["order"])
            lines.append(order)
        base, aim = BASE_NAMES.get(row["baseline"], "by hand"), row["target"]
        target = "" if aim is None else f"{row['ratio_to_baseline']:.2f} of {aim} x {base}: {'met' if row['is_met'] else 'MISSED'}"
        lines.append(
            f"{row['block_kib']:>4} {row['case']:<24} {row['best_gb_per_s']:>9.2f} {row['median_gb_per_s']:>7.2f} "
            f"{row['ratio_to_memcpy']:>8.2f} {row['ratio_to_raw_socket']:>6.2f}  {target:<28} {'#' * round(20 * row['ratio_to_memcpy'])}"
        )
    return "\n".join(lines)


async def main(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    facts, today = machine(), datetime.datetime.now(datetime.UTC).date().isoformat()
    results: list[dict[str, object]] = []
    for block_kib in options.block_kib:
        results += await measure(block_kib, options)
    record = {
        "date": today,
        "machine": {**facts, "load_average_after": os.getloadavg()[0]},
        "num_blocks": options.num_blocks,
        "rounds": options.rounds,
        "is_pinned": options.pin,
        "operations_in_flight": IN_FLIGHT,
        "results": results,
    }
    heading = (
        f"{today}  {facts['cpu']}, {facts['num_cpus']} processors{', pinned' if options.pin else ''}, kernel {facts['kernel']}, "
        f"Python {facts['python']}\n{options.num_blocks} blocks, {options.rounds} rounds, ratios: median of the rounds; "
        f"load average {facts['load_average_before']:.1f} before, {os.getloadavg()[0]:.1f} after"
    )
    text = f"{heading}\n\n{table(results)}\n"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"handoff-transports-{today}-{facts['num_cpus']}cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".txt").write_text(text)
    print(json.dumps(record) if options.json else text)
    print(path, file=sys.stderr)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--num-blocks", type=int, default=2048)
    parser.add_argument("--block-kib", type=int, nargs="+", default=BLOCK_KIB)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(KINDS), metavar=",".join(KINDS))
    parser.add_argument("--pin", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in KINDS]:
        parser.error(f"unknown transport {unknown[0]!r}; known are {', '.join(KINDS)}")
    return options


if __name__ == "__main__":
    given = parsed()
    configure_logging("bench", "source" if given.serve else "sink", "", "error")
    if given.pin:
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[-1] if given.serve else processors[0]})
    asyncio.run(serve(given) if given.serve else main(given))
