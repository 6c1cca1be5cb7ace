import threading

import pytest
from baton_engine.blocks import BlockCounts, BlockManager, CacheEvents, CacheFull, IntegrityError, TablePrefix
from baton_engine.integrity import find_problems


def chain(text: str) -> list[bytes]:
    """One block hash per character; equal prefixes have equal hashes."""
    return [text[: end + 1].encode() for end in range(len(text))]


def cache(manager: BlockManager, text: str) -> None:
    """Leave a chain in the prefix cache."""
    owner = ("cache", text, id(object()))
    shared = manager.acquire(owner, chain(text), len(text))
    for index in range(shared, len(text)):
        manager.publish(owner, index, chain(text)[index])
    manager.release(owner)


def test_all_blocks_start_free():
    assert BlockManager(4).counts() == BlockCounts(total=4, free=4, cached=0, pinned=0, reserved=0, used=0)


def test_acquired_blocks_are_used_and_distinct():
    manager = BlockManager(4)
    assert manager.acquire("a", [], 2) == 0
    assert manager.acquire("b", [], 2) == 0
    assert len({*manager.table("a"), *manager.table("b")}) == 4
    assert manager.counts().used == 4


def test_acquire_is_all_or_nothing_and_says_what_was_missing():
    manager = BlockManager(4)
    manager.acquire("a", [], 3)
    with pytest.raises(CacheFull) as caught:
        manager.acquire("b", [], 2)
    assert (caught.value.needed, caught.value.available) == (2, 1)
    assert not manager.has_table("b")
    assert manager.counts().free == 1


def test_second_table_of_an_owner_is_refused():
    manager = BlockManager(4)
    manager.acquire("a", [], 1)
    with pytest.raises(ValueError, match="table"):
        manager.reserve("a", [], 1)


def test_published_prefix_is_shared_by_the_next_owner():
    manager = BlockManager(4)
    manager.acquire("a", [], 2)
    manager.publish("a", 0, b"x")
    assert manager.match_prefix([b"x", b"y"]) == 1
    assert manager.acquire("b", [b"x", b"y"], 2) == 1
    assert manager.table("a")[0] == manager.table("b")[0]
    assert manager.prefix("b") == TablePrefix(shared=1, ready=1)
    manager.check()


def test_prefix_longer_than_the_table_is_cut():
    manager = BlockManager(4)
    cache(manager, "xyz")
    assert manager.acquire("b", chain("xyz"), 2) == 2
    assert len(manager.table("b")) == 2


def test_release_caches_published_blocks_and_frees_others():
    manager = BlockManager(4)
    manager.acquire("a", [], 3)
    manager.publish("a", 0, b"x")
    manager.release("a")
    manager.release("a")
    assert manager.counts() == BlockCounts(total=4, free=3, cached=1, pinned=0, reserved=0, used=0)


def test_eviction_takes_the_end_of_the_oldest_chain_first():
    manager = BlockManager(4)
    cache(manager, "abc")
    manager.acquire("new", [], 2)
    assert manager.match_prefix(chain("abc")) == 2


def test_touching_a_chain_saves_it_from_eviction():
    manager = BlockManager(4)
    cache(manager, "ab")
    cache(manager, "xy")
    cache(manager, "ab")
    manager.acquire("new", [], 2)
    assert manager.match_prefix(chain("ab")) == 2
    assert manager.match_prefix(chain("xy")) == 0


def test_chain_unpinned_in_pieces_is_evicted_from_its_end():
    """The handoff unpins the beginning first, one confirm per chunk; the beginning must still live longest."""
    manager = BlockManager(4)
    manager.acquire("a", [], 4)
    for index, block_hash in enumerate(chain("abcd")):
        manager.publish("a", index, block_hash)
    manager.pin("a", 0, 4)
    manager.release("a")
    manager.unpin("a", 2)
    manager.unpin("a")
    manager.acquire("new", [], 2)
    assert manager.match_prefix(chain("abcd")) == 2


def test_eviction_spares_the_prefix_being_acquired():
    manager = BlockManager(3)
    cache(manager, "abc")
    assert manager.acquire("b", chain("ab"), 3) == 2
    assert manager.match_prefix(chain("abc")) == 2
    manager.check()


def test_shared_cached_blocks_do_not_count_as_room_for_fresh_ones():
    manager = BlockManager(3)
    cache(manager, "abc")
    with pytest.raises(CacheFull) as caught:
        manager.acquire("b", chain("ab"), 4)
    assert (caught.value.needed, caught.value.available) == (2, 1)
    assert manager.counts().cached == 3


