"""Every walk of docs/handoff.md, section 5, against the real books. Names state the outcome."""

import random
from collections.abc import Callable

import pytest
from baton_engine.api import Priority, SequenceKey
from baton_engine.errors import CacheFull
from baton_handoff.actions import Completed, Ended, Send
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import ConfirmAnswer, EndReason, FailureCause, HandoffEnd, HandoffKey, Outcome, Side
from baton_handoff.messages import Accepted, Announce, Begin, BeginReply, CancelHandoff, Confirm, ConfirmReply, Message, NotNow, Refused
from baton_handoff.sink_handoff import SinkState
from baton_handoff.source_handoff import SourceState
from baton_handoff.testing.world import LAYOUT, Process, World

LONG = tuple(range(1, 10))  # eight tokens to hand over: four full blocks


class Walk:
    """A world with one source p0 and one sink d0, and words for what happens in it."""

    def __init__(self, num_blocks: int = 8, sources: int = 1, sinks: int = 1, block_tokens: tuple[int, int] = (2, 2)) -> None:
        config = HandoffConfig(operation_bytes=2 * LAYOUT.block_bytes)
        self.world = World(sources, sinks, num_blocks, config, block_tokens)
        for link in self.world.links:
            self.world.open_link(*link)
            self.world.deliver_up(*link)
        self.seen: list[Message] = []

    @property
    def p(self) -> Process:
        return self.world.processes["p0"]

    @property
    def d(self) -> Process:
        return self.world.processes["d0"]

    def place(self, request_id: str = "r", tokens: tuple[int, ...] = LONG, priority: Priority = Priority.INTERACTIVE) -> HandoffKey:
        if request_id not in self.world.frontend.requests:
            self.world.submit(request_id, tokens, priority)
        self.world.place(request_id, "p0", "d0")
        return HandoffKey(request_id, self.world.frontend.requests[request_id].attempt, self.d.incarnation)

    def arrive(self) -> None:
        """Starts and Cancels arrive."""
        while self.world.frontend.pending:
            self.world.deliver_pending()

    def talk(self) -> None:
        """Messages arrive until none is on its way."""
        link = self.world.links["d0", "p0"]
        while link.up or link.down:
            self.seen += [message for message in [*link.up, *link.down] if not hasattr(message, "listed")]
            for _ in range(len(link.up)):
                self.world.deliver_up("d0", "p0")
            for _ in range(len(link.down)):
                self.world.deliver_down("d0", "p0")

    def step(self) -> None:
        self.world.engine_step("p0")
        self.world.engine_output("p0")

    def copy(self) -> None:
        """The running operation copies everything; the loop has not seen it."""
        for operation, pull in list(self.d.pulls.items()):
            while not pull.is_done:
                self.world.pull_block("d0", operation)
            self.world.pull_ends("d0", operation)

    def see(self) -> None:
        while self.d.returned:
            self.world.pull_seen("d0")

    def begin(self, request_id: str = "r", tokens: tuple[int, ...] = LONG) -> HandoffKey:
        """Accepted at the sink, computing at the source."""
        key = self.place(request_id, tokens)
        self.arrive()
        self.talk()
        return key

    def half(self) -> HandoffKey:
        """The first two of four blocks are confirmed, the others computed and announced, none of them pulled."""
        key = self.begin()
        self.step()
        self.talk()
        self.copy()
        self.see()
        self.talk()
        self.step()
        self.talk()
        assert self.sink(key).confirmed == 2
        return key

    def sink(self, key: HandoffKey):
        return next(h for h in self.d.sink.live if h.key == key)

    def source(self, key: HandoffKey):
        return next(h for h in self.p.source.live if h.key == key)

    def end(self, key: HandoffKey, side: Side) -> HandoffEnd:
        (end,) = [end for ended, of, end in self.world.ends if (ended, of) == (key, side)]
        return end

    def say_to_source(self, message: Message) -> list[Message]:
        return self._answers(self.p, lambda: self.p.source.receive(self.d.incarnation, message, self.world.now))  # type: ignore[arg-type]

    def say_to_sink(self, message: Message) -> list[Message]:
        return self._answers(self.d, lambda: self.d.sink.receive(self.p.incarnation, message, self.world.now))  # type: ignore[arg-type]

    def _answers(self, process: Process, event: Callable[[], list]) -> list[Message]:  # type: ignore[type-arg]
        actions = event()
        self.world.perform(process, actions)
        return [action.message for action in actions if isinstance(action, Send)]

    def complete(self, request_id: str, tokens: tuple[int, ...] = LONG) -> HandoffKey:
        """From Start to the end of decode."""
        key = self.begin(request_id, tokens)
        for _ in range(8):
            self.step()
            self.talk()
            self.copy()
            self.see()
            self.talk()
        assert key in self.world.completions
        return key

    def empty(self, process: Process) -> bool:
        counts = process.blocks.counts()
        return (counts.pinned, counts.reserved, counts.used) == (0, 0, 0)


