"""A source is read by a few at a time: in order of class and age, with a share per sink, and nobody waits for one that hangs."""

import random
from collections import Counter

import pytest
from baton_engine.api import Priority
from baton_handoff.actions import Send
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import ConfirmAnswer, HandoffKey, PeerRef
from baton_handoff.messages import Announce, Confirm, ConfirmReply
from baton_handoff.readers import Readable, may_announce
from baton_handoff.testing.world import LAYOUT, World

CONFIG = HandoffConfig(max_readers=2, max_readers_per_sink=1)


def handoff(name: str, sink: str, started_at: float, *, read: bool = False, ready: bool = True, batch: bool = False) -> Readable:
    """One of two blocks confirmed; read: the second is announced; ready: the second or third is computed and not announced."""
    blocks = 1 + read + ready
    return Readable(
        key=HandoffKey(name, 1, sink),
        peer=PeerRef(sink, sink),
        priority=Priority.BATCH if batch else Priority.INTERACTIVE,
        started_at=started_at,
        num_blocks=4,
        num_tokens=8,
        confirmed=1,
        announced=1 + read,
        block_ids=list(range(blocks)),
    )


def order(*handoffs: Readable, config: HandoffConfig = CONFIG) -> list[str]:
    return [found.key.request_id for found in may_announce(handoffs, config)]


def test_the_oldest_are_read_first_and_batch_ones_later() -> None:
    assert order(handoff("young", "a", 3.0), handoff("batch", "b", 1.0, batch=True), handoff("old", "c", 2.0)) == ["old", "young"]


def test_a_batch_one_that_has_aged_goes_before_younger_interactive_ones() -> None:
    assert order(handoff("batch", "b", 1.0, batch=True), handoff("young", "a", 11.5), handoff("old", "c", 10.5)) == ["old", "batch"]


def test_a_sink_gets_its_share_and_leaves_the_rest_to_others() -> None:
    assert order(handoff("a1", "a", 1.0), handoff("a2", "a", 2.0), handoff("b1", "b", 3.0)) == ["a1", "b1"]


def test_a_sink_that_is_read_by_as_many_as_allowed_gets_no_more_places_though_some_are_free() -> None:
    assert order(handoff("a1", "a", 1.0, read=True, ready=False), handoff("a2", "a", 2.0)) == []


def test_one_that_is_read_announces_more_without_another_place() -> None:
    assert order(handoff("a1", "a", 1.0, read=True), handoff("b1", "b", 2.0, read=True)) == ["a1", "b1"]


def test_one_that_is_read_announces_no_more_while_an_older_one_waits_for_a_place() -> None:
    full = [handoff("b1", "b", 2.0, read=True), handoff("c1", "c", 3.0, read=True)]
    assert order(handoff("a1", "a", 1.0), *full) == []
    assert order(handoff("a1", "a", 4.0), *full) == ["b1", "c1"]


def test_younger_ones_of_a_sink_whose_oldest_waits_for_its_share_announce_no_more() -> None:
    config = HandoffConfig(max_readers=8, max_readers_per_sink=1)
    assert order(handoff("a1", "a", 1.0), handoff("a2", "a", 2.0, read=True), handoff("b", "b", 3.0), config=config) == ["b"]


class Crowd:
    """A source and several sinks; handoffs of two blocks, few of which may be read at a time."""

    def __init__(self, *, sinks: int = 2, max_readers: int = 2, max_readers_per_sink: int = 1) -> None:
        config = HandoffConfig(operation_bytes=2 * LAYOUT.block_bytes, max_readers=max_readers, max_readers_per_sink=max_readers_per_sink)
        self.world = World(1, sinks, 32, config)
        for link in self.world.links:
            self.world.open_link(*link)
            self.world.deliver_up(*link)
        self.p = self.world.processes["p0"]
        self.num_placed = 0

    def arrive(self) -> None:
        """Starts and Cancels arrive."""
        while self.world.frontend.pending:
            self.world.deliver_pending()

    def step(self) -> None:
        """One step of the source's engine, and its output."""
        self.world.engine_step("p0")
        self.world.engine_output("p0")

    def ready(self, sink: str, priority: Priority = Priority.INTERACTIVE) -> HandoffKey:
        """Begun and computed."""
        self.num_placed += 1
        name = f"r{self.num_placed}"
        self.world.submit(name, (100 + self.num_placed, 2, 3, 4, 5), priority)
        self.world.place(name, "p0", sink)
        self.arrive()
        self.exchange(sink)
        self.step()
        self.step()
        return HandoffKey(name, 1, self.world.processes[sink].incarnation)

    def exchange(self, sink: str) -> None:
        """Messages of one link arrive until none is on its way."""
        link = self.world.links[sink, "p0"]
        while link.up or link.down:
            self.world.deliver_up(sink, "p0")
            self.world.deliver_down(sink, "p0")

    def pull(self, sink: str) -> None:
        """The sink pulls what it knows of, and both agree."""
        self.exchange(sink)
        process = self.world.processes[sink]
        for operation, pull in list(process.pulls.items()):
            while not pull.is_done:
                self.world.pull_block(sink, operation)
            self.world.pull_ends(sink, operation)
            self.world.pull_seen(sink)
        self.exchange(sink)

    def announced(self) -> list[str]:
        """Handoffs that are read now."""
        return sorted(h.key.request_id for h in self.p.source.live if h.is_read)


