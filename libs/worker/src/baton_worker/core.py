"""The inside of a worker without its process: engine, handoffs and frontends wired together, and the tasks that drive them."""

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Protocol

from baton_contracts.discovery.v1.instance_pb2 import Capability
from baton_engine.api import Engine, StepOutput
from baton_engine.errors import EngineFailed
from baton_runtime.errors import Unavailable
from baton_runtime.lifecycle import LoopStallWatch
from baton_runtime.log import get_logger
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from baton_worker.attach import AttachLimits
from baton_worker.attach_service import AttachHandler
from baton_worker.cache_feed import CacheFeed
from baton_worker.dispatch import Dispatcher, Handoffs
from baton_worker.frontends import Frontends
from baton_worker.load import HandoffCounts, WorkerState
from baton_worker.metrics import WorkerMetrics
from baton_worker.service import WorkerServicer
from baton_worker.starts import StartLimits

TICK_S = 0.05
# Part of the drain's time, at its end, in which what still runs is handed back to the frontends.
HAND_BACK_S = 2.0
# How long frontends get to take the last frames when the engine died.
FLUSH_LIMIT_S = 1.0
FLUSH_POLL_S = 0.01

log = get_logger(__name__)


class WorkerHandoffs(Handoffs, HandoffCounts, Protocol):
    """All that a worker uses of `baton_handoff.manager.HandoffManager`, but for its opening and closing."""

    def on_output(self, output: StepOutput) -> None:
        """One step was done; first to hear of it, because it pins what the step announced."""

    def fence_all(self, reason: str) -> None:
        """Our own loop stood still: every peer has given us up."""

    def set_draining(self) -> None:
        """Refuse new handoffs, hand back those that have not begun."""


class WorkerCore:
    """Made on the loop, with an open engine. Run `run_engine` and `run_clock` in a TaskGroup; add `servicer` to a gRPC server."""

    def __init__(
        self,
        *,
        instance_id: str,
        incarnation: str,
        engine: Engine,
        handoffs: WorkerHandoffs,
        capabilities: Collection["Capability"],
        tracer: Tracer,
        registry: CollectorRegistry,
        attach_limits: AttachLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._handoffs = handoffs
        self._clock = clock
        self._metrics = WorkerMetrics(registry)
        limits = StartLimits(engine.info, engine.pool.num_blocks * engine.pool.layout.block_tokens, capabilities)
        self.dispatcher = Dispatcher(instance_id, engine, handoffs, limits, self._metrics, tracer, clock)
        self.frontends = Frontends(instance_id, incarnation, self.dispatcher, attach_limits)
        self.dispatcher.on_end = self.frontends.end
        self.feed = CacheFeed(engine.cache)
        self.state = WorkerState(instance_id, incarnation, engine, self.dispatcher, handoffs)
        self.stall_watch = LoopStallWatch(on_stall=self._on_stall)
        attach = AttachHandler(self.frontends, self.state.beat, self.stall_watch.check, clock)
        self.servicer = WorkerServicer(attach, self.feed, self.state, clock)
        self._export(registry)

    async def run_engine(self) -> None:
        """Hand every step to whom it concerns; returns when the engine was closed.

        Raises: EngineFailed if it died, after every frontend was told, or did not take it in time.
        """
        try:
            async for output in self._engine.outputs():
                self.stall_watch.check()
                self._on_output(output)
        except EngineFailed as error:
            log.error("engine_failed", num_sequences=self.dispatcher.num_live, exc_info=error)
            self.dispatcher.set_draining()
            self.dispatcher.fail_all(error)
            await self._flush(FLUSH_LIMIT_S)
            raise

    async def run_clock(self) -> None:
        """Deadlines, silences, expiries, cache events between steps; until cancelled."""
        while True:
            self.stall_watch.check()
            now = self._clock()
            self.dispatcher.tick(now)
            self.frontends.tick(now)
            self.feed.collect()
            await asyncio.sleep(TICK_S)

    async def drain(self, remaining_s: Callable[[], float]) -> None:
        """Refuse new work and return when everything is over and nothing is pinned or reserved.

        remaining_s: what is left of the grace, which may be shortened meanwhile. What still runs shortly before its end is handed back:
        its frontend goes on elsewhere with the tokens so far.
        """
        self.dispatcher.set_draining()
        self._handoffs.set_draining()
        hand_back_s = min(remaining_s() / 2, HAND_BACK_S)
        is_handed_back = False
        while not self._is_over():
            if not is_handed_back and remaining_s() <= hand_back_s:
                is_handed_back = True
                log.info("handing_back", num_sequences=self.dispatcher.num_live)
                self.dispatcher.hand_back_all()
            await asyncio.sleep(TICK_S)  # three counts of different owners; there is no one event

    def close(self) -> None:
        """End every stream, so that the gRPC server can stop. Idempotent."""
        self.servicer.close()
        for session in self.frontends.sessions:
            session.detach(self._clock(), Unavailable("the worker ends"))

    def _on_output(self, output: StepOutput) -> None:
        self._handoffs.on_output(output)
        self.dispatcher.on_started(output)
        self.frontends.on_output(output)
        self.dispatcher.on_ended(output)
        self.feed.on_output(output)
        self.feed.collect()
        self._metrics.step(output)

    def _on_stall(self, stood_still_s: float) -> None:
        """Others have given us up: do the same before anything they sent meanwhile is looked at."""
        self._handoffs.fence_all("LOOP_STALL")
        self.frontends.fence_all(self._clock())

    def _is_over(self) -> bool:
        return self.state.is_safe_to_stop() and self.frontends.num_unacknowledged == 0

    async def _flush(self, limit_s: float) -> None:
        """Wait until the frontends have acknowledged every end, at most limit_s."""
        deadline = self._clock() + limit_s
        while self.frontends.num_unacknowledged and self._clock() < deadline:  # noqa: ASYNC110  # last thing this process does
            await asyncio.sleep(FLUSH_POLL_S)

    def _export(self, registry: CollectorRegistry) -> None:
        self._metrics.watch_engine(self._engine)
        self._metrics.watch(
            "baton_waiting_sequences",
            "Admitted sequences that are not in the batch, tickets included.",
            lambda: self._engine.stats().waiting_sequences + self._handoffs.queued(),
        )
        self._metrics.watch("baton_live_sequences", "Attempts that are not over.", lambda: self.dispatcher.num_live)
        self._metrics.watch("baton_live_handoffs", "Handoffs that are not over.", self._handoffs.live_handoffs)
        self._metrics.watch(
            "baton_attached_frontends",
            "Frontends with an open Attach stream.",
            lambda: sum(s.stream is not None for s in self.frontends.sessions),
        )
        self._metrics.watch("baton_feed_subscribers", "Open feeds of cache events.", lambda: self.feed.num_subscribers)
        self._metrics.watch("baton_draining", "1 while draining.", lambda: float(self.dispatcher.is_draining))
