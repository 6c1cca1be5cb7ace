"""How long a handoff keeps a request waiting, between real processes: etcd, kvtransfer, a sim prefill and a sim decode worker.

    python bench/handoff_latency.py [--transport shm,tcp,nixl] [--requests 300] [--rounds 1] [--out bench/results]

For each transport, three loads, spoken straight to the workers as a frontend would:

    one block   prompts of one block, one after the other: from announce to confirm, both at the source, by its clock
    one by one  prompts of three chunks of 2 MiB that take 10 ms each to compute: exposed handoff time, from the end of compute of the
                last block to its confirm; and minus what the link itself needs for the last chunk, which is the product's own share
    four        the same, four at a time

Exposed time and announce to confirm are the workers' own figures (log events handoff_completed and handoff_ended at level debug).
The link's speed is measured before, by workers of the same kind that compute and announce 8 MiB at once: the median over their
operations. Frames are gRPC messages of the pair's channel without beats, as the workers count them.

A handoff of one block is one message each way between two processes, and a copy by a thread. So a bare message each way over gRPC
between two processes that do nothing else is measured beside each transport: what the machine takes for it, at p50 and p99, is the
floor of every figure here, and it is printed as a share of them.
"""

import argparse
import asyncio
import datetime
import json
import os
import random
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc
from baton_cli.processes import Child
from baton_contracts.discovery.v1 import instance_pb2 as discovery_pb
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_contracts.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from baton_handoff.transports.nixl_library import NixlMissing, load_nixl
from baton_runtime.discovery import Discovery, View
from baton_runtime.rpc import open_channel
from baton_runtime.testing import EtcdProcess
from machine import machine, settle

NAMESPACE = "/bench"
# 4 KiB of KV per token: blocks of 64 KiB, chunks of 2 MiB. A chunk computes for 10 ms, which is slower than any of the links.
BLOCK_TOKENS, CHUNK_TOKENS, CHUNKS, LINK_CHUNK_TOKENS = 16, 512, 3, 2048
PROFILE = """
description = "handoff latency"
[prefill_ms]
per_token = 0.02
[model]
num_layers = 4
num_kv_heads = 2
head_dim = 64
"""
POOL_BYTES = 512 << 20
READY_LIMIT_S, REQUEST_LIMIT_S = 60.0, 20.0
TARGET_MS = 3.0
WARM_UP = 30  # handoffs that are not counted: connections, introductions, page tables
SERVICES = (discovery_pb.SERVICE_KVTRANSFER, discovery_pb.SERVICE_PREFILL, discovery_pb.SERVICE_DECODE)


@dataclass
class Frontend:
    """One Attach stream to one worker: Starts up, acknowledgements, and the ends by request."""

    stub: WorkerServiceStub
    ended: dict[str, asyncio.Future[pb.Finished]] = field(default_factory=dict)
    outgoing: asyncio.Queue[pb.AttachRequest] = field(default_factory=asyncio.Queue)
    slots: dict[int, str] = field(default_factory=dict)
    num_starts: int = 0

    def start(self, start: pb.Start) -> asyncio.Future[pb.Finished]:
        """Its end."""
        self.num_starts += 1
        start.slot = self.num_starts
        self.slots[start.slot] = start.request_id
        end = self.ended[start.request_id] = asyncio.get_running_loop().create_future()
        self.outgoing.put_nowait(pb.AttachRequest(starts=[start]))
        return end

    async def run(self) -> None:
        """Until cancelled."""
        call = self.stub.Attach()
        try:
            hello = pb.AttachHello(contract_version=1, instance_id="bench", incarnation=f"{os.getpid():016d}", session=1)
            await call.write(pb.AttachRequest(hello=hello))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(call))
                group.create_task(self._write(call))
        finally:
            call.cancel()

    async def _read(self, call: "pb.AttachResponse") -> None:
        async for frame in call:
            self.outgoing.put_nowait(pb.AttachRequest(ack_frame=frame.frame))
            for finished in frame.finished:
                self.ended.pop(self.slots.pop(finished.slot)).set_result(finished)
        raise ConnectionError("the worker has ended the stream")

    async def _write(self, call: "pb.AttachRequest") -> None:
        while True:
            await call.write(await self.outgoing.get())


