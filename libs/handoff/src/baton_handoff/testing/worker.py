"""A worker for tests: a real HandoffManager behind a real gRPC server on loopback, over a FakeEngine and a LoopbackTransport."""

import asyncio
import contextlib
from array import array
from collections.abc import Sequence

import numpy as np
from baton_contracts.discovery.v1.instance_pb2 import Instance, KvLayout, Model, TransportOffer
from baton_contracts.discovery.v1.instance_pb2 import Service as ServiceKind
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as kv_pb
from baton_contracts.worker.v1.handoff_service_pb2_grpc import add_HandoffServiceServicer_to_server
from baton_engine.api import EngineRequest, Priority, SamplingParams, SequenceKey, StepOutput, Work
from baton_engine.pool import BlockLayout, KvPool
from baton_runtime.discovery import View
from baton_runtime.lifecycle import new_incarnation
from baton_runtime.rpc import GrpcServer
from baton_runtime.telemetry import Telemetry
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry

from baton_handoff.config import HandoffConfig
from baton_handoff.ids import FetchEnd, FetchHint, HandoffComplete, HandoffEnd, PeerRef
from baton_handoff.manager import HandoffManager
from baton_handoff.native import NativeTransport
from baton_handoff.testing.engine import FakeEngine
from baton_handoff.testing.loopback import LoopbackNetwork, LoopbackTransport
from baton_handoff.testing.native import NativeFakeEngine, Rooms

TEST_LAYOUT = BlockLayout(num_layers=2, block_tokens=4, num_kv_heads=1, head_dim=2, dtype="float32")
ROOT = b"r" * 16


def layout_record(layout: BlockLayout) -> KvLayout:
    """As in an Instance record."""
    return KvLayout(
        block_tokens=layout.block_tokens,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        block_bytes=layout.block_bytes,
        num_shards=layout.num_shards,
    )


