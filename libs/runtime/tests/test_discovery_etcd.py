"""Discovery against a real etcd: what a cluster does on a bad day."""

import contextlib
from collections.abc import AsyncIterator

import pytest
from baton_contracts.discovery.v1.instance_pb2 import Instance, Service
from baton_runtime.children import free_port
from baton_runtime.discovery import Discovery, View, ViewEvent, ViewEventKind, instance_key
from baton_runtime.etcd import client as client_module
from baton_runtime.etcd.client import EtcdClient
from baton_runtime.records import encode_record, instances_prefix, record_key
from baton_runtime.testing import EtcdProcess, SwallowingProxy, wait_until

NAMESPACE = "/baton/v1"
PREFILL, DECODE = Service.SERVICE_PREFILL, Service.SERVICE_DECODE
KEEPALIVE = ("grpc.keepalive_time", "grpc.keepalive_timeout", "grpc.http2.ping_timeout")
TTL_S = 2.0  # etcd grants no less


def instance(name: str = "decode-0", incarnation: str = "0" * 16, service: int = DECODE, **fields: object) -> Instance:
    return Instance(service=service, instance_id=name, incarnation=incarnation, **fields)


@contextlib.asynccontextmanager
async def discovery(endpoints: str) -> AsyncIterator[Discovery]:
    found = Discovery(endpoints, NAMESPACE, ttl_s=TTL_S)
    await found.start()
    try:
        yield found
    finally:
        await found.close()


def recorded(view: View) -> list[ViewEvent]:
    events: list[ViewEvent] = []
    view.subscribe(events.append)
    return events


def kinds(events: list[ViewEvent]) -> list[ViewEventKind]:
    return [event.kind for event in events]


async def keys(client: EtcdClient) -> list[bytes]:
    return [kv.key for kv in (await client.list_prefix(instances_prefix(NAMESPACE))).kvs]


