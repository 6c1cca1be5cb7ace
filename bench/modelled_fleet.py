"""A fleet of sim workers in one process and in modelled time: the real placement, handoff books, schedulers and block managers, and
nothing of this machine's. A step takes what the profile says, a message HOP_S, a pull its bytes at LINK_BYTES_PER_S; Python takes no time.

Chats and jobs of `mixed_load` run against it. What it leaves out: sockets, serialization, text, and the time all of it takes.
"""

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.router.v1 import router_service_pb2 as route_pb
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb
from baton_engine.api import EngineRequest, Priority, SamplingParams, SequenceKey, StepOutput, Work
from baton_engine.scheduler import SchedulerLimits
from baton_engine.sim_folder import read_sim_folder
from baton_engine.sim_profile import SimProfile
from baton_engine.virtual import ROOT, loop_driven_engine
from baton_handoff.actions import Action, CancelEngine, Completed, Ended, Send, StartEngine, StartPull
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import EndReason, PeerRef
from baton_handoff.sink import SinkBook
from baton_handoff.source import SourceBook
from baton_handoff.source_handoff import SourceState
from baton_handoff.tag import KvShape
from baton_router.config import RouterConfig
from baton_router.fleet import Fleet, Worker
from baton_router.index import BlockIndex
from baton_router.placement import Placer
from baton_worker.assembly import layout_message

HOP_S = 0.0005
LINK_BYTES_PER_S = 2e9
TICK_S = 0.1  # of the books, and a worker's feed to the router
BLOCK_TOKENS = 16
LIMITS = SchedulerLimits(block_tokens=BLOCK_TOKENS, max_batch_sequences=256, max_chunk_tokens=2048)
CAPABILITIES = {
    discovery.SERVICE_PREFILL: [discovery.CAPABILITY_PREFILL_FOR],
    discovery.SERVICE_DECODE: [discovery.CAPABILITY_DECODE_FROM, discovery.CAPABILITY_WHOLE],
}


@dataclass
class Call:
    """One request. times: of its tokens, as the client has them; tokens: what was drawn."""

    request_id: str
    prompt: "array[int]"
    priority: Priority
    max_tokens: int
    sent_at: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    prefill: str = ""
    decode: str = ""


