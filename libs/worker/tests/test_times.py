"""The times the worker promises, on a clock that jumps: exact, whatever the machine does meanwhile. The streams are in memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from baton_contracts.discovery.v1.instance_pb2 import Capability
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import SequenceKey
from baton_engine.scheduler import SchedulerLimits
from baton_engine.sim_profile import load_profile
from baton_engine.virtual import LoopDrivenEngine, loop_driven_engine
from baton_runtime.telemetry import configure_telemetry
from baton_runtime.virtual_time import run_virtual
from baton_worker.core import WorkerCore
from baton_worker.testing import FakeHandoffs, FrontendModel, start_message
from prometheus_client import CollectorRegistry

KEY = SequenceKey("a", 1)
LAW_S = 0.05  # what law 6 allows beside the running step
# Steps of 2 ms while decoding, of up to 250 ms while a prompt is computed.
DECODE_STEP_S, CHUNK_S = 0.002, 0.25
PROFILE = """
[prefill_ms]
per_token = 1.0
[decode_ms]
constant = 2.0
"""
LIMITS = SchedulerLimits(block_tokens=4, max_batch_sequences=8, max_chunk_tokens=2048)


class Stream:
    """A server's end of a stream: what the test puts in, and when what came out."""

    def __init__(self) -> None:
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        self.written: list[tuple[float, Any]] = []
        self.reader: Any = None

    def put(self, request: Any) -> None:
        self._requests.put_nowait(request)

    async def read(self) -> Any:
        return await self._requests.get()

    async def send_initial_metadata(self, metadata: object) -> None: ...

    async def write(self, message: Any) -> None:
        self.written.append((asyncio.get_running_loop().time(), message))
        if self.reader is not None:
            self.reader(message)

    def longest_gap_s(self) -> float:
        times = [at for at, _ in self.written]
        assert len(times) > 5
        return max(after - before for before, after in pairwise(times))


class Quiet:
    """A worker without a process or a socket, and one frontend that reads and acknowledges at once."""

    def __init__(self, core: WorkerCore, engine: LoopDrivenEngine, registry: CollectorRegistry) -> None:
        self.core, self.engine, self.registry = core, engine, registry
        self.frontend = FrontendModel()
        self.attach, self.feed = Stream(), Stream()
        self.attach.reader = self._on_frame

    def _on_frame(self, frame: pb.AttachResponse) -> None:
        self.frontend.process(frame)
        self.attach.put(pb.AttachRequest(ack_frame=self.frontend.processed_frame))

    def start(self, **fields: Any) -> None:
        self.attach.put(pb.AttachRequest(starts=[self.frontend.started(start_message(0, "a", **fields))]))

    def cancel(self) -> None:
        self.attach.put(pb.AttachRequest(cancels=[pb.Cancel(request_id="a", attempt=1)]))

    @property
    def is_free(self) -> bool:
        counts = self.engine.blocks.counts()
        return counts.used + counts.pinned + counts.reserved == 0

    def measured_s(self, phase: str) -> float:
        """What the worker itself measured of the one cancel."""
        assert self.registry.get_sample_value("baton_cancel_to_free_seconds_count", {"phase": phase}) == 1
        return self.registry.get_sample_value("baton_cancel_to_free_seconds_sum", {"phase": phase}) or 0.0


@asynccontextmanager
async def quiet(folder: Any) -> AsyncIterator[Quiet]:
    (folder / "profile.toml").write_text(PROFILE)
    engine = loop_driven_engine(2048, load_profile(str(folder / "profile.toml")), limits=LIMITS)
    await engine.open()
    registry = CollectorRegistry()
    telemetry = configure_telemetry("decode", "0", "decode-0", "d1", "", 0.0)
    core = WorkerCore(
        instance_id="decode-0",
        incarnation="d1",
        engine=engine,
        handoffs=FakeHandoffs(),
        capabilities=[Capability.CAPABILITY_WHOLE],
        tracer=telemetry.tracer,
        registry=registry,
        clock=asyncio.get_running_loop().time,
    )
    core.servicer.open()
    made = Quiet(core, engine, registry)
    made.attach.put(pb.AttachRequest(hello=made.frontend.hello()))
    async with asyncio.TaskGroup() as tasks:
        works = [engine.run(), core.run_engine(), core.run_clock()]
        works += [core.servicer.Attach(None, made.attach), core.servicer.WatchWorker(pb.WatchWorkerRequest(), made.feed)]
        running = [tasks.create_task(work) for work in works]
        yield made
        for task in running:
            task.cancel()
    await telemetry.close()


