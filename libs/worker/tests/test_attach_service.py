"""Attach over real gRPC, with sequences run by hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_contracts.worker.v1 import worker_service_pb2_grpc as rpc
from baton_engine.api import SequenceKey
from baton_runtime.rpc import GrpcServer, open_channel
from baton_runtime.testing import wait_until
from baton_worker import attach_service
from baton_worker.attach_service import AttachHandler
from baton_worker.frontends import Frontends
from baton_worker.testing import FakeControl, FrontendModel, start_message, token_at

A1 = SequenceKey("a", 1)


class AttachOnly(rpc.WorkerServiceServicer):
    def __init__(self, handler: AttachHandler) -> None:
        self._handler = handler

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        await self._handler.run(context)


class Rig:
    def __init__(self, address: str, frontends: Frontends, control: FakeControl, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.frontends = frontends
        self.control = control
        self.stub = rpc.WorkerServiceStub(channel)
        self.is_stalled = False

    def check_stall(self) -> bool:
        if self.is_stalled:
            self.is_stalled = False
            self.frontends.fence_all(asyncio.get_running_loop().time())
            return True
        return False

    @asynccontextmanager
    async def attached(self, model: FrontendModel, *starts: pb.Start) -> AsyncIterator[Any]:
        call = self.stub.Attach()
        try:
            await call.write(pb.AttachRequest(hello=model.hello(), starts=[model.started(start) for start in starts]))
            model.process(await call.read())
            yield call
        finally:
            call.cancel()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    control = FakeControl()
    frontends = Frontends("decode-0", "d1", control)
    control.frontends = frontends
    server = GrpcServer("127.0.0.1:0")
    made: list[Rig] = []
    handler = AttachHandler(frontends, lambda: pb.Beat(step=7), lambda: made[0].check_stall())
    rpc.add_WorkerServiceServicer_to_server(AttachOnly(handler), server.server)
    address = await server.start()
    async with open_channel(address) as channel:
        made.append(Rig(address, frontends, control, channel))
        yield made[0]
    await server.close()


async def read_until(call: Any, model: FrontendModel, *keys: SequenceKey) -> None:
    """Read, process and acknowledge frames until these sequences have ended."""
    async with asyncio.timeout(5.0):
        while not all(key in model.finished for key in keys):
            model.process(await call.read())
            await call.write(pb.AttachRequest(ack_frame=model.processed_frame))


async def status_of(call: Any) -> grpc.aio.AioRpcError:
    """How the stream ends, after the frames still on their way."""
    try:
        async with asyncio.timeout(5.0):
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended with OK")


async def test_tokens_and_the_end_arrive(rig: Rig) -> None:
    model = FrontendModel()
    async with rig.attached(model, start_message(0, "a")) as call:
        await wait_until(lambda: A1 in rig.control.live)
        rig.control.step(num_steps=3)
        rig.control.end(A1, pb.FINISH_REASON_STOP)
        await read_until(call, model, A1)
    assert model.tokens[A1] == [token_at(p) for p in range(3)]


async def test_sequences_survive_a_client_that_cancels_the_call_and_comes_back(rig: Rig) -> None:
    model = FrontendModel()
    starts = [start_message(slot, f"r{slot}") for slot in range(50)]
    keys = [SequenceKey(f"r{slot}", 1) for slot in range(50)]
    async with rig.attached(model, *starts) as call:
        await wait_until(lambda: len(rig.control.live) == 50)
        rig.control.step(num_steps=2)
        frame = await call.read()
        while not frame.slots:
            model.process(frame)
            frame = await call.read()
        model.process(frame)
    await wait_until(lambda: rig.frontends.sessions[0].stream is None)
    rig.control.step(num_steps=3)
    async with rig.attached(model) as call:
        rig.control.step()
        for key in keys:
            rig.control.end(key, pb.FINISH_REASON_LENGTH)
        await read_until(call, model, *keys)
    assert all(model.tokens[key] == [token_at(p) for p in range(6)] for key in keys)
    assert not rig.control.cancelled


async def test_newer_stream_ends_the_older_with_unavailable(rig: Rig) -> None:
    model = FrontendModel()
    async with rig.attached(model) as old, rig.attached(model):
        assert (await status_of(old)).code() is grpc.StatusCode.UNAVAILABLE


async def test_older_session_is_refused(rig: Rig) -> None:
    model = FrontendModel()
    async with rig.attached(model):
        call = rig.stub.Attach()
        await call.write(pb.AttachRequest(hello=pb.AttachHello(contract_version=1, incarnation="f1", session=1)))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        call.cancel()


@pytest.mark.parametrize("first", [pb.AttachRequest(), pb.AttachRequest(hello=pb.AttachHello(incarnation="f1", session=1))])
async def test_stream_without_a_good_hello_is_refused(rig: Rig, first: pb.AttachRequest) -> None:
    call = rig.stub.Attach()
    await call.write(first)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert rig.frontends.sessions == []
    call.cancel()


async def test_client_that_says_nothing_is_refused_in_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach_service, "HELLO_LIMIT_S", 0.05)
    call = rig.stub.Attach()
    assert (await status_of(call)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_reader_stops_while_too_much_is_queued(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach_service, "MAX_QUEUED_BYTES", 1000)
    model = FrontendModel()
    async with rig.attached(model) as call:
        for slot in range(30):
            await call.write(pb.AttachRequest(starts=[start_message(slot, f"r{slot}", prompt=500)]))
        await wait_until(lambda: len(rig.control.live) == 30)


async def test_broken_protocol_ends_the_stream_but_not_the_sequences(rig: Rig) -> None:
    model = FrontendModel()
    async with rig.attached(model, start_message(0, "a")) as call:
        await wait_until(lambda: A1 in rig.control.live)
        await call.write(pb.AttachRequest(ack_frame=999))
        assert (await status_of(call)).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not rig.control.cancelled


async def test_frontend_that_closes_its_side_gets_ok(rig: Rig) -> None:
    model = FrontendModel()
    async with rig.attached(model) as call:
        await call.done_writing()
        async with asyncio.timeout(2.0):
            while await call.read() is not grpc.aio.EOF:
                pass
        assert await call.code() is grpc.StatusCode.OK


async def test_cancel_behind_a_burst_of_long_starts_is_acted_on_before_them(rig: Rig) -> None:
    model = FrontendModel()
    async with rig.attached(model) as call:
        starts = [start_message(slot, f"r{slot}", prompt=50_000) for slot in range(200)]
        await call.write(pb.AttachRequest(starts=starts, cancels=[]))
        await call.write(pb.AttachRequest(cancels=[pb.Cancel(request_id="r199", attempt=1)]))
        await wait_until(lambda: len(rig.control.live) >= 199)
    assert rig.control.forbidden == [("r199", 1)]
    assert SequenceKey("r199", 1) not in rig.control.live


async def test_own_stall_is_noticed_before_the_message_that_follows_it(rig: Rig) -> None:
    model = FrontendModel()
    async with rig.attached(model) as call:
        rig.is_stalled = True
        await call.write(pb.AttachRequest(starts=[start_message(0, "a")]))
        assert (await status_of(call)).code() is grpc.StatusCode.UNAVAILABLE
    assert not rig.control.live


async def test_slow_reader_holds_up_nobody_and_memory_stays_bounded(rig: Rig) -> None:
    slow, quick = FrontendModel("slow"), FrontendModel("quick")
    async with rig.attached(slow, start_message(0, "s")), rig.attached(quick, start_message(0, "q")) as call:
        await wait_until(lambda: len(rig.control.live) == 2)
        quick_key, slow_key = SequenceKey("q", 1), SequenceKey("s", 1)
        while rig.control.live[quick_key] < 1000:
            rig.control.step(num_steps=50)
            model_frame = await call.read()
            quick.process(model_frame)
            await call.write(pb.AttachRequest(ack_frame=quick.processed_frame))
        assert rig.control.live[slow_key] <= 256 * 3
        assert slow_key in rig.control.paused
