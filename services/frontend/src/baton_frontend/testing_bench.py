"""A RequestManager with its streams, over fake workers and routers, for tests."""

import asyncio
import gc
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc
from baton_contracts.discovery.v1 import instance_pb2
from opentelemetry import trace
from prometheus_client import CollectorRegistry

from baton_frontend.active_request import ActiveRequest
from baton_frontend.admission import Admission, AdmissionLimits
from baton_frontend.attach_client import AttachTimes, Identity
from baton_frontend.generation import Generation, GenerationEnd, TokenLogprob
from baton_frontend.metrics import FrontendMetrics
from baton_frontend.requests import ManagerSettings, RequestManager
from baton_frontend.route_client import RouteClient, RouteTimes
from baton_frontend.tail_sampling import TailSampling
from baton_frontend.testing_workers import FakeRouter, FakeWorker
from baton_frontend.workers import Workers

QUICK_TIMES = AttachTimes(beat_s=0.05, suspect_s=0.2, fence_s=0.5, refused_s=0.1, connect_s=0.4, fenced_retry_s=0.1)
QUICK_ROUTES = RouteTimes(connect_s=0.5, probe_after_s=0.1, probe_s=0.2, first_retry_s=0.02, retry_s=0.05)
WAIT_S = 10.0


class RecordingSink:
    """Keeps what it is told; checks the order."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.ends: list[GenerationEnd] = []
        self.on_token: Callable[[], None] | None = None  # called after each delivery
        self._changed = asyncio.Event()

    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """See `TokenSink`."""
        assert not self.ends, "tokens after the end"
        assert len(token_ids) > 0
        self.tokens.extend(token_ids)
        self.logprobs.extend(logprobs or ())
        self._changed.set()
        if self.on_token is not None:
            self.on_token()

    def on_end(self, end: GenerationEnd) -> None:
        """See `TokenSink`."""
        assert not self.ends, "a second end"
        self.ends.append(end)
        self._changed.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Wait until what was delivered makes the condition true."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def end(self, timeout_s: float = WAIT_S) -> GenerationEnd:
        """The one end."""
        await self.until(lambda: bool(self.ends), timeout_s)
        return self.ends[0]


class Bench:
    """What a test holds."""

    def __init__(self, manager: RequestManager, workers: Workers, routes: RouteClient, registry: CollectorRegistry) -> None:
        self.manager = manager
        self.registry = registry
        self.workers = workers
        self.routes = routes

    def show(self, *servers: FakeWorker | FakeRouter) -> None:
        """Discovery shows exactly these."""
        instances = [server.instance for server in servers]
        self.routes.update([i for i in instances if i.service == instance_pb2.SERVICE_ROUTER])
        self.workers.update([i for i in instances if i.service != instance_pb2.SERVICE_ROUTER])

    async def ready(self, *servers: FakeWorker | FakeRouter) -> None:
        """Show these, and wait until their streams are up."""
        self.show(*servers)
        await until(lambda: all(c.is_attached for c in self.workers.clients()) and all(r.is_live for r in self.routes.links))

    def submit(self, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 8, **fields: object) -> tuple[RecordingSink, ActiveRequest]:
        """One generation."""
        sink = RecordingSink()
        generation = Generation(model="m", prompt_token_ids=array("I", prompt), max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
        return sink, self.manager.submit(generation, sink, None)


async def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Wait for a condition nobody announces."""
    deadline = time.monotonic() + timeout_s
    for _ in range(round(timeout_s / 0.005)):
        if condition():
            return
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.005)
    raise TimeoutError("the condition did not come true")


@asynccontextmanager
async def running_bench(
    settings: ManagerSettings | None = None,
    times: AttachTimes = QUICK_TIMES,
    tracer: trace.Tracer | None = None,
    timer_share: float = 1.0,
    limits: AdmissionLimits | None = None,
    tail: TailSampling | None = None,
) -> AsyncIterator[Bench]:
    """A manager that ticks, without workers at first. timer_share: timers fire after this share of their delay."""
    loop = asyncio.get_running_loop()
    workers = Workers(Identity("frontend-0", "f" * 16), time.monotonic, times)
    routes = RouteClient(time.monotonic, QUICK_ROUTES)
    registry = CollectorRegistry()
    manager = RequestManager(
        incarnation="f" * 16,
        workers=workers,
        routes=routes,
        tracer=tracer or trace.NoOpTracer(),
        metrics=FrontendMetrics(registry),
        admission=Admission(limits),
        settings=settings or ManagerSettings(),
        clock=time.monotonic,
        tail=tail,
        call_later=lambda delay_s, callback: loop.call_later(delay_s * timer_share, callback),
    )
    is_open = asyncio.Event()
    # A task of its own holds the group: pytest enters and leaves fixtures in different tasks, which a TaskGroup does not survive.
    holder = loop.create_task(_hold(workers, routes, manager, is_open))
    await is_open.wait()
    try:
        yield Bench(manager, workers, routes, registry)
    finally:
        manager.abort_all()
        holder.cancel()
        await asyncio.wait([holder])
    if not holder.cancelled():
        holder.result()


async def _hold(workers: Workers, routes: RouteClient, manager: RequestManager, is_open: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        workers.open(tasks)
        routes.open(tasks)
        tasks.create_task(manager.run())
        is_open.set()


def num_channels() -> int:
    """gRPC channels of this process that something holds, be it a ring that only the collector would free."""
    # By type(): isinstance looks at __class__, at which lazy modules of other libraries in the process warn.
    return sum(issubclass(type(thing), grpc.aio.Channel) for thing in gc.get_objects())
