"""Accounts, agreement, and the difference between two counts of the same memory."""

import pytest
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_kvtransfer.books import KEEP_ENDED_S, Agreement, Books
from baton_kvtransfer.testing import handoff_event

P, D = "p1", "d1"
BEGUN, PROGRESS, ENDED = pb.HANDOFF_EVENT_KIND_BEGUN, pb.HANDOFF_EVENT_KIND_PROGRESS, pb.HANDOFF_EVENT_KIND_ENDED
CONFIRMED, CANCELLED = pb.HANDOFF_OUTCOME_CONFIRMED, pb.HANDOFF_OUTCOME_CANCELLED


class Spy:
    def __init__(self):
        self.begun_keys, self.ends = [], []

    def begun(self, key, event, incarnation):
        self.begun_keys.append(key)

    def ended(self, handoff, outcome):
        self.ends.append(outcome)


@pytest.fixture
def spy():
    return Spy()


@pytest.fixture
def books(spy):
    made = Books(spy)
    made.open_account(P, 0)
    made.open_account(D, 0)
    return made


def source(kind, held=0, confirmed=0, **kwargs):
    return handoff_event(pb.SIDE_SOURCE, kind, D, D, held, confirmed, **kwargs)


def sink(kind, held=0, confirmed=0, **kwargs):
    return handoff_event(pb.SIDE_SINK, kind, P, D, held, confirmed, **kwargs)


def test_held_bytes_follow_the_events(books):
    books.apply(D, [sink(BEGUN, 800)], 0)
    books.apply(P, [source(PROGRESS, 300)], 0)
    books.apply(P, [source(PROGRESS, 500, 100)], 0)
    assert books.accounts[D].sink_held_bytes == 800
    assert books.accounts[P].source_held_bytes == 500
    assert len(books.live()) == 1
    books.apply(P, [source(ENDED, 0, 800, outcome=CONFIRMED)], 0)
    assert books.accounts[P].source_held_bytes == 0
    assert len(books.live()) == 1
    books.apply(D, [sink(ENDED, 0, 800, outcome=CONFIRMED)], 0)
    assert not books.live()


def test_equal_sums_are_no_mismatch(books):
    books.apply(P, [source(BEGUN, 300)], 0)
    books.apply(P, [source(BEGUN, 100, request_id="r2")], 0)
    for now_s in (0.0, 0.5, 1.0):
        books.accounts[P].close_sums(pb.BooksSums(pinned_bytes=400), now_s)
    assert books.accounts[P].mismatch_bytes == 0


@pytest.mark.parametrize(("pinned", "reserved", "mismatch"), [(300, 0, 0), (200, 0, 100), (500, 0, 200), (300, 50, 50), (0, 10, 310)])
def test_mismatch_is_the_sum_of_both_differences(books, pinned, reserved, mismatch):
    books.apply(P, [source(BEGUN, 300)], 0)
    for now_s in (0.0, 0.5, 1.0):
        books.accounts[P].close_sums(pb.BooksSums(pinned_bytes=pinned, reserved_bytes=reserved), now_s)
    assert books.accounts[P].mismatch_bytes == mismatch


def test_difference_of_a_moment_is_no_mismatch_however_often_it_comes(books):
    """The engine's thread pins blocks a moment before the worker's loop reports them."""
    account = books.accounts[P]
    for tick in range(100):
        account.close_sums(pb.BooksSums(pinned_bytes=0 if tick % 20 == 0 else 300), tick * 0.05)
        assert account.mismatch_bytes == 0


def test_leak_under_moving_sums_counts_by_what_never_went_away(books):
    account = books.accounts[P]
    for tick, pinned_bytes in enumerate((500, 50, 350, 80)):
        account.close_sums(pb.BooksSums(pinned_bytes=pinned_bytes), tick * 0.5)
    assert account.mismatch_bytes == 50
    account.close_sums(pb.BooksSums(pinned_bytes=0), 2.0)
    assert account.mismatch_bytes == 0


def test_equal_confirmed_bytes_agree(books):
    books.apply(P, [source(ENDED, 0, 800, outcome=CONFIRMED)], 0)
    assert not books.agreements
    books.apply(D, [sink(ENDED, 0, 800, outcome=CONFIRMED)], 0)
    assert books.agreements[Agreement.AGREED] == 1


