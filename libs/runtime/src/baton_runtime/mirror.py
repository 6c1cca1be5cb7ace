"""Mirror: follows the instance records in etcd and feeds them to views.

After every gap (start, broken stream, compaction, etcd restarted or wiped): list, let the views take the difference, watch
from the list's revision + 1. One path for all of them, because a wiped store is not recognisable (its cluster id comes back the
same, and a watch from a revision in its future waits in silence).
"""

import asyncio
import time
from collections.abc import Iterable

from baton_contracts.discovery.v1.instance_pb2 import Instance

from baton_runtime.errors import InvalidArgument
from baton_runtime.etcd import etcd_pb2 as pb
from baton_runtime.etcd.client import EtcdClient, EtcdRefused, EtcdUnavailable, WatchEnded
from baton_runtime.log import get_logger
from baton_runtime.records import decode_record, instances_prefix, parse_key
from baton_runtime.registration import retry_delay_s, retry_log_level
from baton_runtime.views import InstanceKey, View

# A watch that lasted this long was healthy: the next failure starts the back-off anew.
_HEALTHY_S = 5.0

log = get_logger(__name__)


class Mirror:
    """Known records, last-known-good; `follow()` is its one task."""

    def __init__(self, client: EtcdClient, namespace: str) -> None:
        self._client = client
        self._namespace = namespace
        self._prefix = instances_prefix(namespace)
        self._records: dict[InstanceKey, Instance] = {}
        self._is_synced = False
        self._views: list[View] = []

    def add_view(self, view: View) -> None:
        """Feed a view from now on, beginning with what is known."""
        self._views.append(view)
        if self._is_synced:
            view.apply_list(self._records.values())
        else:
            for instance in self._records.values():
                view.apply_put(instance)

    async def follow(self) -> None:
        """Follow until cancelled; the views keep what they know then."""
        try:
            await self._follow()
        finally:
            self._set_unsynced()

    async def _follow(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._list_and_watch()
            except (EtcdUnavailable, EtcdRefused, WatchEnded) as e:
                self._set_unsynced()
                failures = 0 if time.monotonic() - began > _HEALTHY_S else failures
                log.log(retry_log_level(failures), "discovery_not_synced", error=str(e), failures=failures + 1)
                await asyncio.sleep(retry_delay_s(failures))
                failures += 1

    async def _list_and_watch(self) -> None:
        listed = await self._client.list_prefix(self._prefix)
        async with self._client.watch(self._prefix, listed.header.revision + 1) as watch:
            # Only now: a list without a watch would be true for a moment only, and "synced" promises more.
            self._take_list(listed.kvs)
            log.info("discovery_synced", revision=listed.header.revision, num_instances=len(self._records))
            while True:
                for event in await watch.events():
                    self._take_event(event)

    def _set_unsynced(self) -> None:
        self._is_synced = False
        for view in self._views:
            view.set_unsynced()

    def _take_list(self, kvs: Iterable[pb.KeyValue]) -> None:
        before, self._records = self._records, {}
        for kv in kvs:
            key = self._key(kv)
            instance = self._instance(key, kv) if key is not None else None
            if key is not None and (kept := instance or before.get(key)) is not None:
                self._records[key] = kept
        self._is_synced = True
        for view in self._views:
            view.apply_list(self._records.values())

    def _take_event(self, event: pb.Event) -> None:
        key = self._key(event.kv)
        if key is None:
            return
        if event.type == pb.Event.DELETE:
            self._records.pop(key, None)
            for view in self._views:
                view.apply_delete(key)
            return
        instance = self._instance(key, event.kv)
        if instance is not None:  # else: what was known stays
            self._records[key] = instance
            for view in self._views:
                view.apply_put(instance)

    def _key(self, kv: pb.KeyValue) -> InstanceKey | None:
        try:
            return parse_key(self._namespace, kv.key)
        except InvalidArgument as e:
            log.warning("foreign_key_ignored", error=str(e))
            return None

    def _instance(self, key: InstanceKey, kv: pb.KeyValue) -> Instance | None:
        try:
            return decode_record(key, kv.value)
        except InvalidArgument as e:
            log.warning("bad_record_ignored", key=kv.key.decode(errors="replace"), error=str(e))
            return None
