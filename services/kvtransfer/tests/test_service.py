"""The service over real gRPC."""

import asyncio
import time

import grpc
import pytest
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_kvtransfer.config import KvTransferConfig
from baton_kvtransfer.testing import handoff_event, worker_record

BEGUN, ENDED = pb.HANDOFF_EVENT_KIND_BEGUN, pb.HANDOFF_EVENT_KIND_ENDED
CONFIRMED = pb.HANDOFF_OUTCOME_CONFIRMED


async def pair(fleet):
    prefill = await fleet.worker("prefill-0", "p1")
    await fleet.until(lambda: "p1" in fleet.broker.workers)
    decode = await fleet.worker("decode-0", "d1")
    await decode.until(lambda: decode.introductions)
    await prefill.until(lambda: prefill.introductions)
    return prefill, decode


async def test_pair_is_introduced_over_the_wire(fleet):
    prefill, decode = await pair(fleet)
    assert prefill.introductions[0].peer.incarnation == "d1"
    assert decode.introductions[0].peer.instance_id == "prefill-0"
    assert prefill.introductions[0].pair_secret == decode.introductions[0].pair_secret


async def test_books_of_one_handoff_balance(fleet):
    prefill, decode = await pair(fleet)
    stub = await fleet.stub()
    await decode.send(events=[handoff_event(pb.SIDE_SINK, BEGUN, "p1", "d1", 800)], sums=pb.BooksSums(reserved_bytes=800))
    await prefill.send(events=[handoff_event(pb.SIDE_SOURCE, BEGUN, "d1", "d1", 500)], sums=pb.BooksSums(pinned_bytes=500))
    await fleet.until(lambda: sum(fleet.broker.held_bytes()) == 1300)
    books = await stub.GetBooks(pb.GetBooksRequest(), timeout=5)
    assert (books.live_handoffs, books.held_bytes, books.mismatch_bytes) == (1, 1300, 0)
    assert sorted(books.reporting_incarnations) == ["d1", "p1"]
    for client, side, peer in ((prefill, pb.SIDE_SOURCE, "d1"), (decode, pb.SIDE_SINK, "p1")):
        event = handoff_event(side, ENDED, peer, "d1", 0, 800, outcome=CONFIRMED)
        await client.send(events=[event], sums=pb.BooksSums())
    await fleet.until(lambda: fleet.broker.num_live() == 0)
    books = await stub.GetBooks(pb.GetBooksRequest(), timeout=5)
    assert (books.held_bytes, books.mismatch_bytes, books.agreed_handoffs, books.disagreed_handoffs) == (0, 0, 1, 0)


async def test_leak_shows_as_mismatch(fleet):
    prefill = await fleet.worker("prefill-0", "p1")
    stub = await fleet.stub()
    async with asyncio.timeout(8):
        while (await stub.GetBooks(pb.GetBooksRequest(), timeout=5)).mismatch_bytes != 4096:
            await prefill.send(sums=pb.BooksSums(pinned_bytes=4096))
            await asyncio.sleep(0.05)


async def test_cancelled_stream_is_told_to_the_peers(fleet):
    prefill, decode = await pair(fleet)
    decode.call.cancel()
    await prefill.until(lambda: prefill.deaths == [("d1", "STREAM_BROKEN")])


async def test_half_closed_stream_ends_and_is_told(fleet):
    prefill, decode = await pair(fleet)
    await decode.call.done_writing()
    await decode.until(lambda: decode.is_over)
    await prefill.until(lambda: prefill.deaths == [("d1", "STREAM_BROKEN")])


async def test_silent_worker_is_told_and_loses_its_stream(fleet):
    prefill, decode = await pair(fleet)
    async with asyncio.timeout(8):
        while not prefill.deaths:
            await prefill.send(sums=pb.BooksSums())
            await asyncio.sleep(0.05)
    assert prefill.deaths == [("d1", "SILENT")]
    await decode.until(lambda: decode.is_over)
    assert decode.error.code() is grpc.StatusCode.UNAVAILABLE
    assert "SILENT" in decode.error.details()


async def test_new_life_ends_the_stream_of_the_old_one_and_the_old_one_stays_out(fleet):
    old = await fleet.worker("decode-0", "d1")
    await fleet.until(lambda: "d1" in fleet.broker.workers)
    await fleet.worker("decode-0", "d2")
    await old.until(lambda: old.is_over)
    again = await fleet.worker("decode-0", "d1")
    await again.until(lambda: again.is_over)
    assert again.error.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_second_stream_of_one_life_takes_over(fleet):
    first = await fleet.worker("decode-0", "d1")
    await fleet.until(lambda: "d1" in fleet.broker.workers)
    second = await fleet.worker("decode-0", "d1")
    await first.until(lambda: first.is_over)
    prefill = await fleet.worker("prefill-0", "p1")
    await second.until(lambda: second.introductions)
    await prefill.until(lambda: prefill.introductions)
    assert fleet.broker.reporting() == ["d1", "p1"]


async def test_first_message_without_a_hello_is_refused(fleet):
    client = await fleet.worker("decode-0", "d1", is_silent=True)
    await client.send(sums=pb.BooksSums())
    await client.until(lambda: client.is_over)
    assert client.error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_record_without_a_layout_is_refused_and_leaves_nothing(fleet):
    client = await fleet.worker("decode-0", "d1", is_silent=True)
    client.record.ClearField("layout")
    await client.hello()
    await client.until(lambda: client.is_over)
    assert client.error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "layout" in client.error.details()
    assert not fleet.broker.workers


