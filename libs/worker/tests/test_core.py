"""The whole worker but its process: real gRPC, real sim engine, handoffs by hand."""

import asyncio
from typing import Any

import grpc
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import SequenceKey
from baton_runtime.drain import Drain, Holdings
from baton_runtime.testing import wait_until
from baton_worker.cache_feed import apply_message
from baton_worker.testing import FrontendModel, start_message

from .conftest import House


def whole(slot: int, name: str, *, prompt: int = 9, max_tokens: int = 20, **fields: Any) -> pb.Start:
    start = start_message(slot, name, prompt=prompt, max_tokens=max_tokens)
    for field, value in fields.items():
        setattr(start, field, value)
    return start


async def test_fifty_requests_stream_all_their_tokens_and_leave_the_pool_empty(house: House) -> None:
    model = FrontendModel()
    starts = [whole(slot, f"r{slot}", prompt=5 + slot % 3) for slot in range(16)]
    async with house.attached(model, *starts) as frontend:
        for slot in range(16, 50):
            await wait_until(lambda: len(model.keys) < 16)
            await frontend.start(whole(slot, f"r{slot}"))
        await wait_until(lambda: len(model.finished) == 50, 10.0)
    assert {finished.reason for finished in model.finished.values()} == {pb.FINISH_REASON_LENGTH}
    assert {len(tokens) for tokens in model.tokens.values()} == {20}
    await wait_until(lambda: house.is_empty)


async def test_usage_says_what_the_attempt_took(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, whole(0, "a", prompt=9, max_tokens=3)) as frontend:
        await wait_until(lambda: frontend.reason("a"))
        await frontend.start(whole(0, "b", prompt=9, max_tokens=3))
        await wait_until(lambda: frontend.reason("b"))
    first, second = model.finished[SequenceKey("a", 1)].usage, model.finished[SequenceKey("b", 1)].usage
    assert (first.input_tokens, first.output_tokens, first.cached_tokens) == (9, 3, 0)
    assert second.cached_tokens == 8
    assert first.queue_us < 1_000_000


async def test_queue_beyond_its_bound_is_refused_with_advice(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, *(whole(slot, f"r{slot}") for slot in range(300))):
        await wait_until(lambda: len(model.finished) == 300, 10.0)
    refused = [end for end in model.finished.values() if end.reason == pb.FINISH_REASON_REFUSED]
    assert refused
    assert all(end.error.retry_after_ms > 0 and end.error.reason == "QUEUE_FULL" for end in refused)
    await wait_until(lambda: house.is_empty)


async def test_invalid_start_is_answered_on_its_slot(house: House) -> None:
    model = FrontendModel()
    bad = whole(0, "a")
    bad.sampling.top_p = 3.0
    async with house.attached(model, bad, whole(1, "b")) as frontend:
        await wait_until(lambda: frontend.reason("b"))
    assert model.finished[SequenceKey("a", 1)].error.message.startswith("sampling.top_p")
    assert frontend.reason("b") == pb.FINISH_REASON_LENGTH


async def test_fifty_sequences_go_on_after_a_broken_stream(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model) as frontend:
        for slot in range(50):
            await wait_until(lambda: house.engine.stats().waiting_sequences < 8)
            await frontend.start(whole(slot, f"r{slot}", prompt=5, max_tokens=150))
        await wait_until(lambda: all(model.tokens[key] for key in list(model.keys.values())), 10.0)
    assert len(model.finished) == 0
    async with house.attached(model) as frontend:
        await wait_until(lambda: len(model.finished) == 50, 10.0)
    assert {end.reason for end in model.finished.values()} == {pb.FINISH_REASON_LENGTH}
    assert {len(tokens) for tokens in model.tokens.values()} == {150}
    undisturbed = FrontendModel("f2")
    async with house.attached(undisturbed, whole(0, "x", prompt=5, max_tokens=150)) as frontend:
        await wait_until(lambda: frontend.reason("x"))
    assert model.tokens[SequenceKey("r7", 1)] == undisturbed.tokens[SequenceKey("x", 1)]
    await wait_until(lambda: house.is_empty)


async def test_frontend_that_reads_nothing_stops_only_its_own_sequences(house: House) -> None:
    slow, quick = FrontendModel("slow"), FrontendModel("quick")
    async with (
        house.attached(slow, whole(0, "s", max_tokens=900)) as stuck,
        house.attached(quick, whole(0, "q", max_tokens=500)) as frontend,
    ):
        stuck.acknowledges = False
        await wait_until(lambda: frontend.reason("q"), 10.0)
        assert stuck.num_tokens("s") <= 3 * (256 + 16)  # three frames, none with more than a paused sequence and a step have
        assert house.core.frontends._routes[SequenceKey("s", 1)][1].is_paused
        stuck.acknowledges = True
        await stuck.say()
        await wait_until(lambda: stuck.reason("s"), 10.0)
    assert stuck.num_tokens("s") == 900


async def test_deadline_ends_the_sequence_with_the_tokens_so_far(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, whole(0, "a", max_tokens=2000, deadline_ms=200)) as frontend:
        await wait_until(lambda: frontend.reason("a"))
    assert frontend.reason("a") == pb.FINISH_REASON_DEADLINE
    assert frontend.num_tokens("a") > 5
    await wait_until(lambda: house.is_empty)