def test_sink_that_counts_less_agrees_because_a_cancel_may_overtake_the_last_answer(books):
    books.apply(D, [sink(ENDED, 0, 300, outcome=CANCELLED)], 0)
    books.apply(P, [source(ENDED, 0, 800, outcome=CONFIRMED)], 0)
    assert books.agreements[Agreement.AGREED] == 1


def test_sink_that_counts_more_than_its_source_disagrees(books):
    books.apply(D, [sink(ENDED, 0, 800, outcome=CONFIRMED)], 0)
    books.apply(P, [source(ENDED, 0, 700, outcome=CANCELLED)], 0)
    assert books.agreements[Agreement.DISAGREED] == 1


def test_end_told_again_when_a_drain_is_over_counts_once_and_closes_the_handoff(books, spy):
    books.apply(P, [source(ENDED, 0, 800, outcome=CONFIRMED)], 0)
    books.apply(D, [sink(BEGUN, 900), sink(ENDED, 100, 800, outcome=CANCELLED)], 0)
    assert len(books.handoffs) == 1
    books.apply(D, [sink(ENDED, 0, 800, outcome=CANCELLED)], 0)
    assert books.agreements[Agreement.AGREED] == 1
    assert books.confirmed_bytes == 800
    assert spy.ends == ["confirmed"]
    assert not books.handoffs


def test_handoff_over_on_both_sides_leaves_nothing_behind(books):
    books.apply(D, [sink(BEGUN, 800), sink(PROGRESS, 300, 500)], 0)
    books.apply(P, [source(BEGUN), source(PROGRESS, 800), source(ENDED, 0, 800, outcome=CONFIRMED)], 0)
    books.apply(D, [sink(ENDED, 0, 800, outcome=CONFIRMED)], 0)
    assert not books.handoffs
    assert not any(account.sources or account.sinks for account in books.accounts.values())
    assert books.events == {
        (pb.SIDE_SINK, BEGUN): 1, (pb.SIDE_SINK, PROGRESS): 1, (pb.SIDE_SINK, ENDED): 1,
        (pb.SIDE_SOURCE, BEGUN): 1, (pb.SIDE_SOURCE, PROGRESS): 1, (pb.SIDE_SOURCE, ENDED): 1,
    }  # fmt: skip


def test_side_that_is_over_waits_for_the_other_sides_worker_to_come_back(books):
    books.apply(D, [sink(BEGUN, 800)], 0)
    books.apply(P, [source(ENDED, 0, 700, outcome=CONFIRMED)], 0)
    books.open_account(D, 1)
    assert not books.live()
    books.apply(D, [sink(PROGRESS, 100, 700)], 2)
    assert len(books.live()) == 1
    books.apply(D, [sink(ENDED, 0, 800, outcome=CONFIRMED)], 3)
    assert books.agreements[Agreement.DISAGREED] == 1
    assert not books.handoffs


def test_age_of_a_handoff_survives_a_new_stream(books):
    event = source(BEGUN, 5)
    event.age_us = 3_000_000
    books.apply(P, [event], 10)
    assert books.live()[0].begun_s == 7


def test_changes_are_collected_only_while_somebody_wants_them(books):
    books.apply(P, [source(BEGUN, 5)], 0)
    assert books.changed is None
    books.changed = {}
    books.apply(P, [source(PROGRESS, 6)], 0)
    assert [handoff.source.held_bytes for handoff in books.changed.values()] == [6]


def test_links_are_kept_until_they_are_closed_or_the_worker_goes(books):
    account = books.accounts[D]
    account.note_link(pb.LinkReport(source_incarnation=P, transport="tcp", pulled_bytes=5))
    account.note_link(pb.LinkReport(source_incarnation=P, transport="tcp", pulled_bytes=9))
    account.note_link(pb.LinkReport(source_incarnation="p2", transport="shm"))
    assert account.links[P].pulled_bytes == 9
    account.note_link(pb.LinkReport(source_incarnation=P, is_closed=True))
    assert list(account.links) == ["p2"]
    books.open_account(D, 0)
    assert not books.accounts[D].links