def test_prefill_dies_before_last_confirm_leaves_decode_with_what_was_confirmed() -> None:
    walk = Walk()
    key = walk.half()
    walk.world.crash("p0")
    walk.world.fence_the_dead()
    end = walk.end(key, Side.SINK)
    assert (end.reason, end.cause, end.confirmed_tokens) == (EndReason.HANDOFF_FAILED, FailureCause.PEER_FENCED, 4)
    assert end.num_bytes == 2 * LAYOUT.block_bytes
    walk.copy()
    walk.see()
    assert walk.d.blocks.counts().cached == 2
    walk.world.settle()


def test_prefill_stopped_then_woken_answers_not_pinned_and_has_its_blocks() -> None:
    walk = Walk()
    key = walk.half()
    walk.world.stop("p0")
    walk.copy()
    walk.see()  # a Confirm for [0, 4) is on its way to the stopped source
    link = walk.world.links["d0", "p0"]
    confirm = next(message for message in link.up if isinstance(message, Confirm))
    walk.world.fence("d0", "p0.1")
    walk.world.wake("p0")
    assert not walk.p.blocks.pinned_owners()
    assert walk.say_to_source(confirm) == [ConfirmReply(key, 4, ConfirmAnswer.NOT_PINNED)]
    assert walk.say_to_sink(ConfirmReply(key, 4, ConfirmAnswer.NOT_PINNED)) == []
    walk.world.settle()


def test_stopped_reader_never_confirms_what_the_source_has_reused() -> None:
    walk = Walk(num_blocks=4)
    key = walk.half()
    walk.world.fence("p0", "d0.1", closes_links=False)  # the sink copies on, its loop knows nothing
    walk.world.submit("other", (50, 51, 52, 53, 54, 55, 56, 57, 58), Priority.INTERACTIVE)
    other = walk.p.blocks.acquire(SequenceKey("own", 1), [], 4)
    assert other == 0
    walk.p.memory[:] = [[(99,)] * 2 for _ in range(4)]  # a sequence of the source's own has overwritten them
    walk.copy()
    walk.see()
    walk.talk()
    end = walk.end(key, Side.SINK)
    assert (end.reason, end.cause, end.confirmed_tokens) == (EndReason.HANDOFF_FAILED, FailureCause.NOT_PINNED, 4)
    walk.p.blocks.release(SequenceKey("own", 1))
    walk.world.settle()


def test_partial_confirm_is_the_next_attempts_prefix() -> None:
    walk = Walk()
    walk.half()
    walk.world.crash("p0")
    walk.world.fence_the_dead()
    walk.arrive()
    walk.copy()
    walk.see()
    walk.world.open_link("d0", "p0")
    key = walk.begin()
    assert key.attempt == 2
    assert walk.sink(key).first == 2
    assert walk.source(key).first == 2
    walk.world.settle()
    assert key in walk.world.completions


def test_decode_dies_and_prefill_ends_with_peer_fenced() -> None:
    walk = Walk()
    key = walk.half()
    walk.world.crash("d0")
    walk.world.fence_the_dead()
    end = walk.end(key, Side.SOURCE)
    assert (end.reason, end.cause, end.peer_incarnation) == (EndReason.HANDOFF_FAILED, FailureCause.PEER_FENCED, "d0.1")
    assert end.confirmed_tokens == 4
    walk.step()
    assert walk.empty(walk.p)
    walk.world.settle()


def test_cancel_before_the_last_reply_leaves_nobody_holding() -> None:
    walk = Walk()
    key = walk.half()
    walk.copy()
    walk.see()
    walk.world.deliver_up("d0", "p0")  # the source has confirmed; the reply is on its way
    assert walk.end(key, Side.SOURCE).reason is EndReason.PREFILLED
    walk.world.cancel("r")
    walk.arrive()
    walk.talk()
    assert walk.end(key, Side.SINK).reason is EndReason.CANCELLED
    assert key not in walk.world.completions
    assert walk.empty(walk.d)
    assert walk.p.confirmed_as_source[key] == 4
    walk.world.settle()


def test_cancel_before_start_makes_the_start_stale() -> None:
    walk = Walk()
    key = walk.place()
    walk.world.cancel("r")
    walk.world.frontend.pending.reverse()
    walk.arrive()
    assert not walk.p.source.live
    assert not walk.d.sink.live
    assert walk.say_to_sink(Begin(key, 8, 4)) == [BeginReply(key, Refused("CANCELLED"))]


def test_begin_before_start_is_told_not_now() -> None:
    walk = Walk()
    key = walk.place()
    walk.world.deliver_pending()  # only prefill has its Start
    walk.talk()
    assert BeginReply(key, NotNow(20)) in walk.seen
    assert walk.source(key).state is SourceState.QUEUED
    walk.arrive()
    walk.world.pass_time(0.02)
    walk.talk()
    assert walk.sink(key).state is SinkState.PULLING


