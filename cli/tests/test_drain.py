"""`baton drain`: which instance, whether it is needed, and how following it ends, with fake instances that serve."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from baton_cli import drain
from baton_cli.drain import Ending, Refused, find, follow, why_needed
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_contracts.instance.v1 import instance_service_pb2 as drain_pb
from baton_contracts.instance.v1.instance_service_pb2_grpc import InstanceServiceServicer, add_InstanceServiceServicer_to_server
from baton_runtime.discovery import InMemoryDiscovery
from baton_runtime.errors import StaleIncarnation
from baton_runtime.rpc import GrpcServer

DRAINING, DRAINED, CUT_OFF = drain_pb.DRAIN_PHASE_DRAINING, drain_pb.DRAIN_PHASE_DRAINED, drain_pb.DRAIN_PHASE_CUT_OFF


def instance(service: str, number: int = 0, *, whole: bool = True, model: str = "m", address: str = "127.0.0.1:1") -> pb.Instance:
    kind = pb.Service.Value(f"SERVICE_{service.upper()}")
    made = pb.Instance(service=kind, instance_id=f"{service}-{number}", incarnation=f"{service}{number}", grpc_address=address, pid=77)
    if service in ("prefill", "decode"):
        made.model.served_name = model
    if service == "decode":
        made.capabilities.append(pb.CAPABILITY_DECODE_FROM)
        made.capabilities.extend([pb.CAPABILITY_WHOLE] if whole else [])
    return made


ALL = [instance("decode", 1), instance("decode", 10), instance("prefill"), instance("frontend")]


@pytest.mark.parametrize(
    ("name", "found"), [("decode-1", "decode-1"), ("decode-10", "decode-10"), ("pre", "prefill-0"), ("f", "frontend-0")]
)
def test_an_instance_is_found_by_id_or_by_an_unique_beginning(name: str, found: str) -> None:
    assert find(ALL, name).instance_id == found


@pytest.mark.parametrize(
    ("instances", "name", "message"),
    [
        (ALL, "decode", r"not one instance but 2: decode-1, decode-10; write more"),
        (ALL, "router-0", r"no instance 'router-0' is registered; there are decode-1, decode-10, frontend-0, prefill-0"),
        (ALL, "", r"no instance '' is registered"),
        ([], "decode-1", r"no instance is registered; is --etcd the right one"),
    ],
)
def test_what_is_not_found_says_what_there_is(instances: list[pb.Instance], name: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        find(instances, name)


OTHER_DECODE, NO_PROMPTS = instance("decode", 1), instance("decode", 1, whole=False)


@pytest.mark.parametrize(
    ("which", "others", "why"),
    [
        (instance("frontend"), [instance("frontend", 1)], ""),
        (instance("frontend"), [OTHER_DECODE, instance("router")], "last ready frontend"),
        (instance("router"), [], ""),
        (instance("kvtransfer"), [], ""),
        (instance("decode"), [OTHER_DECODE], ""),
        (instance("decode"), [instance("prefill")], "last ready decode instance of m"),
        (instance("decode"), [instance("decode", 1, model="other")], "last ready decode instance of m"),
        (instance("decode"), [NO_PROMPTS], "no other ready instance of m may read prompts"),
        (instance("decode"), [NO_PROMPTS, instance("prefill")], ""),
        (instance("prefill"), [OTHER_DECODE], ""),
        (instance("prefill"), [NO_PROMPTS], "last ready prefill instance of m"),
        (instance("prefill"), [NO_PROMPTS, instance("prefill", 1)], ""),
    ],
)
def test_the_last_one_that_requests_need_is_named(which: pb.Instance, others: list[pb.Instance], why: str) -> None:
    found = why_needed(which, others)
    assert why in found
    assert bool(why) == bool(found)


Told = Callable[[], AsyncIterator[drain_pb.DrainResponse]]


class Fake(InstanceServiceServicer):
    """Says what the test has it say."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self.requests: list[drain_pb.DrainRequest] = []

    async def Drain(self, request: drain_pb.DrainRequest, context: Any) -> AsyncIterator[drain_pb.DrainResponse]:
        self.requests.append(request)
        async for message in self._told():
            yield message


def phases(*found: int) -> Told:
    async def told() -> AsyncIterator[drain_pb.DrainResponse]:
        for phase in found:
            yield drain_pb.DrainResponse(phase=phase)  # type: ignore[arg-type]

    return told


async def _begun_then_silent() -> AsyncIterator[drain_pb.DrainResponse]:
    yield drain_pb.DrainResponse(phase=DRAINING)
    await asyncio.Event().wait()


async def _silent() -> AsyncIterator[drain_pb.DrainResponse]:
    await asyncio.Event().wait()
    yield drain_pb.DrainResponse()


async def _another_life() -> AsyncIterator[drain_pb.DrainResponse]:
    raise StaleIncarnation("new", "old")
    yield drain_pb.DrainResponse()


@asynccontextmanager
async def served(told: Told | None) -> AsyncIterator[tuple[pb.Instance, Fake, GrpcServer]]:
    server, fake = GrpcServer("127.0.0.1:0"), Fake(told or _silent)
    if told is not None:
        add_InstanceServiceServicer_to_server(fake, server.server)
    try:
        yield instance("decode", address=await server.start()), fake, server
    finally:
        await server.close()


async def ending(which: pb.Instance, *, is_wait: bool = True, timeout_s: float | None = None, grace_s: float | None = None) -> Ending:
    return await follow(which, grace_s=grace_s, timeout_s=timeout_s, is_wait=is_wait, heard=lambda _: None)