def test_keep_free_is_respected_while_others_hold_blocks():
    manager = BlockManager(4)
    manager.acquire("a", [], 1)
    with pytest.raises(CacheFull):
        manager.acquire("b", [], 3, keep_free=1)
    manager.acquire("b", [], 2, keep_free=1)


def test_keep_free_is_waived_for_the_only_owner():
    manager = BlockManager(4)
    manager.reserve("a", [], 4, keep_free=1)
    assert manager.counts().reserved == 4


def test_full_prefix_hit_needs_no_room():
    manager = BlockManager(2)
    manager.acquire("a", [], 2)
    manager.publish("a", 0, b"x")
    assert manager.acquire("b", [b"x"], 1, keep_free=1) == 1


def test_reserved_blocks_become_used_and_reusable_by_commit():
    manager = BlockManager(4)
    manager.reserve("s", chain("abc"), 4)
    assert manager.counts().reserved == 4
    manager.commit("s", 2, chain("abc"))
    manager.commit("s", 2, chain("abc"))
    assert manager.counts().reserved == 2
    assert manager.counts().used == 2
    assert manager.match_prefix(chain("abc")) == 2
    assert manager.prefix("s") == TablePrefix(shared=0, ready=2)
    manager.check()


def test_unconfirmed_blocks_are_free_after_release_and_confirmed_ones_cached():
    manager = BlockManager(4)
    manager.reserve("s", [], 4)
    manager.commit("s", 2, chain("abc"))
    manager.release("s")
    assert manager.counts() == BlockCounts(total=4, free=2, cached=2, pinned=0, reserved=0, used=0)


def test_partial_last_block_is_committed_without_a_hash():
    manager = BlockManager(4)
    manager.reserve("s", chain("ab"), 3)
    manager.commit("s", 3, chain("ab"))
    manager.release("s")
    assert (manager.counts().cached, manager.counts().free) == (2, 2)


def test_reserve_shares_the_cached_prefix_as_used():
    manager = BlockManager(4)
    cache(manager, "ab")
    assert manager.reserve("s", chain("abc"), 3) == 2
    assert (manager.counts().used, manager.counts().reserved) == (2, 1)
    assert manager.held("s") == 1


def test_commit_beyond_the_table_is_refused():
    manager = BlockManager(4)
    manager.reserve("s", [], 1)
    with pytest.raises(ValueError, match="1 blocks"):
        manager.commit("s", 2, [])


def test_table_with_reserved_blocks_cannot_grow_pin_or_publish():
    manager = BlockManager(4)
    manager.reserve("s", [], 1)
    with pytest.raises(ValueError, match="committed"):
        manager.grow("s")
    with pytest.raises(ValueError, match="reserved"):
        manager.pin("s", 0, 1)
    with pytest.raises(ValueError, match="reserved"):
        manager.publish("s", 0, b"x")


def test_grow_appends_or_takes_nothing():
    manager = BlockManager(2)
    manager.acquire("a", [], 1)
    (fresh,) = manager.grow("a")
    assert manager.table("a")[1] == fresh
    with pytest.raises(CacheFull):
        manager.grow("a")
    assert len(manager.table("a")) == 2


def test_pins_survive_release_and_keep_contents():
    manager = BlockManager(2)
    manager.acquire("a", [], 2)
    manager.publish("a", 0, b"x")
    ids = manager.pin("a", 0, 2)
    manager.release("a")
    assert manager.counts().pinned == 2
    assert manager.pinned_owners() == {"a": 2}
    with pytest.raises(CacheFull):
        manager.acquire("b", [], 1)
    manager.unpin("a", 1)
    assert manager.counts() == BlockCounts(total=2, free=0, cached=1, pinned=1, reserved=0, used=0)
    manager.unpin("a")
    manager.unpin("a")
    assert manager.counts().free == 1
    assert len(ids) == 2
    manager.check()


def test_pinned_prefix_is_shareable():
    manager = BlockManager(2)
    manager.acquire("a", [], 1)
    manager.publish("a", 0, b"x")
    manager.pin("a", 0, 1)
    manager.release("a")
    assert manager.acquire("b", [b"x"], 1) == 1
    assert manager.counts().used == 1
    manager.release("b")
    assert manager.counts().pinned == 1
    manager.check()


