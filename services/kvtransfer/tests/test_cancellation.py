"""Cancelled at every await of a Books stream, the broker ends up without it and everybody else is served."""

import asyncio
import time

import grpc
import pytest
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_kvtransfer.books import Books
from baton_kvtransfer.broker import Broker
from baton_kvtransfer.config import KvTransferConfig
from baton_kvtransfer.service import KvTransferServicer
from baton_kvtransfer.spans import BookSpans
from baton_kvtransfer.testing import handoff_event, worker_record
from baton_runtime.errors import Unavailable
from opentelemetry.trace import NoOpTracer


class Context:
    """A stream whose writes block or not."""

    def __init__(self, is_blocked):
        self.written = []
        self.reached = asyncio.Event()
        self._is_blocked = is_blocked

    async def send_initial_metadata(self, metadata): ...

    async def write(self, message):
        self.reached.set()
        if self._is_blocked:
            await asyncio.Event().wait()
        self.written.append(message)


class Requests:
    """Messages, then silence for ever."""

    def __init__(self, *messages):
        self._messages = list(messages)
        self.drained = asyncio.Event()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._messages:
            return self._messages.pop(0)
        self.drained.set()
        await asyncio.Event().wait()


def hello():
    event = handoff_event(pb.SIDE_SINK, pb.HANDOFF_EVENT_KIND_BEGUN, "p1", "d1", 800)
    return pb.BooksRequest(
        hello=pb.BooksHello(instance=worker_record("decode-0", "d1")), events=[event], sums=pb.BooksSums(reserved_bytes=800)
    )


@pytest.fixture
def broker():
    made = Broker(Books(BookSpans(NoOpTracer(), str)))
    made.hello(worker_record("prefill-0", "p1"), time.monotonic())
    return made


@pytest.fixture
def servicer(broker):
    return KvTransferServicer(KvTransferConfig(), broker)


async def cancel(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_before_the_hello_leaves_nothing(broker, servicer):
    requests = Requests()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(servicer.Books(requests, Context(False)))
        await requests.drained.wait()
        await cancel(task)
    assert set(broker.workers) == {"p1"}
    assert not servicer._streams


@pytest.mark.parametrize("is_blocked", [False, True], ids=["while reading", "while writing"])
async def test_cancelled_stream_is_broken_not_forgotten(broker, servicer, is_blocked):
    requests, context = Requests(hello()), Context(is_blocked)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(servicer.Books(requests, context))
        await context.reached.wait()
        await requests.drained.wait()
        assert "d1" in broker.reporting()
        await cancel(task)
    assert broker.reporting() == ["p1"]
    assert not servicer._streams
    assert broker.held_bytes() == (0, 800)  # it may come back within 200 ms
    now_s = broker.workers["d1"].broken_s
    assert broker.tick(now_s + 0.1).messages == {}
    assert broker.tick(now_s + 0.3).messages["p1"].peers_down[0].reason == "STREAM_BROKEN"
    assert broker.held_bytes() == (0, 0)


async def test_worker_that_leaves_during_a_write_is_no_error_of_ours(broker, servicer):
    requests, context = Requests(hello()), Context(False)

    async def write(message):
        raise grpc.aio.InternalError

    context.write = write
    await servicer.Books(requests, context)
    assert broker.reporting() == ["p1"]


async def test_cancelled_clock_stops_and_can_be_started_again(broker, servicer):
    for _ in range(2):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(servicer.run())
            await asyncio.sleep(0)
            await cancel(task)


async def test_worker_that_does_not_read_loses_its_stream_and_the_others_do_not(broker):
    servicer = KvTransferServicer(KvTransferConfig(max_unsent_messages=16), broker)
    requests, context = Requests(hello()), Context(True)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(outcome(servicer.Books(requests, context)))
        await context.reached.wait()
        for number in range(40):
            _, out = broker.hello(worker_record(f"prefill-{number + 1}", f"q{number}"), 0.0)
            servicer._deliver(out)
    assert "does not read" in str(task.result())
    assert "d1" not in broker.reporting()


async def outcome(stream):
    try:
        await stream
    except Unavailable as error:
        return error
    return None
