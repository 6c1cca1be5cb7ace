"""Introductions, deaths, replaced lives: decisions without a stream."""

import itertools

import pytest
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_kvtransfer.books import Books
from baton_kvtransfer.broker import REPLACED, SILENT, STREAM_BROKEN, Broker
from baton_kvtransfer.testing import handoff_event, worker_record
from baton_runtime.errors import InvalidArgument, StaleIncarnation


class Deaf:
    def begun(self, key, event, incarnation): ...

    def ended(self, handoff, outcome): ...


class Fleet:
    """A broker with a clock."""

    def __init__(self):
        numbers = itertools.count(1)
        self.registered = {}
        self.broker = Broker(
            Books(Deaf()),
            draw_secret=lambda n: next(numbers).to_bytes(n, "big"),
            registered_incarnation=lambda record: self.registered.get(record.instance_id, ""),
        )
        self.now_s = 0.0
        self.sessions = {}

    def hello(self, instance_id, incarnation, **kwargs):
        self.sessions[incarnation], out = self.broker.hello(worker_record(instance_id, incarnation, **kwargs), self.now_s)
        return out

    def report(self, incarnation, **kwargs):
        return self.broker.report(incarnation, self.sessions[incarnation], pb.BooksRequest(**kwargs), self.now_s)

    def break_stream(self, incarnation):
        self.broker.stream_ended(incarnation, self.sessions[incarnation], self.now_s)

    def later(self, seconds, heard=()):
        self.now_s += seconds
        for incarnation in heard:
            self.report(incarnation)
        return self.broker.tick(self.now_s)


@pytest.fixture
def fleet():
    made = Fleet()
    made.hello("prefill-0", "p1")
    return made


def introduced(out, incarnation):
    return {i.peer.incarnation: i for i in out.messages[incarnation].introductions} if incarnation in out.messages else {}


def deaths(out):
    return {
        to: [(down.incarnation, down.reason) for down in message.peers_down] for to, message in out.messages.items() if message.peers_down
    }


def test_both_sides_are_introduced_with_the_same_secret(fleet):
    out = fleet.hello("decode-0", "d1")
    mine, theirs = introduced(out, "d1")["p1"], introduced(out, "p1")["d1"]
    assert mine.pair_secret == theirs.pair_secret
    assert len(mine.pair_secret) == 16
    assert mine.peer.instance_id == "prefill-0"
    assert not mine.refusal


def test_every_pair_has_its_own_secret(fleet):
    first = introduced(fleet.hello("decode-0", "d1"), "d1")["p1"]
    second = introduced(fleet.hello("decode-1", "d2"), "d2")["p1"]
    assert first.pair_secret != second.pair_secret


def test_hello_brings_all_known_peers(fleet):
    fleet.hello("decode-0", "d1")
    fleet.hello("prefill-1", "p2")
    assert set(introduced(fleet.hello("decode-1", "d2"), "d2")) == {"p1", "p2", "d1"}


def test_pair_that_cannot_match_is_told_why_and_gets_no_secret(fleet):
    out = fleet.hello("decode-0", "d1", transports=("nixl",))
    for incarnation, peer in (("d1", "p1"), ("p1", "d1")):
        told = introduced(out, incarnation)[peer]
        assert "transports" in told.refusal
        assert told.pair_secret == b""


def test_stream_that_comes_back_keeps_its_secrets(fleet):
    before = introduced(fleet.hello("decode-0", "d1"), "d1")["p1"].pair_secret
    fleet.break_stream("d1")
    out = fleet.hello("decode-0", "d1")
    assert introduced(out, "d1")["p1"].pair_secret == before
    assert deaths(fleet.later(1.0, heard=["p1", "d1"])) == {}


def test_broken_stream_is_told_after_the_time_to_come_back(fleet):
    fleet.hello("decode-0", "d1")
    fleet.break_stream("d1")
    assert deaths(fleet.later(0.15)) == {}
    assert deaths(fleet.later(0.1)) == {"p1": [("d1", STREAM_BROKEN)]}
    assert deaths(fleet.later(0.1)) == {}


def test_silent_worker_is_told_and_its_stream_ended(fleet):
    fleet.hello("decode-0", "d1")
    assert deaths(fleet.later(1.9, heard=["p1"])) == {}
    out = fleet.later(0.2, heard=["p1"])
    assert deaths(out) == {"p1": [("d1", SILENT)]}
    assert out.closed == {fleet.sessions["d1"]: SILENT}