def test_pinning_twice_is_undone_by_one_unpin():
    manager = BlockManager(2)
    manager.acquire("a", [], 1)
    manager.pin("a", 0, 1)
    manager.pin("a", 0, 1)
    manager.unpin("a")
    manager.release("a")
    assert manager.counts().free == 2


def test_second_block_of_a_hash_stays_unpublished():
    manager = BlockManager(4)
    manager.acquire("a", [], 1)
    manager.acquire("b", [], 1)
    manager.publish("a", 0, b"x")
    manager.publish("b", 0, b"x")
    manager.release("b")
    assert manager.counts().free == 3
    assert manager.cached_hashes() == (b"x",)


def test_events_are_the_net_change():
    manager = BlockManager(1)
    cache(manager, "a")
    assert manager.drain_events() == CacheEvents(stored=(b"a",), removed=())
    cache(manager, "b")
    cache(manager, "a")
    assert manager.drain_events() == CacheEvents(stored=(), removed=())
    cache(manager, "c")
    assert manager.drain_events() == CacheEvents(stored=(b"c",), removed=(b"a",))


def test_listener_is_told_when_room_appears():
    manager = BlockManager(2)
    told: list[BlockCounts] = []
    manager.subscribe_available(lambda: told.append(manager.counts()))
    manager.acquire("a", [], 1)
    manager.pin("a", 0, 1)
    assert told == []
    manager.release("a")
    manager.unpin("a")
    assert told[-1].free == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: m._states.free.append(m._states.free[0]), "states"),
        (lambda m: m._states.refs.__setitem__(m.table("a")[0], 2), "tables"),
        (lambda m: m._states.pin_refs.__setitem__(0, 1), "pins"),
        (lambda m: setattr(m, "_reserved", 5), "reserved"),
        (lambda m: setattr(m._states, "num_pinned", 5), "pinned"),
        (lambda m: m._states.by_hash.__setitem__(b"z", 0), "hashes"),
        (lambda m: m._states.free.pop(), "states"),
    ],
)
def test_check_names_what_is_wrong(damage, words):
    manager = BlockManager(8)
    manager.acquire("a", [], 2)
    manager.publish("a", 0, b"x")
    manager.check()
    damage(manager)
    with pytest.raises(IntegrityError, match=words):
        manager.check()


def test_check_lets_others_take_blocks_while_it_looks(monkeypatch):
    """It looks at every block: held up by it, a step of the engine would be late."""
    manager = BlockManager(8)
    taken: list[int] = []

    def look_slowly(ledger):
        taken.append(manager.acquire("late", [], 2))
        return find_problems(ledger)

    monkeypatch.setattr("baton_engine.blocks.find_problems", look_slowly)
    manager.check()
    assert taken == [0]
    assert manager.counts().used == 2


def test_letting_go_is_told_when_the_last_of_table_and_pins_is_gone():
    manager = BlockManager(8)
    told: list[str] = []
    manager.acquire("a", [], 3)
    manager.pin("a", 0, 2)
    manager.when_let_go("a", lambda: told.append("a"))
    manager.unpin("a", 1)
    manager.release("a")
    assert told == []
    manager.unpin("a")
    manager.unpin("a")
    assert told == ["a"]


def test_letting_go_is_told_to_nobody_who_is_not_interested_any_more():
    manager = BlockManager(8)
    manager.when_let_go("a", lambda: pytest.fail("not asked for"))
    manager.when_let_go("a", None)
    manager.release("a")


def test_letting_go_of_nothing_is_told_at_the_release():
    """What was cancelled before it had blocks ends with a release all the same."""
    manager = BlockManager(8)
    told: list[str] = []
    manager.when_let_go("a", lambda: told.append("a"))
    manager.unpin("a")
    assert told == []
    manager.release("a")
    assert told == ["a"]


def test_threads_leave_sound_books():
    manager = BlockManager(64)
    errors: list[Exception] = []

    def churn(name: int) -> None:
        try:
            for turn in range(200):
                owner = (name, turn)
                try:
                    shared = manager.acquire(owner, chain("abcdef"[: 1 + turn % 6]), 8)
                except CacheFull:
                    continue
                for index in range(shared, 1 + turn % 6):
                    manager.publish(owner, index, chain("abcdef")[index])
                manager.pin(owner, 0, 4)
                manager.release(owner)
                manager.unpin(owner)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    manager.check()
    assert manager.counts().used == manager.counts().pinned == 0


