"""Sums and quantiles."""

import pickle
import random

import pytest
from baton_cli.bench.figures import Durations, Figures


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 0.999])
def test_quantiles_are_right_to_one_percent(share: float) -> None:
    source, durations = random.Random(1), Durations()
    values = sorted(source.expovariate(10) for _ in range(10_000))
    for value in values:
        durations.add(value)
    assert durations.quantile(share) == pytest.approx(values[int(share * len(values)) - 1], rel=0.012)


def test_nothing_has_no_quantile() -> None:
    assert Durations().quantile(0.99) == 0.0


def test_no_quantile_is_beyond_the_largest() -> None:
    durations = Durations()
    durations.add(0.1)
    assert durations.quantile(1.0) <= 0.1 == durations.largest_s


def test_sums_over_processes_are_the_sums() -> None:
    one, other = Figures(started=3, tokens=5), Figures(started=2, tokens=7, problems=["x"])
    one.ends["complete"] = 2
    other.ends["complete"], other.ends["hung"] = 1, 1
    one.gap_s.add(0.01)
    other.gap_s.add(0.02)
    one.merge(pickle.loads(pickle.dumps(other)))
    assert (one.started, one.ended, one.complete, one.tokens, one.gap_s.count, one.problems) == (5, 4, 3, 12, 2, ["x"])