def test_older_attempt_is_refused_as_stale() -> None:
    walk = Walk()
    old = walk.half()
    new = walk.place()
    walk.arrive()
    assert walk.say_to_sink(Begin(old, 8, 4)) == [BeginReply(old, Refused("STALE"))]
    assert walk.say_to_source(Confirm(old, 4, b"t" * 16)) == [ConfirmReply(old, 4, ConfirmAnswer.STALE)]
    assert walk.say_to_sink(Announce(old, 2, (0, 1), 0, 0.0)) == [CancelHandoff(old, "UNKNOWN")]
    walk.world.settle()
    assert new in walk.world.completions


def test_new_attempt_cancels_the_old_one_while_it_computes() -> None:
    walk = Walk()
    old = walk.begin()
    walk.step()
    walk.world.frontend.requests["r"].is_failed_attempt = True  # the Cancel is lost: the Start of attempt 2 has to do
    walk.place()
    walk.arrive()
    assert walk.end(old, Side.SOURCE).reason is EndReason.STALE
    assert walk.end(old, Side.SINK).reason is EndReason.STALE
    walk.world.settle()


def test_link_reopened_repeats_begin_and_nothing_is_lost() -> None:
    walk = Walk()
    key = walk.place()
    walk.arrive()
    walk.world.deliver_down("d0", "p0")  # the sink has reserved; its answer is lost
    walk.world.break_link("d0", "p0")
    walk.world.open_link("d0", "p0")
    walk.talk()
    assert walk.source(key).state is SourceState.COMPUTING
    walk.world.settle()
    assert key in walk.world.completions


def test_link_reopened_repeats_announce_and_confirm() -> None:
    walk = Walk()
    key = walk.half()
    walk.copy()
    walk.see()
    walk.world.deliver_up("d0", "p0")  # confirmed at the source; the reply is lost
    walk.world.break_link("d0", "p0")
    walk.world.open_link("d0", "p0")
    walk.talk()
    assert key in walk.world.completions
    assert [end.reason for _, side, end in walk.world.ends if side is Side.SOURCE] == [EndReason.PREFILLED]


def test_announces_that_overlap_after_a_reopen_are_one_union() -> None:
    walk = Walk()
    key = walk.begin()
    walk.step()
    walk.talk()  # [0, 2) announced, not pulled
    walk.world.break_link("d0", "p0")
    walk.step()  # [2, 4) announced into a broken link
    walk.world.open_link("d0", "p0")
    walk.talk()
    assert len(walk.sink(key).source_ids) == 4
    walk.world.settle()
    assert key in walk.world.completions


def test_reopened_link_ends_what_the_sink_no_longer_knows() -> None:
    walk = Walk()
    key = walk.half()
    walk.world.break_link("d0", "p0")
    walk.world.perform(walk.d, walk.d.sink.cancel("r", 1, "CLIENT_GONE", walk.world.now))  # its CancelHandoff finds no link
    walk.world.open_link("d0", "p0")
    walk.talk()
    end = walk.end(key, Side.SOURCE)
    assert (end.reason, end.cause) == (EndReason.HANDOFF_FAILED, FailureCause.PEER_CANCELLED)


def test_reopened_link_ends_what_the_source_no_longer_knows() -> None:
    walk = Walk()
    key = walk.half()
    walk.world.break_link("d0", "p0")
    walk.world.perform(walk.p, walk.p.source.cancel("r", 1, "CLIENT_GONE", walk.world.now))
    walk.world.open_link("d0", "p0")
    walk.talk()
    end = walk.end(key, Side.SINK)
    assert (end.reason, end.cause) == (EndReason.HANDOFF_FAILED, FailureCause.PEER_CANCELLED)


def test_link_closed_by_an_idle_sink_puts_offers_back_into_the_queue() -> None:
    walk = Walk()
    key = walk.place()
    walk.world.deliver_pending()
    assert walk.source(key).state is SourceState.OFFERED
    walk.world.perform(walk.p, walk.p.source.link_closed("d0.1", walk.world.now))
    assert walk.source(key).state is SourceState.QUEUED
    walk.world.settle()
    assert key in walk.world.completions


def test_link_closed_while_draining_hands_offers_back() -> None:
    walk = Walk()
    key = walk.place()
    walk.world.deliver_pending()
    assert walk.source(key).state is SourceState.OFFERED
    walk.world.drain("p0")
    walk.world.perform(walk.p, walk.p.source.link_closed("d0.1", walk.world.now))
    assert walk.end(key, Side.SOURCE).reason is EndReason.REFUSED
    assert not walk.p.source.live


def test_path_down_fails_tickets_with_that_cause() -> None:
    walk = Walk()
    key = walk.place()
    walk.arrive()
    walk.world.perform(walk.d, walk.d.sink.fence("p0.1", FailureCause.PATH_DOWN, walk.world.now))
    assert walk.end(key, Side.SINK).cause is FailureCause.PATH_DOWN
    walk.world.settle()