async def test_feed_tells_what_is_cached_and_how_busy_the_worker_is(house: House) -> None:
    model = FrontendModel()
    hashes: set[bytes] = set()
    call = house.stub.WatchWorker(pb.WatchWorkerRequest(instance_id="router-0"))
    try:
        first = await call.read()
        assert (first.snapshot, first.incarnation, first.load.blocks.total) == (True, "d1", 4096)
        async with house.attached(model, whole(0, "a", prompt=9, max_tokens=20)) as frontend:
            await wait_until(lambda: frontend.reason("a"))
        busy, samples, number = 0, 0, first.sequence_number
        async with asyncio.timeout(5.0):
            while hashes != set(house.engine.blocks.cached_hashes()) or not hashes:
                message = await call.read()
                assert message.sequence_number == number + 1
                number = message.sequence_number
                apply_message(hashes, message)
                busy = max(busy, message.load.running_sequences)
                samples += len(message.load.samples)
        assert samples > 5
        assert busy == 1
    finally:
        call.cancel()
    await wait_until(lambda: house.core.feed.num_subscribers == 0)


async def test_status_is_sound_and_counts_what_lives(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, whole(0, "a", max_tokens=2000)) as frontend:
        await wait_until(lambda: frontend.num_tokens("a") > 0)
        status = await house.stub.GetStatus(pb.GetStatusRequest(), timeout=2.0)
        assert (status.integrity_error, status.live_sequences, status.load.running_sequences) == ("", 1, 1)
        assert status.load.blocks.used > 0
        assert not status.safe_to_stop
        assert house.core.state.holdings() == Holdings(running=1)


async def test_drain_refuses_new_work_finishes_the_rest_and_is_safe(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, whole(0, "a", max_tokens=100)) as frontend, asyncio.TaskGroup() as tasks:
        await wait_until(lambda: frontend.num_tokens("a") > 0)
        draining = tasks.create_task(house.core.drain(lambda: 10.0))
        await wait_until(lambda: house.core.dispatcher.is_draining)
        await frontend.start(whole(1, "b"))
        await draining
    assert (frontend.reason("a"), frontend.reason("b")) == (pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_REFUSED)
    assert house.handoffs.is_draining
    assert (await house.stub.GetStatus(pb.GetStatusRequest(), timeout=2.0)).safe_to_stop


async def test_drain_hands_back_what_does_not_end_in_time(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, whole(0, "a", max_tokens=4000)) as frontend, asyncio.TaskGroup() as tasks:
        await wait_until(lambda: frontend.num_tokens("a") > 0)
        drain = Drain(60.0)
        drain.ask()
        draining = tasks.create_task(house.core.drain(lambda: drain.remaining_s))
        await wait_until(lambda: house.core.dispatcher.is_draining)
        assert frontend.reason("a") is None
        drain.ask(0.5)  # whoever asks again does not wait as long
        await draining
    assert frontend.reason("a") == pb.FINISH_REASON_PREEMPTED
    assert frontend.num_tokens("a") > 10
    assert house.is_empty


async def test_drain_waits_for_blocks_that_are_still_pinned(house: House) -> None:
    house.handoffs.num_held_blocks = 3
    async with asyncio.TaskGroup() as tasks:
        draining = tasks.create_task(house.core.drain(lambda: 10.0))
        await wait_until(lambda: house.core.dispatcher.is_draining)
        assert not (await house.stub.GetStatus(pb.GetStatusRequest(), timeout=2.0)).safe_to_stop
        assert not draining.done()
        assert house.core.state.holdings() == Holdings(live_handoffs=house.handoffs.live_handoffs())
        house.handoffs.num_held_blocks = 0


async def test_stall_of_the_own_loop_fences_peers_and_breaks_streams(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, whole(0, "a", max_tokens=2000)) as frontend:
        await wait_until(lambda: frontend.num_tokens("a") > 0)
        house.core.stall_watch.check()
        house.core.stall_watch._last = house.core.stall_watch._clock() - 10.0
        house.core.stall_watch.check()
        assert house.handoffs.fenced == ["LOOP_STALL"]
        assert house.core.frontends.num_attached == 0
        assert await frontend.call.code() is grpc.StatusCode.UNAVAILABLE
    await wait_until(lambda: house.is_empty)


async def test_metrics_tell_blocks_tokens_and_attempts(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, whole(0, "a", prompt=9, max_tokens=20)) as frontend:
        await wait_until(lambda: frontend.reason("a"))
    value = house.registry.get_sample_value
    assert value("baton_engine_tokens_total", {"phase": "decode"}) == 20
    assert value("baton_engine_tokens_total", {"phase": "prefill"}) >= 8
    assert value("baton_attempts_total", {"work": "whole", "outcome": "length"}) == 1
    assert value("baton_kv_blocks", {"state": "used"}) == 0
    assert value("baton_engine_step_seconds_count") == value("baton_engine_steps_total")
    assert value("baton_queue_wait_seconds_count", {"work": "whole", "priority": "interactive"}) == 1
