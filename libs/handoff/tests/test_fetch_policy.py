"""When a fetch is worth it, and how long it may take."""

import pytest
from baton_handoff.config import HandoffConfig
from baton_handoff.fetch_policy import DEFAULT_TOKEN_S, OVERHEAD_S, FetchPolicy
from baton_handoff.transports.base import PullStats

TOKEN_BYTES = 1000


def policy(**settings: float) -> FetchPolicy:
    return FetchPolicy(HandoffConfig(**settings), TOKEN_BYTES)  # type: ignore[arg-type]


def test_before_anything_is_measured_the_defaults_count() -> None:
    made = policy()
    assert made.compute_s(1000) == pytest.approx(1000 * DEFAULT_TOKEN_S)
    assert made.transfer_s("a", 1000) == pytest.approx(OVERHEAD_S + 1e6 / 2e9)


def test_fast_link_and_slow_compute_are_worth_a_fetch() -> None:
    made = policy()
    made.stepped(100, 1.0)
    assert made.is_worth("a", 128)
    made.pulled("a", PullStats(10_000, 1, 10.0))  # a kilobyte, so one token, per second
    assert not made.is_worth("a", 128)
    assert made.is_worth("b", 128), "each link is measured by itself"
    made.forget("a")
    assert made.is_worth("a", 128)


def test_fast_compute_is_never_worth_a_fetch() -> None:
    made = policy()
    made.stepped(100_000, 0.01)
    assert not made.is_worth("a", 1000)


@pytest.mark.parametrize(("least", "missing", "is_worth"), [(128, 127, False), (128, 128, True), (0, 10_000, False), (1, 0, False)])
def test_fewer_tokens_than_the_least_are_computed_and_zero_switches_it_off(least: int, missing: int, is_worth: bool) -> None:
    made = policy(fetch_min_tokens=least)
    made.stepped(1, 1.0)
    assert made.is_worth("a", missing) == is_worth


def test_limit_is_what_computing_would_take_and_at_least_the_least() -> None:
    made = policy(fetch_min_limit_s=0.1)
    made.stepped(1000, 1.0)
    assert made.limit_s(10) == 0.1
    assert made.limit_s(5000) == pytest.approx(5.0)


def test_newer_steps_count_more_and_steps_that_only_decode_not_at_all() -> None:
    made = policy()
    made.stepped(1000, 10.0)
    made.stepped(0, 100.0)
    assert made.compute_s(1000) == pytest.approx(10.0)
    for _ in range(50):
        made.stepped(1000, 1.0)
    assert made.compute_s(1000) == pytest.approx(1.0, rel=0.1)
