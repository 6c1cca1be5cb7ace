"""The choice without a router, barred pairs, and what discovery may and may not do."""

from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_frontend.attach_client import Identity
from baton_frontend.placement import Placement, Target
from baton_frontend.testing_bench import running_bench, until
from baton_frontend.testing_workers import FakeWorker
from baton_frontend.workers import PATH_DOWN_S, Workers


async def test_fallback_takes_the_decode_instance_with_the_fewest_sequences() -> None:
    async with running_bench() as bench:
        busy, idle = await FakeWorker("decode-0", "d0").open(), await FakeWorker("decode-1", "d1").open()
        busy.is_running = idle.is_running = False
        await bench.ready(busy)
        bench.submit()
        await busy.until(lambda: len(busy.starts) == 1)
        await bench.ready(busy, idle)
        assert bench.workers.fallback("m", ()) == Placement(Target("decode-1", "d1", idle.address))
        assert bench.workers.fallback("m", ("d1",)) == Placement(Target("decode-0", "d0", busy.address))
        assert bench.workers.fallback("m", ("d0", "d1")) is None
        assert bench.workers.fallback("other", ()) is None
        await busy.close()
        await idle.close()


async def test_fallback_never_takes_prefill_draining_or_decode_only_instances() -> None:
    async with running_bench() as bench:
        workers = [FakeWorker("prefill-0", "p0", service=pb.SERVICE_PREFILL), FakeWorker("decode-0", "d0"), FakeWorker("decode-1", "d1")]
        for worker in workers:
            await worker.open()
        await bench.ready(*workers)
        draining, decode_only = workers[1].instance, workers[2].instance
        draining.draining = True
        decode_only.capabilities.append(pb.CAPABILITY_DECODE_FROM)
        bench.workers.update([workers[0].instance, draining, decode_only])
        assert bench.workers.fallback("m", ()) is None
        assert not bench.workers.may_run_whole("d1")
        for worker in workers:
            await worker.close()


async def test_everything_known_survives_an_empty_discovery() -> None:
    async with running_bench() as bench:
        worker = await FakeWorker("decode-0", "d0").open()
        await bench.ready(worker)
        bench.show()
        assert [model.served_name for model in bench.manager.models()] == ["m"]
        assert bench.workers.fallback("m", ()) is not None
        await worker.close()
        await until(lambda: not bench.manager.models())


async def test_worker_known_only_to_the_router_is_reached() -> None:
    async with running_bench() as bench:
        worker = await FakeWorker("decode-0", "d0").open()
        target = Target("decode-0", "d0", worker.address)
        client = bench.workers.client_for(target)
        assert client is not None
        await until(lambda: client.is_attached)
        assert bench.workers.client_for(target) is client
        await worker.close()
        await until(lambda: not bench.workers.clients())


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_barred_pair_is_free_again_after_its_time() -> None:
    clock = Clock()
    workers = Workers(Identity("frontend-0", "f"), clock)
    pair = Placement(Target("d", "d0", ""), Target("p", "p0", ""))
    workers.bar("p0", "d0")
    assert workers.is_barred(pair)
    assert not workers.is_barred(pair.whole())
    assert not workers.is_barred(Placement(Target("d", "d0", ""), Target("p", "p1", "")))
    clock.now += PATH_DOWN_S
    assert not workers.is_barred(pair)


async def test_no_two_streams_of_a_frontend_have_one_session_number() -> None:
    """A worker started again at the address of its former life hears the clients of both lives."""
    async with running_bench() as bench:
        workers = [await FakeWorker(f"decode-{n}", f"d{n}").open() for n in range(3)]
        await bench.ready(*workers)
        sessions = [request.hello.session for worker in workers for request in worker.requests if request.HasField("hello")]
        assert len(sessions) == len(set(sessions)) == 3
        for worker in workers:
            await worker.close()
