"""The server's prefix cache in our hashes, and KV that nothing explains."""

from array import array

from baton_engine.sglang.http_api import Disaggregation, Load
from baton_engine.sglang.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, CachedPrefixes
from baton_engine.sglang.pin_watch import PinWatch
from baton_runtime.hashing import block_hashes

ROOT = bytes(range(16))
SALT = ROOT.hex()
TOKENS = list(range(100, 148))


def ours(num_tokens: int, *, block: int = 16, root: bytes = ROOT) -> list[bytes]:
    return block_hashes(root, array("I", TOKENS[:num_tokens]), 8, block)


def stored(
    hashes: list[int], start: int, *, parent: int | None = None, block: int = 16, salt: str | None = SALT, medium: str | None = "GPU"
) -> BlockStored:
    return BlockStored(hashes, parent, TOKENS[start : start + len(hashes) * block], block, medium, salt)


def test_a_chain_in_several_events_has_the_hashes_our_own_engines_would_publish() -> None:
    cache = CachedPrefixes(hash_block_tokens=8)
    cache.apply(stored([-5, 7], 0))
    cache.apply(stored([9], 32, parent=7))
    assert list(cache.drain_events().stored) == ours(48)
    assert list(cache.drain_with_hashes()[1]) == ours(48)


def test_what_comes_and_goes_between_two_drains_is_no_news() -> None:
    cache = CachedPrefixes(hash_block_tokens=8)
    cache.apply(stored([1, 2], 0))
    cache.apply(BlockRemoved([2], "GPU"))
    events = cache.drain_events()
    assert (list(events.stored), list(events.removed)) == (ours(16), [])
    cache.apply(BlockRemoved([1, 2]))
    assert list(cache.drain_events().removed) == ours(16)
    cache.apply(stored([1], 0))
    cache.drain_events()
    cache.apply(AllBlocksCleared())
    assert list(cache.drain_events().removed) == ours(16)


def test_tenants_do_not_share_and_requests_that_are_not_ours_are_left_out() -> None:
    cache = CachedPrefixes(hash_block_tokens=8)
    cache.apply(stored([1], 0, salt=bytes(16).hex()))
    cache.apply(stored([2], 0, salt=None))
    cache.apply(stored([3], 0, salt="not hex"))
    cache.apply(stored([4], 16, parent=99))  # a parent nobody told of: no chain
    cache.apply(stored([5], 0, medium="CPU_PINNED"))
    assert list(cache.drain_events().stored) == ours(16, root=bytes(16))


def test_an_event_that_does_not_fit_is_left_out() -> None:
    cache = CachedPrefixes(hash_block_tokens=8)
    cache.apply(BlockStored([1, 2], None, TOKENS[:16], 16, "GPU", SALT))
    cache.apply(BlockStored([3], None, [1, -1], 16, "GPU", SALT))
    assert list(cache.drain_events().stored) == ours(16)


def test_kv_must_stay_unexplained_for_the_whole_time_before_the_server_is_restarted() -> None:
    watch = PinWatch(limit_s=30.0)
    held = [Load(num_used_tokens=64)]
    assert not watch.judge(held, explained_tokens=64, num_posted=1, now=0.0)
    assert not watch.judge(held, explained_tokens=0, num_posted=0, now=1.0)
    assert not watch.judge(held, explained_tokens=0, num_posted=0, now=30.0)
    assert watch.unexplained_s(30.0) == 29.0
    assert not watch.judge(held, explained_tokens=64, num_posted=1, now=30.5)  # explained again: from the beginning
    assert watch.unexplained_s(30.5) == 0.0
    assert not watch.judge(held, explained_tokens=32, num_posted=1, now=40.0)
    assert watch.unexplained.num_tokens == 32
    assert watch.judge(held, explained_tokens=32, num_posted=1, now=70.0)


def test_requests_in_its_queues_that_nobody_asked_for_count_too_but_its_health_check_does_not() -> None:
    watch = PinWatch(limit_s=30.0)
    waiting = [Load(num_waiting_reqs=1, disaggregation=Disaggregation(decode_transfer_queue_reqs=1))]
    watch.judge(waiting, explained_tokens=0, num_posted=0, now=0.0)
    assert not watch.unexplained
    three = [Load(num_waiting_reqs=3, disaggregation=Disaggregation(prefill_inflight_queue_reqs=3))]
    watch.judge(three, explained_tokens=0, num_posted=1, now=0.0)
    assert watch.unexplained.num_requests == 2