def test_engine_error_at_prefill_ends_both_sides() -> None:
    walk = Walk()
    key = walk.begin()
    walk.p.engine.fail_next.add(key.sequence)
    walk.step()
    walk.talk()
    assert walk.end(key, Side.SOURCE).reason is EndReason.ENGINE_ERROR
    assert walk.end(key, Side.SINK).cause is FailureCause.PEER_CANCELLED
    assert walk.empty(walk.p)
    assert walk.empty(walk.d)
    walk.world.settle()


def test_draining_prefill_hands_queued_requests_back_and_finishes_begun_ones() -> None:
    walk = Walk(num_blocks=4)
    begun = walk.half()
    queued = walk.place("q", (7, 7, 7, 7, 7, 7, 7))
    walk.arrive()
    walk.world.drain("p0")
    assert walk.end(queued, Side.SOURCE).reason is EndReason.REFUSED
    assert walk.source(begun).state is SourceState.COMPUTED
    late = walk.place("late")
    walk.arrive()
    assert late.sequence not in [handoff.key.sequence for handoff in walk.p.source.live]
    walk.world.settle()
    assert begun in walk.world.completions


def test_draining_decode_refuses_begins_of_tickets_and_finishes_begun_ones() -> None:
    walk = Walk()
    begun = walk.half()
    ticket = walk.place("q", (7, 7, 7, 7, 7, 7, 7))
    walk.arrive()
    walk.world.drain("d0")
    end = walk.end(ticket, Side.SINK)
    assert end.reason is EndReason.REFUSED
    assert end.error is not None
    assert walk.say_to_sink(Begin(ticket, 6, 3)) == [BeginReply(ticket, Refused("DRAINING"))]
    walk.world.settle()
    assert begun in walk.world.completions


def test_capacity_for_two_and_fifty_queued_in_random_order_all_end() -> None:
    walk = Walk(num_blocks=8)
    sizes = random.Random(7)
    for index in range(50):
        tokens = tuple(sizes.randrange(1, 90) for _ in range(sizes.randrange(2, 16)))
        walk.world.submit(f"r{index}", tokens, sizes.choice(list(Priority)))
        walk.world.place(f"r{index}", "p0", "d0")
    sizes.shuffle(walk.world.frontend.pending)
    walk.world.settle(max_rounds=2000)
    assert len(walk.world.completions) == 50


def test_large_ticket_is_not_starved_by_small_ones() -> None:
    """Small requests always fit beside one another; without the rule the large one waits for ever."""
    walk = Walk(num_blocks=12)
    walk.complete("s0", (1, 2, 3, 4))  # decodes on, holding two blocks
    large = walk.place("large", tuple(range(100, 123)))  # eleven blocks of twelve
    small = 1
    for _ in range(60):
        if large in walk.world.completions:
            break
        walk.place(f"s{small}", (200 + small, 1, 1, 1))
        small += 1
        walk.arrive()
        walk.world.pass_time(0.1)
        for _ in range(4):
            walk.talk()
            walk.step()
            walk.copy()
            walk.see()
        done = list(walk.d.decoding)
        if len(done) > 1:  # one sequence always decodes
            walk.world.finish_decode(walk.d, done[0])
        if walk.d.decoding and not any(h.state is SinkState.PULLING for h in walk.d.sink.live) and small > 30:
            walk.world.finish_decode(walk.d, next(iter(walk.d.decoding)))
    assert large in walk.world.completions
    walk.world.settle()


def test_ticket_of_nearly_the_whole_pool_fits_beside_a_running_sequence_once_room_is_kept_for_it() -> None:
    walk = Walk(num_blocks=40)  # two are kept free for growth
    walk.d.blocks.acquire(SequenceKey("own", 1), [], 2)
    key = walk.place("large", tuple(range(100, 175)))  # 37 of the 38 blocks that are left
    walk.arrive()
    walk.talk()
    assert walk.sink(key).state is SinkState.TICKET
    for _ in range(12):
        walk.world.pass_time(0.1)
        walk.talk()
    assert walk.sink(key).state is SinkState.PULLING
    walk.d.blocks.release(SequenceKey("own", 1))
    walk.world.settle()
    assert key in walk.world.completions


def test_source_without_room_offers_nothing() -> None:
    walk = Walk(num_blocks=8)
    walk.p.blocks.acquire(SequenceKey("own", 1), [], 6)
    key = walk.place()
    walk.arrive()
    assert walk.source(key).state is SourceState.QUEUED
    walk.p.blocks.release(SequenceKey("own", 1))
    walk.world.pass_time(0.05)
    assert walk.source(key).state is SourceState.OFFERED
    walk.world.settle()


def test_room_of_an_offer_is_nobody_elses_until_the_sink_has_answered() -> None:
    walk = Walk()
    key = walk.place()
    walk.arrive()
    assert walk.source(key).state is SourceState.OFFERED
    own = SequenceKey("own", 1)
    with pytest.raises(CacheFull):
        walk.p.blocks.acquire(own, [], 6)
    assert walk.say_to_source(BeginReply(key, NotNow(20))) == []
    walk.p.blocks.acquire(own, [], 6)
    walk.world.pass_time(0.05)
    assert walk.source(key).state is SourceState.QUEUED  # due again, and without room
    walk.p.blocks.release(own)
    walk.world.pass_time(0.05)
    walk.talk()
    assert walk.source(key).state is SourceState.COMPUTING
    walk.world.settle()


