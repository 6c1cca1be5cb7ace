"""Each error has one status, and what is ours stays in the log."""

import json

import pytest
from baton_frontend.openai_errors import ApiError, from_baton_error
from baton_frontend.request_errors import EngineCrash
from baton_runtime.errors import (
    BatonError,
    DataLoss,
    DeadlineExceeded,
    Draining,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    QueueFull,
    StaleAttempt,
    Unavailable,
)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidArgument("max_tokens", "too many"), 400),
        (NotFound("model", "x"), 404),
        (PermissionDenied("no"), 403),
        (QueueFull(1, 1), 429),
        (Draining("x"), 503),
        (Unavailable("x"), 503),
        (DeadlineExceeded(), 504),
        (Internal("1234"), 500),
        (DataLoss("bytes of prompt"), 500),
        (EngineCrash(2), 500),
        (StaleAttempt("r", 1, 2), 500),
    ],
)
def test_status_of_each_error(error: BatonError, status: int) -> None:
    assert from_baton_error(error).status == status


def test_faults_of_ours_do_not_show_their_text() -> None:
    assert "secret" not in from_baton_error(DataLoss("secret")).message


def test_a_request_that_workers_died_of_says_so_and_is_not_to_be_sent_again() -> None:
    """OpenAI's clients send a call that got a 5xx again, twice: four more workers."""
    error = from_baton_error(EngineCrash(2))
    assert "2 workers failed while they ran this request" in error.message
    assert error.headers() == {"X-Should-Retry": "false"}
    assert from_baton_error(Unavailable("x")).headers().keys() == {"Retry-After", "Retry-After-Ms"}


def test_the_field_becomes_the_param() -> None:
    assert from_baton_error(InvalidArgument("max_tokens", "too many")).param == "max_tokens"


def test_retry_after_is_rounded_up_and_always_there_for_429() -> None:
    assert from_baton_error(QueueFull(1, 1, retry_after_ms=1001)).headers() == {"Retry-After": "2", "Retry-After-Ms": "1001"}
    assert from_baton_error(QueueFull(1, 1)).headers()["Retry-After"] == "1"
    assert ApiError(400, "x").headers() == {}


def test_the_body_is_one_line_of_ascii() -> None:
    body = ApiError(404, "model '\u2028\nä'", param="model", code="c").body()
    assert body.isascii()
    assert b"\n" not in body
    assert json.loads(body) == {"error": {"message": "model '\u2028\nä'", "type": "invalid_request_error", "param": "model", "code": "c"}}