def test_side_that_ends_while_draining_holds_until_it_says_otherwise(books):
    books.apply(D, [sink(BEGUN, 800)], 0)
    books.apply(D, [sink(ENDED, 200, outcome=CANCELLED)], 0)
    assert books.accounts[D].sink_held_bytes == 200
    books.expire(KEEP_ENDED_S + 1)
    books.apply(D, [sink(ENDED, 0, outcome=CANCELLED)], KEEP_ENDED_S + 2)
    assert books.accounts[D].sink_held_bytes == 0
    books.expire(3 * KEEP_ENDED_S)
    assert not books.handoffs


def test_only_a_sides_own_worker_may_speak_for_it(books):
    books.open_account("p2", 0)
    books.apply(P, [source(BEGUN, 300)], 0)
    assert books.apply("p2", [source(PROGRESS, 0)], 0) == 1
    assert books.apply(P, [sink(BEGUN, 100)], 0) == 1
    assert books.apply(D, [source(BEGUN, 100)], 0) == 1
    assert books.num_malformed == 3
    assert books.accounts[P].source_held_bytes == 300


@pytest.mark.parametrize("changes", [{"kind": 0}, {"kind": 99}, {"side": 0}, {"side": 9}])
def test_event_of_an_unknown_kind_or_side_is_left_out(books, changes):
    event = source(BEGUN, 1)
    for name, value in changes.items():
        setattr(event, name, value)
    assert books.apply(P, [event], 0) == 1
    assert not books.handoffs


def test_snapshot_replaces_what_was_known(books, spy):
    books.apply(P, [source(BEGUN, 300)], 0)
    books.apply(P, [source(BEGUN, 100, request_id="r2")], 0)
    books.open_account(P, 0)
    books.apply(P, [source(BEGUN, 100, request_id="r2")], 0)
    assert books.accounts[P].source_held_bytes == 100
    assert [key.request_id for key in books.handoffs] == ["r2"]
    assert spy.ends == ["unknown", "unknown"]


def test_closing_one_account_leaves_the_other_side(books):
    books.apply(P, [source(BEGUN, 300)], 0)
    books.apply(D, [sink(BEGUN, 800)], 0)
    books.close_account(P, 0)
    assert books.accounts[D].sink_held_bytes == 800
    (handoff,) = books.handoffs.values()
    assert handoff.source is None
    assert books.live() == [handoff]
    books.close_account(D, 0)
    assert not books.live()
    assert not books.handoffs


def test_ended_handoffs_are_forgotten_after_a_minute_and_live_ones_are_not(books):
    books.apply(P, [source(ENDED, outcome=CANCELLED)], 0)
    books.apply(P, [source(BEGUN, 5, request_id="r2")], 0)
    books.apply(P, [source(ENDED, outcome=CANCELLED, request_id="r3")], 0)
    books.apply(D, [sink(BEGUN, 5, request_id="r3")], 0)
    books.expire(KEEP_ENDED_S - 1)
    assert len(books.handoffs) == 3
    books.expire(KEEP_ENDED_S)
    assert {key.request_id for key in books.handoffs} == {"r2", "r3"}
    assert len(books.accounts[P].sources) == 2
    books.apply(D, [sink(ENDED, request_id="r3", outcome=CANCELLED)], 100)
    books.expire(100 + KEEP_ENDED_S)
    assert {key.request_id for key in books.handoffs} == {"r2"}


def test_ended_handoffs_are_bounded_whatever_the_rate(books, monkeypatch):
    monkeypatch.setattr("baton_kvtransfer.books.MAX_ENDED", 10)
    for number in range(100):
        books.apply(P, [source(ENDED, outcome=CONFIRMED, request_id=f"r{number}")], 0)
    books.expire(0)
    assert len(books.handoffs) == 10
    assert len(books.accounts[P].sources) == 10


def test_attempts_are_apart(books):
    books.apply(P, [source(BEGUN, 5, attempt=1)], 0)
    books.apply(P, [source(BEGUN, 7, attempt=2)], 0)
    assert books.accounts[P].source_held_bytes == 12
    assert len(books.handoffs) == 2