def test_death_is_told_only_to_those_introduced(fleet):
    fleet.hello("decode-0", "d1")
    fleet.hello("prefill-1", "p2")
    fleet.hello("decode-1", "d2", transports=("nixl",))  # refused by both
    fleet.break_stream("p1")
    assert set(deaths(fleet.later(0.3))) == {"d1", "p2"}


def test_worker_that_was_down_is_introduced_again(fleet):
    fleet.hello("decode-0", "d1")
    fleet.break_stream("d1")
    fleet.later(0.3)
    out = fleet.hello("decode-0", "d1")
    assert "d1" in introduced(out, "p1")
    assert not fleet.broker.workers["d1"].down


def test_new_life_replaces_the_old_one_at_once(fleet):
    fleet.hello("decode-0", "d1")
    old = fleet.sessions["d1"]
    out = fleet.hello("decode-0", "d1b")
    assert deaths(out) == {"p1": [("d1", REPLACED)]}
    assert set(introduced(out, "p1")) == {"d1b"}
    assert out.closed == {old: REPLACED}


def test_replaced_life_is_refused_even_when_forgotten(fleet):
    fleet.hello("decode-0", "d1")
    fleet.hello("decode-0", "d1b")
    for wait_s in (0.1, 100.0):
        fleet.later(wait_s, heard=["p1", "d1b"])
        with pytest.raises(StaleIncarnation, match="d1b"):
            fleet.hello("decode-0", "d1")


def test_old_life_that_woke_up_does_not_replace_the_registered_one_after_our_restart(fleet):
    fleet.registered["decode-0"] = "d1b"
    fleet.hello("decode-0", "d1b")
    with pytest.raises(StaleIncarnation):
        fleet.hello("decode-0", "d1")
    fleet.break_stream("d1b")  # then whoever comes is better than nobody
    fleet.hello("decode-0", "d1")


def test_newer_stream_of_the_same_life_ends_the_older_one(fleet):
    old = fleet.sessions["p1"]
    out = fleet.hello("prefill-0", "p1")
    assert list(out.closed) == [old]
    fleet.broker.stream_ended("p1", old, 0.0)
    assert fleet.broker.reporting() == ["p1"]
    assert fleet.broker.report("p1", old, pb.BooksRequest(peers_down=[pb.PeerDown(incarnation="x")]), 0.0).messages == {}


def test_peers_fence_is_passed_on_if_we_do_not_hear_the_worker_either(fleet):
    for name, incarnation in (("decode-0", "d1"), ("decode-1", "d2")):
        fleet.hello(name, incarnation)
    fleet.later(1.5, heard=["d1", "d2"])
    told = pb.PeerDown(incarnation="p1", reason="SILENT")
    assert deaths(fleet.report("d1", peers_down=[told])) == {"d2": [("p1", "SILENT")]}
    assert deaths(fleet.report("d2", peers_down=[told])) == {}  # news once


def test_peers_fence_of_a_worker_we_hear_is_a_path_not_a_death(fleet):
    """Only the pair cannot reach each other: nobody else must act on it."""
    for name, incarnation in (("decode-0", "d1"), ("decode-1", "d2")):
        fleet.hello(name, incarnation)
    assert deaths(fleet.report("d1", peers_down=[pb.PeerDown(incarnation="p1", reason="STREAM_BROKEN")])) == {}


def test_stuck_step_is_passed_on_though_we_hear_the_worker(fleet):
    for name, incarnation in (("decode-0", "d1"), ("decode-1", "d2")):
        fleet.hello(name, incarnation)
    assert deaths(fleet.report("d1", peers_down=[pb.PeerDown(incarnation="p1", reason="STEP_STUCK")])) == {"d2": [("p1", "STEP_STUCK")]}


def test_news_of_strangers_is_ignored(fleet):
    fleet.hello("prefill-1", "p2")
    assert deaths(fleet.report("p2", peers_down=[pb.PeerDown(incarnation=i, reason="STEP_STUCK") for i in ("p1", "zz")])) == {}


def test_own_stall_is_nobodys_silence(fleet):
    fleet.now_s += 10.0
    fleet.broker.excuse(fleet.now_s)
    assert fleet.broker.tick(fleet.now_s).closed == {}
    assert fleet.broker.reporting() == ["p1"]


def book_leak(fleet):
    event = handoff_event(pb.SIDE_SOURCE, pb.HANDOFF_EVENT_KIND_BEGUN, "d1", "d1", 300)
    fleet.report("p1", events=[event])
    for _ in range(3):
        fleet.report("p1", sums=pb.BooksSums(pinned_bytes=1000, stranded_bytes=700))
        fleet.now_s += 0.5