@pytest.mark.parametrize(
    ("told", "is_wait", "how"),
    [
        (phases(DRAINING, DRAINED), True, Ending.DRAINED),
        (phases(DRAINING, DRAINED), False, Ending.BEGUN),
        (phases(DRAINED), False, Ending.DRAINED),
        (phases(DRAINING, CUT_OFF), True, Ending.CUT_OFF),
        (phases(DRAINING), True, Ending.LOST),
    ],
)
async def test_the_last_message_says_how_it_ended(told: Told, is_wait: bool, how: Ending) -> None:
    async with served(told) as (which, fake, _):
        assert await ending(which, is_wait=is_wait, grace_s=1.5) is how
        assert (fake.requests[0].incarnation, fake.requests[0].grace.ToMilliseconds()) == (which.incarnation, 1500)


async def test_no_grace_is_sent_unless_asked_for() -> None:
    async with served(phases(DRAINED)) as (which, fake, _):
        await ending(which)
        assert not fake.requests[0].HasField("grace")


async def test_one_that_dies_meanwhile_is_lost() -> None:
    async with served(_begun_then_silent) as (which, _, server), asyncio.TaskGroup() as tasks:
        begun = asyncio.Event()
        following = tasks.create_task(follow(which, grace_s=None, timeout_s=None, is_wait=True, heard=lambda _: begun.set()))
        await begun.wait()
        await server.close()
    assert following.result() is Ending.LOST


async def test_one_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "SILENCE_LIMIT_S", 0.1)
    async with served(_begun_then_silent) as (which, _, _server):
        assert await ending(which) is Ending.LOST


async def test_the_timeout_ends_the_waiting_only() -> None:
    async with served(_begun_then_silent) as (which, _, _server):
        assert await ending(which, timeout_s=0.1) is Ending.TIMEOUT


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (_silent, r"does not answer at 127.0.0.1:\d+ \(it is silent for 0.1 s\).*SIGTERM to pid 77"),
        (_another_life, r"was started again meanwhile and serves on; ask again"),
        (None, r"cannot be drained by a call; send SIGTERM to pid 77"),
    ],
)
async def test_what_has_not_begun_names_the_fix(monkeypatch: pytest.MonkeyPatch, told: Told | None, message: str) -> None:
    monkeypatch.setattr(drain, "FIRST_LIMIT_S", 0.1 if told is _silent else 10.0)
    async with served(told) as (which, _, _server):
        with pytest.raises(Refused, match=message):
            await ending(which)


async def test_one_that_is_dead_names_the_fix() -> None:
    async with served(_silent) as (which, _, server):
        await server.close()
        with pytest.raises(Refused, match=r"does not answer at .* If it is dead, its record goes within 10 s"):
            await ending(which)


@asynccontextmanager
async def installation(monkeypatch: pytest.MonkeyPatch, *told: tuple[pb.Instance, Told]) -> AsyncIterator[list[pb.Instance]]:
    """Instances that serve, each with what it says when it is drained. Yields: what is registered; may be changed."""
    records: list[pb.Instance] = []

    def opened(etcd: str, namespace: str) -> InMemoryDiscovery:
        made = InMemoryDiscovery()
        for record in records:
            made.put(record)
        return made

    monkeypatch.setattr(drain, "Discovery", opened)
    async with AsyncExitStack() as stack:
        for which, says in told:
            served_one, _, _ = await stack.enter_async_context(served(says))
            which.grpc_address = served_one.grpc_address
            records.append(which)
        yield records


async def run(name: str, *, wait: bool = True, force: bool = False, as_json: bool = False, timeout_s: float | None = None) -> int:
    return await drain.run("e:1", "/b", name, wait=wait, timeout_s=timeout_s, grace_s=None, force=force, as_json=as_json)


async def test_the_command_shows_progress_and_exits_with_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    two = (instance("decode"), phases(DRAINING, DRAINED)), (instance("decode", 1), phases(DRAINED))
    async with installation(monkeypatch, *two):
        assert await run("decode-0", as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["phase"] for line in lines] == ["draining", "drained"]
    assert lines[-1].keys() >= {"running", "live_handoffs", "pinned_blocks", "reserved_blocks", "elapsed_s", "remaining_s"}


async def test_exit_codes_tell_how_it_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = [phases(DRAINING, CUT_OFF), phases(DRAINING), _begun_then_silent, phases(DRAINED)]
    async with installation(monkeypatch, *((instance("router", number), says) for number, says in enumerate(told))):
        assert [await run(f"router-{number}") for number in (0, 1, 3)] == [3, 4, 0]
        assert await run("router-2", wait=False) == 0
        assert await run("router-2", timeout_s=0.0) == 5
    err = capsys.readouterr().err
    assert "cut off: 0 running, 0 handoffs" in err
    assert "router-1 died or was cut off before it said how its drain ended" in err
    assert "the drain of router-2 is not over after 0 s" in err


async def test_the_last_is_refused_also_if_the_other_one_is_registered_but_dead_or_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    async with installation(monkeypatch, (instance("frontend"), phases(DRAINED))) as records:
        records.append(instance("frontend", 1))  # nobody listens at its address
        draining = instance("frontend", 2)
        draining.draining = True
        records.append(draining)
        with pytest.raises(
            Refused, match=r"frontend-0 is not drained: it is the last ready frontend. Start another one first, or use --force"
        ):
            await run("frontend-0")
        assert await run("frontend-0", force=True) == 0


async def test_without_etcd_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "FIRST_LIMIT_S", 0.1)
    down = InMemoryDiscovery()
    down.set_up(False)
    monkeypatch.setattr(drain, "Discovery", lambda etcd, namespace: down)
    with pytest.raises(Refused, match=r"etcd at e:1 does not answer"):
        await run("frontend-0")
