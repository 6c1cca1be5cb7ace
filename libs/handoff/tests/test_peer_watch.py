from baton_handoff.config import Times
from baton_handoff.peer_watch import Beat, FenceReason, PeerState, PeerWatch


def watch() -> PeerWatch:
    return PeerWatch(Times(), now=100.0)


def test_peer_that_beats_is_ok() -> None:
    peer = watch()
    peer.heard(Beat(1), 100.2)
    assert peer.judge(101.1) == (PeerState.OK, None)


def test_silent_for_a_second_is_suspect_and_hearing_it_clears_that() -> None:
    peer = watch()
    assert peer.judge(101.0) == (PeerState.SUSPECT, None)
    peer.heard(Beat(1), 101.5)
    assert peer.judge(101.6) == (PeerState.OK, None)


def test_silent_for_two_seconds_is_fenced() -> None:
    assert watch().judge(102.0) == (PeerState.FENCED, FenceReason.SILENT)


def test_lost_link_is_suspect_at_once_and_fenced_after_200_ms() -> None:
    peer = watch()
    peer.lost(100.5)
    assert peer.judge(100.6) == (PeerState.SUSPECT, None)
    assert peer.judge(100.7) == (PeerState.FENCED, FenceReason.STREAM_BROKEN)


def test_tries_to_reopen_do_not_prolong_the_200_ms() -> None:
    peer = watch()
    peer.lost(100.5)
    peer.lost(100.65)
    assert peer.judge(100.7)[0] is PeerState.FENCED


def test_link_back_in_time_is_ok() -> None:
    peer = watch()
    peer.lost(100.5)
    peer.linked(100.69)
    assert peer.judge(101.0) == (PeerState.OK, None)


def test_step_older_than_two_seconds_is_fenced() -> None:
    peer = watch()
    peer.heard(Beat(1, running_step_age_s=2.1, predicted_step_s=0.2), 100.1)
    assert peer.judge(100.1) == (PeerState.FENCED, FenceReason.STEP_STUCK)


def test_long_step_is_allowed_four_times_its_prediction() -> None:
    peer = watch()
    peer.heard(Beat(1, running_step_age_s=3.9, predicted_step_s=1.0), 100.1)
    assert peer.judge(100.1)[0] is PeerState.OK
    peer.heard(Beat(1, running_step_age_s=4.1, predicted_step_s=1.0), 100.3)
    assert peer.judge(100.3)[0] is PeerState.FENCED


def test_silence_is_measured_from_the_last_message() -> None:
    peer = watch()
    peer.heard(Beat(), 103.0)
    assert peer.silent_s(104.5) == 1.5


def test_rumour_of_death_does_not_touch_a_link_that_works() -> None:
    peer = watch()
    peer.rumoured()
    assert peer.judge(100.9) == (PeerState.OK, None)
    peer.heard(Beat(1), 100.95)
    assert peer.judge(101.95) == (PeerState.SUSPECT, None)  # heard since: the rumour was false


def test_rumour_of_death_fences_whoever_is_suspect_already() -> None:
    peer = watch()
    peer.rumoured()
    assert peer.judge(101.0) == (PeerState.FENCED, FenceReason.STREAM_BROKEN)


def test_rumour_of_death_fences_a_lost_link_at_once_unless_it_comes_back() -> None:
    peer = watch()
    peer.lost(100.5)
    peer.rumoured()
    assert peer.judge(100.51) == (PeerState.FENCED, FenceReason.STREAM_BROKEN)
    peer.linked(100.52)
    assert peer.judge(100.53) == (PeerState.OK, None)


def test_lost_link_is_due_200_ms_later() -> None:
    peer = watch()
    assert peer.reopen_due() == float("inf")
    peer.lost(100.5)
    assert peer.reopen_due() == 100.7