class TestWorker:
    """Use as `async with TestWorker(...) as worker`. ends and completions collect what became of Starts, by request_id."""

    __test__ = False  # not a test class

    def __init__(
        self,
        network: LoopbackNetwork,
        name: str,
        *,
        num_blocks: int = 64,
        layout: BlockLayout = TEST_LAYOUT,
        config: HandoffConfig | None = None,
        view: View | None = None,
        provider: TracerProvider | None = None,
        listen: str = "127.0.0.1:0",
        fingerprint: str = "f" * 16,
        hash_block_tokens: int = 0,
        rooms: Rooms | None = None,
    ) -> None:
        """hash_block_tokens: granularity of the hash chain; 0: the layout's block size. rooms: its engine moves KV itself, in these."""
        self._rooms = rooms
        self._hash_block_tokens = hash_block_tokens or layout.block_tokens
        self.name = name
        self.incarnation = new_incarnation()
        self.registry = CollectorRegistry()
        self.ends: dict[str, HandoffEnd] = {}
        self.completions: dict[str, HandoffComplete] = {}
        self.fetch_ends: dict[str, FetchEnd] = {}
        self.requests: dict[str, EngineRequest] = {}
        self.outputs: list[StepOutput] = []
        self._network = network
        self._num_blocks = num_blocks
        self._layout = layout
        self._config = config or HandoffConfig(operation_bytes=4 * layout.block_bytes)
        self._view = view
        self._provider = provider or TracerProvider()
        self._listen = listen
        self._fingerprint = fingerprint
        self._stack = contextlib.AsyncExitStack()
        self.record = Instance()

    async def __aenter__(self) -> "TestWorker":
        self._make_engine()
        await self.transport.open()
        server = GrpcServer(self._listen)
        self.manager = HandoffManager(
            engine=self.engine,
            instance=lambda: self.record,
            transports=[self.transport],
            telemetry=Telemetry(self._provider, "test", "0"),
            registry=self.registry,
            config=self._config,
            view=self._view,
        )
        add_HandoffServiceServicer_to_server(self.manager.servicer, server.server)
        address = await server.start()
        self.server = server
        self.record = Instance(
            service=ServiceKind.SERVICE_DECODE,
            instance_id=self.name,
            incarnation=self.incarnation,
            grpc_address=address,
            model=Model(served_name="m", fingerprint=self._fingerprint, hash_block_tokens=self._hash_block_tokens),
            layout=layout_record(self._layout),
            transports=[TransportOffer(name=self.transport.name, parameters=self.transport.offer())],
        )
        self._stack.push_async_callback(server.close)
        await self.manager.open()
        self._stack.push_async_callback(self.manager.close)
        tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._stack.callback(tasks.create_task(self._run_engine(), name=f"{self.name} engine").cancel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _make_engine(self) -> None:
        self.engine: FakeEngine | NativeFakeEngine
        self.transport: LoopbackTransport | NativeTransport
        if self._rooms is not None:
            self.engine = NativeFakeEngine(self._num_blocks, self._layout, self._fingerprint, self._rooms)
            self.transport = NativeTransport("fake-1-rooms", f"{self.name}:1")
            return
        pool = KvPool(np.full((self._num_blocks, self._layout.block_bytes), 255, np.uint8), self._layout)
        self.engine = FakeEngine(
            self._num_blocks, self._layout, pool, fingerprint=self._fingerprint, hash_block_tokens=self._hash_block_tokens
        )
        self.transport = LoopbackTransport(self._network, pool, self.incarnation)

    async def _run_engine(self) -> None:
        async for output in self.engine.outputs():
            self.outputs.append(output)
            self.manager.on_output(output)

    def ref(self, address: str = "") -> PeerRef:
        """How others name it."""
        return PeerRef(self.name, self.incarnation, address or self.record.grpc_address)

    def prefill(
        self,
        request_id: str,
        tokens: Sequence[int],
        decode: "TestWorker",
        attempt: int = 1,
        traceparent: str = "",
        fetch_from: FetchHint | None = None,
    ) -> None:
        """Start a prefill for another worker."""
        request = self._request(request_id, tokens, attempt, Work.PREFILL_ONLY)
        self.manager.start_prefill(request, decode.ref(), traceparent, lambda end: self._ended(request_id, end), fetch_from)

    def fetch(self, request_id: str, tokens: Sequence[int], source: "TestWorker", traceparent: str = "") -> None:
        """Fetch all full blocks of a sequence from another worker, as before whole work."""
        request = self._request(request_id, tokens, 1, Work.WHOLE)
        hint = FetchHint(source.ref(), len(tokens))

        def on_end(end: FetchEnd) -> None:
            assert request_id not in self.fetch_ends, "ended twice"
            self.fetch_ends[request_id] = end

        self.manager.start_fetch(request, hint, traceparent, on_end)

    def slow_down(self, token_s: float = 1.0) -> None:
        """From now on computing is believed to take so long per token; a second makes every fetch worth it."""
        self.manager.on_output(StepOutput(step=0, prefill_tokens=100, duration_s=100 * token_s))

    def decode(
        self,
        request_id: str,
        tokens: Sequence[int],
        prefill: "TestWorker | PeerRef",
        attempt: int = 1,
        traceparent: str = "",
    ) -> None:
        """Start a decode with KV from another worker; the engine is started when it has come."""
        request = self._request(request_id, tokens, attempt, Work.DECODE_ONLY)
        peer = prefill if isinstance(prefill, PeerRef) else prefill.ref()
        self.manager.start_decode(
            request, peer, traceparent, lambda done: self._completed(request, done), lambda end: self._ended(request_id, end)
        )

    def pool_bytes(self, request: EngineRequest) -> list[list[int]]:
        """Per block of the request's table here: the distinct values of its bytes that hold KV, and of the tail."""
        found = []
        for index, block in enumerate(self.engine.blocks.table(request.key)):
            slots = self.engine.pool.data[block].reshape(self._layout.num_planes, self._layout.block_tokens, -1)
            valid = min(self._layout.block_tokens, request.num_kv_tokens - index * self._layout.block_tokens)
            found.append([*np.unique(slots[:, :valid]).tolist(), *np.unique(slots[:, valid:]).tolist()])
        return found

    def holds_nothing(self) -> bool:
        """Whether no block is pinned, reserved or used, by the block manager (which is checked)."""
        self.engine.blocks.check()
        counts = self.engine.blocks.counts()
        return (counts.pinned, counts.reserved, counts.used) == (0, 0, 0)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of the registry; 0 if it is not there."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def _request(self, request_id: str, tokens: Sequence[int], attempt: int, work: Work) -> EngineRequest:
        sampling = SamplingParams(max_tokens=1)
        key = SequenceKey(request_id, attempt)
        request = EngineRequest(key, array("I", tokens), len(tokens), ROOT, work, Priority.INTERACTIVE, sampling)
        self.requests[request_id] = request
        return request

    def _ended(self, request_id: str, end: HandoffEnd) -> None:
        assert request_id not in self.ends or self.ends[request_id] != end, "ended twice"
        self.ends[request_id] = end

    def _completed(self, request: EngineRequest, complete: HandoffComplete) -> None:
        self.contents = self.pool_bytes(request)
        self.completions[request.key.request_id] = complete
        self.engine.start(request)


def introduce(a: TestWorker, b: TestWorker, secret: bytes = b"s" * 16, refusal: str = "") -> None:
    """As kvtransfer does, to both."""
    a.manager.introductions.add(kv_pb.Introduction(peer=b.record, pair_secret=secret, refusal=refusal))
    b.manager.introductions.add(kv_pb.Introduction(peer=a.record, pair_secret=secret, refusal=refusal))
