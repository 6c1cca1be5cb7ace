from baton_engine.api import SequenceKey
from baton_engine.blocks import BlockManager
from baton_handoff.audit import Audit, Start

OWNER = SequenceKey("r", 1)


def audit(starts: dict, silent_s: float = 0.0) -> tuple[Audit, BlockManager]:  # type: ignore[type-arg]
    blocks = BlockManager(8)
    return Audit(blocks, starts, lambda start, now: silent_s, stranded_s=5.0), blocks


def test_blocks_of_a_live_handoff_are_not_stranded() -> None:
    seen, blocks = audit({OWNER: Start("p", is_source=False)})
    blocks.reserve(OWNER, [], 3)
    assert seen.stranded_blocks(0.0) == seen.stranded_blocks(100.0) == 0


def test_blocks_of_nobody_are_stranded_after_a_second() -> None:
    seen, blocks = audit({})
    blocks.reserve(OWNER, [], 3)
    assert seen.stranded_blocks(10.0) == 0
    assert seen.stranded_blocks(11.0) == 3
    blocks.release(OWNER)
    assert seen.stranded_blocks(12.0) == 0


def test_pins_that_outlive_their_table_are_found() -> None:
    seen, blocks = audit({})
    blocks.acquire(OWNER, [], 3)
    blocks.pin(OWNER, 0, 2)
    blocks.release(OWNER)
    seen.stranded_blocks(0.0)
    assert seen.stranded_blocks(2.0) == 2


def test_blocks_for_a_side_silent_for_over_five_seconds_are_stranded() -> None:
    seen, blocks = audit({OWNER: Start("p", is_source=False)}, silent_s=5.1)
    blocks.reserve(OWNER, [], 3)
    assert seen.stranded_blocks(0.0) == 3


def test_owner_that_comes_back_starts_its_grace_anew() -> None:
    seen, blocks = audit({})
    blocks.reserve(OWNER, [], 3)
    seen.stranded_blocks(0.0)
    blocks.release(OWNER)
    seen.stranded_blocks(0.5)
    blocks.reserve(OWNER, [], 3)
    assert seen.stranded_blocks(1.2) == 0