def test_ticket_is_told_not_now_at_growing_intervals() -> None:
    walk = Walk(num_blocks=8)
    walk.d.blocks.acquire(SequenceKey("own", 1), [], 8)
    walk.place()
    walk.arrive()
    for _ in range(40):
        walk.talk()
        walk.world.pass_time(0.05)
    waits = [m.answer.retry_after_ms for m in walk.seen if isinstance(m, BeginReply) and isinstance(m.answer, NotNow)]
    assert waits[:6] == [20, 40, 80, 160, 250, 250]
    walk.d.blocks.release(SequenceKey("own", 1))
    walk.world.settle()


def test_source_that_hears_of_an_accepted_offer_without_room_cancels() -> None:
    """The sink has accepted, its answer was lost with the link, and the room the offer had was taken since."""
    walk = Walk()
    key = walk.place()
    walk.arrive()
    walk.world.deliver_down("d0", "p0")
    assert walk.sink(key).state is SinkState.PULLING
    walk.world.break_link("d0", "p0")
    walk.world.perform(walk.p, walk.p.source.link_closed(walk.d.incarnation, walk.world.now))
    walk.p.blocks.acquire(SequenceKey("own", 1), [], 6)
    walk.world.open_link("d0", "p0")
    walk.talk()
    assert walk.end(key, Side.SOURCE).reason is EndReason.REFUSED
    assert walk.end(key, Side.SINK).cause is FailureCause.PEER_CANCELLED
    assert walk.empty(walk.d)


def test_partial_last_block_travels_and_its_tail_is_named() -> None:
    walk = Walk()
    key = walk.complete("r", (1, 2, 3, 4, 5, 6))  # five tokens: the world checks tail_block and tail_tokens
    assert walk.world.processes["d0"].requests[key.sequence].num_kv_tokens % LAYOUT.block_tokens == 1


def test_only_the_partial_block_travels_if_the_full_ones_are_cached() -> None:
    walk = Walk()
    walk.complete("r", (1, 2, 3, 4, 5, 6))
    key = walk.begin("again", (1, 2, 3, 4, 5, 7))
    assert walk.sink(key).first == 2
    assert walk.sink(key).num_blocks == 3
    walk.world.settle()


def test_everything_cached_completes_without_bytes() -> None:
    walk = Walk()
    walk.complete("r")
    key = walk.begin("again", (*LONG[:8], 77))
    assert key in walk.world.completions
    end = walk.end(key, Side.SOURCE)
    assert (end.reason, end.num_bytes, end.confirmed_tokens) == (EndReason.PREFILLED, 0, 8)
    assert not walk.p.blocks.has_table(key.sequence)


def test_lost_answer_that_everything_is_cached_comes_from_the_tombstone() -> None:
    walk = Walk()
    walk.complete("r")
    key = walk.place("again")
    walk.arrive()
    walk.world.deliver_down("d0", "p0")
    assert key in walk.world.completions
    walk.world.break_link("d0", "p0")
    walk.world.open_link("d0", "p0")
    walk.talk()
    assert walk.end(key, Side.SOURCE).reason is EndReason.PREFILLED


def test_sink_that_says_it_has_more_than_any_cache_can_hold_fails_the_handoff() -> None:
    walk = Walk()
    key = walk.place("r", (*LONG, 10))  # nine tokens to hand over: four full blocks and one of one token
    walk.world.deliver_pending()
    assert walk.say_to_source(BeginReply(key, Accepted(5))) == [CancelHandoff(key, "UNKNOWN_BLOCKS")]
    end = walk.end(key, Side.SOURCE)
    assert (end.reason, end.cause, end.confirmed_tokens) == (EndReason.HANDOFF_FAILED, FailureCause.DATA_LOSS, 0)
    assert walk.empty(walk.p)
    walk.world.settle()


def test_accepted_for_a_handoff_that_is_over_makes_the_sink_release() -> None:
    walk = Walk()
    key = walk.place()
    walk.arrive()
    link = walk.world.links["d0", "p0"]
    begin = link.down[0]
    walk.world.perform(walk.p, walk.p.source.cancel("r", 1, "CLIENT_GONE", walk.world.now))
    link.down.clear()  # its CancelHandoff is lost ...
    link.down.append(begin)  # ... and the Begin is not
    walk.talk()
    assert walk.end(key, Side.SINK).cause is FailureCause.PEER_CANCELLED
    assert walk.empty(walk.d)


def test_accepted_for_a_confirmed_handoff_is_left_alone() -> None:
    walk = Walk()
    key = walk.complete("r")
    assert walk.say_to_source(BeginReply(key, Accepted(4))) == []


