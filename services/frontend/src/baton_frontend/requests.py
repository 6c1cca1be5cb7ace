"""RequestManager: admits requests, and carries out what their state machines decide (request.py)."""

import asyncio
import itertools
import secrets
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from baton_contracts.discovery.v1 import instance_pb2
from baton_runtime import hashing
from baton_runtime.errors import BatonError, Draining, NotFound, Unavailable
from baton_runtime.log import get_logger
from opentelemetry import trace
from opentelemetry.context import Context

from baton_frontend.active_request import ActiveRequest
from baton_frontend.admission import Admission
from baton_frontend.generation import Generation, ModelInfo, TokenSink
from baton_frontend.metrics import FrontendMetrics
from baton_frontend.pacing import Pacer
from baton_frontend.placement import Ask, Placement
from baton_frontend.request import RequestLimits
from baton_frontend.route_client import RouteClient
from baton_frontend.tail_sampling import TailSampling
from baton_frontend.workers import Workers

TICK_S = 0.05
LIMITS_CHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    """resumes_per_tick: resumes asked for per 50 ms. route_limit_s: an unanswered question is given up after this long."""

    resumes_per_tick: int = 32
    route_limit_s: float = 600.0
    limits: RequestLimits = field(default_factory=RequestLimits)


class RequestManager:
    """Implements Generator. Synchronous but for `run`, its one task, which ticks everything every 50 ms."""

    def __init__(
        self,
        *,
        incarnation: str,
        workers: Workers,
        routes: RouteClient,
        tracer: trace.Tracer,
        metrics: FrontendMetrics,
        admission: Admission,
        settings: ManagerSettings,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle],
        forget: Callable[[instance_pb2.Instance], object] = lambda _: None,
        tail: TailSampling | None = None,
    ) -> None:
        """forget: told of workers whose record and stream are both gone. tail: of traces that are not sampled."""
        self.workers = workers
        self.routes = routes
        self.tracer = tracer
        self.tail = tail
        self.metrics = metrics
        self.admission = admission
        self.settings = settings
        self.clock = clock
        self.call_later = call_later
        self.log = get_logger(__name__).bind()  # bound once: structlog's lazy proxy looks for its caller at every line
        self._incarnation = incarnation
        self._forget = forget
        self._numbers = itertools.count(1)
        self._active: dict[str, ActiveRequest] = {}
        self._pacer: Pacer[tuple[ActiveRequest, Ask]] = Pacer(settings.resumes_per_tick)
        self._cache_roots: dict[str, bytes] = {}
        self._last_prompt: tuple[array[int], bytes, int, bytes] | None = None
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._next_limits_check = 0.0
        metrics.inflight.set_function(lambda: len(self._active))
        workers.observer = self

    # --- Generator

    def submit(self, generation: Generation, sink: TokenSink, trace_context: Context | None) -> ActiveRequest:
        """See `Generator`. Raises: Draining, AdmissionFull, InvalidArgument, NotFound; the sink is never called then, nor before this
        returns."""
        try:
            model = self._admissible(generation)
        except BatonError as error:
            self.metrics.on_refused(error.reason)
            raise
        request_id = f"{self._incarnation}-{next(self._numbers)}"
        seed = generation.seed if generation.seed is not None else secrets.randbits(64)
        try:
            active = ActiveRequest(self, request_id, generation, seed, model, sink, trace_context)
        except Exception:  # a bug; what was taken must not be lost with it
            self.admission.leave(generation.num_tokens)
            raise
        self._active[request_id] = active
        self._idle.clear()
        active.begin()
        return active

    def model(self, served_name: str) -> ModelInfo | None:
        """See `Generator`."""
        return self.workers.model(served_name)

    def models(self) -> list[ModelInfo]:
        """See `Generator`."""
        return self.workers.models()

    def _admissible(self, generation: Generation) -> ModelInfo:
        if self._is_draining:
            raise Draining("this frontend")
        model = self.workers.model(generation.model)
        if model is None:
            raise NotFound("model", generation.model)
        self.admission.admit(generation.num_tokens)
        return model

    # --- life

    @property
    def num_inflight(self) -> int:
        """Generations that have not ended."""
        return len(self._active)

    @property
    def is_ready(self) -> bool:
        """Whether a new generation would be taken."""
        return not self._is_draining and self.admission.is_open and bool(self.workers.models())

    def set_draining(self) -> None:
        """Refuse new generations from now on."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns when nothing is in flight."""
        await self._idle.wait()

    def abort_all(self) -> None:
        """End everything in flight with an error; workers are told."""
        for active in list(self._active.values()):
            active.abort(Unavailable("the frontend is closing"))

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick(self.clock())

    def tick(self, now: float) -> None:
        """Judge workers and routers by the clock, let held-back questions go."""
        self.workers.tick(now)
        self.routes.tick(now)
        for active, ask in self._pacer.tick():
            active.ask_now(ask)
        if now >= self._next_limits_check:
            self._next_limits_check = now + LIMITS_CHECK_S
            for active in list(self._active.values()):
                active.check_limits(now)
            self._observe()

    def _observe(self) -> None:
        self.metrics.attached_workers.set(sum(client.is_attached for client in self.workers.clients()))
        self.metrics.live_routers.set(sum(link.is_live for link in self.routes.links))
        self.metrics.paced_asks.set(len(self._pacer))

    # --- for the requests

    def pace(self, active: ActiveRequest, ask: Ask) -> None:
        """Let a question go now or in its turn."""
        if self._pacer.admit((active, ask), is_resume=ask.attempt > 1):
            active.ask_now(ask)

    def ended(self, active: ActiveRequest) -> None:
        """A request is over."""
        if self._active.pop(active.request_id, None) is not None:
            self.admission.leave(active.generation.num_tokens)
        if not self._active:
            self._idle.set()

    def usable(self, placement: Placement, num_tokens: int) -> Placement:
        """The placement, or decode alone where the pair cannot work: barred, prefill not reachable, nothing to hand over."""
        if placement.prefill is None:
            return placement
        is_possible = num_tokens > 1 and not self.workers.is_barred(placement) and self.workers.client_for(placement.prefill) is not None
        return placement if is_possible or not self.workers.may_run_whole(placement.decode.incarnation) else placement.whole()

    def cache_root(self, model: ModelInfo) -> bytes:
        """Root of the model's hash chain."""
        root = self._cache_roots.get(model.fingerprint)
        if root is None:
            root = self._cache_roots[model.fingerprint] = hashing.cache_root(model.fingerprint)
        return root

    def block_hashes(self, model: ModelInfo, prompt: "array[int]", output: "array[int]") -> bytes:
        """Hash chain of the full blocks of prompt and output. The choices of one call share their prompt, so the last is kept."""
        if model.hash_block_tokens < 1:
            return b""
        root = self.cache_root(model)
        if output:
            return b"".join(hashing.chain_hashes(root, prompt + output, model.hash_block_tokens))
        last = self._last_prompt
        if last is None or last[0] is not prompt or last[1:3] != (root, model.hash_block_tokens):
            hashes = b"".join(hashing.chain_hashes(root, prompt, model.hash_block_tokens))
            last = self._last_prompt = (prompt, root, model.hash_block_tokens, hashes)
        return last[3]

    # --- WorkersObserver

    def on_worker_fenced(self, incarnation: str, reason: str) -> None:
        """See `WorkersObserver`."""
        self.metrics.worker_losses.labels(reason).inc()
        self.routes.fenced(incarnation)
        for active in list(self._active.values()):
            active.on_worker_died(incarnation)

    def on_worker_dropped(self, instance: instance_pb2.Instance) -> None:
        """See `WorkersObserver`."""
        self._forget(instance)

    def on_cancel_sent(self, waited_s: float) -> None:
        """See `WorkersObserver`."""
        self.metrics.cancel_to_sent.observe(waited_s)

    def on_cancelled_end(self, waited_s: float) -> None:
        """See `WorkersObserver`."""
        self.metrics.cancel_to_end.observe(waited_s)
