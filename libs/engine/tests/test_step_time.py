"""Prediction of step lengths."""

import random

import pytest
from baton_engine.runner import StepLoad
from baton_engine.step_time import StepTimeFit


def seconds(load: StepLoad, speed: float = 1.0) -> float:
    parts = 2e-3 + 5e-5 * load.prefill_tokens + 2e-7 * load.prefill_attended_tokens + 3e-4 * load.decode_sequences
    return (parts + 4e-7 * load.decode_kv_tokens) / speed


def random_load(choose: random.Random) -> StepLoad:
    load = StepLoad()
    for _ in range(choose.randint(1, 20)):
        start = choose.randrange(2000)
        load = load.plus(start, start + 1)
    if choose.random() < 0.5:
        start = choose.randrange(2000)
        load = load.plus(start, start + choose.randint(2, 500))
    return load


def trained(choose: random.Random, speed: float = 1.0, steps: int = 300, fit: StepTimeFit | None = None) -> StepTimeFit:
    fit = fit or StepTimeFit()
    for _ in range(steps):
        load = random_load(choose)
        fit.observe(load, seconds(load, speed) * choose.uniform(0.9, 1.1))
    return fit


def test_steps_are_predicted_within_a_fifth() -> None:
    choose = random.Random(1)
    fit = trained(choose)
    for _ in range(50):
        load = random_load(choose)
        assert fit.predict_s(load) == pytest.approx(seconds(load), rel=0.2)


def test_prediction_follows_a_machine_that_became_slower() -> None:
    choose = random.Random(2)
    fit = trained(choose, speed=0.4, fit=trained(choose))
    load = StepLoad().plus(0, 300)
    assert fit.predict_s(load) == pytest.approx(seconds(load, 0.4), rel=0.25)


def test_one_stall_hardly_changes_the_prediction() -> None:
    choose = random.Random(3)
    fit, load = trained(choose), StepLoad().plus(100, 101)
    fit.observe(load, 30.0)
    trained(choose, steps=8, fit=fit)
    assert fit.predict_s(load) < 2 * seconds(load)


def test_prefill_is_still_known_after_a_long_time_of_decode_alone() -> None:
    choose = random.Random(4)
    fit = trained(choose)
    for _ in range(2000):
        load = StepLoad(decode_sequences=8, decode_kv_tokens=choose.randint(1000, 9000))
        fit.observe(load, seconds(load))
    load = StepLoad().plus(0, 400)
    assert fit.predict_s(load) == pytest.approx(seconds(load), rel=0.3)


def test_prediction_never_falls_with_more_load() -> None:
    choose = random.Random(5)
    fit = StepTimeFit()
    for _ in range(100):
        fit.observe(random_load(choose), choose.uniform(0.001, 0.1))
    for field in StepLoad._fields:
        load = random_load(choose)
        assert fit.predict_s(load._replace(**{field: getattr(load, field) + 100})) >= fit.predict_s(load)
