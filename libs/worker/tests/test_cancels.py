"""That the time from a cancel to free blocks is measured in every phase, once, and for nobody else."""

import pytest
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import EndReason, StepOutput
from baton_handoff.ids import HandoffKey
from baton_worker.cancels import CancelPhase

from .test_dispatch import KEY, Rig


@pytest.fixture
def rig() -> Rig:
    """Handoffs here end when the test says so, as they do while an operation runs."""
    return Rig(ends_cancelled=False)


def measured(rig: Rig) -> dict[str, tuple[float, float]]:
    """Number and sum of seconds by phase, of those that have any."""
    value = rig.registry.get_sample_value
    found = {}
    for phase in CancelPhase:
        labels = {"phase": phase.value}
        count, total = value("baton_cancel_to_free_seconds_count", labels), value("baton_cancel_to_free_seconds_sum", labels)
        assert count is not None
        assert total is not None
        if count:
            found[phase.value] = (count, total)
    return found


def cancel(rig: Rig) -> None:
    rig.dispatcher.cancel(KEY, pb.FINISH_REASON_CANCELLED)


@pytest.mark.parametrize("work", ["prefill_for", "decode_from"])
def test_queued_handoff_holds_nothing_and_counts_as_freed_at_once(rig: Rig, work: str) -> None:
    rig.start(work)
    cancel(rig)
    assert measured(rig) == {"queued": (1, 0.0)}


def test_whole_in_the_engines_queue_is_freed_when_the_engine_ends_it(rig: Rig) -> None:
    """It holds nothing now, but the engine may be admitting it at this very moment."""
    rig.start()
    cancel(rig)
    rig.now += 0.01
    assert not measured(rig)
    rig.ended(EndReason.CANCELLED)
    assert measured(rig) == {"queued": (1, pytest.approx(0.01))}


@pytest.mark.parametrize(("has_token", "phase"), [(False, "computing"), (True, "decoding")])
def test_sequence_in_the_engine_is_freed_when_its_table_is_released(rig: Rig, has_token: bool, phase: str) -> None:
    rig.start()
    rig.engine.blocks.acquire(KEY, [], 2)
    rig.step(StepOutput(step=1, started=[KEY]))
    if has_token:
        rig.dispatcher.first_token(KEY)
    cancel(rig)
    rig.now += 0.25
    rig.ended(EndReason.CANCELLED)
    assert measured(rig) == {phase: (1, 0.25)}


def test_source_that_computes_is_freed_when_pins_and_table_are_gone(rig: Rig) -> None:
    rig.start("prefill_for")
    rig.engine.blocks.acquire(KEY, [], 2)
    rig.engine.blocks.pin(KEY, 0, 1)
    cancel(rig)
    rig.engine.blocks.release(KEY)
    assert not measured(rig)
    rig.now += 0.5
    rig.engine.blocks.unpin(KEY)
    assert measured(rig) == {"computing": (1, 0.5)}


def test_source_that_has_computed_is_transferring_until_it_unpins(rig: Rig) -> None:
    rig.start("prefill_for")
    rig.engine.blocks.acquire(KEY, [], 2)
    rig.engine.blocks.pin(KEY, 0, 2)
    rig.engine.blocks.release(KEY)
    cancel(rig)
    rig.engine.blocks.unpin(KEY)
    assert measured(rig) == {"transferring": (1, 0.0)}


def test_sink_is_freed_when_its_operation_has_returned(rig: Rig) -> None:
    rig.start("decode_from")
    rig.engine.blocks.reserve(KEY, [], 2)
    cancel(rig)
    rig.now += 0.03
    rig.engine.blocks.release(KEY)
    assert measured(rig) == {"transferring": (1, pytest.approx(0.03))}


def test_source_that_fetches_is_freed_when_its_own_blocks_and_those_of_the_fetch_are(rig: Rig) -> None:
    fetch = HandoffKey(*KEY, "me", is_fetch=True)
    rig.start("prefill_for")
    rig.engine.blocks.acquire(KEY, [], 4)
    rig.engine.blocks.reserve(fetch, [], 2)
    cancel(rig)
    rig.engine.blocks.release(KEY)
    assert not measured(rig)
    rig.now += 0.03
    rig.engine.blocks.release(fetch)
    assert measured(rig) == {"transferring": (1, pytest.approx(0.03))}


def test_sequence_that_waits_for_its_first_step_with_received_kv_is_decoding(rig: Rig) -> None:
    rig.start("decode_from")
    rig.engine.blocks.reserve(KEY, [], 2)
    rig.handoffs.complete(KEY)
    cancel(rig)
    rig.ended(EndReason.CANCELLED)
    assert measured(rig) == {"decoding": (1, 0.0)}


def test_deadline_is_measured_and_a_cancel_after_it_does_not_start_anew(rig: Rig) -> None:
    rig.start(deadline_ms=1000)
    rig.now += 1
    rig.dispatcher.tick(rig.now)
    rig.now += 0.02
    cancel(rig)
    rig.now += 0.02
    rig.ended(EndReason.CANCELLED)
    assert measured(rig) == {"queued": (1, pytest.approx(0.04))}


def test_sequence_that_had_ended_before_its_cancel_is_not_measured(rig: Rig) -> None:
    rig.start()
    output = rig.engine.ended(KEY, EndReason.LENGTH)
    cancel(rig)
    rig.step(output)
    rig.engine.blocks.release(KEY)
    assert not measured(rig)


def test_undisturbed_sequence_is_not_measured(rig: Rig) -> None:
    rig.start()
    rig.ended(EndReason.STOP)
    assert not measured(rig)
