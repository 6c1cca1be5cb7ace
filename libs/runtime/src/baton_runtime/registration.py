"""EtcdRegistration: one instance's record in etcd, kept there through everything that happens to etcd.

    grant a lease -> publish the record under it -> every ttl/3: renew the lease, look whether the record is (still) ours
         ^                                             |
         '---- lease gone (expired, wiped store) ------'      etcd down: the same lease is renewed when it is back in time

A lease lost never touches the engine: it only means that the record must be put again.
"""

import asyncio
import logging
import math
import random

from baton_contracts.discovery.v1.instance_pb2 import Instance

from baton_runtime.errors import InvalidArgument
from baton_runtime.etcd.client import EtcdClient, EtcdRefused, EtcdUnavailable, KeepAlive
from baton_runtime.log import get_logger
from baton_runtime.records import decode_record, encode_record, record_key
from baton_runtime.views import instance_key

RETRY_MIN_S, RETRY_MAX_S = 0.1, 1.0
REVOKE_LIMIT_S = 1.0

log = get_logger(__name__)


def retry_delay_s(failures: int) -> float:
    """Delay before the next try after so many failures in a row: doubling from 0.1 s to 1 s, half of it random."""
    limit = min(RETRY_MAX_S, RETRY_MIN_S * float(1 << min(failures, 10)))
    return limit * (0.5 + random.random() / 2)


def retry_log_level(failures: int) -> int:
    """Level at which the next failure is worth a line: the 1st, 2nd, 4th, 8th, ... in a row warn, the others are for debugging."""
    return logging.DEBUG if failures & (failures + 1) else logging.WARNING


class _LeaseLost(Exception):
    """The lease is gone: grant another one."""


class EtcdRegistration:
    """See `baton_runtime.discovery.Registration`. `hold()` is its one task, run by Discovery's TaskGroup."""

    def __init__(self, client: EtcdClient, namespace: str, instance: Instance, ttl_s: float) -> None:
        self._client = client
        self._key = record_key(namespace, instance)
        self._name = instance_key(instance)
        self._instance = _copy(instance)
        self._ttl_s = max(1, math.ceil(ttl_s))
        self._lease = 0
        self._changed = asyncio.Event()
        self._registered = asyncio.Event()
        self._has_been_registered = False
        self._is_in_conflict = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_registered(self) -> bool:
        """True while etcd is known to hold the record under our live lease."""
        return self._registered.is_set()

    async def registered(self, timeout_s: float) -> bool:
        """Wait until the record is in etcd; False if it is not after timeout_s (it goes on trying)."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._registered.wait()
        except TimeoutError:
            return False
        return True

    def update(self, instance: Instance) -> None:
        """Replace the record as a whole, soon. Raises: InvalidArgument if it names another instance or life."""
        if instance_key(instance) != self._name or instance.incarnation != self._instance.incarnation:
            raise InvalidArgument("instance", "a registration cannot change its service, instance_id or incarnation")
        self._instance = _copy(instance)
        self._changed.set()

    async def revoke(self) -> None:
        """Take the record out of etcd, at most 1 s; if etcd is down the lease runs out there. Idempotent."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        self._registered.clear()
        lease, self._lease = self._lease, 0
        if not lease:
            return
        try:
            async with asyncio.timeout(REVOKE_LIMIT_S):
                await self._client.revoke(lease)
            log.info("instance_deregistered")
        except (TimeoutError, EtcdUnavailable, EtcdRefused) as e:
            log.warning("instance_deregister_failed", error=str(e) or f"no answer within {REVOKE_LIMIT_S} s")

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to hold the record. For Discovery."""
        self._task = tasks.create_task(self.hold(), name=f"registration-{self._key.decode()}")

    async def hold(self) -> None:
        """Keep the record in etcd until cancelled. Cancelling leaves the lease: revoke() ends it."""
        failures = 0
        while True:
            try:
                await self._hold_one_lease()
            except _LeaseLost:
                self._registered.clear()
                log.warning("lease_lost", lease=self._lease)
                failures = 0
            except (EtcdUnavailable, EtcdRefused) as e:
                self._registered.clear()
                log.log(retry_log_level(failures), "registration_failed", error=str(e), failures=failures + 1)
                await asyncio.sleep(retry_delay_s(failures))
                failures += 1

    async def _hold_one_lease(self) -> None:
        granted = await self._client.grant(self._ttl_s)
        self._lease = granted.ID
        beat_s = granted.TTL / 3
        await self._publish()
        log.info("instance_registered", lease=granted.ID, ttl_s=granted.TTL)
        failures = 0
        while True:
            try:
                async with self._client.keepalive() as stream:
                    while True:
                        await self._wait_for_beat(beat_s)
                        await self._renew(stream, beat_s)
                        failures = 0
            except EtcdUnavailable as e:
                # The lease may well live on (a restarted etcd gives each its full TTL again): renew it, do not replace it.
                self._registered.clear()
                log.log(retry_log_level(failures), "lease_renewal_failed", error=str(e), failures=failures + 1)
                await asyncio.sleep(retry_delay_s(failures))
                failures += 1
                self._changed.set()  # no further beat of waiting

    async def _wait_for_beat(self, beat_s: float) -> None:
        try:
            async with asyncio.timeout(beat_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _renew(self, stream: KeepAlive, beat_s: float) -> None:
        self._changed.clear()
        if await stream.renew(self._lease, beat_s) <= 0:
            raise _LeaseLost
        try:
            await self._publish()
        except EtcdRefused as e:
            raise _LeaseLost from e

    async def _publish(self) -> None:
        """See to it that the record in etcd is ours, current, and under our lease.

        Whoever comes first takes the name over, whatever life had it before. Coming back to find a later life there means that we
        were replaced while we were away: it stays, and we wait for it to go.
        """
        while True:
            value = encode_record(self._instance)
            found = await self._client.get(self._key)
            if found is not None and found.value == value and found.lease == self._lease:
                break
            if found is not None and self._has_been_registered and not self._is_ours(found.value):
                self._enter_conflict(found.value)
                return
            if await self._client.put_if_unchanged(self._key, value, self._lease, found.mod_revision if found is not None else 0):
                break
        self._has_been_registered = True
        self._is_in_conflict = False
        self._registered.set()

    def _is_ours(self, value: bytes) -> bool:
        try:
            return decode_record(self._name, value).incarnation == self._instance.incarnation
        except InvalidArgument:
            return True  # garbage has no owner

    def _enter_conflict(self, value: bytes) -> None:
        self._registered.clear()
        if not self._is_in_conflict:
            self._is_in_conflict = True
            log.error("registration_conflict", key=self._key.decode(), other=value.decode(errors="replace")[:500])


def _copy(instance: Instance) -> Instance:
    copied = Instance()
    copied.CopyFrom(instance)
    return copied