def test_leak_is_a_mismatch_until_the_sums_agree(fleet):
    book_leak(fleet)
    assert fleet.broker.mismatch_bytes(fleet.now_s) == 700
    fleet.report("p1", sums=pb.BooksSums(pinned_bytes=300))
    assert fleet.broker.mismatch_bytes(fleet.now_s) == 0


def test_mismatch_of_a_worker_without_a_stream_counts_for_five_seconds(fleet):
    book_leak(fleet)
    fleet.break_stream("p1")
    fleet.later(4.9)
    assert fleet.broker.mismatch_bytes(fleet.now_s) == 700
    fleet.later(0.2)
    assert fleet.broker.mismatch_bytes(fleet.now_s) == 0


def test_mismatch_of_a_replaced_life_goes_with_it(fleet):
    book_leak(fleet)
    fleet.hello("prefill-0", "p1b")
    assert fleet.broker.mismatch_bytes(fleet.now_s) == 0


def test_dead_worker_holds_nothing_and_has_no_live_handoffs(fleet):
    book_leak(fleet)
    assert fleet.broker.held_bytes() == (300, 0)
    assert fleet.broker.num_live() == 1
    assert fleet.broker.stranded_bytes() == 700
    fleet.break_stream("p1")
    fleet.later(0.3)
    assert fleet.broker.held_bytes() == (0, 0)
    assert fleet.broker.num_live() == 0
    assert fleet.broker.stranded_bytes() == 0


def test_dead_worker_is_forgotten_after_a_minute_with_its_books_and_secrets(fleet):
    fleet.hello("decode-0", "d1")
    book_leak(fleet)
    fleet.break_stream("p1")
    fleet.later(1.0, heard=["d1"])
    fleet.later(58.5, heard=["d1"])
    assert "p1" in fleet.broker.workers
    fleet.later(1.0, heard=["d1"])
    assert "p1" not in fleet.broker.workers
    assert "p1" not in fleet.broker.books.accounts
    assert not fleet.broker.books.handoffs
    assert fleet.broker.workers["d1"].secrets == {}


@pytest.mark.parametrize("field", ["instance_id", "incarnation", "model", "layout", "service"])
def test_record_that_cannot_be_introduced_is_refused_by_field(fleet, field):
    record = worker_record("decode-0", "d1")
    record.ClearField(field)
    with pytest.raises(InvalidArgument, match=f"hello.instance.{field}"):
        fleet.broker.hello(record, 0.0)


def test_next_due_is_when_the_first_worker_could_be_given_up(fleet):
    assert Broker(Books(Deaf())).next_due() == float("inf")
    fleet.later(0.5)
    fleet.hello("decode-0", "d1")
    assert fleet.broker.next_due() == 2.0
    fleet.break_stream("d1")
    assert fleet.broker.next_due() == 0.7
    assert deaths(fleet.later(0.25))["p1"] == [("d1", STREAM_BROKEN)]
    assert fleet.broker.next_due() == 2.0


def test_stream_that_broke_while_our_own_loop_stood_still_gets_longer_to_come_back(fleet):
    """The workers could not know whether we live, and may try only once a second."""
    fleet.hello("decode-0", "d1")
    fleet.now_s = 20.0
    fleet.broker.excuse(fleet.now_s)
    fleet.break_stream("d1")
    assert not deaths(fleet.later(1.5, heard=["p1"]))
    fleet.hello("decode-0", "d1")
    assert not deaths(fleet.later(1.0, heard=["p1", "d1"]))
    fleet.break_stream("d1")
    assert deaths(fleet.later(0.25, heard=["p1"]))["p1"] == [("d1", STREAM_BROKEN)]


def test_links_name_both_workers_and_go_with_the_stream(fleet):
    fleet.hello("decode-0", "d1")
    fleet.report("d1", links=[pb.LinkReport(source_incarnation="p1", transport="tcp", reason="tcp: not the same host")])
    (link,) = fleet.broker.links()
    assert (link.source_instance_id, link.sink_instance_id, link.report.reason) == ("prefill-0", "decode-0", "tcp: not the same host")
    fleet.break_stream("d1")
    assert fleet.broker.links() == []


def test_each_replica_draws_its_own_secret_for_a_pair():
    replicas = [Broker(Books(Deaf())) for _ in range(2)]
    told = []
    for broker in replicas:
        broker.hello(worker_record("prefill-0", "p1"), 0)
        _, out = broker.hello(worker_record("decode-0", "d1"), 0)
        assert introduced(out, "p1")["d1"].pair_secret == introduced(out, "d1")["p1"].pair_secret
        told.append(introduced(out, "p1")["d1"].pair_secret)
    assert told[0] != told[1]
