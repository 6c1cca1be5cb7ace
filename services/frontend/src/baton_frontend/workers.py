"""All workers this frontend knows: one Attach stream each, the models they serve, and the choice without a router.

Discovery adds workers. It never kills one: a worker whose record vanished is dropped only when its own stream fails too.
"""

import asyncio
import itertools
from collections.abc import Callable, Collection
from typing import Protocol

from baton_contracts.discovery.v1 import instance_pb2
from baton_runtime.log import get_logger

from baton_frontend.attach_client import AttachClient, AttachTimes, Identity
from baton_frontend.generation import ModelInfo
from baton_frontend.placement import Placement, Target

PATH_DOWN_S = 10.0
LATE_TICK_S = 0.25  # several ticks were missed: this process stood still
_FLUSH_POLL_S = 0.01

log = get_logger(__name__)


class WorkersObserver(Protocol):
    """Who hears of deaths."""

    def on_worker_fenced(self, incarnation: str, reason: str) -> None:
        """The worker counts as dead; the owners of its lanes were told before."""

    def on_worker_dropped(self, instance: instance_pb2.Instance) -> None:
        """A worker is forgotten: its record had vanished, and now its stream has failed too."""

    def on_cancel_sent(self, waited_s: float) -> None:
        """A Cancel has left this process, so long after it was decided."""

    def on_cancelled_end(self, waited_s: float) -> None:
        """A cancelled attempt is over at its worker, so long after the cancel was decided."""