def test_answers_that_come_twice_change_nothing() -> None:
    walk = Walk()
    key = walk.half()
    assert walk.say_to_source(BeginReply(key, Accepted(0))) == []
    assert walk.say_to_source(BeginReply(key, NotNow(20))) == []
    assert walk.say_to_sink(Begin(key, 8, 4)) == [BeginReply(key, Accepted(0))]
    assert walk.say_to_sink(ConfirmReply(key, 2, ConfirmAnswer.CONFIRMED)) == []
    assert walk.say_to_source(Confirm(key, 2, b"any" * 4)) == [ConfirmReply(key, 2, ConfirmAnswer.CONFIRMED)]
    assert walk.sink(key).confirmed == 2
    walk.world.settle()


def test_nothing_is_asked_twice() -> None:
    walk = Walk()
    walk.half()
    assert [message.end_block for message in walk.seen if isinstance(message, Confirm)] == [2]


def test_older_answer_does_not_commit_what_is_asked_now() -> None:
    walk = Walk()
    key = walk.half()
    walk.copy()
    walk.see()  # Confirm(4) is on its way
    assert walk.say_to_sink(ConfirmReply(key, 2, ConfirmAnswer.CONFIRMED)) == []
    assert walk.sink(key).confirmed == 2
    walk.world.settle()


def test_begun_handoff_the_reopened_link_does_not_list_ends_at_once() -> None:
    walk = Walk()
    key = walk.begin()  # nothing is announced yet, so that nothing else would tell the source
    walk.world.perform(walk.p, walk.p.source.link_up("d0.1", [], walk.world.now))
    assert walk.end(key, Side.SOURCE).cause is FailureCause.PEER_CANCELLED


def test_confirm_of_blocks_never_announced_is_not_pinned() -> None:
    walk = Walk()
    key = walk.begin()
    walk.step()
    assert walk.say_to_source(Confirm(key, 3, walk.sink(key).tags.at(3))) == [ConfirmReply(key, 3, ConfirmAnswer.NOT_PINNED)]


def test_tag_mismatch_discards_and_ends_both_sides_with_data_loss() -> None:
    walk = Walk()
    key = walk.half()
    assert walk.say_to_source(Confirm(key, 4, b"x" * 16)) == [ConfirmReply(key, 4, ConfirmAnswer.TAG_MISMATCH)]
    walk.copy()
    walk.see()
    walk.world.perform(walk.d, walk.d.sink.receive("p0.1", ConfirmReply(key, 4, ConfirmAnswer.TAG_MISMATCH), walk.world.now))
    assert walk.end(key, Side.SOURCE).cause is FailureCause.DATA_LOSS
    assert walk.end(key, Side.SINK).cause is FailureCause.DATA_LOSS
    assert walk.d.blocks.counts().reserved == 0


def test_negative_answer_is_never_committed() -> None:
    walk = Walk()
    key = walk.half()
    walk.copy()
    walk.see()
    walk.world.perform(walk.d, walk.d.sink.receive("p0.1", ConfirmReply(key, 4, ConfirmAnswer.NOT_PINNED), walk.world.now))
    assert walk.end(key, Side.SINK).confirmed_tokens == 4
    assert key not in walk.world.completions


def test_cancelled_pull_drains_before_its_blocks_are_free() -> None:
    walk = Walk()
    walk.half()
    reserved = walk.d.blocks.counts().reserved
    assert walk.d.pulls
    walk.world.cancel("r")
    walk.arrive()
    assert walk.d.blocks.counts().reserved == reserved
    assert len(walk.d.sink.draining) == 1
    walk.copy()
    walk.see()
    assert walk.empty(walk.d)
    assert not walk.d.sink.draining


def test_cancel_by_the_sink_stops_the_engine_of_the_source() -> None:
    walk = Walk()
    key = walk.begin("r", tuple(range(1, 18)))  # four steps to compute
    walk.say_to_source(CancelHandoff(key, "CLIENT_GONE"))
    assert walk.end(key, Side.SOURCE).cause is FailureCause.PEER_CANCELLED
    walk.step()
    walk.step()
    assert not walk.p.engine.has_work()
    assert walk.empty(walk.p)


def test_blocks_pinned_by_a_step_that_ended_after_the_cancel_are_unpinned() -> None:
    walk = Walk()
    walk.begin()
    walk.world.cancel("r")
    walk.arrive()
    walk.world.engine_step("p0")  # it ran when the cancel came
    assert walk.p.blocks.pinned_owners()
    walk.world.engine_output("p0")
    assert not walk.p.blocks.pinned_owners()


def test_failed_pull_is_path_down_and_tells_the_source() -> None:
    walk = Walk()
    key = walk.half()
    for operation in list(walk.d.pulls):
        walk.world.pull_ends("d0", operation, FailureCause.PATH_DOWN)
    walk.see()
    walk.talk()
    assert walk.end(key, Side.SINK).cause is FailureCause.PATH_DOWN
    assert walk.end(key, Side.SOURCE).cause is FailureCause.PEER_CANCELLED


