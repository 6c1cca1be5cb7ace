"""Views: what this process knows about instances, kept through every failure of discovery.

Discovery is for finding instances, never for declaring them dead (docs/discovery.md): a record that disappears is marked gone
and stays. Whoever uses the view drops it with `forget` when its own stream to that instance fails too.
"""

import asyncio
import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from baton_contracts.discovery.v1.instance_pb2 import Instance, Service

from baton_runtime.log import get_logger

# Service is an enum value; a type alias because protobuf's enums are ints at run time.
InstanceKey: TypeAlias = tuple[int, str]
# Gone records nobody forgets; beyond it the longest gone are dropped, so that years of restarts do not fill memory.
MAX_GONE = 1024

log = get_logger(__name__)


class ViewEventKind(enum.Enum):
    """What happened to a record."""

    ADDED = "added"  # not known before (or forgotten)
    CHANGED = "changed"  # another record under the same name (compare incarnations), or a gone one is back
    VANISHED = "vanished"  # no longer in discovery; still in View.instances


@dataclass(frozen=True, slots=True)
class ViewEvent:
    """One change. instance: the record now (VANISHED: the last one); previous: the one before, with CHANGED."""

    kind: ViewEventKind
    instance: Instance
    previous: Instance | None = None


def instance_key(instance: Instance) -> InstanceKey:
    """(service, instance_id): the name under which a record is kept."""
    return (instance.service, instance.instance_id)


class View:
    """Live, last-known-good records of some services. Read it on the event loop; treat the records as immutable."""

    def __init__(self, services: Iterable["Service"] = ()) -> None:
        self._services = frozenset(int(s) for s in services)
        self._gone: dict[InstanceKey, None] = {}  # in the order in which they vanished
        self._subscribers: list[Callable[[ViewEvent], None]] = []
        self._synced = asyncio.Event()
        self.instances: dict[InstanceKey, Instance] = {}

    @property
    def is_synced(self) -> bool:
        """True while the view follows the store; False before the first list and after every gap, until the next list."""
        return self._synced.is_set()

    async def synced(self, timeout_s: float) -> bool:
        """Wait until the view follows the store; False if it does not after timeout_s (go on with what is known)."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._synced.wait()
        except TimeoutError:
            return False
        return True

    def is_gone(self, instance: Instance) -> bool:
        """True if the record has disappeared from discovery, or another incarnation took its place, or it is not known."""
        known = self.instances.get(instance_key(instance))
        return known is None or known.incarnation != instance.incarnation or instance_key(instance) in self._gone

    def forget(self, instance: Instance) -> bool:
        """Drop a gone instance for good; call it when your own stream to it has failed. Subscribers are not told.

        Returns: False, and nothing happens, while discovery still has this incarnation, or if it is not known.
        """
        key = instance_key(instance)
        known = self.instances.get(key)
        if known is None or known.incarnation != instance.incarnation or key not in self._gone:
            return False
        del self.instances[key], self._gone[key]
        return True

    def subscribe(self, callback: Callable[[ViewEvent], None]) -> Callable[[], None]:
        """Call back, synchronously and in order, at every change; first with ADDED (and VANISHED) for what is known already.

        Returns: a function that ends the subscription.
        """
        self._subscribers.append(callback)
        for key, instance in list(self.instances.items()):
            _notify(callback, ViewEvent(ViewEventKind.ADDED, instance))
            if key in self._gone:
                _notify(callback, ViewEvent(ViewEventKind.VANISHED, instance))

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    def follows(self, service: int) -> bool:
        """True if records of this service belong in the view."""
        return not self._services or service in self._services

    def apply_put(self, instance: Instance) -> None:
        """A record is in the store. For discovery clients."""
        key = instance_key(instance)
        if not self.follows(key[0]):
            return
        previous = self.instances.get(key)
        was_gone = key in self._gone
        self._gone.pop(key, None)
        if previous == instance and not was_gone:
            return
        self.instances[key] = instance
        self._emit(ViewEvent(ViewEventKind.ADDED if previous is None else ViewEventKind.CHANGED, instance, previous))

    def apply_delete(self, key: InstanceKey) -> None:
        """A record is no longer in the store. For discovery clients."""
        instance = self.instances.get(key)
        if instance is None or key in self._gone:
            return
        self._gone[key] = None
        self._emit(ViewEvent(ViewEventKind.VANISHED, instance))
        while len(self._gone) > MAX_GONE:
            longest_gone = next(iter(self._gone))
            del self._gone[longest_gone], self.instances[longest_gone]

    def apply_list(self, instances: Iterable[Instance]) -> None:
        """The whole store, after a gap: the difference becomes events, and the view is synced. For discovery clients."""
        present = {instance_key(i): i for i in instances if self.follows(i.service)}
        for key in [k for k in self.instances if k not in present]:
            self.apply_delete(key)
        for instance in present.values():
            self.apply_put(instance)
        self._synced.set()

    def set_unsynced(self) -> None:
        """The store cannot be followed now; everything known is kept. For discovery clients."""
        self._synced.clear()

    def _emit(self, event: ViewEvent) -> None:
        for callback in list(self._subscribers):
            _notify(callback, event)


def _notify(callback: Callable[[ViewEvent], None], event: ViewEvent) -> None:
    try:
        callback(event)
    except Exception:  # supervisor: one bad subscriber must not end discovery for the others
        log.exception("view_subscriber_failed", kind=event.kind.value, instance_id=event.instance.instance_id)