class Workers:
    """The workers by incarnation. Everything but the streams themselves is synchronous."""

    def __init__(self, identity: Identity, clock: Callable[[], float], times: AttachTimes | None = None) -> None:
        self._identity = identity
        self._clock = clock
        self._times = times or AttachTimes()
        self._clients: dict[str, AttachClient] = {}
        self._sessions = itertools.count(1)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._barred: dict[tuple[str, str], float] = {}  # (prefill, decode) incarnations -> until
        self._last_tick = clock()
        self.observer: WorkersObserver | None = None

    # --- life

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """Streams run in this group from now on."""
        self._tasks = tasks

    def close(self) -> None:
        """End all streams. Idempotent."""
        self._tasks = None
        for task in self._running.values():
            task.cancel()
        self._running.clear()
        self._clients.clear()

    def update(self, instances: Collection[instance_pb2.Instance]) -> None:
        """The workers discovery shows."""
        listed = {instance.incarnation: instance for instance in instances if instance.grpc_address}
        for incarnation, instance in listed.items():
            client = self._clients.get(incarnation) or self._add(incarnation, instance.grpc_address)
            if client is not None:
                client.instance = instance
                client.decodes = model_info(instance.model) if _decodes(instance) else None
        for client in self._clients.values():
            client.is_listed = client.incarnation in listed

    def _add(self, incarnation: str, address: str) -> AttachClient | None:
        if self._tasks is None:
            return None
        client = AttachClient(incarnation, address, self._identity, self, self._clock, self._times, self._sessions)
        self._clients[incarnation] = client
        self._running[incarnation] = self._tasks.create_task(client.run(), name=f"attach-{incarnation}")
        return client

    def tick(self, now: float) -> None:
        """Judge every worker by the clock, after making good for time in which this process itself stood still. Every 50 ms."""
        late_s = now - self._last_tick
        self._last_tick = now
        if late_s > LATE_TICK_S:
            for client in self._clients.values():
                client.forgive(late_s)
        for client in list(self._clients.values()):
            client.tick(now)
            if not client.is_listed and not client.is_attached and (client.is_fenced or client.is_gone):
                self._drop(client)
        for pair, until in list(self._barred.items()):
            if until <= now:
                del self._barred[pair]

    def on_stall(self, stood_still_s: float) -> None:
        """This process stood still for longer than workers tolerate: they count its streams as broken, so it does too."""
        log.warning("streams_broken_by_stall", stood_still_s=round(stood_still_s, 3))
        for client in self._clients.values():
            client.break_session("own_stall")

    def _drop(self, client: AttachClient) -> None:
        log.info("worker_dropped", worker=client.incarnation, address=client.address)
        del self._clients[client.incarnation]
        self._running.pop(client.incarnation).cancel()
        if client.instance is not None and self.observer is not None:
            self.observer.on_worker_dropped(client.instance)

    async def flush(self, timeout_s: float) -> None:
        """Wait, at most so long, until what was queued for the streams that are up has left."""
        for _ in range(round(timeout_s / _FLUSH_POLL_S)):
            if not any(client.is_attached and client.has_pending for client in self._clients.values()):
                return
            await asyncio.sleep(_FLUSH_POLL_S)

    # --- AttachObserver

    def on_fenced(self, client: AttachClient, reason: str) -> None:
        """See `AttachObserver`."""
        if self.observer is not None:
            self.observer.on_worker_fenced(client.incarnation, reason)

    def on_session(self, client: AttachClient) -> None:
        """See `AttachObserver`."""

    def on_cancel_sent(self, waited_s: float) -> None:
        """See `AttachObserver`."""
        if self.observer is not None:
            self.observer.on_cancel_sent(waited_s)

    def on_cancelled_end(self, waited_s: float) -> None:
        """See `AttachObserver`."""
        if self.observer is not None:
            self.observer.on_cancelled_end(waited_s)

    # --- questions

    def clients(self) -> list[AttachClient]:
        """All workers known now."""
        return list(self._clients.values())

    def client_for(self, target: Target) -> AttachClient | None:
        """The stream to a chosen worker, opened now if only the router knows it yet; None if it cannot take a Start."""
        client = self._clients.get(target.incarnation)
        if client is None and target.address:
            client = self._add(target.incarnation, target.address)
        return client if client is not None and client.can_start else None

    def is_healthy(self, incarnation: str) -> bool:
        """Whether our own stream to that worker is alive."""
        client = self._clients.get(incarnation)
        return client is not None and client.is_healthy

    def models(self) -> list[ModelInfo]:
        """Models some known decode instance serves; one entry per served name.

        One whose workers are all fenced stays: that nobody serves it at this moment is a 503, not an unknown name.
        """
        found: dict[str, ModelInfo] = {}
        for client in self._clients.values():
            if client.decodes is not None and not client.is_gone:
                found.setdefault(client.decodes.served_name, client.decodes)
        return list(found.values())

    def model(self, served_name: str) -> ModelInfo | None:
        """One of `models` by its name."""
        for client in self._clients.values():
            if client.decodes is not None and client.decodes.served_name == served_name and not client.is_gone:
                return client.decodes
        return None

    def may_run_whole(self, incarnation: str) -> bool:
        """Whether this decode instance also prefills; unknown ones do."""
        client = self._clients.get(incarnation)
        if client is None or client.instance is None or not client.instance.capabilities:
            return True
        return instance_pb2.CAPABILITY_WHOLE in client.instance.capabilities

    def fallback(self, model: str, excluded: Collection[str]) -> Placement | None:
        """Without any router: the healthy decode instance with the fewest sequences of ours runs the whole request."""
        able = [
            client
            for client in self._clients.values()
            if client.instance is not None
            and _decodes(client.instance)
            and client.instance.model.served_name == model
            and not client.instance.draining
            and client.incarnation not in excluded
            and client.is_healthy
            and self.may_run_whole(client.incarnation)
        ]
        if not able:
            return None
        best = min(able, key=lambda client: (client.num_lanes, client.incarnation))
        instance_id = best.instance.instance_id if best.instance is not None else ""
        return Placement(Target(instance_id, best.incarnation, best.address))

    # --- pairs without a path

    def bar(self, prefill_incarnation: str, decode_incarnation: str) -> None:
        """Do not use this pair for 10 s."""
        self._barred[(prefill_incarnation, decode_incarnation)] = self._clock() + PATH_DOWN_S

    def is_barred(self, placement: Placement) -> bool:
        """Whether the pair of this placement is known to have no path."""
        if placement.prefill is None:
            return False
        return self._barred.get((placement.prefill.incarnation, placement.decode.incarnation), 0.0) > self._clock()


def model_info(model: instance_pb2.Model) -> ModelInfo:
    """The seam's form of a record's model."""
    return ModelInfo(
        served_name=model.served_name,
        path=model.path,
        max_model_tokens=model.max_model_tokens,
        vocab_size=model.vocab_size,
        fingerprint=model.fingerprint,
        hash_block_tokens=model.hash_block_tokens,
    )


def _decodes(instance: instance_pb2.Instance) -> bool:
    return instance.service == instance_pb2.SERVICE_DECODE and bool(instance.model.served_name)