async def test_a_registered_instance_is_seen_and_a_revoked_one_is_gone_but_kept(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as here, discovery(etcd.endpoint) as there:
        view = there.view(DECODE)
        events = recorded(view)
        assert await view.synced(5)
        registration = await here.register(instance(zone="a"))
        await wait_until(lambda: len(events) == 1)
        registration.update(instance(zone="b"))
        await wait_until(lambda: len(events) == 2)
        await registration.revoke()
        await wait_until(lambda: len(events) == 3)
        assert kinds(events) == [ViewEventKind.ADDED, ViewEventKind.CHANGED, ViewEventKind.VANISHED]
        assert view.instances[instance_key(instance())].zone == "b"
        assert view.is_gone(instance())
        assert view.forget(instance())
        assert not view.instances


async def test_a_view_lists_what_was_there_before_and_only_its_services(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as here:
        decode = await here.register(instance())
        prefill = await here.register(instance("prefill-0", service=PREFILL))
        assert await decode.registered(5)
        assert await prefill.registered(5)
        view = here.view(PREFILL)
        assert await view.synced(5)
        assert list(view.instances) == [(PREFILL, "prefill-0")]


async def test_a_new_incarnation_replaces_the_old_one(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as first, discovery(etcd.endpoint) as second, discovery(etcd.endpoint) as there:
        view = there.view(DECODE)
        events = recorded(view)
        old = await first.register(instance())
        await wait_until(lambda: old.is_registered and len(events) == 1)
        await second.register(instance(incarnation="1" * 16))
        await wait_until(lambda: len(events) == 2)
        assert events[1].kind is ViewEventKind.CHANGED
        assert events[1].previous == instance()
        assert view.is_gone(instance())
        await wait_until(lambda: not old.is_registered)
        assert not await old.registered(TTL_S / 2), "the life that was replaced must not take the name back"
        assert view.instances[instance_key(instance())].incarnation == "1" * 16


async def test_a_replaced_life_registers_again_when_its_successor_is_gone(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as first, discovery(etcd.endpoint) as second:
        old = await first.register(instance())
        assert await old.registered(5)
        new = await second.register(instance(incarnation="1" * 16))
        await wait_until(lambda: not old.is_registered)
        await new.revoke()
        await wait_until(lambda: old.is_registered)


async def test_killed_and_restarted_etcd_keeps_lease_and_view(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as here:
        view = here.view(DECODE)
        events = recorded(view)
        registration = await here.register(instance())
        await wait_until(lambda: registration.is_registered and len(events) == 1)
        await etcd.kill()
        await wait_until(lambda: not view.is_synced)
        assert view.instances
        await etcd.start()
        await wait_until(lambda: view.is_synced and registration.is_registered)
        assert kinds(events) == [ViewEventKind.ADDED]


async def test_changes_made_during_a_gap_are_seen_after_it(etcd: EtcdProcess) -> None:
    """The mirror's connection is cut by a restart; records change before it is back."""
    async with discovery(etcd.endpoint) as there:
        client = EtcdClient(etcd.endpoint)
        for name in ("decode-0", "decode-1"):
            await client.put(record_key(NAMESPACE, instance(name)), encode_record(instance(name)))
        view = there.view(DECODE)
        events = recorded(view)
        await wait_until(lambda: len(events) == 2)
        port, etcd.port = etcd.port, free_port()
        await etcd.restart()  # elsewhere, so that only we reach it
        elsewhere = EtcdClient(etcd.endpoint)
        await elsewhere.delete(record_key(NAMESPACE, instance("decode-0")))
        await elsewhere.put(record_key(NAMESPACE, instance("decode-1")), encode_record(instance("decode-1", zone="b")))
        await elsewhere.put(record_key(NAMESPACE, instance("decode-2")), encode_record(instance("decode-2")))
        await elsewhere.close()
        etcd.port = port
        await etcd.restart()
        await wait_until(lambda: len(events) == 5)
        assert {(e.kind, e.instance.instance_id) for e in events[2:]} == {
            (ViewEventKind.VANISHED, "decode-0"),
            (ViewEventKind.CHANGED, "decode-1"),
            (ViewEventKind.ADDED, "decode-2"),
        }
        await client.close()


async def test_wiped_etcd_is_filled_again_and_nothing_is_dropped(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as here, discovery(etcd.endpoint) as there:
        view = there.view(DECODE)
        await here.register(instance("decode-0"))
        await here.register(instance("decode-1"))
        await wait_until(lambda: len(view.instances) == 2)
        seen: list[int] = []
        view.subscribe(lambda _: seen.append(len(view.instances)))
        await etcd.wipe()
        await wait_until(lambda: view.is_synced and not any(view.is_gone(i) for i in view.instances.values()), timeout_s=8)
        assert set(seen) == {2}


async def test_lease_that_is_gone_is_replaced(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as here:
        registration = await here.register(instance())
        assert await registration.registered(5)
        client = EtcdClient(etcd.endpoint)
        before = await client.get(record_key(NAMESPACE, instance()))
        assert before is not None
        view = here.view()
        await wait_until(lambda: len(view.instances) == 1)
        events = recorded(view)
        await client.revoke(before.lease)  # what expiry does, seen from here
        await wait_until(lambda: kinds(events)[1:] == [ViewEventKind.VANISHED, ViewEventKind.CHANGED])
        after = await client.get(record_key(NAMESPACE, instance()))
        assert after is not None
        assert after.lease not in (0, before.lease)
        await client.close()


async def test_hanging_etcd_past_the_ttl_ends_registered(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as here:
        view = here.view()
        registration = await here.register(instance())
        await wait_until(lambda: registration.is_registered and len(view.instances) == 1)
        etcd.stop()
        await wait_until(lambda: not registration.is_registered)
        assert not await registration.registered(TTL_S + 0.5)
        etcd.cont()
        await wait_until(lambda: registration.is_registered and view.is_synced, timeout_s=8)
        await wait_until(lambda: not view.is_gone(instance()))


async def test_record_deleted_by_somebody_is_put_again(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as here:
        view = here.view()
        events = recorded(view)
        await here.register(instance())
        await wait_until(lambda: len(events) == 1)
        client = EtcdClient(etcd.endpoint)
        assert await client.delete(record_key(NAMESPACE, instance()))
        await wait_until(lambda: len(events) == 3)
        assert kinds(events)[1:] == [ViewEventKind.VANISHED, ViewEventKind.CHANGED]
        await client.close()


async def test_everything_starts_before_etcd_does() -> None:
    port = free_port()
    async with discovery(f"127.0.0.1:{port}") as here:
        view = here.view()
        registration = await here.register(instance())
        assert not await view.synced(0.3)
        assert not registration.is_registered
        async with EtcdProcess(port=port):
            await wait_until(lambda: registration.is_registered and view.is_synced and len(view.instances) == 1)


async def test_dead_endpoints_are_passed_over(etcd: EtcdProcess) -> None:
    async with discovery(f"127.0.0.1:{free_port()},{etcd.endpoint},127.0.0.1:{free_port()}") as here:
        view = here.view()
        registration = await here.register(instance())
        await wait_until(lambda: registration.is_registered and view.is_synced and len(view.instances) == 1)


async def test_next_endpoint_is_used_when_the_one_in_use_dies(etcd: EtcdProcess) -> None:
    """The second is another store, empty, which is the worst case: the lease is unknown there and every record is missing."""
    async with EtcdProcess() as other, discovery(f"{etcd.endpoint},{other.endpoint}") as here:
        view = here.view()
        registration = await here.register(instance())
        await wait_until(lambda: registration.is_registered and len(view.instances) == 1)
        await etcd.kill()
        await wait_until(lambda: not registration.is_registered)
        await wait_until(lambda: registration.is_registered and view.is_synced and not view.is_gone(instance()))
        client = EtcdClient(other.endpoint)
        assert len(await keys(client)) == 1
        await client.close()


async def test_compacted_history_leads_to_a_new_list(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as here:
        client = EtcdClient(etcd.endpoint)
        view = here.view()
        assert await view.synced(5)
        await etcd.kill()
        await wait_until(lambda: not view.is_synced)
        await etcd.start()
        await client.put(record_key(NAMESPACE, instance()), encode_record(instance()))
        revision = (await client.list_prefix(instances_prefix(NAMESPACE))).header.revision
        await client.compact(revision)
        await wait_until(lambda: view.is_synced and len(view.instances) == 1)
        await client.close()


async def test_record_that_does_not_parse_is_ignored_and_the_known_one_kept(etcd: EtcdProcess) -> None:
    async with discovery(etcd.endpoint) as here:
        client = EtcdClient(etcd.endpoint)
        await client.put(record_key(NAMESPACE, instance()), encode_record(instance()))
        view = here.view()
        await wait_until(lambda: len(view.instances) == 1)
        await client.put(record_key(NAMESPACE, instance()), b"{not json")
        await client.put(
            record_key(NAMESPACE, instance("decode-1")), encode_record(instance("decode-1")).replace(b"{", b'{"from_the_future": 1, ', 1)
        )
        await wait_until(lambda: len(view.instances) == 2)
        assert view.instances[instance_key(instance())] == instance()
        assert not view.is_gone(instance())
        await client.close()


async def test_close_takes_the_records_out(etcd: EtcdProcess) -> None:
    client = EtcdClient(etcd.endpoint)
    async with discovery(etcd.endpoint) as here:
        registration = await here.register(instance())
        assert await registration.registered(5)
        assert len(await keys(client)) == 1
    assert await keys(client) == []
    await client.close()


async def test_connection_that_swallows_everything_is_noticed_and_replaced(etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-open: no packet says that the connection is dead. The keepalive is shortened from 10 s + 3 s."""
    quick = [(name, value // 10 if name.startswith(KEEPALIVE) else value) for name, value in client_module.CHANNEL_OPTIONS]
    monkeypatch.setattr(client_module, "CHANNEL_OPTIONS", quick)
    async with SwallowingProxy(etcd.endpoint) as network, discovery(network.address) as here:
        view = here.view()
        assert await view.synced(5)
        network.swallow()
        direct = EtcdClient(etcd.endpoint)
        await direct.put(record_key(NAMESPACE, instance()), encode_record(instance()))
        await direct.close()
        assert view.is_synced, "nothing tells it yet"
        await wait_until(lambda: not view.is_synced, timeout_s=8)
        await wait_until(lambda: view.is_synced and len(view.instances) == 1, timeout_s=8)
