"""Every walk of a fetch (docs/handoff.md, section 9), against the real books. Names state the outcome."""

import pytest
from baton_engine.api import SequenceKey
from baton_handoff.config import HandoffConfig
from baton_handoff.fetch_sink import FetchSinkBook, FetchState
from baton_handoff.ids import ConfirmAnswer, FetchEnd, FetchOutcome, HandoffKey
from baton_handoff.messages import CancelHandoff, Confirm, ConfirmReply, Fetch, FetchReply
from baton_handoff.tag import KvShape
from baton_handoff.testing.fetch_net import CONFIG, LAYOUT, LIMIT_S, Net, chain


@pytest.fixture
def net() -> Net:
    """Workers a and b; a has the chain "abcdef" cached, b is linked to it."""
    made = Net()
    made.peers["a"].cache("abcdef")
    made.open("b", "a")
    return made


LINK = ("b.1", "a.1")


def run(net: Net) -> None:
    """Everything that can happen, until nothing moves."""
    for _ in range(20):
        net.talk()
        net.pull_all("b")


def test_cached_blocks_arrive_and_are_cached_with_their_contents(net: Net) -> None:
    key = net.fetch("b", "a", "abcdef")
    run(net)
    b = net.peers["b"]
    assert b.ends[key] == FetchEnd(FetchOutcome.FETCHED, 12, 6 * LAYOUT.block_bytes)
    assert b.blocks.match_prefix(chain("abcdef")) == 6
    assert b.blocks.counts().cached == net.peers["a"].blocks.counts().cached == 6
    net.settle()


def test_only_what_is_missing_is_asked_for(net: Net) -> None:
    b = net.peers["b"]
    b.cache("abc")
    key = net.fetch("b", "a", "abcdef")
    (fetch,) = [message for message in net.up[LINK] if isinstance(message, Fetch)]
    assert (fetch.first_block, fetch.hashes) == (3, tuple(chain("abcdef")[3:]))
    run(net)
    assert b.ends[key].num_tokens == 6


def test_source_without_its_beginning_still_gives_the_rest(net: Net) -> None:
    """A chain hash stands for all tokens before it."""
    a, b = net.peers["a"], net.peers["b"]
    a.overwrite()
    for index, block_hash in enumerate(chain("abcdef")[3:], 3):  # only blocks 3.. are cached, as after an odd eviction
        owner = SequenceKey(f"odd {index}", 1)
        a.blocks.acquire(owner, [], 1)
        a.memory[a.blocks.table(owner)[0]] = block_hash
        a.blocks.publish(owner, 0, block_hash)
        a.blocks.release(owner)
    b.cache("abc")
    key = net.fetch("b", "a", "abcdef")
    run(net)
    assert b.ends[key] == FetchEnd(FetchOutcome.FETCHED, 6, 3 * LAYOUT.block_bytes)


def test_source_that_has_less_gives_what_it_has(net: Net) -> None:
    key = net.fetch("b", "a", "abcdxyz")
    run(net)
    assert net.peers["b"].ends[key] == FetchEnd(FetchOutcome.PARTIAL, 8, 4 * LAYOUT.block_bytes)
    net.settle()


def test_source_that_has_nothing_says_so_at_once(net: Net) -> None:
    key = net.fetch("b", "a", "xyz")
    net.talk()
    assert net.peers["b"].ends[key] == FetchEnd(FetchOutcome.NOT_FOUND)
    net.settle()


def test_pinned_blocks_are_not_evicted_while_they_are_read(net: Net) -> None:
    a = net.peers["a"]
    key = net.fetch("b", "a", "abcdef")
    net.talk()
    a.overwrite()
    assert a.blocks.match_prefix(chain("abcdef")) == 6
    run(net)
    assert net.peers["b"].ends[key].outcome is FetchOutcome.FETCHED


def test_no_blocks_are_held_while_the_link_is_opened() -> None:
    net = Net()
    net.peers["a"].cache("abcdef")
    key = net.fetch("b", "a", "abcdef")
    (fetch,) = net.peers["b"].sink.live
    assert fetch.state is FetchState.WAITING
    assert net.peers["b"].blocks.counts().free == 16
    net.open("b", "a")
    assert fetch.state is FetchState.ASKED
    run(net)
    assert net.peers["b"].ends[key].outcome is FetchOutcome.FETCHED


def test_too_little_room_for_all_fetches_the_first_part() -> None:
    net = Net(num_blocks=8)
    net.peers["a"].cache("abcdefg")
    b = net.peers["b"]
    b.blocks.acquire(SequenceKey("own", 1), [], 4)
    net.open("b", "a")
    key = net.fetch("b", "a", "abcdefg")
    run(net)
    assert b.ends[key] == FetchEnd(FetchOutcome.FETCHED, 6, 3 * LAYOUT.block_bytes)  # four free, one of them kept for growth


def test_no_room_at_all_ends_it_at_once(net: Net) -> None:
    b = net.peers["b"]
    b.blocks.acquire(SequenceKey("own", 1), [], 16)
    key = net.fetch("b", "a", "abcdef")
    assert b.ends[key] == FetchEnd(FetchOutcome.NO_ROOM)


