"""Cancel, leave or die at every point of a sequence's life: then one end, no blocks, nothing live."""

from typing import Any

import pytest
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import SequenceKey
from baton_engine.errors import EngineFailed
from baton_runtime.hashing import block_hashes
from baton_runtime.testing import wait_until
from baton_worker.testing import FrontendModel, start_message

from .conftest import Attached, House

KEY = SequenceKey("a", 1)


def start(work: str = "whole", *, prompt: int = 9, max_tokens: int = 2000) -> pb.Start:
    message = start_message(0, "a", prompt=prompt, max_tokens=max_tokens)
    if work == "decode_from":
        message.decode_from.MergeFrom(pb.DecodeFrom(prefill_instance_id="p", prefill_incarnation="p1", prefill_address="h:1"))
    if work == "prefill_for":
        message.prefill_for.MergeFrom(pb.PrefillFor(decode_instance_id="d", decode_incarnation="d1"))
    return message


async def in_queue(house: House, frontend: Attached) -> None:
    await wait_until(lambda: house.core.dispatcher.num_live == 1)


async def in_prefill(house: House, frontend: Attached) -> None:
    await wait_until(lambda: house.engine.stats().running_sequences == 1)


async def at_first_token(house: House, frontend: Attached) -> None:
    await wait_until(lambda: frontend.num_tokens("a") >= 1)


async def in_mid_stream(house: House, frontend: Attached) -> None:
    await wait_until(lambda: frontend.num_tokens("a") >= 30)


POINTS = [in_queue, in_prefill, at_first_token, in_mid_stream]


@pytest.mark.parametrize("reached", POINTS)
async def test_cancelled_sequence_ends_once_and_frees_its_blocks(house: House, reached: Any) -> None:
    model = FrontendModel()
    async with house.attached(model, start(prompt=3000)) as frontend:
        await reached(house, frontend)
        await frontend.cancel("a")
        await wait_until(lambda: frontend.reason("a"))
        await wait_until(lambda: house.is_empty)
    assert frontend.reason("a") == pb.FINISH_REASON_CANCELLED


@pytest.mark.parametrize("reached", POINTS)
async def test_frontend_that_leaves_for_good_frees_its_blocks_within_four_seconds(house: House, reached: Any) -> None:
    model = FrontendModel()
    async with house.attached(model, start(prompt=3000)) as frontend:
        await reached(house, frontend)
        frontend.call.cancel()
        await wait_until(lambda: house.is_empty, 4.2)
    assert not house.core.frontends.sessions


async def test_cancel_and_start_in_any_order_hold_nothing(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model) as frontend:
        await frontend.cancel("a")
        await frontend.start(start())
        await wait_until(lambda: frontend.reason("a"))
    assert frontend.reason("a") == pb.FINISH_REASON_STALE
    assert house.is_empty


async def test_higher_attempt_takes_over_and_both_end_once(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, start()) as frontend:
        await at_first_token(house, frontend)
        again = start_message(1, "a", attempt=2, prompt=9, max_tokens=20)
        await frontend.start(again)
        await wait_until(lambda: len(model.finished) == 2)
    assert (frontend.reason("a", 1), frontend.reason("a", 2)) == (pb.FINISH_REASON_STALE, pb.FINISH_REASON_LENGTH)
    await wait_until(lambda: house.is_empty)


@pytest.mark.parametrize("work", ["decode_from", "prefill_for"])
async def test_cancel_in_a_handoff_is_passed_on_and_ends_once(house: House, work: str) -> None:
    model = FrontendModel()
    async with house.attached(model, start(work)) as frontend:
        await wait_until(lambda: KEY in house.handoffs.held)
        await frontend.cancel("a")
        await wait_until(lambda: frontend.reason("a"))
    assert frontend.reason("a") == pb.FINISH_REASON_CANCELLED
    assert ("a", 1, "CLIENT_GONE") in house.handoffs.cancelled


async def test_cancel_after_the_handoff_ends_the_sequence_in_the_engine(house: House) -> None:
    model = FrontendModel()
    async with house.attached(model, start("decode_from")) as frontend:
        await wait_until(lambda: KEY in house.handoffs.held)
        receive_kv(house)
        await in_mid_stream(house, frontend)
        await frontend.cancel("a")
        await wait_until(lambda: frontend.reason("a"))
        await wait_until(lambda: house.is_empty)
    assert frontend.reason("a") == pb.FINISH_REASON_CANCELLED


def receive_kv(house: House) -> None:
    """What the sink of a handoff does: reserve, write the bytes the sim expects, commit, hand on."""
    from baton_engine.sim_pattern import expected_block_bytes

    request = house.handoffs.held[KEY].request
    blocks, layout, num_blocks = house.engine.blocks, house.engine.pool.layout, 2
    blocks.reserve(KEY, [], num_blocks)
    for index, block in enumerate(blocks.table(KEY)):
        house.engine.pool.data[block] = expected_block_bytes(layout, request.token_ids, index).reshape(-1)
    hashes = block_hashes(request.cache_root, request.token_ids[: request.num_kv_tokens], layout.block_tokens, layout.block_tokens)
    blocks.commit(KEY, num_blocks, hashes)
    house.handoffs.complete(KEY, cached_tokens=0, handoff_bytes=num_blocks * layout.block_bytes)


async def test_dead_engine_is_told_to_every_frontend_and_ends_the_process(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    model = FrontendModel()
    async with house.attached(model, start()) as frontend:
        await at_first_token(house, frontend)
        held = start_message(1, "b", prompt=9)
        held.decode_from.MergeFrom(pb.DecodeFrom(prefill_instance_id="p", prefill_incarnation="p1", prefill_address="h:1"))
        await frontend.start(held)
        await wait_until(lambda: house.handoffs.held)
        assert house.engine_task is not None
        guarded = house.engine_task
        monkeypatch.setattr(house.engine._engine._runner, "run", broken)
        await wait_until(lambda: len(model.finished) == 2)
        await wait_until(guarded.done)
    assert {end.reason for end in model.finished.values()} == {pb.FINISH_REASON_ENGINE_ERROR}
    assert isinstance(house.engine_error, EngineFailed)