async def test_drain_ends_streams_and_refuses_new_ones(fleet):
    client = await fleet.worker("decode-0", "d1")
    await fleet.until(lambda: "d1" in fleet.broker.workers)
    fleet.servicer.drain()
    await client.until(lambda: client.is_over)
    assert client.error.code() is grpc.StatusCode.UNAVAILABLE
    late = await fleet.worker("decode-1", "d2", is_silent=True)  # a write that meets the end would hide the status
    await late.until(lambda: late.is_over)
    assert late.error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("config", [KvTransferConfig(max_workers=2)])
async def test_worker_over_the_limit_is_refused(fleet):
    await pair(fleet)
    third = await fleet.worker("decode-1", "d2")
    await third.until(lambda: third.is_over)
    assert third.error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("config", [KvTransferConfig(max_unsent_messages=16)])
async def test_worker_that_does_not_read_loses_its_stream_in_spite_of_a_blocked_write(fleet):
    deaf = await fleet.worker("decode-0", "d1", is_deaf=True)
    await fleet.until(lambda: "d1" in fleet.broker.reporting())
    for number in range(200):
        record = worker_record(f"prefill-{number}", f"p{number}")
        record.model.path = "x" * 200_000
        _, out = fleet.broker.hello(record, time.monotonic())
        fleet.servicer._deliver(out)
        await asyncio.sleep(0)
        if not fleet.servicer._streams or "d1" not in fleet.broker.reporting():
            break
    await fleet.until(lambda: "d1" not in fleet.broker.reporting() and not fleet.servicer._streams)
    deaf.call.cancel()


async def test_echo_says_how_far_the_reports_are_booked(fleet):
    client = await fleet.worker("decode-0", "d1")
    for sequence in range(2, 50):
        await client.send(events=[handoff_event(pb.SIDE_SINK, BEGUN, "p1", "d1", 1, request_id=f"r{sequence}")], sequence=sequence)
    await client.until(lambda: client.booked == 49)
    assert fleet.broker.num_live() == 48


async def test_worker_that_wants_no_echo_gets_none(fleet):
    client = await fleet.worker("decode-0", "d1")
    await fleet.until(lambda: "d1" in fleet.broker.workers)
    await client.send(sums=pb.BooksSums(reserved_bytes=7))
    await fleet.until(lambda: fleet.broker.books.accounts["d1"].reserved_bytes == 7)
    assert client.booked == 0


async def watched(call) -> pb.WatchHandoffsResponse:
    """The next message of a watch that is not a beat."""
    async with asyncio.timeout(5):
        while True:
            message = await call.read()
            if message.WhichOneof("message") != "delta" or message.delta.handoffs:
                return message


async def test_watch_tells_a_snapshot_then_changes_then_why_it_ends(fleet):
    prefill, decode = await pair(fleet)
    call = (await fleet.stub()).WatchHandoffs(pb.WatchHandoffsRequest(), timeout=20)
    assert (await watched(call)).WhichOneof("message") == "snapshot"
    await decode.send(events=[handoff_event(pb.SIDE_SINK, BEGUN, "p1", "d1", 800)])
    (view,) = (await watched(call)).delta.handoffs
    assert (view.sink.instance_id, view.sink.held_bytes, view.is_live) == ("decode-0", 800, True)
    prefill.call.cancel()
    fleet.servicer.drain()
    message = await watched(call)
    while message.WhichOneof("message") != "end":
        message = await watched(call)
    assert message.end.reason == "DRAINING"
    assert await call.code() is grpc.StatusCode.OK
    assert not fleet.broker.watches


async def test_watch_beats_when_nothing_happens_and_ends_with_its_client(fleet, monkeypatch):
    monkeypatch.setattr("baton_kvtransfer.service.WATCH_BEAT_S", 0.02)
    call = (await fleet.stub()).WatchHandoffs(pb.WatchHandoffsRequest(), timeout=20)
    messages = [await call.read() for _ in range(4)]
    assert [m.WhichOneof("message") for m in messages] == ["snapshot", "delta", "delta", "delta"]
    call.cancel()
    await fleet.until(lambda: not fleet.broker.watches)


@pytest.mark.parametrize("config", [KvTransferConfig(max_watchers=1)])
async def test_watch_over_the_limit_is_refused(fleet):
    stub = await fleet.stub()
    first = stub.WatchHandoffs(pb.WatchHandoffsRequest(), timeout=20)
    await first.read()
    second = stub.WatchHandoffs(pb.WatchHandoffsRequest(), timeout=20)
    assert await second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.cancel()


async def test_watch_of_a_draining_kvtransfer_is_refused(fleet):
    fleet.servicer.drain()
    call = (await fleet.stub()).WatchHandoffs(pb.WatchHandoffsRequest(), timeout=20)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_links_are_part_of_the_books(fleet):
    _, decode = await pair(fleet)
    await decode.send(links=[pb.LinkReport(source_incarnation="p1", transport="shm", reason="shm: same segment token", pulled_bytes=9)])
    stub = await fleet.stub()
    async with asyncio.timeout(5):
        while not (links := (await stub.GetBooks(pb.GetBooksRequest(), timeout=5)).links):
            await asyncio.sleep(0.01)
    assert [(link.sink_instance_id, link.source_instance_id, link.report.pulled_bytes) for link in links] == [("decode-0", "prefill-0", 9)]
