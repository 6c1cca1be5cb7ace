"""`baton drain`: which instance, whether it is needed, and how following it ends, with fake instances that serve."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from baton_cli import drain
from baton_cli.drain import Ending, Refused, find, follow, why_needed
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_contracts.instance.v1 import instance_service_pb2 as drain_pb
from baton_contracts.instance.v1.instance_service_pb2_grpc import InstanceServiceServicer, add_InstanceServiceServicer_to_server
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