def test_more_fetches_than_allowed_end_at_once() -> None:
    net = Net(num_blocks=64)
    b = net.peers["b"]
    keys = [net.fetch("b", "a", "abc", f"r{number}") for number in range(CONFIG.max_fetches + 1)]
    assert b.ends == {keys[-1]: FetchEnd(FetchOutcome.NO_ROOM)}
    net.settle()


def test_source_pins_no_more_than_its_share() -> None:
    net = Net(config=HandoffConfig(operation_bytes=2 * LAYOUT.block_bytes, fetch_min_tokens=2, fetch_pin_share=0.25))
    net.peers["a"].cache("abcdef")
    net.open("b", "a")
    first, second = net.fetch("b", "a", "abcdef", "r1"), net.fetch("b", "a", "abcdef", "r2")
    net.talk()
    assert net.peers["a"].blocks.counts().pinned == 4
    assert net.peers["b"].ends[second].outcome is FetchOutcome.NOT_FOUND
    run(net)
    assert net.peers["b"].ends[first] == FetchEnd(FetchOutcome.PARTIAL, 8, 4 * LAYOUT.block_bytes)
    net.settle()


def test_time_over_keeps_what_was_confirmed_and_waits_for_its_own_operation(net: Net) -> None:
    a, b = net.peers["a"], net.peers["b"]
    key = net.fetch("b", "a", "abcdef")
    net.talk()
    net.pull_all("b")
    net.talk()  # two blocks confirmed, the next operation runs
    net.pass_time(LIMIT_S)
    assert b.ends[key] == FetchEnd(FetchOutcome.TIMEOUT, 4, 2 * LAYOUT.block_bytes)
    assert len(b.sink.draining) == 1
    assert b.blocks.counts().reserved == 4
    net.talk()
    assert a.blocks.counts().pinned == 0
    a.overwrite()
    net.pull_all("b")  # reads what is no longer pinned, into blocks that are its own to throw away
    assert not b.sink.draining
    assert b.blocks.counts().reserved == 0
    assert b.blocks.match_prefix(chain("abcdef")) == 2
    net.settle()


def test_cancel_in_every_state_leaves_nobody_holding(net: Net) -> None:
    for number, stop_after in enumerate(("asked", "found", "pulled")):
        key = net.fetch("b", "a", "abcdef", f"r{number}")
        if stop_after != "asked":
            net.talk()
        if stop_after == "pulled":
            net.pull_all("b")
        net.perform(net.peers["b"], net.peers["b"].sink.cancel(f"r{number}", 1, "CLIENT_GONE"))
        assert net.peers["b"].ends[key].outcome is FetchOutcome.CANCELLED
        run(net)
        assert not net.peers["a"].source.live
        net.peers["b"].overwrite()
    net.settle()


def test_source_fenced_ends_the_fetch(net: Net) -> None:
    key = net.fetch("b", "a", "abcdef")
    net.talk()
    net.crash("a")
    net.fence("b", "a.1")
    assert net.peers["b"].ends[key].outcome is FetchOutcome.FENCED
    assert net.peers["b"].blocks.counts().reserved == 6  # the operation still runs
    net.pull_all("b")
    assert net.peers["b"].blocks.counts().reserved == 0
    net.settle()


def test_sink_fenced_unpins_and_its_confirm_is_refused(net: Net) -> None:
    a, b = net.peers["a"], net.peers["b"]
    key = net.fetch("b", "a", "abcdef")
    net.talk()
    net.fence("a", "b.1", closes_links=False)
    assert a.blocks.counts().pinned == 0
    a.overwrite()
    net.pull_all("b")
    net.talk()
    assert b.ends[key] == FetchEnd(FetchOutcome.NOT_PINNED)
    assert b.blocks.match_prefix(chain("abcdef")) == 0
    net.settle()


def test_stopped_sink_wakes_and_uses_nothing(net: Net) -> None:
    a, b = net.peers["a"], net.peers["b"]
    key = net.fetch("b", "a", "abcdef")
    net.talk()
    b.is_stopped = True
    net.fence("a", "b.1")
    a.overwrite()
    net.pull_all("b")  # its transport's thread goes on
    net.wake("b")
    assert b.ends[key].outcome is FetchOutcome.FENCED
    assert b.blocks.match_prefix(chain("abcdef")) == 0
    net.settle()


def test_block_taken_back_by_the_source_is_never_confirmed(net: Net) -> None:
    """A step that failed took the block's content back while it was being read."""
    a, b = net.peers["a"], net.peers["b"]
    owner = SequenceKey("guilty", 1)
    a.blocks.acquire(owner, chain("abcdef"), 6)
    key = net.fetch("b", "a", "abcdef")
    net.talk()
    a.blocks.unpublish(owner)
    net.pull_all("b")
    net.talk()
    assert b.ends[key] == FetchEnd(FetchOutcome.NOT_PINNED)
    a.blocks.release(owner)
    net.settle()


