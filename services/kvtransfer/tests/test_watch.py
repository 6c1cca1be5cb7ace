"""What a watcher is told: a snapshot, then each changed handoff once, and a fresh snapshot if it was too slow."""

import pytest
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_kvtransfer import watch
from baton_kvtransfer.books import Books
from baton_kvtransfer.testing import handoff_event

BEGUN, PROGRESS, ENDED = pb.HANDOFF_EVENT_KIND_BEGUN, pb.HANDOFF_EVENT_KIND_PROGRESS, pb.HANDOFF_EVENT_KIND_ENDED
CONFIRMED = pb.HANDOFF_OUTCOME_CONFIRMED
NAMES = {"p1": "prefill-0", "d1": "decode-0"}


class Deaf:
    def begun(self, key, event, incarnation): ...

    def ended(self, handoff, outcome): ...


class House:
    """Books of one pair, their watches, and a clock."""

    def __init__(self):
        self.books = Books(Deaf())
        self.down = set()
        self.watches = watch.Watches(self.books, self)
        self.wakes = 0
        for incarnation in NAMES:
            self.books.open_account(incarnation, 0)

    def instance_id(self, incarnation):
        return NAMES.get(incarnation, incarnation)

    def is_down(self, incarnation):
        return incarnation in self.down

    def open(self, **filters):
        return self.watches.open(pb.WatchHandoffsRequest(**filters), self.wake)

    def wake(self):
        self.wakes += 1

    def source(self, kind, held=0, confirmed=0, now_s=0.0, **kwargs):
        self.books.apply("p1", [handoff_event(pb.SIDE_SOURCE, kind, "d1", "d1", held, confirmed, **kwargs)], now_s)

    def sink(self, kind, held=0, confirmed=0, now_s=0.0, **kwargs):
        self.books.apply("d1", [handoff_event(pb.SIDE_SINK, kind, "p1", "d1", held, confirmed, **kwargs)], now_s)

    def told(self, watcher, now_s=0.0):
        self.watches.spread()
        return self.watches.next_message(watcher, now_s)


@pytest.fixture
def house():
    return House()


def requests(views):
    return [view.handoff.request_id for view in views]


def test_first_message_is_a_snapshot_of_what_lives(house):
    house.sink(BEGUN, 800)
    house.source(ENDED, outcome=CONFIRMED, request_id="r2")
    first = house.told(house.open(), 2.5)
    (view,) = first.snapshot.handoffs
    assert (view.handoff.request_id, view.handoff.attempt, view.handoff.decode_incarnation) == ("r1", 1, "d1")
    assert (view.sink.instance_id, view.sink.held_bytes, view.is_live, view.age_us) == ("decode-0", 800, True, 2_500_000)
    assert (view.source.instance_id, view.source.kind) == ("prefill-0", pb.HANDOFF_EVENT_KIND_UNSPECIFIED)
    assert first.snapshot.dropped_changes == 0
    assert first.revision == 2


def test_handoff_that_changed_several_times_is_told_once_as_it_is_now(house):
    watcher = house.open()
    house.told(watcher)
    for held in (100, 200, 300):
        house.source(PROGRESS, held)
    (view,) = house.told(watcher).delta.handoffs
    assert view.source.held_bytes == 300
    assert house.wakes == 1
    assert house.told(watcher) is None


def test_last_view_of_a_handoff_has_both_sides_ends_and_its_length(house):
    watcher = house.open()
    house.sink(BEGUN, 800, now_s=1)
    house.told(watcher, 1)
    house.source(ENDED, 0, 800, outcome=CONFIRMED, now_s=2)
    house.sink(ENDED, 0, 800, outcome=CONFIRMED, now_s=3)
    (view,) = house.told(watcher, 9).delta.handoffs
    assert not view.is_live
    assert (view.source.outcome, view.sink.outcome, view.sink.confirmed_bytes) == (CONFIRMED, CONFIRMED, 800)
    assert view.age_us == 2_000_000


def test_transport_comes_with_its_reason_and_the_time_pulls_took(house):
    house.books.accounts["d1"].note_link(pb.LinkReport(source_incarnation="p1", transport="tcp", reason="tcp: the only one"))
    event = handoff_event(pb.SIDE_SINK, PROGRESS, "p1", "d1", 800)
    event.transport, event.pulled_bytes, event.pull_us = "tcp", 400, 50
    house.books.apply("d1", [event], 0)
    (view,) = house.told(house.open()).snapshot.handoffs
    assert (view.transport, view.transport_reason, view.pulled_bytes, view.pull_us) == ("tcp", "tcp: the only one", 400, 50)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"request_id": "r1"}, ["r1"]),
        ({"instance_id": "prefill-0"}, ["r1", "r2"]),
        ({"instance_id": "prefill-9"}, []),
        ({"instance_id": "decode-0", "request_id": "r2"}, ["r2"]),
    ],
)
def test_filters_hold_for_the_snapshot_and_for_changes(house, filters, expected):
    early, late = house.open(**filters), None
    house.told(early)
    house.sink(BEGUN, 1)
    house.sink(BEGUN, 1, request_id="r2")
    late = house.open(**filters)
    assert requests(house.told(late).snapshot.handoffs) == expected
    message = house.told(early)
    assert requests(message.delta.handoffs if message else []) == expected


def test_dead_worker_ends_its_handoffs_for_the_watcher(house):
    house.sink(BEGUN, 800)
    watcher = house.open()
    house.told(watcher)
    house.down.add("d1")
    house.watches.worker_down("d1")
    (view,) = house.told(watcher).delta.handoffs
    assert view.sink.is_down
    assert not view.is_live


def test_forgotten_side_is_told_even_if_the_filter_knows_it_no_more(house):
    house.source(BEGUN, 800)
    watcher = house.open(instance_id="prefill-0")
    house.told(watcher)
    house.books.close_account("p1", 0)
    (view,) = house.told(watcher).delta.handoffs
    assert not view.is_live
    assert not view.HasField("source")


def test_slow_watcher_starts_afresh_with_a_count(house, monkeypatch):
    monkeypatch.setattr(watch, "MAX_PENDING", 10)
    watcher = house.open()
    house.told(watcher)
    for number in range(12):
        house.source(BEGUN, 5, request_id=f"r{number}")
    house.watches.spread()
    house.source(BEGUN, 5, request_id="later")
    message = house.told(watcher)
    assert len(message.snapshot.handoffs) == 13
    assert message.snapshot.dropped_changes == 13
    assert house.watches.num_dropped == 13
    house.source(PROGRESS, 6)
    assert requests(house.told(watcher).delta.handoffs) == ["r1"]


def test_messages_are_bounded_and_say_what_they_leave_out(house, monkeypatch):
    monkeypatch.setattr(watch, "MAX_ROWS", 10)
    watcher = house.open()
    for number in range(25):
        house.source(BEGUN, 5, request_id=f"r{number}")
    first = house.told(watcher)
    assert (len(first.snapshot.handoffs), first.snapshot.left_out) == (10, 15)
    for number in range(25):
        house.source(PROGRESS, 6, request_id=f"r{number}")
    sizes = [len(house.told(watcher).delta.handoffs) for _ in range(3)]
    assert sizes == [10, 10, 5]
    assert not watcher.has_news


def test_without_watchers_the_books_collect_nothing(house):
    watcher = house.open()
    house.watches.close(watcher)
    house.watches.close(watcher)
    house.source(BEGUN, 5)
    assert house.books.changed is None
    assert len(house.watches) == 0