class ModelledWorker:
    """Engine and books of one prefill or decode instance, and the router's view of it."""

    def __init__(self, fleet: "ModelledFleet", name: str, service: "discovery.Service", num_blocks: int, profile: SimProfile) -> None:
        self.name = name
        self._fleet = fleet
        self.engine = loop_driven_engine(num_blocks, profile, limits=LIMITS)
        shape = KvShape(name, "model", self.engine.pool.layout, BLOCK_TOKENS)
        config = HandoffConfig(look_ahead_tokens=2 * LIMITS.max_chunk_tokens)
        self.source = SourceBook(self.engine.blocks, shape, config)
        self.sink = SinkBook(self.engine.blocks, shape, config)
        self._samples: list[worker_pb.StepSample] = []
        self._requests: dict[SequenceKey, EngineRequest] = {}
        record = discovery.Instance(
            service=service,
            instance_id=name,
            incarnation=name,
            grpc_address=name,
            model=discovery.Model(served_name="m", hash_block_tokens=BLOCK_TOKENS, max_model_tokens=self.engine.info.max_model_tokens),
            layout=layout_message(self.engine.pool.layout),
            capabilities=CAPABILITIES[service],
        )
        self.seen = fleet.router_knows(record)

    async def run(self) -> None:
        """What the worker's loop does with its engine's steps."""
        async for output in self.engine.outputs():
            self._on_output(output)

    async def tick(self) -> None:
        """The books' clock, and the feed to the router."""
        while True:
            now = asyncio.get_running_loop().time()
            self.perform(self.source.tick(now) + self.sink.tick(now))
            self._tell_router(now)
            await asyncio.sleep(TICK_S)

    def start(self, request: EngineRequest, peer: str) -> None:
        """A Start has come. peer: the other instance, for work of a pair."""
        now = asyncio.get_running_loop().time()
        self._requests[request.key] = request
        if request.work is Work.WHOLE:
            self.engine.start(request)
        elif request.work is Work.PREFILL_ONLY:
            self.perform(self.source.start(request, PeerRef(peer, peer), "", now))
        else:
            self.perform(self.sink.start(request, PeerRef(peer, peer), "", now))

    def perform(self, actions: Sequence[Action]) -> None:
        """As HandoffManager does."""
        loop = asyncio.get_running_loop()
        for action in actions:
            if isinstance(action, Send):
                loop.call_later(HOP_S, self._fleet.workers[action.peer_incarnation].receive, self.name, action.message)
            elif isinstance(action, StartEngine):
                self.engine.start(action.request)
            elif isinstance(action, CancelEngine):
                self.engine.cancel(action.sequence)
            elif isinstance(action, StartPull):
                num_bytes = len(action.dest_ids) * self.engine.pool.block_bytes
                loop.call_later(HOP_S + num_bytes / LINK_BYTES_PER_S, self._pulled, action)
            elif isinstance(action, Completed):
                self._clear_tail(action)
                self.engine.start(self._requests[action.key.sequence])
            elif isinstance(action, Ended) and action.end.reason is not EndReason.PREFILLED:
                raise RuntimeError(f"{action.key} ended at {self.name} with {action.end}")

    def receive(self, peer: str, message: object) -> None:
        """A message of the pair's channel."""
        book = self.source if message.key.decode_incarnation == peer else self.sink  # type: ignore[attr-defined]
        self.perform(book.receive(peer, message, asyncio.get_running_loop().time()))  # type: ignore[arg-type]

    def _pulled(self, pull: StartPull) -> None:
        source = self._fleet.workers[pull.peer_incarnation]
        self.engine.pool.data[list(pull.dest_ids)] = source.engine.pool.data[list(pull.source_ids)]
        self.perform(self.sink.pull_returned(pull.operation, None, asyncio.get_running_loop().time()))

    def _clear_tail(self, done: Completed) -> None:
        if done.tail_block >= 0:
            layout = self.engine.pool.layout
            slots = self.engine.pool.data[done.tail_block].reshape(layout.num_planes, layout.block_tokens, -1)
            slots[:, done.tail_tokens :] = 0

    def _on_output(self, output: StepOutput) -> None:
        now = asyncio.get_running_loop().time()
        for ready in output.ready:
            self.perform(self.source.blocks_ready(ready, now))
        for end in output.ends:
            self.perform(self.source.engine_ended(end, now))
        for key, token_id in zip(output.keys, output.token_ids, strict=True):
            self._fleet.token(key, token_id, now + HOP_S)
        for end in output.ends:
            if self._requests.pop(end.key).work is not Work.PREFILL_ONLY:
                self._fleet.ended(end.key)
        if output.prefill_tokens or output.decode_sequences:
            self._samples.append(
                worker_pb.StepSample(
                    prefill_tokens=output.prefill_tokens,
                    decode_sequences=output.decode_sequences,
                    kv_tokens=output.kv_tokens,
                    duration_us=round(output.duration_s * 1e6),
                )
            )

    def _tell_router(self, now: float) -> None:
        stats, beat = self.engine.stats(), self.engine.beat()
        queued = [handoff for handoff in self.source.live if handoff.state in (SourceState.QUEUED, SourceState.OFFERED)]
        load = worker_pb.WorkerLoad(
            running_sequences=stats.running_sequences,
            waiting_sequences=stats.waiting_sequences + len(queued) + self.sink.num_tickets(),
            waiting_prefill_tokens=stats.waiting_prefill_tokens + sum(handoff.num_tokens for handoff in queued),
            active_kv_tokens=stats.active_kv_tokens,
            samples=self._samples[-32:],
        )
        self._samples.clear()
        self.seen.heard(
            worker_pb.Beat(
                step=beat.step,
                running_step_age_us=round(beat.running_step_age_s * 1e6),
                predicted_step_us=round(beat.predicted_step_s * 1e6),
            ),
            now,
        )
        self.seen.reported(load, now)