def test_the_next_is_announced_when_one_is_confirmed() -> None:
    crowd = Crowd()
    first, second = crowd.ready("d0"), crowd.ready("d0")
    assert (crowd.announced(), crowd.p.source.num_held_back()) == (["r1"], 1)
    assert crowd.p.blocks.held(second.sequence) == 2  # pinned, so that nothing is lost by waiting
    crowd.pull("d0")
    assert first in crowd.world.completions
    assert (crowd.announced(), crowd.p.source.num_held_back()) == (["r2"], 0)
    crowd.pull("d0")
    assert second in crowd.world.completions
    crowd.world.settle()


def test_interactive_goes_before_batch_that_waited_longer() -> None:
    crowd = Crowd()
    crowd.ready("d0")
    crowd.ready("d0", Priority.BATCH)
    crowd.ready("d0")
    crowd.pull("d0")
    assert crowd.announced() == ["r3"]
    crowd.world.settle()


def test_a_sink_that_hangs_keeps_its_share_and_no_more_until_it_is_fenced() -> None:
    crowd = Crowd(sinks=2)
    crowd.ready("d0"), crowd.ready("d0")
    crowd.world.stop("d0")
    for _ in range(3):  # the other goes on, one after the other
        other = crowd.ready("d1")
        crowd.pull("d1")
        assert other in crowd.world.completions
    assert crowd.announced() == ["r1"]
    crowd.world.fence("p0", crowd.world.processes["d0"].incarnation)
    assert (crowd.p.source.num_read(), crowd.p.blocks.counts().pinned) == (0, 0)
    crowd.world.wake("d0")
    crowd.world.settle()


@pytest.mark.parametrize("end", ["cancel", "fence"])
def test_a_place_is_free_again_however_its_handoff_ends(end: str) -> None:
    crowd = Crowd(sinks=2, max_readers=1)
    crowd.ready("d0")
    crowd.ready("d1")
    assert crowd.announced() == ["r1"]
    if end == "cancel":
        crowd.world.cancel("r1")
        crowd.arrive()
    else:
        crowd.world.fence("p0", crowd.world.processes["d0"].incarnation)
    assert crowd.announced() == ["r2"]
    crowd.pull("d1")
    crowd.world.settle()


def test_what_is_held_back_is_not_announced_when_the_link_comes_back_and_not_confirmed() -> None:
    crowd = Crowd()
    crowd.ready("d0")
    held_back = crowd.ready("d0")
    crowd.exchange("d0")
    crowd.world.break_link("d0", "p0")
    crowd.world.open_link("d0", "p0")
    crowd.world.deliver_up("d0", "p0")
    repeated = [m.key.request_id for m in crowd.world.links["d0", "p0"].down if isinstance(m, Announce)]
    assert repeated == ["r1"]
    d = crowd.world.processes["d0"]
    tag = next(h for h in d.sink.live if h.key == held_back).tags.at(1)
    answer = Send(d.incarnation, ConfirmReply(held_back, 1, ConfirmAnswer.NOT_PINNED))
    assert answer in crowd.p.source.receive(d.incarnation, Confirm(held_back, 1, tag), crowd.world.now)
    crowd.world.settle()


def test_nothing_is_announced_to_a_sink_whose_link_is_down_and_all_once_it_is_back() -> None:
    crowd = Crowd(max_readers_per_sink=2)
    crowd.ready("d0")
    crowd.pull("d0")
    key = HandoffKey("r9", 1, crowd.world.processes["d0"].incarnation)
    crowd.world.submit("r9", (9, 2, 3, 4, 5))
    crowd.world.place("r9", "p0", "d0")
    crowd.arrive()
    crowd.exchange("d0")
    crowd.world.break_link("d0", "p0")
    crowd.step()
    crowd.step()
    assert (crowd.announced(), crowd.p.source.num_held_back()) == ([], 1)
    crowd.world.open_link("d0", "p0")
    crowd.pull("d0")
    assert key in crowd.world.completions
    crowd.world.settle()


def test_a_suspect_sink_is_announced_nothing_until_it_is_heard_again() -> None:
    crowd = Crowd(max_readers_per_sink=2)
    d = crowd.world.processes["d0"].incarnation
    crowd.ready("d0")
    crowd.pull("d0")
    crowd.world.submit("r9", (9, 2, 3, 4, 5))
    crowd.world.place("r9", "p0", "d0")
    crowd.arrive()
    crowd.exchange("d0")
    crowd.world.perform(crowd.p, crowd.p.source.suspect(d, True, crowd.world.now))
    crowd.step()
    crowd.step()
    assert crowd.announced() == []
    crowd.world.perform(crowd.p, crowd.p.source.suspect(d, False, crowd.world.now))
    assert crowd.announced() == ["r9"]
    crowd.world.settle()


def test_max_readers_is_never_exceeded_and_always_used_in_a_busy_history() -> None:
    draw, crowd, seen = random.Random(7), Crowd(), set()
    for number in range(60):
        crowd.world.submit(f"r{number}", (100 + number, 2, 3, 4, 5), draw.choice(list(Priority)))
        crowd.world.place(f"r{number}", "p0", draw.choice(["d0", "d1"]))
    while steps := crowd.world.enabled():
        draw.choice(steps)()
        read_by = Counter(h.peer.incarnation for h in crowd.p.source.live if h.is_read)
        assert max(read_by.values(), default=0) <= 1
        seen.add(crowd.p.source.num_read())
    crowd.world.settle()
    assert len(crowd.world.completions) == 60
    assert seen == {0, 1, 2}