def test_starts_of_different_sequences_are_refused_at_begin() -> None:
    walk = Walk()
    key = walk.place()
    walk.arrive()
    assert walk.say_to_sink(Begin(key, 6, 3)) == [BeginReply(key, Refused("CANCELLED"))]
    assert walk.end(key, Side.SINK).cause is FailureCause.DATA_LOSS


def test_sink_pulls_interactive_before_batch() -> None:
    walk = Walk(num_blocks=16)
    walk.begin("first", (9, 9, 9, 9, 9))
    walk.begin("second", (8, 8, 8, 8, 8))
    batch = walk.place("batch", (1, 2, 3, 4, 5), Priority.BATCH)
    walk.arrive()
    interactive = walk.place("interactive", (5, 4, 3, 2, 1))
    walk.arrive()
    walk.talk()
    for _ in range(4):
        walk.step()
        walk.talk()
    assert len(walk.d.pulls) == 2  # all a peer may have
    walk.copy()
    walk.world.pull_seen("d0")
    running = [pull.start.key for pull in walk.d.pulls.values()]
    assert interactive in running
    assert batch not in running
    walk.world.settle()


def test_batch_that_has_aged_is_pulled_before_younger_interactive_ones() -> None:
    walk = Walk(num_blocks=16)
    walk.begin("first", (9, 9, 9, 9, 9))
    walk.begin("second", (8, 8, 8, 8, 8))
    batch = walk.place("batch", (1, 2, 3, 4, 5), Priority.BATCH)
    walk.arrive()
    walk.world.pass_time(walk.world.config.times.batch_ageing_s + 1)
    interactive = walk.place("interactive", (5, 4, 3, 2, 1))
    walk.arrive()
    walk.talk()
    for _ in range(4):
        walk.step()
        walk.talk()
    assert len(walk.d.pulls) == 2  # all a peer may have
    walk.copy()
    walk.world.pull_seen("d0")
    running = [pull.start.key for pull in walk.d.pulls.values()]
    assert batch in running
    assert interactive not in running
    walk.world.settle()


def test_confirmed_handoff_can_be_asked_again_for_sixty_seconds() -> None:
    walk = Walk()
    key = walk.complete("r")
    walk.world.pass_time(59)
    assert walk.say_to_source(Confirm(key, 4, b"")) == [ConfirmReply(key, 4, ConfirmAnswer.CONFIRMED)]
    walk.world.pass_time(2)
    assert walk.say_to_source(Confirm(key, 4, b"")) == [ConfirmReply(key, 4, ConfirmAnswer.NOT_PINNED)]


def test_handoffs_of_other_sinks_are_not_answered_for_them() -> None:
    walk = Walk(sinks=2)
    key = walk.half()
    actions = walk.p.source.receive("d1.1", CancelHandoff(key, "CLIENT_GONE"), walk.world.now)
    assert not [action for action in actions if isinstance(action, Ended | Completed)]
    assert walk.source(key).state is SourceState.COMPUTED


def test_slow_sink_holds_back_only_its_own_work() -> None:
    walk = Walk(num_blocks=8, sinks=2)
    walk.begin("slow1")
    walk.step()
    walk.step()  # four blocks pinned for d0, which never pulls
    walk.world.submit("slow2", tuple(range(20, 25)), Priority.INTERACTIVE)
    walk.world.place("slow2", "p0", "d0")
    walk.world.submit("quick", tuple(range(30, 35)), Priority.INTERACTIVE)
    walk.world.place("quick", "p0", "d1")
    walk.arrive()
    states = {handoff.key.request_id: handoff.state for handoff in walk.p.source.live}
    assert states["slow2"] is SourceState.QUEUED
    assert states["quick"] is SourceState.OFFERED
    walk.world.settle()


def test_large_request_waiting_for_its_peers_share_is_not_overtaken_by_that_peers_small_ones() -> None:
    walk = Walk(num_blocks=20, sinks=2)
    walk.begin("first")  # four of the ten blocks that d0 may have
    walk.world.submit("large", tuple(range(20, 37)), Priority.INTERACTIVE)  # eight
    walk.world.place("large", "p0", "d0")
    walk.world.submit("small", (50, 51, 52), Priority.INTERACTIVE)
    walk.world.place("small", "p0", "d0")
    walk.world.submit("elsewhere", (60, 61, 62), Priority.INTERACTIVE)
    walk.world.place("elsewhere", "p0", "d1")
    walk.arrive()
    states = {handoff.key.request_id: handoff.state for handoff in walk.p.source.live}
    assert states["large"] is SourceState.QUEUED
    assert states["small"] is SourceState.QUEUED
    assert states["elsewhere"] is SourceState.OFFERED
    walk.world.settle()
    assert len(walk.world.completions) == 4


def test_suspect_sink_gets_no_new_offers() -> None:
    walk = Walk()
    walk.world.perform(walk.p, walk.p.source.suspect("d0.1", True, walk.world.now))
    key = walk.place()
    walk.arrive()
    assert walk.source(key).state is SourceState.QUEUED
    walk.world.perform(walk.p, walk.p.source.suspect("d0.1", False, walk.world.now))
    assert walk.source(key).state is SourceState.OFFERED
    walk.world.settle()