class ModelledFleet:
    """Workers, a router and one frontend. Use inside `baton_runtime.virtual_time.run_virtual`."""

    def __init__(self, profile: SimProfile, *, prefill: int, decode: int, num_blocks: int, router: RouterConfig | None = None) -> None:
        """num_blocks: of each worker's pool, of BLOCK_TOKENS tokens."""
        self._profile = profile
        self._router = router or RouterConfig()
        self._known = Fleet()
        self._index = BlockIndex(1_000_000)
        self._placer = Placer(self._router, self._known, self._index)
        self._calls: dict[SequenceKey, tuple[Call, int]] = {}
        self._num_placed = 0
        kinds = [("prefill", discovery.SERVICE_PREFILL, prefill), ("decode", discovery.SERVICE_DECODE, decode)]
        self.workers = {
            f"{name}-{i}": ModelledWorker(self, f"{name}-{i}", service, num_blocks, profile)
            for name, service, count in kinds
            for i in range(count)
        }
        self._is_prefill = [worker for name, worker in self.workers.items() if name.startswith("prefill")]

    @property
    def allowed_token_ids(self) -> npt.NDArray[np.uint32]:
        """What the sims may draw."""
        return read_sim_folder(None, self._profile.model).allowed_token_ids

    def router_knows(self, record: discovery.Instance) -> Worker:
        """A worker has registered."""
        return self._known.add(record, self._index.add_worker(), self._router.default_prefill_us_per_token)

    async def run(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Open everything; cancel what is returned to end it."""
        running = []
        for worker in self.workers.values():
            await worker.engine.open()
            running += [tasks.create_task(work) for work in (worker.engine.run(), worker.run(), worker.tick())]
        now = asyncio.get_running_loop().time()
        for source in self._is_prefill:
            for sink in self.workers.values():
                if sink not in self._is_prefill:
                    sink.perform(sink.sink.link_up(source.name, now))
                    source.perform(source.source.link_up(sink.name, [], now))
        await asyncio.sleep(2 * TICK_S)
        return running

    async def ask(self, call: Call) -> None:
        """Place a call, run it, return when its last token has come. Raises: RuntimeError if it is not placed."""
        loop = asyncio.get_running_loop()
        call.sent_at = loop.time()
        self._num_placed += 1
        query = route_pb.Query(
            query_id=self._num_placed,
            request_id=call.request_id,
            attempt=1,
            model="m",
            priority=int(call.priority),  # type: ignore[arg-type]  # the numbers are the same
            num_tokens=len(call.prompt),
            max_new_tokens=call.max_tokens,
        )
        answer = self._placer.place(query, self._num_placed, loop.time() + HOP_S)
        if not answer.HasField("placement"):
            raise RuntimeError(f"{call.request_id}: {answer.refusal}")
        key, number = SequenceKey(call.request_id, 1), self._num_placed
        self._calls[key] = (call, number)
        call.decode, call.prefill = answer.placement.decode.instance_id, answer.placement.prefill.instance_id
        if call.prefill:
            self._send(call.prefill, call, key, Work.PREFILL_ONLY, call.decode)
        self._send(call.decode, call, key, Work.DECODE_ONLY if call.prefill else Work.WHOLE, call.prefill)
        await call.done.wait()

    def token(self, key: SequenceKey, token_id: int, at: float) -> None:
        """A token has come to the frontend."""
        call, _ = self._calls[key]
        call.tokens.append(token_id)
        call.times.append(at)

    def ended(self, key: SequenceKey) -> None:
        """Its last token has come."""
        call, number = self._calls.pop(key)
        self._placer.ended(number)
        call.done.set()

    def _send(self, name: str, call: Call, key: SequenceKey, work: Work, peer: str) -> None:
        sampling = SamplingParams(max_tokens=call.max_tokens, ignore_eos=True)
        request = EngineRequest(key, call.prompt, len(call.prompt), ROOT, work, call.priority, sampling)
        # Asking the router and being sent to the worker.
        asyncio.get_running_loop().call_later(3 * HOP_S, self.workers[name].start, request, peer)
