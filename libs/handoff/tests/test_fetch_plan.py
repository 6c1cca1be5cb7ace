"""What is asked for when the two sides have blocks of other sizes."""

from array import array
from dataclasses import replace

import pytest
from baton_engine.api import EngineRequest, SequenceKey, Work
from baton_engine.pool import BlockLayout
from baton_handoff.fetch_plan import FetchPlan, plan_fetch
from baton_handoff.tag import KvShape
from baton_runtime.hashing import block_hashes

ROOT = b"r" * 16
TOKENS = array("I", range(100))
LAYOUT = BlockLayout(num_layers=1, block_tokens=8, num_kv_heads=1, head_dim=1, dtype="float32")


def plan(own_tokens: int, source_tokens: int, num_tokens: int = 100) -> FetchPlan:
    shape = KvShape("a", "f", replace(LAYOUT, block_tokens=own_tokens), hash_block_tokens=8)
    request = EngineRequest(SequenceKey("r", 1), TOKENS, len(TOKENS), ROOT, Work.WHOLE)
    return plan_fetch(shape, replace(LAYOUT, block_tokens=source_tokens), request, shape.hashes(request), num_tokens)


@pytest.mark.parametrize(("own", "source", "tokens"), [(8, 8, 96), (8, 32, 96), (32, 8, 96), (8, 64, 64), (64, 16, 64)])
def test_blocks_are_whole_on_both_sides_and_named_as_each_side_names_them(own: int, source: int, tokens: int) -> None:
    made = plan(own, source)
    assert made.num_tokens == tokens
    assert list(made.hashes) == block_hashes(ROOT, TOKENS[:tokens], 8, own)
    assert list(made.source_hashes) == block_hashes(ROOT, TOKENS[:tokens], 8, source)


def test_last_token_is_never_fetched() -> None:
    assert plan(4 * 8, 8, 1000).num_tokens == 96
    assert plan(8, 8, 1000).num_tokens == 96


def test_belief_in_fewer_tokens_asks_for_fewer() -> None:
    assert plan(8, 32, 70).num_tokens == 64
    assert plan(8, 32, 31).num_tokens == 0


def test_shortened_stays_whole_on_both_sides() -> None:
    made = plan(8, 32).shortened(7)
    assert (made.num_blocks, len(made.source_hashes)) == (4, 1)
    assert plan(8, 32).shortened(3).num_blocks == 0


def test_cached_blocks_move_the_first_block_asked_for() -> None:
    assert plan(8, 32).cut(5).first_block == 1, "its head lies in our cache"
    assert plan(32, 8).cut(1).first_block == 4
    assert plan(8, 8).cut(12).first_block == 12, "nothing is missing"
