"""A client that leaves, in every phase: one end, slots free, workers and routers told."""

from array import array
from collections.abc import AsyncIterator

import pytest
from baton_contracts.router.v1 import router_service_pb2 as router_pb2
from baton_frontend.active_request import ActiveRequest
from baton_frontend.requests import ManagerSettings
from baton_frontend.testing_bench import Bench, RecordingSink, running_bench, until
from baton_frontend.testing_workers import FakeRouter, FakeWorker, expected_output, placed_on
from baton_runtime.errors import DeadlineExceeded


class Fleet:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.decode = FakeWorker("decode-0", "d0")
        self.prefill = FakeWorker("prefill-0", "p0", service=3)
        self.router = FakeRouter("router-0", self.place)
        self.hold = False

    def place(self, query: router_pb2.Query) -> router_pb2.Answer | None:
        return None if self.hold else placed_on(query.query_id, self.decode, self.prefill)

    async def is_clean(self, sink: RecordingSink, handle: ActiveRequest) -> None:
        """The end state of every test here."""
        assert (await sink.end()).reason in ("cancelled", "failed")
        handle.cancel()
        assert self.bench.manager.num_inflight == 0
        await until(lambda: all(client.num_lanes == 0 for client in self.bench.workers.clients()))
        await until(lambda: not self.decode.sequences and not self.prefill.sequences)
        assert all(link.num_open == 0 for link in self.bench.routes.links)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with running_bench() as bench:
        fleet = Fleet(bench)
        for server in (fleet.decode, fleet.prefill, fleet.router):
            await server.open()
        await bench.ready(fleet.decode, fleet.prefill, fleet.router)
        yield fleet
        for server in (fleet.decode, fleet.prefill, fleet.router):
            await server.close()


async def test_before_the_question_has_left(fleet: Fleet) -> None:
    sink, handle = fleet.bench.submit()
    handle.cancel()
    await fleet.is_clean(sink, handle)
    assert not fleet.decode.starts


async def test_while_the_router_thinks(fleet: Fleet) -> None:
    fleet.hold = True
    sink, handle = fleet.bench.submit()
    await fleet.router.until(lambda: bool(fleet.router.queries))
    handle.cancel()
    await fleet.is_clean(sink, handle)
    query_id = fleet.router.queries[0].query_id
    await fleet.router.until(lambda: query_id in [i for r in fleet.router.requests for i in r.withdrawn_query_ids])


async def test_during_the_handoff_both_sides_are_told(fleet: Fleet) -> None:
    fleet.decode.is_running = fleet.prefill.is_running = False
    sink, handle = fleet.bench.submit()
    await fleet.decode.until(lambda: bool(fleet.decode.starts))
    await fleet.prefill.until(lambda: bool(fleet.prefill.starts))
    handle.cancel()
    for worker in (fleet.decode, fleet.prefill):
        await worker.until(lambda worker=worker: [c.request_id for c in worker.cancels] == [handle.request_id])
    await fleet.is_clean(sink, handle)
    assert fleet.bench.registry.get_sample_value("baton_cancel_to_freed_seconds_count") == 2


async def test_in_mid_stream_nothing_more_is_delivered(fleet: Fleet) -> None:
    sink, handle = fleet.bench.submit(max_tokens=1000)
    await sink.until(lambda: len(sink.tokens) >= 5)
    handle.cancel()
    count = len(sink.tokens)
    await fleet.is_clean(sink, handle)
    assert len(sink.tokens) == count == sink.ends[0].output_tokens


async def test_from_inside_a_delivery(fleet: Fleet) -> None:
    """As a stop string does."""
    sink, handle = fleet.bench.submit(max_tokens=1000)
    sink.on_token = lambda: handle.cancel() if len(sink.tokens) >= 3 else None
    await fleet.is_clean(sink, handle)
    assert sink.tokens == expected_output(array("I", [1, 2, 3]), len(sink.tokens))


async def test_while_the_stream_is_broken(fleet: Fleet) -> None:
    sink, handle = fleet.bench.submit(max_tokens=1000)
    await sink.until(lambda: len(sink.tokens) >= 5)
    fleet.decode.break_streams()
    await until(lambda: not all(client.is_attached for client in fleet.bench.workers.clients()))
    handle.cancel()
    await fleet.is_clean(sink, handle)


async def test_between_two_attempts(fleet: Fleet) -> None:
    sink, handle = fleet.bench.submit(max_tokens=1000)
    await sink.until(lambda: len(sink.tokens) >= 5)
    fleet.hold = True
    fleet.decode.keeps_sequences = False
    fleet.decode.break_streams()
    await fleet.router.until(lambda: len(fleet.router.queries) == 2)
    handle.cancel()
    await fleet.is_clean(sink, handle)


async def test_silent_worker_does_not_hold_the_end_back(fleet: Fleet) -> None:
    sink, handle = fleet.bench.submit(max_tokens=1000)
    await sink.until(lambda: len(sink.tokens) >= 5)
    fleet.decode.is_silent = True
    handle.cancel()
    await sink.end(0.4)
    fleet.decode.is_silent = False
    await fleet.is_clean(sink, handle)


async def test_after_the_end_it_does_nothing(fleet: Fleet) -> None:
    sink, handle = fleet.bench.submit(max_tokens=2)
    await sink.end()
    handle.cancel()
    assert [end.reason for end in sink.ends] == ["length"]


async def test_deadline_ends_it_everywhere(fleet: Fleet) -> None:
    sink, handle = fleet.bench.submit(max_tokens=100_000, deadline_s=0.2)
    end = await sink.end()
    assert isinstance(end.error, DeadlineExceeded)
    assert 0 < fleet.decode.starts[0].deadline_ms <= 200
    await fleet.is_clean(sink, handle)


async def test_a_request_without_a_deadline_of_its_own_has_the_default() -> None:
    async with running_bench(ManagerSettings(default_deadline_s=0.3)) as bench:
        worker = await FakeWorker("decode-0", "d0").open()
        await bench.ready(worker)
        sink, _ = bench.submit(max_tokens=100_000)
        assert isinstance((await sink.end()).error, DeadlineExceeded)
        assert 0 < worker.starts[0].deadline_ms <= 300
        await worker.close()


async def test_closing_frontend_ends_everything(fleet: Fleet) -> None:
    submitted = [fleet.bench.submit(max_tokens=1000) for _ in range(20)]
    for sink, _ in submitted:
        await sink.until(lambda sink=sink: len(sink.tokens) > 2)
    fleet.bench.manager.abort_all()
    for sink, handle in submitted:
        await fleet.is_clean(sink, handle)
    await fleet.bench.manager.wait_idle()


async def test_many_clients_leaving_at_random_leave_nothing_behind(fleet: Fleet) -> None:
    submitted = [fleet.bench.submit(max_tokens=60) for _ in range(60)]
    for n, (sink, handle) in enumerate(submitted):
        if n % 2:
            sink.on_token = lambda sink=sink, handle=handle, n=n: handle.cancel() if len(sink.tokens) >= n else None
    for sink, _ in submitted:
        await sink.end()
        assert sink.tokens == expected_output(array("I", [1, 2, 3]), len(sink.tokens))
    await until(lambda: all(client.num_lanes == 0 for client in fleet.bench.workers.clients()))
    assert fleet.bench.manager.num_inflight == 0
