"""The state of a drain, and the call that asks for it, on a service that holds what a test says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import grpc
import pytest
from baton_contracts.instance.v1 import instance_service_pb2 as pb
from baton_contracts.instance.v1 import instance_service_pb2_grpc as pb_grpc
from baton_runtime.config import CommonConfig
from baton_runtime.drain import Drain, Holdings, Phase
from baton_runtime.errors import InvalidArgument, StaleIncarnation, from_rpc_error
from baton_runtime.instance_service import serve_instance
from baton_runtime.lifecycle import Service
from baton_runtime.rpc import GrpcServer, open_channel
from baton_runtime.testing import wait_until
from google.protobuf.duration_pb2 import Duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def drain(clock: Clock) -> Drain:
    return Drain(30.0, clock)


def test_a_drain_that_nobody_asked_for_has_not_begun_and_cannot_end(drain: Drain) -> None:
    drain.end(is_complete=True)
    assert (drain.phase, drain.is_asked, drain.elapsed_s, drain.remaining_s) == (Phase.SERVING, False, 0.0, 30.0)


def test_asked_without_a_time_it_takes_the_grace_of_the_instance(drain: Drain, clock: Clock) -> None:
    drain.ask()
    clock.now += 10
    assert (drain.phase, drain.elapsed_s, drain.remaining_s) == (Phase.DRAINING, 10.0, 20.0)


def test_the_first_to_ask_may_give_more_than_the_grace(drain: Drain) -> None:
    drain.ask(600.0)
    assert drain.remaining_s == 600.0


def test_asked_again_it_is_the_same_drain_whose_end_can_only_come_sooner(drain: Drain, clock: Clock) -> None:
    asks: list[float] = []
    drain.on_ask = lambda: asks.append(drain.remaining_s)
    drain.ask(20.0)
    clock.now += 5
    drain.ask(600.0)
    assert (drain.elapsed_s, drain.remaining_s) == (5.0, 15.0)
    drain.ask(1.0)
    assert (drain.elapsed_s, drain.remaining_s) == (5.0, 1.0)
    assert asks == [20.0, 1.0]


@pytest.mark.parametrize(("is_complete", "phase"), [(True, Phase.DRAINED), (False, Phase.CUT_OFF)])
def test_over_is_over(drain: Drain, clock: Clock, is_complete: bool, phase: Phase) -> None:
    drain.ask()
    clock.now += 2
    drain.end(is_complete=is_complete)
    clock.now += 7
    drain.ask(100.0)
    drain.end(is_complete=not is_complete)
    assert (drain.phase, drain.elapsed_s, drain.remaining_s) == (phase, 2.0, 0.0)
    assert drain.over.is_set()


def test_time_that_has_run_out_is_not_negative(drain: Drain, clock: Clock) -> None:
    drain.ask(1.0)
    clock.now += 5
    assert drain.remaining_s == 0.0


async def test_the_end_waits_for_all_who_want_to_hear_it(drain: Drain) -> None:
    assert not await drain.heard()
    async with asyncio.TaskGroup() as tasks:
        with drain.watched():
            with drain.watched():
                heard = tasks.create_task(drain.heard())
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not heard.done()
    assert heard.result()


class Held(Service):
    """Drains when the test says so."""

    name: ClassVar[str] = "decode"
    held = Holdings()

    async def start(self) -> None:
        """The test serves."""

    def holdings(self) -> Holdings:
        return self.held


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Held, Any]]:
    service = Held(CommonConfig())
    server = GrpcServer("127.0.0.1:0")
    serve_instance(service, server)
    try:
        async with open_channel(await server.start()) as channel:
            yield service, pb_grpc.InstanceServiceStub(channel)
    finally:
        await server.close()


async def messages(call: Any) -> list[pb.DrainResponse]:
    """All that are still to come."""
    found = []
    while isinstance(message := await call.read(), pb.DrainResponse):
        found.append(message)
    return found


async def test_the_call_returns_only_when_nothing_is_held() -> None:
    async with served() as (service, stub):
        service.held = Holdings(running=2, live_handoffs=1, pinned_blocks=7, reserved_blocks=5)
        call = stub.Drain(pb.DrainRequest(incarnation=service.incarnation), timeout=15)
        first = await call.read()
        assert first.phase == pb.DRAIN_PHASE_DRAINING
        assert first.holdings == pb.Holdings(running=2, live_handoffs=1, pinned_blocks=7, reserved_blocks=5)
        assert (await call.read()).phase == pb.DRAIN_PHASE_DRAINING  # it beats
        service.held = Holdings()
        service.drain_state.end(is_complete=True)
        rest = await messages(call)
        assert [m.phase for m in rest][-1] == pb.DRAIN_PHASE_DRAINED
        assert rest[-1].holdings == pb.Holdings()


async def test_two_callers_follow_one_drain_and_one_who_leaves_changes_nothing() -> None:
    async with served() as (service, stub):
        leaver, stayer = (stub.Drain(pb.DrainRequest(), timeout=15) for _ in range(2))
        await leaver.read()
        await stayer.read()
        leaver.cancel()
        await wait_until(lambda: service.drain_state._num_watchers == 1)
        assert service.drain_state.phase is Phase.DRAINING
        service.drain_state.end(is_complete=False)
        assert (await messages(stayer))[-1].phase == pb.DRAIN_PHASE_CUT_OFF
        late = stub.Drain(pb.DrainRequest(), timeout=15)
        assert [m.phase for m in await messages(late)] == [pb.DRAIN_PHASE_CUT_OFF]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (pb.DrainRequest(incarnation="another"), StaleIncarnation),
        (pb.DrainRequest(grace=Duration(seconds=-1)), InvalidArgument),
        (pb.DrainRequest(grace=Duration(seconds=3601)), InvalidArgument),
    ],
)
async def test_what_is_refused_begins_nothing(request_: pb.DrainRequest, error: type[Exception]) -> None:
    async with served() as (service, stub):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Drain(request_, timeout=15).read()
        assert type(from_rpc_error(refused.value)) is error
        assert service.drain_state.phase is Phase.SERVING
