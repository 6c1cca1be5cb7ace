"""Messages to and from baton.worker.v1. What does not parse is a bug or an attack of the peer: ProtocolError ends its link."""

import sys
from array import array
from collections.abc import Iterable
from typing import cast

from baton_contracts.worker.v1 import handoff_service_pb2 as pb
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb
from baton_engine.api import EngineBeat
from baton_runtime.errors import InvalidArgument
from baton_runtime.hashing import HASH_BYTES

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
    FromSink,
    FromSource,
    Message,
    NotNow,
    Refused,
)
from baton_handoff.peer_watch import Beat

CONTRACT_VERSION = 1


class ProtocolError(InvalidArgument):
    """The peer said something the contract does not know."""


def key_to_proto(key: HandoffKey) -> pb.HandoffId:
    """As baton.worker.v1.HandoffId."""
    return pb.HandoffId(request_id=key.request_id, attempt=key.attempt, decode_incarnation=key.decode_incarnation, is_fetch=key.is_fetch)


def key_from_proto(handoff: pb.HandoffId) -> HandoffKey:
    """Raises: ProtocolError if a part is missing."""
    if not handoff.request_id or not handoff.attempt or not handoff.decode_incarnation:
        raise ProtocolError("handoff", "has no identity")
    return HandoffKey(handoff.request_id, handoff.attempt, handoff.decode_incarnation, handoff.is_fetch)


def beat_to_proto(beat: EngineBeat) -> worker_pb.Beat:
    """Seconds to us."""
    return worker_pb.Beat(
        step=beat.step,
        running_step_age_us=max(0, int(beat.running_step_age_s * 1e6)),
        predicted_step_us=max(0, int(beat.predicted_step_s * 1e6)),
    )


def beat_from_proto(beat: worker_pb.Beat) -> Beat:
    """Us to seconds."""
    return Beat(beat.step, beat.running_step_age_us / 1e6, beat.predicted_step_us / 1e6)


def request_to_proto(message: Message | None, beat: EngineBeat) -> pb.PairRequest:
    """What the sink says; None: only a beat."""
    request = pb.PairRequest(beat=beat_to_proto(beat))
    if isinstance(message, BeginReply):
        request.begin_reply.CopyFrom(_begin_reply_to_proto(message))
    elif isinstance(message, Confirm):
        request.confirm.CopyFrom(pb.Confirm(handoff=key_to_proto(message.key), end_block=message.end_block, tag=message.tag))
    elif isinstance(message, Fetch):
        request.fetch.CopyFrom(_fetch_to_proto(message))
    elif isinstance(message, CancelHandoff):
        request.cancel.CopyFrom(pb.CancelHandoff(handoff=key_to_proto(message.key), reason=message.reason))
    else:
        assert message is None, "a sink says nothing else"
    return request


def response_to_proto(message: Message | None, beat: EngineBeat) -> pb.PairResponse:
    """What the source says; None: only a beat."""
    response = pb.PairResponse(beat=beat_to_proto(beat))
    if isinstance(message, Begin):
        response.begin.CopyFrom(_begin_to_proto(message))
    elif isinstance(message, Announce):
        response.announce.CopyFrom(_announce_to_proto(message))
    elif isinstance(message, ConfirmReply):
        answer = cast("pb.ConfirmAnswer", message.answer.value)
        age_us = max(0, int(message.age_s * 1e6))
        reply = pb.ConfirmReply(handoff=key_to_proto(message.key), end_block=message.end_block, answer=answer, age_us=age_us)
        response.confirm_reply.CopyFrom(reply)
    elif isinstance(message, FetchReply):
        response.fetch_reply.CopyFrom(_fetch_reply_to_proto(message))
    elif isinstance(message, CancelHandoff):
        response.cancel.CopyFrom(pb.CancelHandoff(handoff=key_to_proto(message.key), reason=message.reason))
    else:
        assert message is None, "a source says nothing else"
    return response


def message_from_request(request: pb.PairRequest) -> FromSink | None:
    """What the sink said; None: only a beat. Raises: ProtocolError."""
    kind = request.WhichOneof("message")
    if kind is None:
        return None
    if kind == "begin_reply":
        return _begin_reply_from_proto(request.begin_reply)
    if kind == "confirm":
        return Confirm(key_from_proto(request.confirm.handoff), request.confirm.end_block, request.confirm.tag)
    if kind == "cancel":
        return CancelHandoff(key_from_proto(request.cancel.handoff), request.cancel.reason)
    if kind == "fetch":
        return _fetch_from_proto(request.fetch)
    raise ProtocolError("message", f"{kind} is out of place")


