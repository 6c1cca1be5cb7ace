"""What a worker makes of news of deaths: a hint shortens its own doubts, and never starts them."""

from collections.abc import Callable
from unittest.mock import Mock

import pytest
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_handoff.config import HandoffConfig
from baton_handoff.handoff_metrics import HandoffMetrics
from baton_handoff.ids import FailureCause, PeerRef
from baton_handoff.peer_watch import Beat, PeerWatch
from baton_handoff.peers import Peers, PeersOwner
from baton_handoff.pulls import Puller
from baton_handoff.testing.worker import TEST_LAYOUT, layout_record
from prometheus_client import CollectorRegistry

LAYOUT = layout_record(TEST_LAYOUT)
DEAD = PeerRef("prefill-0", "p1", "127.0.0.1:1")


class Setup:
    """Peers with a clock and an owner that only notes what it is told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.owner = Mock(spec=PeersOwner)
        self.owner.notice.side_effect = lambda: self.now
        own = Instance(instance_id="decode-0", incarnation="d1", layout=LAYOUT)
        self.peers = Peers(
            self.owner,
            lambda: own,
            [],
            HandoffMetrics(CollectorRegistry()),
            HandoffConfig(),
            lambda: self.now,
            lambda introductions: Puller([], introductions, lambda: own, open_limit_s=2.0),
        )

    def introduce(self) -> None:
        peer = Instance(instance_id="prefill-0", incarnation="p1", layout=LAYOUT)
        self.peers.introductions.add(pb.Introduction(peer=peer, pair_secret=b"s" * 16))

    def ticket(self) -> None:
        self.peers.use_source(DEAD, self.now)

    def link(self) -> PeerWatch:
        """As a welcome does."""
        watch = PeerWatch(HandoffConfig().times, self.now)
        self.peers.clients["p1"].watch = watch
        return watch

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.peers.judge(self.now)

    @property
    def fenced(self) -> list[tuple[str, FailureCause]]:
        return [call.args for call in self.owner.source_over.call_args_list]


@pytest.fixture
def setup() -> Setup:
    made = Setup()
    made.introduce()
    made.ticket()
    return made


def test_news_alone_never_ends_what_makes_progress(setup: Setup) -> None:
    watch = setup.link()
    setup.peers.hinted("p1", "STREAM_BROKEN")
    for _ in range(20):
        watch.heard(Beat(1), setup.now)
        setup.later(0.25)
    assert not setup.fenced


def test_news_of_a_source_we_have_not_heard_for_a_second_ends_its_handoffs_at_once(setup: Setup) -> None:
    setup.link()
    setup.peers.hinted("p1", "SILENT")
    setup.later(0.9)
    assert not setup.fenced
    setup.later(0.2)
    assert setup.fenced == [("p1", FailureCause.PEER_FENCED)]


@pytest.mark.parametrize(
    "doubt", [lambda setup: setup.link().lost(setup.now), lambda setup: setattr(setup.peers.clients["p1"], "has_failed", True)]
)
def test_news_of_a_source_whose_link_is_lost_or_could_not_be_opened_ends_its_handoffs_at_once(
    setup: Setup, doubt: Callable[[Setup], None]
) -> None:
    doubt(setup)
    setup.peers.hinted("p1", "STREAM_BROKEN")
    assert setup.fenced == [("p1", FailureCause.PEER_FENCED)]


def test_old_news_count_for_a_ticket_that_comes_later(setup: Setup) -> None:
    setup.peers.clients.clear()
    setup.peers.hinted("p1", "STREAM_BROKEN")
    setup.ticket()
    setup.later(0.05)
    assert not setup.fenced
    setup.peers.clients["p1"].has_failed = True
    setup.later(0.05)
    assert setup.fenced == [("p1", FailureCause.PEER_FENCED)]


def test_new_introduction_makes_old_news_void(setup: Setup) -> None:
    setup.peers.hinted("p1", "STREAM_BROKEN")
    setup.introduce()
    setup.peers.clients["p1"].has_failed = True
    setup.later(1.5)
    assert not setup.fenced


def test_hearing_the_peer_makes_old_news_void(setup: Setup) -> None:
    watch = setup.link()
    setup.peers.hinted("p1", "STREAM_BROKEN")
    watch.heard(Beat(1), setup.now)
    setup.later(0.05)
    setup.peers.clients.clear()
    setup.ticket()
    setup.peers.clients["p1"].has_failed = True
    setup.later(0.05)
    assert not setup.fenced


def test_lost_link_is_due_when_it_will_be_given_up(setup: Setup) -> None:
    assert setup.peers.next_due() == float("inf")
    setup.link().lost(setup.now)
    assert setup.peers.next_due() == pytest.approx(100.2)
