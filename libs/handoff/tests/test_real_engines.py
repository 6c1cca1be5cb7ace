"""Two sim engines with their own threads, real shared memory and tcp, over real gRPC: every byte that arrives is checked."""

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from baton_contracts.discovery.v1.instance_pb2 import Instance, Model, TransportOffer
from baton_contracts.discovery.v1.instance_pb2 import Service as ServiceKind
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as kv_pb
from baton_contracts.worker.v1.handoff_service_pb2_grpc import add_HandoffServiceServicer_to_server
from baton_engine.api import EndReason as EngineEnd
from baton_engine.api import EngineRequest, SamplingParams, SequenceEnd, SequenceKey, StepOutput, Work
from baton_engine.factory import build_engine
from baton_engine.sim_pattern import expected_block_bytes
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import EndReason, FetchHint, FetchOutcome, HandoffEnd, PeerRef
from baton_handoff.manager import HandoffManager
from baton_handoff.testing.worker import ROOT, layout_record
from baton_handoff.transports import PoolMemory, make_transports
from baton_runtime.lifecycle import new_incarnation
from baton_runtime.rpc import GrpcServer
from baton_runtime.telemetry import Telemetry
from baton_runtime.testing import wait_until
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

BLOCK_TOKENS = 8
NUM_BLOCKS = 48
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class SimWorker:
    """A worker over a DrivenEngine; checks the bytes of every handoff that completes."""

    def __init__(
        self, name: str, transports: Sequence[str], exporter: InMemorySpanExporter, block_tokens: int = BLOCK_TOKENS, num_shards: int = 1
    ) -> None:
        self.name = name
        self._cut = (block_tokens, num_shards)
        self.incarnation = new_incarnation()
        self.registry = CollectorRegistry()
        self.prefilled: dict[str, HandoffEnd] = {}
        self.failed: dict[str, HandoffEnd] = {}
        self.checked: list[str] = []
        self.decoded: dict[str, SequenceEnd] = {}
        self._names = transports
        self._provider = TracerProvider()
        self._provider.add_span_processor(SimpleSpanProcessor(exporter))
        self._stack = contextlib.AsyncExitStack()
        self.record = Instance()

    async def __aenter__(self) -> "SimWorker":
        block_tokens, num_shards = self._cut
        loaded = build_engine(
            "sim", None, "instant", block_tokens=block_tokens, hash_block_tokens=BLOCK_TOKENS, num_shards=num_shards, max_chunk_tokens=32
        )
        self.layout = loaded.layout
        pool, memory = PoolMemory.allocate(NUM_BLOCKS * BLOCK_TOKENS // block_tokens, loaded.layout, self.incarnation)
        self._stack.callback(memory.close)
        self.engine = loaded.bind(pool)
        await self.engine.open()
        self._stack.push_async_callback(self.engine.close)
        transports = make_transports(self._names, memory, pool, self.incarnation, "127.0.0.1:0", "")
        for transport in transports:
            await transport.open()
            self._stack.push_async_callback(transport.close)
        server = GrpcServer("127.0.0.1:0")
        self.manager = HandoffManager(
            engine=self.engine,
            instance=lambda: self.record,
            transports=transports,
            telemetry=Telemetry(self._provider, "test", "0"),
            registry=self.registry,
            config=HandoffConfig(operation_bytes=3 * loaded.layout.block_bytes),
        )
        add_HandoffServiceServicer_to_server(self.manager.servicer, server.server)
        address = await server.start()
        self._stack.push_async_callback(server.close)
        self.record = Instance(
            service=ServiceKind.SERVICE_DECODE,
            instance_id=self.name,
            incarnation=self.incarnation,
            grpc_address=address,
            model=Model(fingerprint=loaded.info.fingerprint, hash_block_tokens=BLOCK_TOKENS),
            layout=layout_record(loaded.layout),
            transports=[TransportOffer(name=transport.name, parameters=transport.offer()) for transport in transports],
        )
        await self.manager.open()
        self._stack.push_async_callback(self.manager.close)
        tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._stack.callback(tasks.create_task(self._run()).cancel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _run(self) -> None:
        async for output in self.engine.outputs():
            self.manager.on_output(output)
            self.decoded |= {end.key.request_id: end for end in output.ends if end.reason is not EngineEnd.PREFILLED}

    def ref(self) -> PeerRef:
        return PeerRef(self.name, self.incarnation, self.record.grpc_address)

    def decode(self, request: EngineRequest, prefill: "SimWorker", traceparent: str = "") -> None:
        name = request.key.request_id

        def complete(_: object) -> None:
            self._check(request)
            self.checked.append(name)
            self.engine.start(request)

        self.manager.start_decode(request, prefill.ref(), traceparent, complete, lambda end: self.failed.update({name: end}))

    def prefill(self, request: EngineRequest, decode: "SimWorker", traceparent: str = "") -> None:
        name = request.key.request_id
        self.manager.start_prefill(request, decode.ref(), traceparent, lambda end: self.prefilled.update({name: end}))

    def _check(self, request: EngineRequest) -> None:
        handed_over = request.token_ids[: request.num_kv_tokens]
        for index, block in enumerate(self.engine.blocks.table(request.key)):
            expected = expected_block_bytes(self.layout, handed_over, index)
            assert (self.engine.pool.data[block] == expected).all(), f"block {index} of {request.key}"

    def holds_nothing(self) -> bool:
        self.engine.blocks.check()
        counts = self.engine.blocks.counts()
        return (counts.pinned, counts.reserved, counts.used) == (0, 0, 0)


def request(name: str, tokens: Sequence[int], work: Work) -> EngineRequest:
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    return EngineRequest(SequenceKey(name, 1), array("I", tokens), len(tokens), ROOT, work, sampling=sampling)


@contextlib.asynccontextmanager
async def pair(
    p_names: Sequence[str],
    d_names: Sequence[str],
    exporter: InMemorySpanExporter | None = None,
    *,
    p_cut: tuple[int, int] = (BLOCK_TOKENS, 1),
    d_cut: tuple[int, int] = (BLOCK_TOKENS, 1),
) -> AsyncIterator[tuple[SimWorker, SimWorker]]:
    """p_cut, d_cut: tokens per block and shards."""
    exporter = exporter or InMemorySpanExporter()
    async with SimWorker("p", p_names, exporter, *p_cut) as p, SimWorker("d", d_names, exporter, *d_cut) as d:
        for own, peer in ((p, d), (d, p)):
            own.manager.introductions.add(kv_pb.Introduction(peer=peer.record, pair_secret=b"secret of 16 by."))
        yield p, d


def place(p: SimWorker, d: SimWorker, name: str, tokens: Sequence[int], traceparent: str = "") -> None:
    p.prefill(request(name, tokens, Work.PREFILL_ONLY), d, traceparent)
    d.decode(request(name, tokens, Work.DECODE_ONLY), p, traceparent)


def prompt(number: int, num_tokens: int) -> list[int]:
    return [(number * 7919 + index * 31) % 1000 + 3 for index in range(num_tokens)]


needs_shm = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory on this machine")


@needs_shm
@pytest.mark.parametrize("names", [["shm", "tcp"], ["tcp"]])
async def test_forty_prompts_arrive_byte_for_byte_and_leave_nothing(names: list[str]) -> None:
    async with pair(names, names) as (p, d):
        for number in range(40):
            place(p, d, f"r{number}", prompt(number % 25, 2 + number * 5))
        await wait_until(lambda: len(d.checked) + len(d.failed) == 40, timeout_s=15)
        assert not d.failed
        await wait_until(lambda: len(p.prefilled) == 40 and len(d.decoded) == 40)
        assert {end.reason for end in p.prefilled.values()} == {EndReason.PREFILLED}
        await wait_until(lambda: p.holds_nothing() and d.holds_nothing())
        assert d.manager.stranded_bytes() == 0


@needs_shm
@pytest.mark.parametrize("name", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("p_cut", "d_cut"),
    [((8, 1), (8, 2)), ((8, 2), (8, 1)), ((8, 2), (8, 4)), ((8, 1), (32, 1)), ((32, 1), (8, 1)), ((32, 4), (16, 2)), ((8, 1), (16, 4))],
    ids=lambda cut: f"{cut[0]}x{cut[1]}",
)
async def test_prompts_arrive_byte_for_byte_in_other_blocks_and_shards(p_cut: tuple[int, int], d_cut: tuple[int, int], name: str) -> None:
    async with pair([name], [name], p_cut=p_cut, d_cut=d_cut) as (p, d):
        for number in range(16):
            place(p, d, f"r{number}", prompt(number % 11, 2 + number * 13))  # some share their beginning, so caches of all sizes are hit
        await wait_until(lambda: len(d.checked) + len(d.failed) == 16, timeout_s=15)
        assert not d.failed
        await wait_until(lambda: len(p.prefilled) == 16 and len(d.decoded) == 16)
        assert {end.reason for end in d.decoded.values()} == {EngineEnd.LENGTH}, "the sim verifies what it attends to"
        await wait_until(lambda: p.holds_nothing() and d.holds_nothing())
        assert d.manager.stranded_bytes() == 0


@needs_shm
@pytest.mark.parametrize("name", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("p_cut", "d_cut"),
    [((8, 1), (8, 1)), ((8, 2), (8, 1)), ((8, 1), (32, 1)), ((32, 1), (8, 1)), ((32, 4), (16, 2))],
    ids=lambda cut: f"{cut[0]}x{cut[1]}",
)
async def test_cached_blocks_are_fetched_byte_for_byte_in_other_blocks_and_shards(
    p_cut: tuple[int, int], d_cut: tuple[int, int], name: str
) -> None:
    """P has computed 200 tokens, D the first 40 of them: D fetches what it lacks, as far as both have whole blocks."""
    tokens, step = prompt(1, 200), max(p_cut[0], d_cut[0])
    async with pair([name], [name], p_cut=p_cut, d_cut=d_cut) as (p, d):
        p.engine.start(request("p", tokens, Work.WHOLE))
        d.engine.start(request("d", tokens[:41], Work.WHOLE))
        await wait_until(lambda: "p" in p.decoded and "d" in d.decoded)
        d.manager.on_output(StepOutput(step=0, prefill_tokens=100, duration_s=100.0))  # from now on a fetch is worth it
        wanted, ends = request("r", tokens, Work.WHOLE), []
        d.manager.start_fetch(wanted, FetchHint(p.ref(), 200), "", ends.append)
        await wait_until(lambda: ends)
        end, own = 199 // step * step, 40 // d_cut[0] * d_cut[0]
        assert (ends[0].outcome, ends[0].num_tokens) == (FetchOutcome.FETCHED, end - own)
        d.engine.start(wanted)
        await wait_until(lambda: "r" in d.decoded)
        assert d.decoded["r"].cached_tokens == end
        assert d.decoded["r"].reason is EngineEnd.LENGTH, "the sim verifies what it attends to"
        num_blocks = end // d_cut[0]
        assert d.engine.blocks.acquire("look", d.manager._fetches.hashes(wanted), num_blocks) == num_blocks
        for index, block in enumerate(d.engine.blocks.table("look")):
            assert (d.engine.pool.data[block] == expected_block_bytes(d.layout, wanted.token_ids[:199], index)).all()
        d.engine.blocks.release("look")
        await wait_until(lambda: p.holds_nothing() and d.holds_nothing())


@needs_shm
async def test_shared_memory_is_preferred_and_tcp_is_what_is_left() -> None:
    async with pair(["shm", "tcp"], ["tcp"]) as (p, d):
        place(p, d, "r", prompt(1, 50))
        await wait_until(lambda: "r" in d.checked)
        assert d.registry.get_sample_value("baton_handoff_pull_gigabytes_per_second_count", {"transport": "tcp"})
    async with pair(["shm", "tcp"], ["shm", "tcp"]) as (p, d):
        place(p, d, "r", prompt(1, 50))
        await wait_until(lambda: "r" in d.checked)
        assert d.registry.get_sample_value("baton_handoff_pull_gigabytes_per_second_count", {"transport": "shm"})


async def test_spans_of_a_sampled_request_belong_to_its_trace() -> None:
    exporter = InMemorySpanExporter()
    async with pair(["tcp"], ["tcp"], exporter) as (p, d):
        place(p, d, "r", prompt(1, 50), TRACEPARENT)
        await wait_until(lambda: "r" in d.checked and "r" in p.prefilled)
        await wait_until(lambda: len(exporter.get_finished_spans()) >= 3)
        spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"kv.begin", "kv.pull", "kv.confirm"}
    for span in spans.values():
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    pull = dict(spans["kv.pull"].attributes or {})
    assert pull["baton.bytes"] == 7 * d.layout.block_bytes
    assert pull["baton.transport"] == "tcp"
    assert pull["baton.operations"] >= 3


async def test_cancels_at_random_moments_leave_nothing() -> None:
    async with pair(["tcp"], ["tcp"]) as (p, d):
        for number in range(60):
            place(p, d, f"r{number}", prompt(number, 20 + number))
            for _ in range(number % 7):
                await asyncio.sleep(0)
            if number % 3 != 2:
                (p if number % 3 else d).manager.cancel(f"r{number}", 1, "CLIENT_GONE")
                (d if number % 3 else p).manager.cancel(f"r{number}", 1, "CLIENT_GONE")
                d.engine.cancel(SequenceKey(f"r{number}", 1))
        await wait_until(lambda: not p.manager.live_handoffs() and not d.manager.live_handoffs(), timeout_s=15)
        await wait_until(lambda: p.holds_nothing() and d.holds_nothing())
        assert all(f"r{number}" in d.checked for number in range(60) if number % 3 == 2)
