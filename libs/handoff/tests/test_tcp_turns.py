"""Turns at the source: how many at a time, who is next, and that nobody can keep one."""

import threading

import pytest
from baton_handoff.transports.tcp_source import _HOLD_LIMIT_S, _TurnWatch
from baton_handoff.transports.tcp_turns import Turns
from baton_handoff.transports.tcp_wire import ConnectionFailed, TcpConfig


def begun(*turns):
    return [turn.wait(0) for turn in turns]


def test_at_most_so_many_begin_at_once():
    turns = Turns(2)
    assert begun(turns.ask(), turns.ask(), turns.ask()) == [True, True, False]


def test_who_waited_longest_is_next():
    turns = Turns(1)
    first, second, third = turns.ask(), turns.ask(), turns.ask()
    first.give_back()
    assert begun(second, third) == [True, False]
    second.give_back()
    assert begun(third) == [True]


def test_turn_is_given_back_once():
    turns = Turns(1)
    first, second = turns.ask(), turns.ask()
    first.give_back()
    first.give_back()
    assert begun(second, turns.ask()) == [True, False]


def test_who_leaves_the_queue_is_passed_over():
    turns = Turns(1)
    first, second, third = turns.ask(), turns.ask(), turns.ask()
    second.give_back()
    first.give_back()
    assert begun(third) == [True]
    third.give_back()
    assert begun(turns.ask()) == [True]


def test_waiting_thread_is_woken():
    turns = Turns(1)
    first, second = turns.ask(), turns.ask()
    woken = threading.Event()
    thread = threading.Thread(target=lambda: second.wait(10) and woken.set())
    thread.start()
    first.give_back()
    assert woken.wait(10)
    thread.join(10)


def test_reader_that_takes_nothing_loses_its_turn():
    turns = Turns(1)
    first, second = turns.ask(), turns.ask()
    _TurnWatch(TcpConfig(), first).timed_out()
    assert begun(second) == [True]


def test_reader_that_needs_long_loses_its_turn_and_goes_on():
    turns = Turns(1)
    first, second = turns.ask(), turns.ask()
    watch = _TurnWatch(TcpConfig(), first)
    began_s = watch.call_began()
    watch.progressed(began_s, 100)
    assert begun(second) == [False]
    watch.progressed(began_s + _HOLD_LIMIT_S + 0.01, 100)
    assert begun(second) == [True]
    watch.progressed(began_s + 1, 100)
    assert watch.num_bytes == 300


def test_reader_that_takes_nothing_for_long_is_given_up():
    turn = Turns(1).ask()
    with pytest.raises(ConnectionFailed, match="silent"):
        _TurnWatch(TcpConfig(silence_limit_s=0.0), turn).timed_out()