def test_outcomes_are_reported_with_what_is_held() -> None:
    walk = Walk()
    key = walk.half()
    assert walk.p.booked[key, Side.SOURCE] == 2
    assert walk.d.booked[key, Side.SINK] == 2
    walk.world.settle()
    assert walk.p.booked[key, Side.SOURCE] == 0
    assert Outcome.CONFIRMED == 1


# Blocks of other sizes at the other side: what is said counts in the source's blocks (two tokens and eight), what is held in our own.


def test_confirmed_tokens_of_a_block_that_is_not_full_are_held_and_not_kept() -> None:
    walk = Walk(block_tokens=(2, 4))
    key = walk.begin("r", tuple(range(1, 14)))  # twelve tokens: six blocks there, three here
    walk.step()
    walk.step()
    walk.talk()
    walk.copy()
    walk.see()
    walk.talk()
    assert (walk.sink(key).confirmed, walk.sink(key).committed) == (2, 1)
    walk.copy()
    walk.see()
    walk.talk()
    walk.world.crash("p0")
    walk.world.fence_the_dead()
    end = walk.end(key, Side.SINK)
    assert (end.confirmed_tokens, end.num_bytes) == (8, 4 * LAYOUT.block_bytes)
    assert walk.empty(walk.d)
    walk.world.settle()


def test_a_block_of_the_source_that_is_half_cached_is_pulled_by_its_other_half_only() -> None:
    walk = Walk(num_blocks=16, block_tokens=(8, 2))
    walk.complete("r", (1, 2, 3, 4, 5, 6, 7))  # six tokens: three blocks cached here
    key = walk.begin("again", (1, 2, 3, 4, 5, 6, 70, 80, 90, 100))
    assert (walk.sink(key).first, walk.sink(key).committed, walk.sink(key).num_blocks) == (0, 3, 5)
    walk.step()
    walk.talk()
    (pull,) = walk.d.pulls.values()
    assert [unit % 4 for unit in pull.start.source_ids] == [3]
    assert pull.start.dest_ids == tuple(walk.d.blocks.table(key.sequence)[3:4])
    walk.world.settle()
    assert key in walk.world.completions


def test_everything_cached_here_completes_though_the_sources_last_block_is_partial() -> None:
    walk = Walk(num_blocks=16, block_tokens=(8, 2))
    walk.complete("r", (1, 2, 3, 4, 5, 6, 7))
    key = walk.begin("again", (1, 2, 3, 4, 5, 6, 77))
    assert key in walk.world.completions
    end = walk.end(key, Side.SOURCE)
    assert (end.reason, end.num_bytes, end.confirmed_tokens) == (EndReason.PREFILLED, 0, 6)
    assert not walk.p.blocks.has_table(key.sequence)


def test_a_source_with_larger_blocks_believes_no_cache_that_its_sink_cannot_have() -> None:
    walk = Walk(num_blocks=16, block_tokens=(8, 2))
    key = walk.place("r", (1, 2, 3, 4, 5, 6))  # five tokens: the last one is in no full block of either side
    walk.world.deliver_pending()
    assert walk.say_to_source(BeginReply(key, Accepted(1))) == [CancelHandoff(key, "UNKNOWN_BLOCKS")]
    walk.world.settle()


def test_a_link_that_breaks_while_a_block_is_half_filled_goes_on_where_it_was() -> None:
    walk = Walk(num_blocks=16, block_tokens=(2, 8))
    key = walk.begin("r", tuple(range(1, 18)))
    for _ in range(2):
        walk.step()
        walk.talk()
    walk.copy()
    walk.see()  # its Confirm is on the way ...
    walk.world.break_link("d0", "p0")  # ... and lost
    walk.world.open_link("d0", "p0")
    walk.talk()
    assert (walk.sink(key).confirmed, walk.sink(key).committed) == (2, 0)
    walk.world.settle()
    assert key in walk.world.completions


def test_begin_that_counts_blocks_of_another_size_than_introduced_is_data_loss() -> None:
    walk = Walk(block_tokens=(2, 4))
    key = walk.place()
    walk.arrive()
    walk.world.links["d0", "p0"].down.clear()
    assert walk.say_to_sink(Begin(key, 8, 2)) == [BeginReply(key, Refused("CANCELLED"))]
    assert walk.end(key, Side.SINK).cause is FailureCause.DATA_LOSS


def test_begin_of_more_tokens_than_the_pool_holds_is_too_large_whatever_the_blocks() -> None:
    walk = Walk(num_blocks=8, block_tokens=(8, 2))
    unknown = HandoffKey("unknown", 1, walk.d.incarnation)
    assert walk.say_to_sink(Begin(unknown, 17, 3)) == [BeginReply(unknown, Refused("TOO_LARGE"))]
    assert isinstance(walk.say_to_sink(Begin(unknown, 16, 2))[0].answer, NotNow)  # type: ignore[union-attr]