def test_other_model_is_data_loss(net: Net) -> None:
    b = net.peers["b"]
    b.sink = FetchSinkBook(b.blocks, KvShape(b.incarnation, "other", LAYOUT, 2), CONFIG)
    key = net.fetch("b", "a", "abcdef")
    run(net)
    assert b.ends[key] == FetchEnd(FetchOutcome.DATA_LOSS)
    net.settle()


def test_reopened_link_repeats_the_question(net: Net) -> None:
    key = net.fetch("b", "a", "abcdef")
    net.cut(LINK)
    net.open("b", "a")
    run(net)
    assert net.peers["b"].ends[key].outcome is FetchOutcome.FETCHED


def test_reopened_link_gets_the_lost_answer_again(net: Net) -> None:
    key = net.fetch("b", "a", "abcdef")
    net.deliver_up(LINK)
    net.deliver_up(LINK)
    net.cut(LINK)
    net.open("b", "a")
    run(net)
    assert net.peers["b"].ends[key].outcome is FetchOutcome.FETCHED
    net.settle()


def test_reopened_link_repeats_the_confirm(net: Net) -> None:
    key = net.fetch("b", "a", "ab")
    net.talk()
    net.pull_all("b")
    net.deliver_up(LINK)  # confirmed at the source; the reply is lost
    assert not net.peers["a"].source.live
    net.cut(LINK)
    net.open("b", "a")
    run(net)
    assert net.peers["b"].ends[key] == FetchEnd(FetchOutcome.FETCHED, 4, 2 * LAYOUT.block_bytes)


def test_reopened_link_ends_at_the_source_what_the_sink_has_given_up(net: Net) -> None:
    net.fetch("b", "a", "abcdef")
    net.talk()
    net.cut(LINK)
    net.perform(net.peers["b"], net.peers["b"].sink.cancel("r", 1, "CLIENT_GONE"))  # its word finds no link
    assert net.peers["a"].blocks.counts().pinned == 6
    net.open("b", "a")
    net.talk()
    assert net.peers["a"].blocks.counts().pinned == 0
    net.settle()


def test_answer_for_a_fetch_that_is_over_is_cancelled(net: Net) -> None:
    net.fetch("b", "a", "abcdef")
    b = net.peers["b"]
    key = HandoffKey("gone", 1, "b.1", is_fetch=True)
    assert net.perform(b, b.sink.receive("a.1", FetchReply(key, 0, (1, 2)))) == [CancelHandoff(key, "UNKNOWN")]
    assert net.perform(b, b.sink.receive("a.1", FetchReply(key, 0, (), "OVER"))) == []


def test_question_about_a_fetch_that_is_over_pins_nothing(net: Net) -> None:
    key = net.fetch("b", "a", "abcdef")
    run(net)
    a = net.peers["a"]
    said = net.perform(a, a.source.receive("b.1", Fetch(key, 0, tuple(chain("abcdef"))), net.now))
    assert said == [FetchReply(key, 0, (), "OVER")]
    assert net.perform(a, a.source.receive("b.1", Confirm(key, 6, b"t" * 16), net.now)) == [ConfirmReply(key, 6, ConfirmAnswer.CONFIRMED)]
    assert net.perform(a, a.source.receive("b.1", Confirm(key, 7, b"t" * 16), net.now)) == [ConfirmReply(key, 7, ConfirmAnswer.NOT_PINNED)]


def test_nobody_speaks_for_another_sink(net: Net) -> None:
    key = HandoffKey("r", 1, "b.1", is_fetch=True)
    assert net.peers["a"].source.receive("c.1", Fetch(key, 0, tuple(chain("ab"))), net.now) == []


def test_answer_about_blocks_nobody_asked_for_is_data_loss(net: Net) -> None:
    key = net.fetch("b", "a", "abcdef")
    b = net.peers["b"]
    net.perform(b, b.sink.receive("a.1", FetchReply(key, 3, (1, 2))))
    assert b.ends[key].outcome is FetchOutcome.DATA_LOSS
    net.settle()


def test_draining_source_gives_nothing_new_and_finishes_the_rest(net: Net) -> None:
    first = net.fetch("b", "a", "abcdef", "r1")
    net.talk()
    net.peers["a"].source.set_draining()
    second = net.fetch("b", "a", "abcdef", "r2")
    run(net)
    assert net.peers["b"].ends[first].outcome is FetchOutcome.FETCHED
    assert net.peers["b"].ends[second].outcome is FetchOutcome.NOT_FOUND
    net.settle()


def test_two_fetches_of_one_prefix_keep_one_copy(net: Net) -> None:
    net.fetch("b", "a", "abcdef", "r1")
    net.fetch("b", "a", "abcdef", "r2")
    run(net)
    b = net.peers["b"]
    assert [end.outcome for end in b.ends.values()] == [FetchOutcome.FETCHED] * 2
    assert b.blocks.counts().cached == 6
    assert b.blocks.counts().free == 10
