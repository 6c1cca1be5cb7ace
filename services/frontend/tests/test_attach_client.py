"""The Attach stream against a worker over real gRPC: breaks, hangs, and what becomes of the sequences."""

import gc
from array import array
from collections.abc import AsyncIterator

import pytest
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_frontend.testing_bench import Bench, num_channels, running_bench, until
from baton_frontend.testing_workers import FakeWorker, expected_output

PROMPT = array("I", [1, 2, 3])


@pytest.fixture
async def worker() -> AsyncIterator[FakeWorker]:
    worker = await FakeWorker("decode-0", "d0").open()
    yield worker
    await worker.close()


@pytest.fixture
async def other() -> AsyncIterator[FakeWorker]:
    other = await FakeWorker("decode-1", "d1").open()
    yield other
    await other.close()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_bench() as bench:
        yield bench


async def test_hello_names_this_frontend_and_its_session(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    hello = worker.requests[0].hello
    assert (hello.contract_version, hello.instance_id, hello.incarnation, hello.session) == (1, "frontend-0", "f" * 16, 1)


async def test_tokens_of_many_sequences_arrive_complete(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    submitted = [bench.submit([n, 2, 3], max_tokens=20)[0] for n in range(50)]
    for n, sink in enumerate(submitted):
        assert (await sink.end()).reason == "length"
        assert sink.tokens == expected_output(array("I", [n, 2, 3]), 20)
    await until(lambda: bench.workers.clients()[0].num_lanes == 0)


async def test_merged_frames_arrive_complete(bench: Bench, worker: FakeWorker) -> None:
    worker.merge_every = 5
    await bench.ready(worker)
    sink, _ = bench.submit(max_tokens=23)
    await sink.end()
    assert sink.tokens == expected_output(PROMPT, 23)


async def test_frames_are_acknowledged_by_number(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    await worker.until(lambda: worker.requests[-1].ack_frame >= 5)


async def test_silent_frontend_sends_beats(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    worker.is_silent = True
    count = len(worker.requests)
    await worker.until(lambda: len(worker.requests) >= count + 3)


async def test_broken_stream_goes_on_where_it_stood(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    submitted = [bench.submit([n, 2, 3], max_tokens=100)[0] for n in range(100)]
    await submitted[-1].until(lambda: len(submitted[-1].tokens) > 10)
    worker.break_streams()
    for n, sink in enumerate(submitted):
        end = await sink.end()
        assert (end.reason, end.resumed) == ("length", 0)
        assert sink.tokens == expected_output(array("I", [n, 2, 3]), 100)
    assert worker.sessions == 2
    assert len(worker.requests) > 1
    assert {start.attempt for start in worker.starts} == {1}


async def test_sequences_the_worker_forgot_are_resumed_there(bench: Bench, worker: FakeWorker) -> None:
    worker.keeps_sequences = False
    await bench.ready(worker)
    sink, _ = bench.submit(max_tokens=60)
    await sink.until(lambda: len(sink.tokens) > 10)
    worker.break_streams()
    assert (await sink.end()).resumed == 1
    assert sink.tokens == expected_output(PROMPT, 60)
    resumed = worker.starts[-1]
    given = array("I", resumed.token_ids).tolist()
    assert resumed.attempt == 2
    assert resumed.num_prompt_tokens == 3
    assert given == PROMPT.tolist() + expected_output(PROMPT, len(given) - 3)
    assert resumed.sampling == worker.starts[0].sampling


async def test_killed_worker_is_fenced_and_its_requests_go_elsewhere(bench: Bench, worker: FakeWorker, other: FakeWorker) -> None:
    await bench.ready(worker, other)
    submitted = [bench.submit([n, 2, 3], max_tokens=60)[0] for n in range(40)]
    await submitted[-1].until(lambda: len(submitted[-1].tokens) > 5)
    await worker.close()
    for n, sink in enumerate(submitted):
        await sink.end()
        assert sink.tokens == expected_output(array("I", [n, 2, 3]), 60)
    assert {sink.ends[0].resumed for sink in submitted} == {0, 1}


async def test_hung_worker_is_fenced_by_its_silence(bench: Bench, worker: FakeWorker, other: FakeWorker) -> None:
    await bench.ready(worker)
    sink, _ = bench.submit(max_tokens=30)
    await sink.until(lambda: len(sink.tokens) > 5)
    worker.is_silent = True
    await bench.ready(other, worker)
    assert (await sink.end()).resumed == 1
    assert sink.tokens == expected_output(PROMPT, 30)


async def test_only_worker_unreachable_for_a_while_is_waited_for(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    (client,) = bench.workers.clients()
    sink, _ = bench.submit(max_tokens=30)
    await sink.until(lambda: len(sink.tokens) > 5)
    worker.is_silent = True
    await until(lambda: client.is_fenced)
    worker.is_silent = False
    assert (await sink.end()).resumed == 1
    assert sink.tokens == expected_output(PROMPT, 30)


async def test_stuck_step_fences_though_beats_arrive(bench: Bench, worker: FakeWorker, other: FakeWorker) -> None:
    await bench.ready(worker)
    sink, _ = bench.submit(max_tokens=30)
    await sink.until(lambda: len(sink.tokens) > 5)
    await bench.ready(other, worker)
    worker.is_running, worker.step_age_us = False, 2_500_000
    assert (await sink.end()).resumed == 1
    assert sink.tokens == expected_output(PROMPT, 30)


async def test_fenced_worker_that_moves_again_counts_as_alive(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    (client,) = bench.workers.clients()
    worker.is_running, worker.step_age_us = False, 2_500_000
    await until(lambda: client.is_fenced)
    worker.is_running, worker.step_age_us = True, 0
    await until(lambda: client.is_healthy)
    sink, _ = bench.submit(max_tokens=5)
    await sink.end()
    assert sink.tokens == expected_output(PROMPT, 5)


async def test_another_life_at_the_address_is_not_taken_for_the_old_one(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    (client,) = bench.workers.clients()
    sink, _ = bench.submit(max_tokens=500)
    await sink.until(lambda: len(sink.tokens) > 5)
    worker.incarnation = "d0-second-life"
    worker.break_streams()
    await until(lambda: client.is_gone)
    bench.show(worker)
    assert (await sink.end()).resumed == 1
    assert sink.tokens == expected_output(PROMPT, 500)
    await until(lambda: client not in bench.workers.clients())


async def test_vanished_record_does_not_end_a_worker_whose_stream_lives(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    bench.show()
    sink, _ = bench.submit(max_tokens=10)
    assert (await sink.end()).reason == "length"
    await worker.close()
    await until(lambda: not bench.workers.clients())


async def test_cancel_goes_before_starts_of_the_same_message(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    sink, handle = bench.submit(max_tokens=1000)
    await sink.until(lambda: bool(sink.tokens))
    handle.cancel()
    bench.submit(max_tokens=3)
    await worker.until(lambda: bool(worker.cancels))
    message = next(request for request in worker.requests if request.cancels)
    assert message.cancels[0] == pb.Cancel(request_id=handle.request_id, attempt=1)
    value = bench.registry.get_sample_value
    await until(lambda: value("baton_cancel_to_sent_seconds_count") == 1)
    assert 0 < (value("baton_cancel_to_sent_seconds_sum") or 0) < 5


async def test_own_stall_breaks_streams_but_loses_nothing(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    sink, _ = bench.submit(max_tokens=60)
    await sink.until(lambda: len(sink.tokens) > 5)
    bench.workers.on_stall(2.5)
    assert (await sink.end()).resumed == 0
    assert worker.sessions == 2
    assert sink.tokens == expected_output(PROMPT, 60)


async def test_time_this_process_stood_still_is_not_the_workers_silence(bench: Bench, worker: FakeWorker) -> None:
    await bench.ready(worker)
    (client,) = bench.workers.clients()
    later = bench.manager.clock() + 100.0
    bench.workers.tick(later)
    assert not client.is_fenced


async def test_broken_and_refused_streams_leave_nothing_for_the_collector(bench: Bench, worker: FakeWorker) -> None:
    """It runs seldom (tune_gc), and each channel left is some 100 KB: a frontend grew by 15 MB within minutes of deaths and restarts."""
    await bench.ready(worker)
    gc.collect()
    gc.disable()
    try:
        for session in range(2, 6):
            worker.break_streams()
            await until(lambda session=session: worker.sessions == session)
        await worker.close()
        await until(lambda: bench.workers.clients()[0].is_fenced)
        assert num_channels() <= 1  # of the try that may be under way
    finally:
        gc.enable()
