"""Routers over real gRPC: one asked per model, the next when it dies or hangs, none at all."""

import asyncio
import gc
import time
from array import array
from collections.abc import AsyncIterator

import pytest
from baton_contracts.router.v1 import router_service_pb2 as router_pb2
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_frontend.request import RequestLimits
from baton_frontend.requests import ManagerSettings
from baton_frontend.route_client import RouterLink, RouteTimes, rendezvous
from baton_frontend.testing_bench import Bench, num_channels, running_bench, until
from baton_frontend.testing_workers import FakeRouter, FakeWorker, expected_output, placed_on, refused_with
from baton_runtime import hashing
from baton_runtime.errors import QueueFull, Unavailable

PROMPT = array("I", [1, 2, 3])


class Fleet:
    """One decode, one prefill, and routers that place where `place` says."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.decode = FakeWorker("decode-0", "d0")
        self.prefill = FakeWorker("prefill-0", "p0", service=3)
        self.routers: list[FakeRouter] = []
        self.use_pair = False
        self.hold = False
        self.refusals: list[str] = []

    def place(self, query: router_pb2.Query) -> router_pb2.Answer | None:
        if self.hold:
            return None
        if self.refusals:
            return refused_with(query.query_id, self.refusals.pop(0), 50)
        return placed_on(query.query_id, self.decode, self.prefill if self.use_pair else None)

    async def open(self, num_routers: int) -> None:
        await self.decode.open()
        await self.prefill.open()
        for n in range(num_routers):
            self.routers.append(await FakeRouter(f"router-{n}", self.place).open())
        self.routers.sort(key=lambda router: rendezvous("m", router.instance_id))  # the one asked comes first
        await self.bench.ready(self.decode, self.prefill, *self.routers)

    async def close(self) -> None:
        for server in (self.decode, self.prefill, *self.routers):
            await server.close()


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with running_bench(ManagerSettings(route_limit_s=0.5, limits=RequestLimits(new_patience_s=0.5))) as bench:
        fleet = Fleet(bench)
        yield fleet
        await fleet.close()


async def test_placement_of_the_router_is_followed(fleet: Fleet) -> None:
    fleet.use_pair = True
    await fleet.open(2)
    sink, handle = fleet.bench.submit(range(40), max_tokens=6, seed=7)
    await sink.end()
    assert sink.tokens == expected_output(array("I", range(40)), 6)
    (query,) = fleet.routers[0].queries
    assert fleet.routers[1].queries == []
    assert (query.request_id, query.attempt, query.model, query.num_tokens, query.max_new_tokens) == (handle.request_id, 1, "m", 40, 6)
    root = hashing.cache_root("f" * 16)
    assert query.block_hashes == b"".join(hashing.chain_hashes(root, array("I", range(40)), 16))
    (decode,), (prefill,) = fleet.decode.starts, fleet.prefill.starts
    assert decode.decode_from.prefill_incarnation == "p0"
    assert prefill.prefill_for.decode_incarnation == "d0"
    assert decode.cache_root == prefill.cache_root == root
    assert decode.token_ids == prefill.token_ids == array("I", range(40)).tobytes()
    assert decode.sampling.seed == 7
    await fleet.routers[0].until(lambda: query.query_id in [i for r in fleet.routers[0].requests for i in r.ended_query_ids])


async def test_unseeded_choices_get_their_own_seed(fleet: Fleet) -> None:
    await fleet.open(1)
    for sink, _ in [fleet.bench.submit(), fleet.bench.submit()]:
        await sink.end()
    first, second = (start.sampling.seed for start in fleet.decode.starts)
    assert first != second


async def test_router_dies_with_a_question_open_and_the_next_answers(fleet: Fleet) -> None:
    fleet.hold = True
    await fleet.open(2)
    sink, _ = fleet.bench.submit()
    await fleet.routers[0].until(lambda: bool(fleet.routers[0].queries))
    fleet.hold = False
    await fleet.routers[0].close()
    await sink.end()
    assert sink.tokens == expected_output(PROMPT, 8)
    assert len(fleet.routers[1].queries) == 1


async def test_router_that_hangs_is_left_for_the_next(fleet: Fleet) -> None:
    await fleet.open(2)
    fleet.routers[0].is_stopped = True
    sink, _ = fleet.bench.submit()
    assert (await sink.end()).reason == "length"
    assert len(fleet.routers[1].queries) == 1


async def test_router_with_a_long_queue_is_waited_for(fleet: Fleet) -> None:
    fleet.hold = True
    await fleet.open(1)
    sink, _ = fleet.bench.submit()
    await fleet.routers[0].until(lambda: bool(fleet.routers[0].queries))
    (link,) = fleet.bench.routes.links
    with pytest.raises(TimeoutError):
        await until(lambda: not link.is_live, 0.4)
    assert not sink.ends


async def test_question_without_an_answer_is_given_up(fleet: Fleet) -> None:
    fleet.hold = True
    await fleet.open(1)
    sink, _ = fleet.bench.submit()
    assert isinstance((await sink.end()).error, QueueFull)
    await fleet.routers[0].until(lambda: any(r.withdrawn_query_ids for r in fleet.routers[0].requests))


async def test_without_any_router_decode_does_the_whole_request(fleet: Fleet) -> None:
    await fleet.open(0)
    sink, _ = fleet.bench.submit()
    await sink.end()
    assert fleet.decode.starts[0].HasField("whole")
    assert sink.tokens == expected_output(PROMPT, 8)


async def test_running_streams_do_not_notice_a_dead_router(fleet: Fleet) -> None:
    await fleet.open(1)
    sink, _ = fleet.bench.submit(max_tokens=60)
    await sink.until(lambda: len(sink.tokens) > 5)
    await fleet.routers[0].close()
    later, _ = fleet.bench.submit(max_tokens=5)
    await later.end()
    assert (await sink.end()).resumed == 0
    assert sink.tokens == expected_output(PROMPT, 60)


async def test_dead_router_that_comes_back_is_asked_again(fleet: Fleet) -> None:
    await fleet.open(1)
    await fleet.routers[0].close()
    await until(lambda: not fleet.bench.routes.links[0].is_live)
    back = await FakeRouter("router-0", fleet.place).open()
    back.incarnation = "router-0-2"
    fleet.routers.append(back)
    fleet.bench.show(fleet.decode, fleet.prefill, back)
    await until(lambda: [link.incarnation for link in fleet.bench.routes.links if link.is_live] == ["router-0-2"])
    sink, _ = fleet.bench.submit()
    await sink.end()
    assert len(back.queries) == 1


async def test_router_that_is_back_in_a_moment_is_not_bypassed(fleet: Fleet) -> None:
    await fleet.open(1)
    (link,) = fleet.bench.routes.links
    router = fleet.routers[0]
    port = router.address.rpartition(":")[2]
    await router.close()
    await until(lambda: not link.is_live)
    sink, _ = fleet.bench.submit()
    await router.open(f"127.0.0.1:{port}")
    await sink.end()
    assert len(router.queries) == 1


async def test_vanished_record_of_a_live_router_changes_nothing(fleet: Fleet) -> None:
    await fleet.open(1)
    fleet.bench.show(fleet.decode, fleet.prefill)
    sink, _ = fleet.bench.submit()
    await sink.end()
    assert len(fleet.routers[0].queries) == 1


async def test_overloaded_router_is_a_429(fleet: Fleet) -> None:
    fleet.refusals = ["OVERLOADED"]
    await fleet.open(1)
    sink, _ = fleet.bench.submit()
    error = (await sink.end()).error
    assert isinstance(error, QueueFull)
    assert error.retry_after_ms == 50


async def test_no_instance_for_a_moment_is_waited_for(fleet: Fleet) -> None:
    fleet.refusals = ["NO_INSTANCE", "NO_INSTANCE"]
    await fleet.open(1)
    sink, _ = fleet.bench.submit()
    assert (await sink.end()).reason == "length"


async def test_no_decode_at_all_is_a_503(fleet: Fleet) -> None:
    await fleet.open(0)
    await fleet.decode.close()
    await until(lambda: fleet.bench.workers.clients()[0].is_fenced)
    sink, _ = fleet.bench.submit()
    assert isinstance((await sink.end()).error, Unavailable)


async def test_worker_that_refuses_is_avoided(fleet: Fleet) -> None:
    await fleet.open(1)
    fleet.decode.refuse_with = worker_pb2.FINISH_REASON_REFUSED
    sink, _ = fleet.bench.submit()
    await fleet.routers[0].until(lambda: len(fleet.routers[0].queries) > 1)
    assert list(fleet.routers[0].queries[1].excluded_incarnations) == ["d0"]
    assert isinstance((await sink.end()).error, QueueFull)


async def test_pair_without_a_path_is_reported_and_not_used(fleet: Fleet) -> None:
    fleet.use_pair = True
    await fleet.open(1)
    fleet.decode.is_running = fleet.prefill.is_running = False
    sink, _ = fleet.bench.submit()
    await fleet.decode.until(lambda: bool(fleet.decode.sequences))
    (sequence,) = fleet.decode.sequences.values()
    failure = worker_pb2.HandoffFailure(peer_incarnation="p0", cause=worker_pb2.HANDOFF_FAILURE_CAUSE_PATH_DOWN)
    sequence.end(worker_pb2.FINISH_REASON_HANDOFF_FAILED, handoff_failure=failure)
    fleet.decode.is_running = True
    assert (await sink.end()).reason == "length"
    reported = [down for request in fleet.routers[0].requests for down in request.paths_down]
    assert reported == [router_pb2.PathDown(prefill_incarnation="p0", decode_incarnation="d0")]
    assert fleet.decode.starts[1].HasField("whole")  # though the router named the pair again


async def test_fenced_worker_is_reported_to_the_router(fleet: Fleet) -> None:
    await fleet.open(1)
    await fleet.prefill.close()
    await fleet.routers[0].until(lambda: "p0" in [i for r in fleet.routers[0].requests for i in r.fenced_incarnations])


async def test_dead_prefill_of_a_placement_means_decode_alone(fleet: Fleet) -> None:
    fleet.use_pair = True
    await fleet.open(1)
    await fleet.prefill.close()
    await until(lambda: any(client.is_fenced for client in fleet.bench.workers.clients()))
    sink, _ = fleet.bench.submit()
    assert (await sink.end()).resumed == 0
    assert fleet.decode.starts[0].HasField("whole")


async def test_streams_to_dead_routers_leave_nothing_for_the_collector() -> None:
    """As in test_attach_client.py."""
    router = await FakeRouter("router-0", lambda query: None).open()
    address = router.address
    link = RouterLink("router-0", "r" * 16, address, time.monotonic, RouteTimes(first_retry_s=0.01, retry_s=0.01))
    gc.collect()
    gc.disable()
    try:
        running = asyncio.create_task(link.run())
        for _ in range(3):
            await until(lambda: link.is_live)
            await router.close()
            await until(lambda: not link.is_live)
            await router.open(address)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert num_channels() <= 1  # of the one that was cancelled
    finally:
        gc.enable()
        await router.close()
