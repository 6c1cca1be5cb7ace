from baton_handoff.ids import HandoffKey, Outcome
from baton_handoff.tombstones import Tombstone, Tombstones

KEY = HandoffKey("r", 2, "d")
STONE = Tombstone(Outcome.CANCELLED, num_blocks=4, confirmed_blocks=1)


def test_ended_handoff_is_remembered_for_sixty_seconds() -> None:
    stones = Tombstones(60.0)
    stones.saw("r", 2)
    stones.bury(KEY, STONE, 100.0)
    stones.expire(159.9)
    assert stones.get(KEY) is STONE
    assert stones.newest("r") == 2
    stones.expire(160.0)
    assert stones.get(KEY) is None
    assert stones.newest("r") == 0
    assert len(stones) == 0


def test_live_attempt_keeps_its_number_however_old_the_cancel_is() -> None:
    stones = Tombstones(60.0)
    stones.cancel("r", 1, 100.0)
    stones.saw("r", 2)
    stones.expire(1000.0)
    assert stones.newest("r") == 2
    stones.bury(KEY, STONE, 1000.0)
    stones.expire(1060.0)
    assert len(stones) == 0


def test_cancel_covers_lower_attempts_only() -> None:
    stones = Tombstones(60.0)
    stones.cancel("r", 2, 0.0)
    assert stones.is_over(KEY)
    assert stones.is_over(KEY._replace(attempt=1))
    assert not stones.is_over(KEY._replace(attempt=3))
    assert not stones.is_older(KEY._replace(attempt=2))


def test_later_end_prolongs_the_memory_of_the_request() -> None:
    stones = Tombstones(60.0)
    stones.saw("r", 1)
    stones.saw("r", 2)
    stones.bury(KEY._replace(attempt=1), STONE, 0.0)
    stones.bury(KEY, STONE, 50.0)
    stones.expire(61.0)
    assert stones.get(KEY._replace(attempt=1)) is None
    assert stones.newest("r") == 2
    assert stones.is_older(KEY._replace(attempt=1))