@dataclass
class Bench:
    """Running processes and the streams to both workers."""

    folder: Path
    view: View
    prefill: Frontend
    decode: Frontend
    http: aiohttp.ClientSession
    num_requests: int = 0

    def instance(self, name: str) -> discovery_pb.Instance:
        """Its record."""
        return next(i for i in self.view.instances.values() if i.instance_id == name)

    async def handoff(self, num_tokens: int) -> None:
        """One request whose KV of num_tokens tokens is handed over. Raises: RuntimeError if it does not end well."""
        self.num_requests += 1
        prefill, decode = self.instance("prefill-0"), self.instance("decode-0")
        tokens = array("I", random.choices(range(1000, 30000), k=num_tokens + 1))
        common = {
            "request_id": f"r{self.num_requests}",
            "attempt": 1,
            "priority": pb.PRIORITY_INTERACTIVE,
            "token_ids": tokens.tobytes(),
            "num_prompt_tokens": len(tokens),
            "cache_root": bytes(16),
            "sampling": pb.Sampling(max_tokens=1, ignore_eos=True),
        }
        source = pb.DecodeFrom(
            prefill_instance_id=prefill.instance_id, prefill_incarnation=prefill.incarnation, prefill_address=prefill.grpc_address
        )
        sink = pb.PrefillFor(decode_instance_id=decode.instance_id, decode_incarnation=decode.incarnation)
        ends = [self.decode.start(pb.Start(**common, decode_from=source)), self.prefill.start(pb.Start(**common, prefill_for=sink))]
        async with asyncio.timeout(REQUEST_LIMIT_S):
            decoded, prefilled = await asyncio.gather(*ends)
        if (decoded.reason, prefilled.reason) != (pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_PREFILLED):
            raise RuntimeError(f"{common['request_id']}: {decoded} {prefilled}")

    async def run(self, num_tokens: Sequence[int], concurrency: int) -> list[str]:
        """That many requests, so many at a time. Returns: their ids."""
        first = self.num_requests
        todo = iter(num_tokens)

        async def work() -> None:
            for tokens in todo:
                await self.handoff(tokens)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        return [f"r{number}" for number in range(first + 1, self.num_requests + 1)]

    async def frames(self, name: str) -> float:
        """Messages of the pair's channel a worker has heard."""
        async with self.http.get(f"http://{self.instance(name).metrics_address}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("baton_handoff_messages_total"))

    async def events(self, name: str, event: str, request_ids: Sequence[str]) -> list[dict[str, object]]:
        """The log's events of these requests, in their order, once all are written."""
        wanted = set(request_ids)
        deadline = time.monotonic() + READY_LIMIT_S
        while True:
            found: dict[str, dict[str, object]] = {}
            for line in (self.folder / f"{name}.log").read_text().splitlines():
                entry = json.loads(line) if line.startswith("{") else {}
                if entry.get("event") == event and entry.get("request_id") in wanted:
                    found[str(entry["request_id"])] = entry
            if len(found) == len(wanted):
                return [found[request_id] for request_id in request_ids]
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: {len(found)} of {len(wanted)} events {event}")
            await asyncio.sleep(0.1)


async def echo() -> None:
    """A process that sends back what it gets; prints its port, ends with stdin."""

    async def answer(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async for request in requests:
            await context.write(request)

    handler = grpc.method_handlers_generic_handler("bench.Echo", {"Echo": grpc.stream_stream_rpc_method_handler(answer)})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    settle()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


async def bare_round_trip_ms(count: int) -> list[float]:
    """p50 and p99 of one message each way, one every 20 ms or so."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--echo"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    port = int(await child.stdout.readline())
    took_ms = []
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream("/bench.Echo/Echo")()
        for _ in range(count):
            await asyncio.sleep(0.02)
            began_s = time.perf_counter()
            await call.write(b"x" * 200)
            await call.read()
            took_ms.append((time.perf_counter() - began_s) * 1e3)
        call.cancel()
    child.stdin.close()
    await child.wait()
    return [quantile(took_ms, 0.5), quantile(took_ms, 0.99)]


@asynccontextmanager
async def running(transport: str, folder: Path, chunk_tokens: int) -> AsyncIterator[Bench]:
    """All processes, up and introduced; ended with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    profile = folder / "profile.toml"
    profile.write_text(PROFILE)
    async with EtcdProcess() as etcd:
        children = [
            _child(service, etcd.endpoint, transport, profile, chunk_tokens, folder) for service in ("kvtransfer", "prefill", "decode")
        ]
        discovery = Discovery(etcd.endpoint, NAMESPACE)
        await discovery.start()
        try:
            view = discovery.view(*SERVICES)
            for child in children:
                await child.start()
            await _until_registered(view, children)
            prefill, decode = (i for name in ("prefill-0", "decode-0") for i in view.instances.values() if i.instance_id == name)
            async with open_channel(prefill.grpc_address) as p, open_channel(decode.grpc_address) as d, aiohttp.ClientSession() as http:
                made = Bench(folder, view, Frontend(WorkerServiceStub(p)), Frontend(WorkerServiceStub(d)), http)
                async with asyncio.TaskGroup() as group:
                    streams = [group.create_task(frontend.run()) for frontend in (made.prefill, made.decode)]
                    yield made
                    for stream in streams:
                        stream.cancel()
        finally:
            await discovery.close()
            for child in children:
                if child.process is not None and child.is_running:
                    child.process.kill()
                    await child.process.wait()


def _child(service: str, etcd: str, transport: str, profile: Path, chunk_tokens: int, folder: Path) -> Child:
    name = f"{service}-0"
    settings = {"instance_id": name, "etcd": etcd, "etcd_namespace": NAMESPACE, "log_format": "json", "log_level": "debug"}
    if service != "kvtransfer":
        settings |= {
            "engine": "sim",
            "profile": str(profile),
            "transports": transport,
            "kv_memory_bytes": str(POOL_BYTES),
            "block_tokens": str(BLOCK_TOKENS),
            "max_chunk_tokens": str(chunk_tokens),
        }
    environment = {f"BATON_{service.upper()}_{key.upper()}": value for key, value in settings.items()}
    return Child(name, [sys.executable, "-m", f"baton_{service}.main"], environment, folder / f"{name}.log")


async def _until_registered(view: View, children: Sequence[Child]) -> None:
    deadline = time.monotonic() + READY_LIMIT_S
    while len(view.instances) < len(children):
        for child in children:
            if not child.is_running or time.monotonic() > deadline:
                raise RuntimeError(f"{child.name}: {child.exit_text()}\n{child.last_lines()}")
        await asyncio.sleep(0.05)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of them does not exceed, to 1 us."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def number(entry: dict[str, object], key: str) -> float:
    """A figure of a log event."""
    return float(str(entry[key]))


async def exposed_case(bench: Bench, name: str, num_tokens: Sequence[int], concurrency: int, link_gb_per_s: float) -> dict[str, object]:
    """Exposed times of one load."""
    before = [await bench.frames(worker) for worker in ("decode-0", "prefill-0")]
    request_ids = await bench.run(num_tokens, concurrency)
    after = [await bench.frames(worker) for worker in ("decode-0", "prefill-0")]
    to_sink, to_source = ((new - old) / len(request_ids) for new, old in zip(after, before, strict=True))
    done = await bench.events("decode-0", "handoff_completed", request_ids)
    sources = await bench.events("prefill-0", "handoff_ended", request_ids)
    exposed = [number(entry, "exposed_ms") for entry in done]
    link = [number(entry, "last_chunk_bytes") / link_gb_per_s / 1e6 for entry in done]
    rest = [one - other for one, other in zip(exposed, link, strict=True)]
    known = [one + number(entry, "round_trip_ms") for one, entry in zip(rest, done, strict=True)]
    announced = [number(entry, "announce_to_confirm_ms") for entry in sources]
    return {
        "case": name,
        "requests": len(request_ids),
        "concurrency": concurrency,
        "handoff_bytes": int(statistics.median(number(entry, "num_bytes") for entry in done)),
        "last_chunk_bytes": int(statistics.median(number(entry, "last_chunk_bytes") for entry in done)),
        "announce_to_confirm_ms": [quantile(announced, 0.5), quantile(announced, 0.99)],
        "exposed_ms": [quantile(exposed, 0.5), quantile(exposed, 0.99)],
        "exposed_minus_link_ms": [quantile(rest, 0.5), quantile(rest, 0.99)],
        # Decode learns of the commit at most one round trip after it: an upper bound of what its first step waits for.
        "known_to_decode_minus_link_ms": [quantile(known, 0.5), quantile(known, 0.99)],
        "frames_to_sink": round(to_sink, 2),
        "frames_to_source": round(to_source, 2),
    }


async def measure(transport: str, options: argparse.Namespace) -> dict[str, object]:
    """All loads over one transport."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.logs / transport if options.logs else Path(temporary)
        async with running(transport, folder / "link", LINK_CHUNK_TOKENS) as bench:
            await bench.run([LINK_CHUNK_TOKENS] * WARM_UP, 1)
            big = await bench.events("decode-0", "handoff_completed", await bench.run([LINK_CHUNK_TOKENS] * WARM_UP, 1))
            link = statistics.median(number(entry, "gigabytes_per_second") for entry in big)
            used = {str(entry["transport"]) for entry in big}
            if used != {transport}:
                raise RuntimeError(f"asked for {transport}, {used} was used")
        async with running(transport, folder / "latency", CHUNK_TOKENS) as bench:
            await bench.run([CHUNK_TOKENS] * WARM_UP, 1)
            cases, prompt = [], CHUNKS * CHUNK_TOKENS
            for index in range(options.rounds):
                cases += [
                    await exposed_case(bench, "one block", [BLOCK_TOKENS] * options.requests, 1, link) | {"round": index},
                    await exposed_case(bench, "one by one", [prompt] * options.requests, 1, link) | {"round": index},
                    await exposed_case(bench, "four", [prompt] * options.requests, 4, link) | {"round": index},
                ]
    bare = await bare_round_trip_ms(options.requests)
    for case in cases:
        case["bare_round_trip_share"] = [round(floor / max(case["exposed_minus_link_ms"][i], 1e-3), 2) for i, floor in enumerate(bare)]
    return {"transport": transport, "link_gb_per_s": round(link, 3), "bare_round_trip_ms": bare, "cases": cases}


def table(results: Sequence[dict[str, object]]) -> str:
    """For people."""
    lines = [
        f"{'transport':<9} {'case':<10} {'last KiB':>8} {'announce-confirm ms':>20} {'exposed ms':>15} {'minus link ms':>15} "
        f"{'known minus link':>17} {'bare / it':>12} {'frames >sink >source':>21}"
    ]
    for result in results:
        assert isinstance(result["cases"], list)
        for case in result["cases"]:
            share = " / ".join(f"{part:.0%}" for part in case["bare_round_trip_share"])
            pairs = [f"{p50:.2f} / {p99:.2f}" for p50, p99 in (case[key] for key in _PAIRS)]
            lines.append(
                f"{result['transport']:<9} {case['case']:<10} {case['last_chunk_bytes'] >> 10:>8} {pairs[0]:>20} {pairs[1]:>15} "
                f"{pairs[2]:>15} {pairs[3]:>17} {share:>12} {case['frames_to_sink']:>14} {case['frames_to_source']:>6}"
            )
        p50, p99 = result["bare_round_trip_ms"]
        lines.append(
            f"{result['transport']:<9} link: {result['link_gb_per_s']} GB/s in operations of 8 MiB; "
            f"bare message each way: {p50:.2f} / {p99:.2f} ms"
        )
    lines.append(f"p50 / p99; target: minus link at most {TARGET_MS} ms p99 on shm and tcp, one by one")
    return "\n".join(lines)


def available() -> str:
    """The transports to measure unless told: nixl where it is installed."""
    try:
        load_nixl()
    except NixlMissing:
        return "shm,tcp"
    return "shm,tcp,nixl"


_PAIRS = ("announce_to_confirm_ms", "exposed_ms", "exposed_minus_link_ms", "known_to_decode_minus_link_ms")


async def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default=available(), help="shm, tcp or nixl; several with commas")
    parser.add_argument("--requests", type=int, default=300, help="of each load")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs; else they are thrown away")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.echo:
        return await echo()
    facts = machine()
    results = [await measure(transport, options) for transport in options.transport.split(",")]
    text = table(results)
    print(text)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = options.out / f"handoff-latency-{today}-{facts['num_cpus']}cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"date": today, "machine": facts, "results": results}, indent=1) + "\n")
    path.with_suffix(".txt").write_text(text + "\n")
    print(path)


if __name__ == "__main__":
    asyncio.run(main())
