"""The bounds themselves."""

import pytest
from baton_frontend.admission import Admission, AdmissionLimits
from baton_frontend.config import FrontendConfig
from baton_frontend.request_errors import AdmissionFull
from baton_runtime.config import load
from baton_runtime.errors import ConfigError, Draining, InvalidArgument


@pytest.fixture
def refused() -> list[str]:
    return []


@pytest.fixture
def admission(refused: list[str]) -> Admission:
    return Admission(AdmissionLimits(max_inflight=2, max_inflight_tokens=100, max_held_bytes=50, retry_after_ms=700), refused.append)


def test_every_bound_says_its_name_its_size_and_what_is_held(admission: Admission, refused: list[str]) -> None:
    admission.admit(60)
    with pytest.raises(AdmissionFull, match=r"60 of at most 100 tokens \(frontend\.max_inflight_tokens\), and 41 more .* 700 ms"):
        admission.admit(41)
    admission.admit(40)
    for ask in (admission.check, lambda: admission.admit(0)):
        with pytest.raises(AdmissionFull, match=r"2 of at most 2 requests \(frontend\.max_inflight\)"):
            ask()
    admission.take_bytes(50)
    with pytest.raises(AdmissionFull, match=r"50 of at most 50 bytes \(frontend\.max_held_bytes\)") as full:
        admission.take_bytes(1)
    assert full.value.retry_after_ms == 700
    assert refused == ["max_inflight_tokens", "max_inflight", "max_inflight", "max_held_bytes"]


def test_a_refusal_takes_nothing(admission: Admission) -> None:
    admission.admit(60)
    for refused in (lambda: admission.admit(50), lambda: admission.admit(101), lambda: admission.take_bytes(51)):
        with pytest.raises((AdmissionFull, InvalidArgument)):
            refused()
    assert (admission.num_requests, admission.num_tokens, admission.num_bytes) == (1, 60, 0)


def test_draining_refuses_what_begins_and_admits_what_began(admission: Admission) -> None:
    admission.check()
    admission.set_draining()
    with pytest.raises(Draining):
        admission.check()
    admission.admit(10)
    assert not admission.is_open


def test_a_bound_below_one_body_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="max_held_bytes 2048 is below max_body_bytes"):
        load(FrontendConfig, "frontend", environ={"BATON_FRONTEND_MAX_HELD_BYTES": "2048"})
