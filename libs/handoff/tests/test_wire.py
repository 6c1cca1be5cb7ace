import pytest
from baton_contracts.worker.v1 import handoff_service_pb2 as pb
from baton_engine.api import EngineBeat
from baton_handoff import wire
from baton_handoff.ids import ConfirmAnswer, HandoffKey
from baton_handoff.messages import (
    Accepted,
    Announce,
    Begin,
    BeginReply,
    CancelHandoff,
    Confirm,
    ConfirmReply,
    Fetch,
    FetchReply,
    NotNow,
    Refused,
)
from baton_handoff.peer_watch import Beat

KEY = HandoffKey("frontend-1", 3, "0123456789abcdef")
FETCH = KEY._replace(is_fetch=True)
BEAT = EngineBeat(step=7, running_step_age_s=0.25, predicted_step_s=0.125)


@pytest.mark.parametrize(
    "message",
    [
        BeginReply(KEY, Accepted(0)),
        BeginReply(KEY, Accepted(5)),
        BeginReply(KEY, NotNow(20)),
        BeginReply(KEY, Refused("STALE")),
        Confirm(KEY, 9, b"t" * 16),
        CancelHandoff(KEY, "DEADLINE"),
        Fetch(FETCH, 3, (b"a" * 16, b"b" * 16), "00-1-2-01"),
        Confirm(FETCH, 9, b"t" * 16),
        CancelHandoff(FETCH, "TIMEOUT"),
    ],
)
def test_what_a_sink_says_arrives_as_it_was_said(message: object) -> None:
    request = pb.PairRequest.FromString(wire.request_to_proto(message, BEAT).SerializeToString())  # type: ignore[arg-type]
    assert wire.message_from_request(request) == message
    assert wire.beat_from_proto(request.beat) == Beat(7, 0.25, 0.125)


@pytest.mark.parametrize(
    "message",
    [
        Begin(KEY, 40, 3, "00-1-2-01"),
        Announce(KEY, 2, (7, 1, 4_000_000_000), 32, 0.5),
        ConfirmReply(KEY, 9, ConfirmAnswer.NOT_PINNED),
        ConfirmReply(KEY, 9, ConfirmAnswer.CONFIRMED, 0.25),
        CancelHandoff(KEY, "UNKNOWN"),
        FetchReply(FETCH, 3, (7, 1, 4_000_000_000)),
        FetchReply(FETCH, 0, (), "NOT_CACHED"),
        ConfirmReply(FETCH, 9, ConfirmAnswer.CONFIRMED),
    ],
)
def test_what_a_source_says_arrives_as_it_was_said(message: object) -> None:
    response = pb.PairResponse.FromString(wire.response_to_proto(message, BEAT).SerializeToString())  # type: ignore[arg-type]
    assert wire.message_from_response(response) == message


def test_beat_alone_is_no_message() -> None:
    assert wire.message_from_request(wire.request_to_proto(None, BEAT)) is None
    assert wire.message_from_response(wire.response_to_proto(None, BEAT)) is None


@pytest.mark.parametrize(
    "request_",
    [
        pb.PairRequest(confirm=pb.Confirm(end_block=1)),
        pb.PairRequest(begin_reply=pb.BeginReply(handoff=wire.key_to_proto(KEY))),
        pb.PairRequest(hello=pb.PairHello()),
        pb.PairRequest(fetch=pb.Fetch(handoff=wire.key_to_proto(FETCH))),
        pb.PairRequest(fetch=pb.Fetch(handoff=wire.key_to_proto(FETCH), block_hashes=b"x" * 17)),
        pb.PairRequest(fetch=pb.Fetch(handoff=wire.key_to_proto(KEY), block_hashes=b"x" * 16)),
    ],
)
def test_nonsense_of_a_sink_is_a_protocol_error(request_: pb.PairRequest) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.message_from_request(request_)


@pytest.mark.parametrize(
    "response",
    [
        pb.PairResponse(announce=pb.Announce(handoff=wire.key_to_proto(KEY), source_block_ids=b"123")),
        pb.PairResponse(announce=pb.Announce(handoff=wire.key_to_proto(KEY))),
        pb.PairResponse(confirm_reply=pb.ConfirmReply(handoff=wire.key_to_proto(KEY), end_block=1)),
        pb.PairResponse(welcome=pb.PairWelcome()),
        pb.PairResponse(fetch_reply=pb.FetchReply(handoff=wire.key_to_proto(FETCH))),
        pb.PairResponse(fetch_reply=pb.FetchReply(handoff=wire.key_to_proto(FETCH), found=pb.FetchFound(first_block=1))),
        pb.PairResponse(fetch_reply=pb.FetchReply(handoff=wire.key_to_proto(KEY), none=pb.FetchNone(reason="BUSY"))),
    ],
)
def test_nonsense_of_a_source_is_a_protocol_error(response: pb.PairResponse) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.message_from_response(response)