def message_from_response(response: pb.PairResponse) -> FromSource | None:
    """What the source said; None: only a beat. Raises: ProtocolError."""
    kind = response.WhichOneof("message")
    if kind is None:
        return None
    if kind == "begin":
        begin = response.begin
        return Begin(key_from_proto(begin.handoff), begin.num_tokens, begin.num_blocks, begin.traceparent)
    if kind == "announce":
        return _announce_from_proto(response.announce)
    if kind == "confirm_reply":
        reply = response.confirm_reply
        try:
            answer = ConfirmAnswer(reply.answer)
        except ValueError:
            raise ProtocolError("confirm_reply.answer", f"{reply.answer} is unknown") from None
        return ConfirmReply(key_from_proto(reply.handoff), reply.end_block, answer, reply.age_us / 1e6)
    if kind == "cancel":
        return CancelHandoff(key_from_proto(response.cancel.handoff), response.cancel.reason)
    if kind == "fetch_reply":
        return _fetch_reply_from_proto(response.fetch_reply)
    raise ProtocolError("message", f"{kind} is out of place")


def _begin_to_proto(begin: Begin) -> pb.Begin:
    return pb.Begin(
        handoff=key_to_proto(begin.key), num_tokens=begin.num_tokens, num_blocks=begin.num_blocks, traceparent=begin.traceparent
    )


def _begin_reply_to_proto(reply: BeginReply) -> pb.BeginReply:
    message = pb.BeginReply(handoff=key_to_proto(reply.key))
    if isinstance(reply.answer, Accepted):
        message.accepted.CopyFrom(pb.BeginAccepted(first_block=reply.answer.first_block))
    elif isinstance(reply.answer, NotNow):
        message.not_now.retry_after_ms = max(1, reply.answer.retry_after_ms)
    else:
        message.refused.reason = reply.answer.reason
    return message


def _begin_reply_from_proto(reply: pb.BeginReply) -> BeginReply:
    key = key_from_proto(reply.handoff)
    kind = reply.WhichOneof("answer")
    if kind == "accepted":
        return BeginReply(key, Accepted(reply.accepted.first_block))
    if kind == "not_now":
        return BeginReply(key, NotNow(max(1, reply.not_now.retry_after_ms)))
    if kind == "refused":
        return BeginReply(key, Refused(reply.refused.reason))
    raise ProtocolError("begin_reply.answer", "is missing")


def _announce_to_proto(announce: Announce) -> pb.Announce:
    return pb.Announce(
        handoff=key_to_proto(announce.key),
        first_block=announce.first_block,
        source_block_ids=_column(announce.block_ids),
        cached_tokens=announce.cached_tokens,
        age_us=max(0, int(announce.age_s * 1e6)),
    )


def _announce_from_proto(announce: pb.Announce) -> Announce:
    if not announce.source_block_ids or len(announce.source_block_ids) % 4:
        raise ProtocolError("announce.source_block_ids", f"{len(announce.source_block_ids)} bytes are no u32 column")
    ids = _from_column(announce.source_block_ids)
    return Announce(key_from_proto(announce.handoff), announce.first_block, ids, announce.cached_tokens, announce.age_us / 1e6)


def _fetch_to_proto(fetch: Fetch) -> pb.Fetch:
    return pb.Fetch(
        handoff=key_to_proto(fetch.key),
        first_block=fetch.first_block,
        block_hashes=b"".join(fetch.hashes),
        traceparent=fetch.traceparent,
    )


def _fetch_from_proto(fetch: pb.Fetch) -> Fetch:
    data = fetch.block_hashes
    if not fetch.handoff.is_fetch or not data or len(data) % HASH_BYTES:
        raise ProtocolError("fetch.block_hashes", f"{len(data)} bytes are no hashes, or the identity is not a fetch's")
    hashes = tuple(data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES))
    return Fetch(key_from_proto(fetch.handoff), fetch.first_block, hashes, fetch.traceparent)


def _fetch_reply_to_proto(reply: FetchReply) -> pb.FetchReply:
    message = pb.FetchReply(handoff=key_to_proto(reply.key))
    if reply.block_ids:
        message.found.CopyFrom(pb.FetchFound(first_block=reply.first_block, source_block_ids=_column(reply.block_ids)))
    else:
        message.none.reason = reply.refusal
    return message


def _fetch_reply_from_proto(reply: pb.FetchReply) -> FetchReply:
    key, kind = key_from_proto(reply.handoff), reply.WhichOneof("answer")
    if not key.is_fetch:
        raise ProtocolError("fetch_reply.handoff", "is not a fetch's identity")
    if kind == "none":
        return FetchReply(key, 0, (), reply.none.reason or "NOT_CACHED")
    if kind != "found" or not reply.found.source_block_ids or len(reply.found.source_block_ids) % 4:
        raise ProtocolError("fetch_reply.answer", "is missing or has no u32 column of blocks")
    return FetchReply(key, reply.found.first_block, _from_column(reply.found.source_block_ids))


def _column(ids: Iterable[int]) -> bytes:
    column = array("I", ids)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _from_column(data: bytes) -> tuple[int, ...]:
    column = array("I")
    column.frombytes(data)
    if sys.byteorder == "big":
        column.byteswap()
    return tuple(column)
