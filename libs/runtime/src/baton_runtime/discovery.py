"""Discovery: who is there. Instance records in etcd under a lease, as protobuf JSON, at <namespace>/instances/<service>/<id>.

    discovery = Discovery("127.0.0.1:2379", "/baton/v1")
    await discovery.start()
    view = discovery.view(Service.SERVICE_PREFILL)
    registration = await discovery.register(instance)

Nothing here fails because etcd is down: registrations keep trying, views keep what they know. See docs/discovery.md.
"""

import asyncio
from typing import Protocol

from baton_contracts.discovery.v1.instance_pb2 import Instance, Service

from baton_runtime.etcd.client import EtcdClient
from baton_runtime.mirror import Mirror
from baton_runtime.registration import EtcdRegistration
from baton_runtime.views import InstanceKey, View, ViewEvent, ViewEventKind, instance_key

__all__ = [
    "Discovery",
    "DiscoveryClient",
    "InMemoryDiscovery",
    "InstanceKey",
    "Registration",
    "View",
    "ViewEvent",
    "ViewEventKind",
    "instance_key",
]


class Registration(Protocol):
    """One instance's record in the store, held until revoked."""

    @property
    def is_registered(self) -> bool:
        """True while the store is known to hold the record under a live lease."""

    async def registered(self, timeout_s: float) -> bool:
        """Wait until the record is in the store; False if it is not after timeout_s (it goes on trying)."""

    def update(self, instance: Instance) -> None:
        """Replace the record as a whole, soon; service, instance_id and incarnation must stay the same."""

    async def revoke(self) -> None:
        """Take the record out of the store, at most 1 s; if the store is down its lease runs out there. Idempotent."""


class DiscoveryClient(Protocol):
    """What services use of discovery."""

    async def start(self) -> None:
        """Begin; returns at once even if the store is down."""

    async def close(self) -> None:
        """Revoke every registration and end every view. Idempotent."""

    async def register(self, instance: Instance) -> Registration:
        """Put a record into the store and keep it there; returns at once even if the store is down."""

    def view(self, *services: "Service") -> View:
        """A live view of some services' instances (none named: of all)."""


class Discovery:
    """Discovery on etcd. Start and close it in one task.

    endpoints: comma-separated host:port. namespace: prefix of every key. ttl_s: lease of a registration, in seconds, rounded up
    (etcd grants at least about 2 s).
    """

    def __init__(self, endpoints: str, namespace: str, ttl_s: float = 10.0) -> None:
        self._namespace = namespace
        self._ttl_s = ttl_s
        self._registrations: list[EtcdRegistration] = []
        self._following: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._client = EtcdClient(endpoints)
        self._mirror = Mirror(self._client, namespace)

    async def start(self) -> None:
        """Begin; returns at once, even if etcd is down."""
        self._tasks = await asyncio.TaskGroup().__aenter__()

    async def close(self) -> None:
        """Revoke every registration (at most 1 s), end every view where it stands. Idempotent."""
        if self._tasks is None:
            return
        tasks, self._tasks = self._tasks, None
        try:
            await asyncio.gather(*(registration.revoke() for registration in self._registrations))
            if self._following is not None:
                self._following.cancel()
            await tasks.__aexit__(None, None, None)
        finally:
            await self._client.close()

    async def register(self, instance: Instance) -> Registration:
        """Put a record into etcd and keep it there; returns at once even if etcd is down.

        A record of an earlier life under the same name is replaced. Raises: InvalidArgument for a record that cannot have a place.
        """
        registration = EtcdRegistration(self._client, self._namespace, instance, self._ttl_s)
        registration.start(self._running())
        self._registrations.append(registration)
        return registration

    def view(self, *services: "Service") -> View:
        """A live view of some services' instances (none named: of all); empty and not synced at first."""
        view = View(services)
        self._mirror.add_view(view)
        if self._following is None:
            self._following = self._running().create_task(self._mirror.follow(), name="discovery-mirror")
        return view

    def _running(self) -> asyncio.TaskGroup:
        if self._tasks is None:
            raise RuntimeError("discovery is not started")
        return self._tasks


class InMemoryDiscovery:
    """Discovery without a store, for unit tests: same interface, plus what etcd does to one on a bad day."""

    def __init__(self) -> None:
        self._records: dict[InstanceKey, Instance] = {}
        self._views: list[View] = []
        self._registrations: list[_InMemoryRegistration] = []
        self._is_up = True

    async def start(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """Revoke every registration made here."""
        for registration in list(self._registrations):
            await registration.revoke()

    async def register(self, instance: Instance) -> Registration:
        """Put the record; views have it when this returns."""
        registration = _InMemoryRegistration(self, instance)
        self._registrations.append(registration)
        registration.update(instance)
        return registration

    def view(self, *services: "Service") -> View:
        """A view that follows this object's records."""
        view = View(services)
        self._views.append(view)
        if self._is_up:
            view.apply_list(self._records.values())
        return view

    def put(self, instance: Instance) -> None:
        """Test control: a record appears or changes."""
        record = Instance()
        record.CopyFrom(instance)
        self._records[instance_key(record)] = record
        for view in self._views if self._is_up else ():
            view.apply_put(record)

    def vanish(self, instance: Instance) -> None:
        """Test control: a record disappears (lease expired, store wiped)."""
        self._records.pop(instance_key(instance), None)
        for view in self._views if self._is_up else ():
            view.apply_delete(instance_key(instance))

    def set_up(self, is_up: bool) -> None:
        """Test control: the store goes down (views stop following) or comes back (they list)."""
        self._is_up = is_up
        for view in self._views:
            if is_up:
                view.apply_list(self._records.values())
            else:
                view.set_unsynced()

    def _released(self, registration: "_InMemoryRegistration") -> None:
        self._registrations.remove(registration)


class _InMemoryRegistration:
    def __init__(self, discovery: InMemoryDiscovery, instance: Instance) -> None:
        self._discovery = discovery
        self._instance = instance
        self._is_revoked = False

    @property
    def is_registered(self) -> bool:
        return not self._is_revoked

    async def registered(self, timeout_s: float) -> bool:
        return self.is_registered

    def update(self, instance: Instance) -> None:
        if not self._is_revoked:
            self._instance = instance
            self._discovery.put(instance)

    async def revoke(self) -> None:
        if not self._is_revoked:
            self._is_revoked = True
            self._discovery._released(self)
            self._discovery.vanish(self._instance)
