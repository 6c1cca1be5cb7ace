"""What the source's end answers to sinks that are not what they should be. Raw stubs against a real server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from baton_contracts.discovery.v1.instance_pb2 import Instance, KvLayout
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as kv_pb
from baton_contracts.worker.v1 import handoff_service_pb2 as pb
from baton_contracts.worker.v1.handoff_service_pb2_grpc import HandoffServiceStub
from baton_handoff import pair_servicer
from baton_handoff.config import HandoffConfig, Times
from baton_handoff.testing import LoopbackNetwork, TestWorker
from baton_runtime.rpc import open_channel
from baton_runtime.testing import wait_until

SECRET = b"s" * 16
SINK = "5" * 16


@pytest.fixture
async def source() -> AsyncIterator[TestWorker]:
    config = HandoffConfig(times=Times(hello_s=0.2))
    async with TestWorker(LoopbackNetwork(), "prefill-0", config=config) as worker:
        peer = Instance()
        peer.CopyFrom(worker.record)
        peer.instance_id, peer.incarnation = "decode-0", SINK
        worker.manager.introductions.add(kv_pb.Introduction(peer=peer, pair_secret=SECRET))
        yield worker


@contextlib.asynccontextmanager
async def stream(source: TestWorker) -> AsyncIterator[Any]:
    channel = open_channel(source.record.grpc_address)
    call = HandoffServiceStub(channel).Pair()
    try:
        yield call
    finally:
        call.cancel()
        await channel.close(None)


def hello(source: TestWorker, **changes: object) -> pb.PairRequest:
    fields: dict[str, object] = {
        "contract_version": 1,
        "instance_id": "decode-0",
        "incarnation": SINK,
        "source_incarnation": source.incarnation,
        "pair_secret": SECRET,
        "session": 1,
        "layout": source.record.layout,
    }
    return pb.PairRequest(hello=pb.PairHello(**{**fields, **changes}))  # type: ignore[arg-type]


async def read_to_end(call: Any) -> None:
    while True:
        await call.read()


async def code_after(source: TestWorker, *requests: pb.PairRequest) -> tuple[grpc.StatusCode, str]:
    """Status of a stream on which these are said."""
    async with stream(source) as call, asyncio.timeout(3):
        try:
            for request in requests:
                await call.write(request)
            await read_to_end(call)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # a write may find the call ended as well
        return await call.code(), await call.details()


async def test_hello_is_welcomed_with_the_incarnation_and_beats_follow(source: TestWorker) -> None:
    async with stream(source) as call, asyncio.timeout(3):
        await call.write(hello(source))
        assert (await call.read()).welcome.incarnation == source.incarnation
        beat = await call.read()
        assert beat.WhichOneof("message") is None
        assert beat.HasField("beat")


async def test_hello_for_another_life_is_failed_precondition(source: TestWorker) -> None:
    code, _ = await code_after(source, hello(source, source_incarnation="0" * 16))
    assert code is grpc.StatusCode.FAILED_PRECONDITION


async def test_unknown_secret_or_sink_is_permission_denied(source: TestWorker) -> None:
    assert (await code_after(source, hello(source, pair_secret=b"x" * 16)))[0] is grpc.StatusCode.PERMISSION_DENIED
    assert (await code_after(source, hello(source, incarnation="6" * 16)))[0] is grpc.StatusCode.PERMISSION_DENIED
    assert not source.manager.servicer.peers


async def test_other_layout_is_refused_naming_both(source: TestWorker) -> None:
    code, text = await code_after(source, hello(source, layout=KvLayout(num_layers=77)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "layers=77" in text
    assert "layers=2" in text


async def test_stream_without_hello_is_refused(source: TestWorker) -> None:
    assert (await code_after(source, pb.PairRequest()))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert (await code_after(source))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_nonsense_ends_the_stream(source: TestWorker) -> None:
    code, text = await code_after(source, hello(source), pb.PairRequest(confirm=pb.Confirm(end_block=1)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "identity" in text


async def test_newer_stream_replaces_the_older_one(source: TestWorker) -> None:
    async with stream(source) as old, stream(source) as new, asyncio.timeout(3):
        await old.write(hello(source, session=1))
        await old.read()
        await new.write(hello(source, session=2))
        assert (await new.read()).HasField("welcome")
        with pytest.raises(grpc.aio.AioRpcError, match="replaced"):
            await read_to_end(old)
        assert SINK in source.manager.servicer.peers
        assert source.manager.servicer.peers[SINK].session is not None


async def test_older_stream_that_comes_late_is_refused(source: TestWorker) -> None:
    async with stream(source) as new, asyncio.timeout(3):
        await new.write(hello(source, session=2))
        await new.read()
        assert (await code_after(source, hello(source, session=1)))[0] is grpc.StatusCode.UNAVAILABLE
        assert (await new.read()).HasField("beat")


async def test_link_closed_by_its_sink_is_forgotten_without_a_fence(source: TestWorker) -> None:
    async with stream(source) as call, asyncio.timeout(3):
        await call.write(hello(source))
        await call.read()
        await call.done_writing()
        await wait_until(lambda: not source.manager.servicer.peers)
    assert source.metric("baton_handoff_fences_total", role="source", reason="stream_broken") == 0


async def test_link_that_breaks_is_fenced_after_200_ms(source: TestWorker) -> None:
    async with stream(source) as call, asyncio.timeout(3):
        await call.write(hello(source))
        await call.read()
    await wait_until(lambda: not source.manager.servicer.peers, timeout_s=1)
    assert source.metric("baton_handoff_fences_total", role="source", reason="stream_broken") == 1
    assert SINK not in source.transport.allowed


async def test_silent_sink_is_fenced_and_its_stream_ended(source: TestWorker) -> None:
    async with stream(source) as call, asyncio.timeout(4):
        await call.write(hello(source))
        with pytest.raises(grpc.aio.AioRpcError, match="SILENT"):
            await read_to_end(call)
    assert SINK not in source.manager.servicer.peers


async def test_handoffs_nobody_knows_are_cancelled_at_the_hello(source: TestWorker) -> None:
    unknown = pb.HandoffId(request_id="r", attempt=1, decode_incarnation=SINK)
    async with stream(source) as call, asyncio.timeout(3):
        await call.write(hello(source, handoffs=[unknown]))
        await call.read()
        assert (await call.read()).cancel.handoff == unknown


async def test_servicer_that_is_not_open_is_unavailable(source: TestWorker) -> None:
    source.manager.servicer.close()
    assert (await code_after(source, hello(source)))[0] is grpc.StatusCode.UNAVAILABLE


async def test_eof_of_a_link_in_use_is_a_break(source: TestWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_servicer, "CLOSE_PROOF_S", 0.0)
    monkeypatch.setattr(source.manager, "is_sink_in_use", lambda incarnation: True)
    async with stream(source) as call, asyncio.timeout(3):
        await call.write(hello(source))
        await call.read()
        await call.done_writing()
        await wait_until(lambda: source.metric("baton_handoff_fences_total", role="source", reason="stream_broken") == 1)


async def test_sink_learns_of_an_end_that_comes_with_the_welcome(source: TestWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC cannot send a status if the first write was cancelled under way; the sink would wait until it fences us."""

    def end_at_once(incarnation: str, secret: bytes, listed: object) -> None:
        session = source.manager.servicer.peers[incarnation].session
        assert session is not None
        session.end("at once")

    monkeypatch.setattr(source.manager, "sink_linked", end_at_once)
    assert await code_after(source, hello(source)) == (grpc.StatusCode.UNAVAILABLE, "at once")
