from baton_worker.attempts import Attempts


def test_attempts_at_or_below_the_highest_are_stale() -> None:
    attempts = Attempts()
    assert attempts.start("a", 2)
    assert not attempts.start("a", 2)
    assert not attempts.start("a", 1)
    assert attempts.start("a", 3)


def test_request_is_remembered_until_its_tombstone_expires() -> None:
    attempts = Attempts(tombstone_s=60.0)
    attempts.start("a", 1)
    attempts.expire(1000.0)
    assert attempts.highest("a") == 1
    attempts.end("a", 1000.0)
    attempts.expire(1059.0)
    assert not attempts.start("a", 1)
    attempts.expire(1061.0)
    assert len(attempts) == 0


def test_request_with_one_attempt_still_live_is_not_buried() -> None:
    attempts = Attempts(tombstone_s=60.0)
    attempts.start("a", 1)
    attempts.start("a", 2)
    attempts.end("a", 0.0)
    attempts.expire(100.0)
    assert attempts.highest("a") == 2


def test_flood_of_cancels_is_bounded_oldest_first() -> None:
    attempts = Attempts(max_tombstones=10)
    for number in range(50):
        attempts.cancel(f"r{number}", 1, 0.0)
    attempts.expire(1.0)
    assert len(attempts) == 10
    assert attempts.highest("r49") == 1
    assert attempts.highest("r0") == 0
