"""The Route streams: one per router. Each model is asked of the live router with the lowest rendezvous hash, so that all
frontends ask the same one; when it dies its open questions go to the next, and without any to the frontend's own fallback.
"""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from baton_contracts.discovery.v1 import instance_pb2
from baton_contracts.router.v1 import router_service_pb2 as router_pb2
from baton_contracts.router.v1 import router_service_pb2_grpc as router_grpc
from baton_runtime.log import get_logger
from baton_runtime.rpc import open_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton_frontend.stream_io import WRITE_PACE_S, StreamBroken, is_task_cancelled, read_message, release_frames, write_message

# Hints kept for a router that reads slowly; the oldest are dropped beyond.
MAX_HINTS = 4096

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RouteTimes:
    """In seconds. A Route stream has no beats of its own: while questions are open and nothing was heard for probe_after_s, the
    router's health service is asked, and a router that does not answer within probe_s is left for the next one."""

    connect_s: float = 1.0
    probe_after_s: float = 0.5
    probe_s: float = 1.0
    first_retry_s: float = 0.05
    retry_s: float = 0.5
    return_s: float = 0.2  # a router that was lost or found less than this ago may be about to answer


class QueryOwner(Protocol):
    """Who asked."""

    def on_answer(self, query_id: int, answer: router_pb2.Answer, link: "RouterLink") -> None:
        """Placed or refused. link: where the placement is to be ended."""

    def on_query_lost(self, query_id: int) -> None:
        """The router is gone; ask again."""


class RouterLink:
    """One router and the stream to it. `run()` keeps the stream; everything else is synchronous."""

    def __init__(self, instance_id: str, incarnation: str, address: str, clock: Callable[[], float], times: RouteTimes) -> None:
        self.instance_id = instance_id
        self.incarnation = incarnation
        self.address = address
        self.is_listed = True
        self.is_draining = False
        self.is_live = False
        self._clock = clock
        self._times = times
        self._open: dict[int, QueryOwner] = {}
        self._queries: dict[int, router_pb2.Query] = {}  # not sent yet
        self._withdrawn: list[int] = []
        self._ended: list[int] = []
        self._paths_down: list[router_pb2.PathDown] = []
        self._fenced: list[str] = []
        self._wake = asyncio.Event()
        self._probe_wanted = asyncio.Event()
        self._last_heard = self._down_since = clock()

    @property
    def is_returning(self) -> bool:
        """Not live, but lost or found only a moment ago."""
        return not self.is_live and self._clock() - self._down_since < self._times.return_s

    @property
    def num_open(self) -> int:
        """Questions without an answer."""
        return len(self._open)

    def ask(self, query: router_pb2.Query, owner: QueryOwner) -> None:
        """Queue a question. Call only if `is_live`."""
        if not self._open:
            self._last_heard = self._clock()  # silence counts from the first open question
        self._open[query.query_id] = owner
        self._queries[query.query_id] = query
        self._wake.set()

    def withdraw(self, query_id: int) -> None:
        """The answer is not wanted any more. Unknown ids are ignored."""
        if self._open.pop(query_id, None) is not None and self._queries.pop(query_id, None) is None:
            self._withdrawn.append(query_id)
            self._wake.set()

    def end(self, query_id: int) -> None:
        """The placement given for this question is over. The router hears of it with the next message, or tick."""
        if self.is_live:
            self._ended.append(query_id)  # each undoes a sum of the router's, so none is dropped; they are as many as requests at most

    def path_down(self, prefill_incarnation: str, decode_incarnation: str) -> None:
        """This pair cannot reach each other."""
        self._hint(self._paths_down, router_pb2.PathDown(prefill_incarnation=prefill_incarnation, decode_incarnation=decode_incarnation))

    def fenced(self, incarnation: str) -> None:
        """We have fenced this worker."""
        self._hint(self._fenced, incarnation)

    def tick(self, now: float) -> None:
        """Ask for a probe when open questions meet silence; let go what waited for company."""
        if self._ended:
            self._wake.set()
        if self.is_live and self._open and now - self._last_heard >= self._times.probe_after_s:
            self._probe_wanted.set()

    async def run(self) -> None:
        """Keep the stream until cancelled."""
        while True:
            was_live = await self._session()
            if is_task_cancelled():
                return  # as in AttachClient.run
            await asyncio.sleep(self._times.first_retry_s if was_live else self._times.retry_s)

    def _hint(self, hints: list[Any], hint: object) -> None:
        if not self.is_live:
            return  # a router forgets a frontend whose stream ends
        hints.append(hint)
        if len(hints) > MAX_HINTS:
            del hints[0]
        self._wake.set()

    async def _session(self) -> bool:
        channel = open_channel(self.address, "router")
        call: Any = None
        reason, was_live = "", False
        try:
            async with asyncio.TaskGroup() as tasks:
                # The router says nothing until asked, so that it takes calls is learned from its health service.
                await self._probe(channel, self._times.connect_s)
                call = router_grpc.RouterServiceStub(channel).Route()
                was_live = self.is_live = True
                log.info("router_live", router=self.instance_id, address=self.address)
                tasks.create_task(self._write_loop(call), name=f"route-write-{self.instance_id}")
                tasks.create_task(self._probe_loop(channel), name=f"route-probe-{self.instance_id}")
                await self._read_loop(call)
        except* StreamBroken as group:
            reason = str(group.exceptions[0])
            release_frames(group)
        finally:
            del tasks  # it holds the exceptions, which hold this frame
            if call is not None:
                call.cancel()
            lost = self._end_session()
            await channel.close(None)
        if was_live:
            log.warning("router_lost", router=self.instance_id, address=self.address, reason=reason, open_queries=len(lost))
        for query_id, owner in lost.items():
            owner.on_query_lost(query_id)
        return was_live

    def _end_session(self) -> dict[int, QueryOwner]:
        if self.is_live:
            self.is_live, self._down_since = False, self._clock()
        lost, self._open = self._open, {}
        for pending in (self._queries, self._withdrawn, self._ended, self._paths_down, self._fenced):
            pending.clear()
        self._wake.clear()
        self._probe_wanted.clear()
        return lost

    async def _read_loop(self, call: Any) -> None:
        while True:
            response = await read_message(call)
            self._last_heard = self._clock()
            for answer in response.answers:
                owner = self._open.pop(answer.query_id, None)
                if owner is not None:
                    owner.on_answer(answer.query_id, answer, self)
                elif answer.HasField("placement"):
                    self.end(answer.query_id)  # withdrawn while the answer was on its way

    async def _write_loop(self, call: Any) -> None:
        """The one writer: what came together while a write was under way leaves as one message."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            message = router_pb2.RouteRequest(
                queries=self._queries.values(),
                withdrawn_query_ids=self._withdrawn,
                paths_down=self._paths_down,
                fenced_incarnations=self._fenced,
                ended_query_ids=self._ended,
            )
            for sent in (self._queries, self._withdrawn, self._paths_down, self._fenced, self._ended):
                sent.clear()
            await write_message(call, message)
            await asyncio.sleep(WRITE_PACE_S)

    async def _probe_loop(self, channel: Any) -> None:
        while True:
            await self._probe_wanted.wait()
            await self._probe(channel, self._times.probe_s)
            self._last_heard = self._clock()
            self._probe_wanted.clear()

    async def _probe(self, channel: Any, timeout_s: float) -> None:
        """Raises: StreamBroken if the router's process does not answer. That it is NOT_SERVING is an answer: it drains."""
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise StreamBroken(f"health: {error.code().name}: {error.details()}") from error


