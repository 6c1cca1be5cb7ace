"""The phases add up to the whole, whatever the workers have said."""

import pytest
from baton_frontend.latency_budget import LatencyBudget, PhaseTimes, latency_budget


def budget(times: PhaseTimes, *, is_pair: bool = True) -> LatencyBudget:
    """Admitted at 10, Start at 10.5, first token at 11.5, end at 14."""
    return latency_budget(10.0, 10.5, 11.5, 14.0, times, is_pair=is_pair)


def test_a_pair_has_all_six_phases() -> None:
    # decode waited 0.8 s for its first step: 0.2 s prefill's queue, 0.1 s of exposed handoff, so 0.5 s of computing
    phases = budget(PhaseTimes(prefill_queue_us=200_000, decode_queue_us=800_000, handoff_us=100_000))
    assert phases == pytest.approx((0.5, 0.2, 0.5, 0.1, 0.2, 2.5))
    assert sum(value or 0.0 for value in phases) == pytest.approx(4.0)


def test_decode_alone_has_no_pull_and_its_first_step_is_prefills_last() -> None:
    phases = budget(PhaseTimes(decode_queue_us=300_000), is_pair=False)
    assert phases == (0.5, 0.3, pytest.approx(0.7), None, None, 2.5)


@pytest.mark.parametrize(
    "times",
    [
        PhaseTimes(),
        PhaseTimes(prefill_queue_us=200_000),
        PhaseTimes(decode_queue_us=800_000),
        PhaseTimes(prefill_queue_us=9_000_000, decode_queue_us=800_000, handoff_us=100_000),
        PhaseTimes(prefill_queue_us=200_000, decode_queue_us=9_000_000, handoff_us=9_000_000),
    ],
)
@pytest.mark.parametrize("is_pair", [True, False])
def test_what_is_not_known_or_cannot_be_is_in_another_phase(times: PhaseTimes, is_pair: bool) -> None:
    phases = budget(times, is_pair=is_pair)
    assert sum(value or 0.0 for value in phases) == pytest.approx(4.0)
    assert all(value is None or value >= 0 for value in phases)


def test_a_request_that_came_to_no_token_or_no_worker_says_how_far_it_got() -> None:
    assert latency_budget(10.0, None, None, 14.0, PhaseTimes(), is_pair=False) == LatencyBudget(route_s=4.0)
    assert latency_budget(10.0, 10.5, None, 14.0, PhaseTimes(), is_pair=True) == LatencyBudget(route_s=0.5)


def test_in_ms_names_every_phase() -> None:
    named = budget(PhaseTimes(decode_queue_us=300_000), is_pair=False).in_ms()
    assert named == {
        "route_ms": 500.0,
        "queue_ms": 300.0,
        "prefill_ms": 700.0,
        "pull_ms": None,
        "first_step_ms": None,
        "stream_ms": 2500.0,
    }
