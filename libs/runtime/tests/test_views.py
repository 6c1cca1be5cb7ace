from baton_contracts.discovery.v1.instance_pb2 import Instance, Service
from baton_runtime import views
from baton_runtime.discovery import InMemoryDiscovery
from baton_runtime.views import View, ViewEvent, ViewEventKind, instance_key

DECODE, PREFILL = Service.SERVICE_DECODE, Service.SERVICE_PREFILL


def instance(name: str = "decode-0", incarnation: str = "0" * 16, service: int = DECODE, **fields: object) -> Instance:
    return Instance(service=service, instance_id=name, incarnation=incarnation, **fields)


def recorded(view: View) -> list[tuple[ViewEventKind, str]]:
    events: list[tuple[ViewEventKind, str]] = []
    view.subscribe(lambda e: events.append((e.kind, e.instance.instance_id)))
    return events


async def test_vanished_instance_stays_until_it_is_forgotten() -> None:
    discovery = InMemoryDiscovery()
    view = discovery.view(DECODE)
    events = recorded(view)
    registration = await discovery.register(instance())
    assert not view.is_gone(instance())
    assert not view.forget(instance()), "discovery still has it"
    await registration.revoke()
    assert view.is_gone(instance())
    assert list(view.instances.values()) == [instance()]
    assert view.forget(instance())
    assert not view.forget(instance())
    assert view.instances == {}
    assert events == [(ViewEventKind.ADDED, "decode-0"), (ViewEventKind.VANISHED, "decode-0")]


async def test_forgetting_an_old_life_leaves_the_new_one() -> None:
    discovery = InMemoryDiscovery()
    view = discovery.view()
    discovery.put(instance())
    discovery.put(instance(incarnation="1" * 16))
    assert view.is_gone(instance())
    assert not view.forget(instance())
    assert view.instances[instance_key(instance())].incarnation == "1" * 16


async def test_return_of_a_gone_instance_is_a_change() -> None:
    discovery = InMemoryDiscovery()
    view = discovery.view()
    seen: list[ViewEvent] = []
    discovery.put(instance())
    discovery.vanish(instance())
    view.subscribe(seen.append)
    discovery.put(instance())
    assert [e.kind for e in seen] == [ViewEventKind.ADDED, ViewEventKind.VANISHED, ViewEventKind.CHANGED]
    assert seen[-1].previous == instance()
    assert not view.is_gone(instance())


async def test_same_record_again_is_no_event() -> None:
    discovery = InMemoryDiscovery()
    view = discovery.view()
    events = recorded(view)
    discovery.put(instance())
    discovery.put(instance())
    assert len(events) == 1


async def test_list_after_a_gap_tells_the_difference() -> None:
    discovery = InMemoryDiscovery()
    view = discovery.view()
    for name in ("a", "b"):
        discovery.put(instance(name))
    events = recorded(view)
    events.clear()
    discovery.set_up(False)
    assert not view.is_synced
    discovery.vanish(instance("a"))
    discovery.put(instance("b", zone="z"))
    discovery.put(instance("c"))
    assert events == []
    discovery.set_up(True)
    assert view.is_synced
    assert sorted(events, key=lambda e: e[1]) == [
        (ViewEventKind.VANISHED, "a"),
        (ViewEventKind.CHANGED, "b"),
        (ViewEventKind.ADDED, "c"),
    ]


async def test_empty_list_drops_nothing() -> None:
    view = View()
    view.apply_list([instance("a"), instance("b")])
    view.apply_list([])
    assert len(view.instances) == 2
    assert view.is_gone(instance("a"))


async def test_view_has_only_the_services_it_asked_for() -> None:
    discovery = InMemoryDiscovery()
    view = discovery.view(PREFILL)
    discovery.put(instance())
    discovery.put(instance("prefill-0", service=PREFILL))
    assert [i.instance_id for i in view.instances.values()] == ["prefill-0"]


async def test_bad_subscriber_does_not_keep_others_from_their_events() -> None:
    view = View()

    def fails(_: ViewEvent) -> None:
        raise RuntimeError("bad subscriber")

    view.subscribe(fails)
    events = recorded(view)
    view.apply_put(instance())
    assert len(events) == 1


async def test_unsubscribed_callback_is_not_called() -> None:
    view = View()
    events: list[ViewEvent] = []
    unsubscribe = view.subscribe(events.append)
    unsubscribe()
    unsubscribe()
    view.apply_put(instance())
    assert events == []


async def test_gone_records_are_bounded() -> None:
    view = View()
    for number in range(views.MAX_GONE + 10):
        view.apply_put(instance(f"decode-{number}"))
        view.apply_delete((DECODE, f"decode-{number}"))
    assert len(view.instances) == views.MAX_GONE
    assert (DECODE, "decode-0") not in view.instances


async def test_synced_waits_no_longer_than_asked() -> None:
    assert not await View().synced(0.01)
    assert await InMemoryDiscovery().view().synced(0.01)


async def test_closing_revokes_what_was_registered() -> None:
    discovery = InMemoryDiscovery()
    view = discovery.view()
    registration = await discovery.register(instance())
    assert await registration.registered(1)
    await discovery.close()
    assert not registration.is_registered
    registration.update(instance(zone="late"))
    assert view.is_gone(instance())