async def eventually(condition: Any, limit_s: float = 60.0) -> float:
    """Wait in steps of 0.1 ms of virtual time; how long it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not condition():
        assert loop.time() - began < limit_s, "never became true"
        await asyncio.sleep(1e-4)
    return loop.time() - began


def test_idle_stream_carries_a_beat_at_least_every_250_ms(tmp_path: Any) -> None:
    async def main() -> None:
        async with quiet(tmp_path) as worker:
            await asyncio.sleep(5)
            assert worker.attach.longest_gap_s() <= 0.25
            assert all(message.HasField("beat") for _, message in worker.attach.written)

    run_virtual(main())


def test_stream_carries_a_frame_at_least_every_250_ms_during_long_chunks(tmp_path: Any) -> None:
    """The beats are the loop's, not the engine's: a step that runs does not hold them up."""

    async def main() -> None:
        async with quiet(tmp_path) as worker:
            worker.start(prompt=4000)
            await asyncio.sleep(3)
            assert worker.attach.longest_gap_s() <= 0.25
            ages = [message.beat.running_step_age_us for _, message in worker.attach.written]
            assert max(ages) > 100_000

    run_virtual(main())


def test_idle_feed_says_load_every_250_ms(tmp_path: Any) -> None:
    async def main() -> None:
        async with quiet(tmp_path) as worker:
            await asyncio.sleep(5)
            assert worker.feed.longest_gap_s() <= 0.25
            assert all(message.HasField("load") for _, message in worker.feed.written)

    run_virtual(main())


@pytest.mark.parametrize("into_step_s", [0.0, 0.0001, 0.001, 0.0019, 0.002])
def test_cancel_while_decoding_frees_the_blocks_within_a_step_and_50_ms(tmp_path: Any, into_step_s: float) -> None:
    """Wherever in a step it comes. Nothing on the way has to wait for a timer: it takes the rest of the step and no more."""

    async def main() -> None:
        async with quiet(tmp_path) as worker:
            worker.start(prompt=9, max_tokens=2000)
            await eventually(lambda: len(worker.frontend.tokens[KEY]) >= 30)
            await asyncio.sleep(into_step_s)
            worker.cancel()
            assert await eventually(lambda: worker.is_free) <= DECODE_STEP_S + LAW_S
            assert worker.measured_s("decoding") <= DECODE_STEP_S + 1e-9
            await eventually(lambda: KEY in worker.frontend.finished, LAW_S)
            assert worker.frontend.finished[KEY].reason == pb.FINISH_REASON_CANCELLED

    run_virtual(main())


@pytest.mark.parametrize("into_chunk_s", [0.0, 0.1, 0.24])
def test_cancel_while_computing_frees_the_blocks_within_a_chunk_and_50_ms(tmp_path: Any, into_chunk_s: float) -> None:
    async def main() -> None:
        async with quiet(tmp_path) as worker:
            worker.start(prompt=3000)
            await eventually(lambda: worker.engine.stats().running_sequences == 1)
            await asyncio.sleep(into_chunk_s)
            worker.cancel()
            assert await eventually(lambda: worker.is_free) <= CHUNK_S + LAW_S
            assert worker.measured_s("computing") <= CHUNK_S + 1e-9
            worker.engine.blocks.check()

    run_virtual(main())


def test_deadline_frees_the_blocks_within_a_step_and_50_ms_of_its_time(tmp_path: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with quiet(tmp_path) as worker:
            start = start_message(0, "a", prompt=9, max_tokens=2000)
            start.deadline_ms = 1000
            worker.attach.put(pb.AttachRequest(starts=[worker.frontend.started(start)]))
            due_at = loop.time() + 1.0
            await eventually(lambda: not worker.is_free)
            await eventually(lambda: worker.is_free)
            assert due_at <= loop.time() <= due_at + DECODE_STEP_S + LAW_S + 1e-3
            await eventually(lambda: KEY in worker.frontend.finished, LAW_S)
            assert worker.frontend.finished[KEY].reason == pb.FINISH_REASON_DEADLINE

    run_virtual(main())