class RouteClient:
    """All routers. Hints go to every live one, questions to one."""

    def __init__(self, clock: Callable[[], float], times: RouteTimes | None = None) -> None:
        self._clock = clock
        self._times = times or RouteTimes()
        self._links: dict[str, RouterLink] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._num_queries = 0

    @property
    def links(self) -> list[RouterLink]:
        """Routers known now."""
        return list(self._links.values())

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """Streams run in this group from now on."""
        self._tasks = tasks

    def close(self) -> None:
        """End all streams. Idempotent."""
        for task in self._running.values():
            task.cancel()
        self._running.clear()
        self._links.clear()
        self._tasks = None

    def update(self, routers: list[instance_pb2.Instance]) -> None:
        """The routers discovery shows. One that vanished is kept while its stream lives."""
        listed = {router.incarnation: router for router in routers if router.grpc_address}
        for incarnation, router in listed.items():
            if incarnation not in self._links and self._tasks is not None:
                link = RouterLink(router.instance_id, incarnation, router.grpc_address, self._clock, self._times)
                self._links[incarnation] = link
                self._running[incarnation] = self._tasks.create_task(link.run(), name=f"route-{router.instance_id}")
        for link in self._links.values():
            link.is_listed = link.incarnation in listed
            link.is_draining = link.is_listed and listed[link.incarnation].draining

    def next_query_id(self) -> int:
        """Unique over all routers, from 1."""
        self._num_queries += 1
        return self._num_queries

    def choose(self, model: str) -> RouterLink | None:
        """The live router for a model, one that drains only if there is no other; None if there is none."""
        live = [link for link in self._links.values() if link.is_live]
        return min(live, key=lambda link: (link.is_draining, rendezvous(model, link.instance_id))) if live else None

    def is_returning(self) -> bool:
        """Whether some router may be live again in a moment."""
        return any(link.is_returning for link in self._links.values())

    def tick(self, now: float) -> None:
        """Watch open questions; forget routers that are neither listed nor live. Call every 50 ms."""
        for incarnation, link in list(self._links.items()):
            link.tick(now)
            if not link.is_listed and not link.is_live:
                del self._links[incarnation]
                self._running.pop(incarnation).cancel()

    def path_down(self, prefill_incarnation: str, decode_incarnation: str) -> None:
        """Tell every live router."""
        for link in self._links.values():
            link.path_down(prefill_incarnation, decode_incarnation)

    def fenced(self, incarnation: str) -> None:
        """Tell every live router."""
        for link in self._links.values():
            link.fenced(incarnation)


def rendezvous(model: str, instance_id: str) -> bytes:
    """Rank of a router for a model; lowest wins. The same in every frontend."""
    return hashlib.sha256(f"{model}\0{instance_id}".encode()).digest()
