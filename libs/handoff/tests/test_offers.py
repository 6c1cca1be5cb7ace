from array import array

import pytest
from baton_engine.api import EngineRequest, Priority, SequenceKey, Work
from baton_engine.pool import BlockLayout
from baton_handoff.admission import OfferQueue
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import HandoffKey, PeerRef
from baton_handoff.offers import Offers
from baton_handoff.source_handoff import SourceHandoff, SourceState
from baton_handoff.tag import KvShape, TagChain

BLOCK = 16
CONFIG = HandoffConfig(look_ahead_tokens=4096)
SHAPE = KvShape("p", "f", BlockLayout(1, BLOCK, 1, 1, "float32"), BLOCK)
LONG, SHORT = 16384, 256


class Source:
    """A queue and what was begun, as a SourceBook has them."""

    def __init__(self) -> None:
        self.queue: OfferQueue[SourceHandoff] = OfferQueue(CONFIG.times)
        self.begun: dict[HandoffKey, SourceHandoff] = {}
        self.offers = Offers(self.queue, self.begun, CONFIG, 1 << 20, BLOCK)

    def waits(self, name: str, num_tokens: int, priority: Priority = Priority.INTERACTIVE) -> None:
        self.queue.add(handoff(name, num_tokens, priority))

    def computes(self, name: str, num_tokens: int, priority: Priority = Priority.INTERACTIVE) -> None:
        made = handoff(name, num_tokens, priority)
        made.state = SourceState.COMPUTING
        self.begun[made.key] = made

    def offered(self) -> list[str]:
        return [made.key.request_id for made in self.offers.may_offer({"d": True}, 1.0)]


def handoff(name: str, num_tokens: int, priority: Priority) -> SourceHandoff:
    request = EngineRequest(SequenceKey(name, 1), array("I", bytes(4 * num_tokens)), num_tokens, bytes(16), Work.PREFILL_ONLY, priority)
    return SourceHandoff(
        key=HandoffKey(name, 1, "d"),
        peer=PeerRef("d", "d"),
        priority=priority,
        started_at=0.0,
        num_blocks=num_tokens // BLOCK,
        num_tokens=num_tokens,
        request=request,
        traceparent="",
        hashes=[],
        tags=TagChain(SHAPE, bytes(16), request.token_ids, num_tokens),
    )


def test_batch_work_under_way_never_keeps_an_interactive_prompt_from_being_offered() -> None:
    source = Source()
    for index in range(8):
        source.computes(f"b{index}", LONG, Priority.BATCH)
    source.waits("chat", SHORT)
    source.waits("more batch", LONG, Priority.BATCH)
    assert source.offered() == ["chat"]


def test_long_prompts_of_the_same_class_leave_room_for_a_short_one_to_be_begun_beside_them() -> None:
    source = Source()
    for index in range(8):
        source.computes(f"long{index}", LONG)
    source.waits("another", LONG)
    source.waits("chat", SHORT)
    assert source.offered() == ["chat"]


@pytest.mark.parametrize("priority", list(Priority))
def test_no_more_than_the_look_ahead_is_offered(priority: Priority) -> None:
    source = Source()
    for index in range(30):
        source.waits(f"{index:02}", SHORT, priority)
    assert len(source.offered()) == CONFIG.look_ahead_tokens // SHORT