def test_unpublished_blocks_are_free_once_nobody_holds_them_and_never_published_again():
    manager = BlockManager(8)
    manager.acquire("a", [], 3)
    for index, name in enumerate(chain("abc")):
        manager.publish("a", index, name)
    manager.acquire("b", chain("ab"), 4)
    manager.drain_events()
    manager.unpublish("b")
    manager.publish("a", 0, chain("a")[0])
    manager.check()
    assert manager.match_prefix(chain("abc")) == 0
    assert list(manager.drain_events().removed) == chain("ab")
    manager.release("a")
    manager.release("b")
    manager.check()
    assert (manager.counts().free, manager.counts().cached) == (7, 1)


def test_cached_run_is_pinned_for_a_fetch_and_cannot_be_evicted():
    manager = BlockManager(4)
    cache(manager, "abc")
    ids = manager.pin_cached("fetch", 1, chain("abcd")[1:], most=8)
    assert len(ids) == 2
    assert manager.counts() == BlockCounts(total=4, free=1, cached=1, pinned=2, reserved=0, used=0)
    assert manager.pinned_owners() == {"fetch": 2}
    manager.acquire("own", [], 2)
    with pytest.raises(CacheFull):
        manager.acquire("other", [], 1)
    manager.unpin("fetch", 2)
    assert manager.held("fetch") == 1
    manager.unpin("fetch")
    assert manager.counts().cached == 2
    manager.check()


def test_block_in_use_can_be_pinned_for_a_fetch_and_survives_its_sequence():
    manager = BlockManager(2)
    manager.acquire("a", [], 1)
    manager.publish("a", 0, b"x")
    (block,) = manager.pin_cached("fetch", 0, [b"x"], most=1)
    assert manager.counts().used == 1
    manager.release("a")
    assert manager.counts().pinned == 1
    assert manager.acquire("b", [b"x"], 1) == 1
    assert manager.table("b") == (block,)
    manager.release("b")
    manager.unpin("fetch")
    assert manager.counts().cached == 1
    manager.check()


def test_nothing_cached_pins_nothing():
    manager = BlockManager(2)
    assert manager.pin_cached("fetch", 0, [b"x"], most=4) == ()
    assert manager.pinned_owners() == {}


def test_blocks_taken_back_are_not_trusted_for_a_fetch():
    manager = BlockManager(2)
    manager.acquire("a", [], 1)
    manager.publish("a", 0, b"x")
    manager.pin_cached("fetch", 0, [b"x"], most=1)
    assert manager.is_trusted("fetch")
    manager.unpublish("a")
    assert not manager.is_trusted("fetch")
    manager.release("a")
    manager.unpin("fetch")
    assert manager.counts().free == 2
    manager.check()


def test_rematch_takes_what_was_cached_meanwhile_and_frees_its_own():
    manager = BlockManager(8)
    assert manager.acquire("a", chain("abcd"), 4) == 0
    cache(manager, "abc")
    assert manager.rematch("a", chain("abcd")) == 3
    assert manager.prefix("a") == TablePrefix(shared=3, ready=3)
    assert manager.counts() == BlockCounts(total=8, free=4, cached=0, pinned=0, reserved=0, used=4)
    manager.release("a")
    assert manager.counts().cached == 3
    manager.check()


def test_rematch_needs_no_room():
    manager = BlockManager(4)
    manager.acquire("other", [], 1)
    manager.publish("other", 0, b"a")
    manager.acquire("a", [], 3)
    assert manager.counts().free == 0
    assert manager.rematch("a", [b"a"]) == 1
    assert manager.table("a")[0] == manager.table("other")[0]
    assert manager.counts().free == 1
    manager.check()


def test_rematch_of_a_table_that_was_written_to_is_refused():
    manager = BlockManager(4)
    manager.acquire("a", [], 2)
    manager.publish("a", 0, b"a")
    with pytest.raises(ValueError, match="untouched"):
        manager.rematch("a", [b"a", b"b"])


def test_fresh_blocks_rise_also_when_chains_are_evicted_for_them() -> None:
    """Neighbours in rising order travel as one run; a chain is evicted from its end."""
    blocks = BlockManager(8)
    chain = [bytes([i]) * 16 for i in range(8)]
    blocks.acquire("a", chain, 8)
    for index, block_hash in enumerate(chain):
        blocks.publish("a", index, block_hash)
    blocks.release("a")
    blocks.reserve("b", [], 5)
    assert blocks.table("b") == (3, 4, 5, 6, 7)
    blocks.commit("b", 5, [])
    assert blocks.grow("b", 2) == [1, 2]
    blocks.check()
