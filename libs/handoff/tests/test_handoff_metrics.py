"""Links by peer: their speed, and that their labels go with them."""

import pytest
from baton_handoff.handoff_metrics import LINK_HALF_LIFE_S, HandoffMetrics
from baton_handoff.ids import EndReason, FailureCause, HandoffEnd, Side
from baton_handoff.transports.base import PullStats
from prometheus_client import CollectorRegistry

RATE = "baton_handoff_link_gigabytes_per_second"


class Metrics(HandoffMetrics):
    def __init__(self) -> None:
        self.all = CollectorRegistry()
        super().__init__(self.all)

    def pull(self, incarnation: str, peer: str, gb_per_s: float, *, seconds: float = 0.01, transport: str = "tcp") -> None:
        self.pulled(incarnation, peer, transport, PullStats(round(gb_per_s * seconds * 1e9), 1, seconds), is_retry=False)

    def rate(self, peer: str, transport: str = "tcp") -> float | None:
        return self.all.get_sample_value(RATE, {"peer": peer, "transport": transport})

    def num_links(self) -> int:
        return sum(len(family.samples) for family in self.all.collect() if family.name == RATE)


def test_a_link_shows_its_speed_and_follows_a_change() -> None:
    metrics = Metrics()
    metrics.pull("p.1", "p", 2.0)
    assert metrics.rate("p") == pytest.approx(2.0)
    for _ in range(10):
        metrics.pull("p.1", "p", 8.0, seconds=LINK_HALF_LIFE_S)
    assert metrics.rate("p") == pytest.approx(8.0, rel=0.01)


def test_a_small_operation_hardly_changes_the_speed_of_a_busy_link() -> None:
    metrics = Metrics()
    metrics.pull("p.1", "p", 8.0, seconds=0.2)
    metrics.pull("p.1", "p", 0.01, seconds=0.001)
    assert metrics.rate("p") == pytest.approx(8.0, rel=0.02)


def test_labels_of_a_peer_go_with_its_link() -> None:
    metrics = Metrics()
    metrics.pull("p.1", "p", 1.0)
    metrics.pull("q.1", "q", 1.0)
    metrics.peer_gone("p.1")
    metrics.peer_gone("p.1")
    metrics.peer_gone("never seen")
    assert (metrics.rate("p"), metrics.rate("q"), metrics.num_links()) == (None, 1.0, 1)


def test_the_next_life_of_a_peer_keeps_the_label_when_the_one_before_goes() -> None:
    metrics = Metrics()
    metrics.pull("p.1", "p", 1.0)
    metrics.pull("p.2", "p", 3.0)
    metrics.peer_gone("p.1")
    assert metrics.rate("p") == pytest.approx(3.0)
    metrics.peer_gone("p.2")
    assert metrics.num_links() == 0


def test_a_link_over_another_transport_has_one_label() -> None:
    metrics = Metrics()
    metrics.pull("p.1", "p", 1.0, transport="shm")
    metrics.pull("p.1", "p", 2.0, transport="tcp")
    assert (metrics.rate("p", "shm"), metrics.rate("p", "tcp"), metrics.num_links()) == (None, pytest.approx(2.0), 1)


def test_an_operation_without_duration_is_no_speed() -> None:
    metrics = Metrics()
    metrics.pulled("p.1", "p", "shm", PullStats(100, 1, 0.0), is_retry=True)
    assert metrics.num_links() == 0
    assert metrics.all.get_sample_value("baton_handoff_pull_retries_total") == 1


def test_data_loss_is_counted_apart() -> None:
    metrics = Metrics()
    assert metrics.all.get_sample_value("baton_handoff_data_loss_total") == 0  # there before the first
    metrics.ended(Side.SINK, HandoffEnd(EndReason.HANDOFF_FAILED, FailureCause.DATA_LOSS))
    metrics.ended(Side.SINK, HandoffEnd(EndReason.HANDOFF_FAILED, FailureCause.PATH_DOWN))
    metrics.ended(Side.SINK, None)
    assert metrics.all.get_sample_value("baton_handoff_data_loss_total") == 1
    assert metrics.all.get_sample_value("baton_handoffs_total", {"outcome": "data_loss", "role": "sink"}) == 1
