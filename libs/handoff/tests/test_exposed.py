"""The exposed time: from the end of compute to the last confirm, both by the source's clock, whatever the sink's clock says."""

from array import array
from dataclasses import replace

import pytest
from baton_engine.api import BlocksReady, EngineRequest, SequenceKey, Work
from baton_engine.blocks import BlockManager
from baton_handoff.actions import Action, Completed, Ended, Send, StartPull
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import ConfirmAnswer, HandoffComplete, HandoffKey, PeerRef
from baton_handoff.messages import Accepted, Begin, BeginReply, Confirm, ConfirmReply, Message
from baton_handoff.sink import SinkBook
from baton_handoff.source import SourceBook
from baton_handoff.tag import KvShape
from baton_handoff.testing.world import LAYOUT

TOKENS = array("I", range(9))  # eight to hand over: four blocks of two
REQUEST = EngineRequest(SequenceKey("r", 1), TOKENS, len(TOKENS), b"r" * 16, Work.PREFILL_ONLY)
KEY = HandoffKey("r", 1, "d.1")
FAR = 5e5  # the sink's clock began at another time


class Pair:
    """A source at its time `now` and a sink whose clock shows another time."""

    def __init__(self) -> None:
        blocks = [BlockManager(16), BlockManager(16)]
        self.source_blocks = blocks[0]
        self.source = SourceBook(blocks[0], KvShape("p.1", "m", LAYOUT, 2), HandoffConfig())
        self.sink = SinkBook(blocks[1], KvShape("d.1", "m", LAYOUT, 2), HandoffConfig())
        self.now = 100.0
        self.done: list[HandoffComplete] = []
        self.ended: list[float] = []
        self.sink.start(replace(REQUEST, work=Work.DECODE_ONLY), PeerRef("p", "p.1"), "", self.now + FAR)
        self.source.start(REQUEST, PeerRef("d", "d.1"), "", self.now)
        (begin,) = self.to_sink(self.source.link_up("d.1", [], self.now))
        assert isinstance(begin, Begin)
        (reply,) = self.to_source(self.sink.receive("p.1", begin, self.now + FAR))
        assert reply == BeginReply(KEY, Accepted(0))
        self.source.receive("d.1", reply, self.now)

    def compute(self, first: int, count: int) -> list[Message]:
        """A chunk ends now. Returns: what is announced."""
        ids = self.source_blocks.pin(REQUEST.key, first, count)
        return self.to_sink(self.source.blocks_ready(BlocksReady(REQUEST.key, first, ids, 0, self.now), self.now))

    def pull(self, announces: list[Message]) -> list[Message]:
        """The sink hears, and pulls at once. Returns: its Confirms."""
        actions = [action for announce in announces for action in self.sink.receive("p.1", announce, self.now + FAR)]  # type: ignore[arg-type]
        pulls = [action.operation for action in actions if isinstance(action, StartPull)]
        return self.to_source([a for operation in pulls for a in self.sink.pull_returned(operation, None, self.now + FAR)])

    def confirm(self, confirms: list[Message]) -> list[Message]:
        """The source answers, now."""
        return self.to_sink([action for confirm in confirms for action in self.source.receive("d.1", confirm, self.now)])  # type: ignore[arg-type]

    def hear(self, replies: list[Message]) -> None:
        """The sink hears the answers."""
        for reply in replies:
            actions = self.sink.receive("p.1", reply, self.now + FAR)  # type: ignore[arg-type]
            self.done += [action.complete for action in actions if isinstance(action, Completed)]

    def to_sink(self, actions: list[Action]) -> list[Message]:
        self.ended += [action.end.exposed_s for action in actions if isinstance(action, Ended)]
        return [action.message for action in actions if isinstance(action, Send)]

    def to_source(self, actions: list[Action]) -> list[Message]:
        return [action.message for action in actions if isinstance(action, Send)]


def test_exposed_is_the_time_from_the_last_chunk_to_its_confirm_at_the_source() -> None:
    pair = Pair()
    first = pair.confirm(pair.pull(pair.compute(0, 2)))
    pair.hear(first)
    pair.now += 0.5  # the second chunk computes
    announce = pair.compute(2, 2)
    pair.now += 0.003
    confirms = pair.pull(announce)
    pair.now += 0.002
    replies = pair.confirm(confirms)
    pair.now += 7.0  # a slow way back is the round trip's, not the source's
    pair.hear(replies)
    (complete,) = pair.done
    assert complete.exposed_s == pytest.approx(0.005)
    assert complete.last_chunk_bytes == 2 * LAYOUT.block_bytes
    assert pair.ended == [pytest.approx(0.005)]


def test_a_repeated_last_confirm_carries_the_age_it_has_then() -> None:
    pair = Pair()
    confirms = pair.pull(pair.compute(0, 4))
    pair.now += 0.01
    pair.confirm(confirms)  # the answer is lost
    pair.now += 0.15
    (again,) = [message for message in pair.to_source(pair.sink.link_up("p.1", pair.now + FAR)) if isinstance(message, Confirm)]
    replies = pair.confirm([again])
    assert replies == [ConfirmReply(KEY, 4, ConfirmAnswer.CONFIRMED, pytest.approx(0.16))]
    pair.hear(replies)
    assert pair.done[0].exposed_s == pytest.approx(0.16)


def test_an_answer_that_is_no_yes_has_no_age() -> None:
    pair = Pair()
    pair.compute(0, 2)
    pair.now += 1.0
    (reply,) = pair.confirm([Confirm(KEY, 4, bytes(16))])
    assert reply == ConfirmReply(KEY, 4, ConfirmAnswer.NOT_PINNED, 0.0)


def test_the_answer_to_a_confirm_is_the_first_thing_the_source_does() -> None:
    pair = Pair()
    (confirm,) = pair.pull(pair.compute(0, 4))
    actions = pair.source.receive("d.1", confirm, pair.now)  # type: ignore[arg-type]
    assert isinstance(actions[0], Send)
    assert any(isinstance(action, Ended) for action in actions[1:])
