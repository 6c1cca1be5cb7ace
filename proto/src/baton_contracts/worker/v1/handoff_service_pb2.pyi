from baton_contracts.discovery.v1 import instance_pb2 as _instance_pb2
from baton_contracts.worker.v1 import worker_service_pb2 as _worker_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConfirmAnswer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONFIRM_ANSWER_UNSPECIFIED: _ClassVar[ConfirmAnswer]
    CONFIRM_ANSWER_CONFIRMED: _ClassVar[ConfirmAnswer]
    CONFIRM_ANSWER_NOT_PINNED: _ClassVar[ConfirmAnswer]
    CONFIRM_ANSWER_TAG_MISMATCH: _ClassVar[ConfirmAnswer]
    CONFIRM_ANSWER_STALE: _ClassVar[ConfirmAnswer]
CONFIRM_ANSWER_UNSPECIFIED: ConfirmAnswer
CONFIRM_ANSWER_CONFIRMED: ConfirmAnswer
CONFIRM_ANSWER_NOT_PINNED: ConfirmAnswer
CONFIRM_ANSWER_TAG_MISMATCH: ConfirmAnswer
CONFIRM_ANSWER_STALE: ConfirmAnswer

class HandoffId(_message.Message):
    __slots__ = ("request_id", "attempt", "decode_incarnation", "is_fetch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    IS_FETCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    decode_incarnation: str
    is_fetch: bool
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., decode_incarnation: _Optional[str] = ..., is_fetch: bool = ...) -> None: ...

class PairRequest(_message.Message):
    __slots__ = ("beat", "hello", "begin_reply", "confirm", "cancel", "fetch")
    BEAT_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEGIN_REPLY_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    beat: _worker_service_pb2.Beat
    hello: PairHello
    begin_reply: BeginReply
    confirm: Confirm
    cancel: CancelHandoff
    fetch: Fetch
    def __init__(self, beat: _Optional[_Union[_worker_service_pb2.Beat, _Mapping]] = ..., hello: _Optional[_Union[PairHello, _Mapping]] = ..., begin_reply: _Optional[_Union[BeginReply, _Mapping]] = ..., confirm: _Optional[_Union[Confirm, _Mapping]] = ..., cancel: _Optional[_Union[CancelHandoff, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ...) -> None: ...

class PairResponse(_message.Message):
    __slots__ = ("beat", "welcome", "begin", "announce", "confirm_reply", "cancel", "fetch_reply")
    BEAT_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_REPLY_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    FETCH_REPLY_FIELD_NUMBER: _ClassVar[int]
    beat: _worker_service_pb2.Beat
    welcome: PairWelcome
    begin: Begin
    announce: Announce
    confirm_reply: ConfirmReply
    cancel: CancelHandoff
    fetch_reply: FetchReply
    def __init__(self, beat: _Optional[_Union[_worker_service_pb2.Beat, _Mapping]] = ..., welcome: _Optional[_Union[PairWelcome, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., announce: _Optional[_Union[Announce, _Mapping]] = ..., confirm_reply: _Optional[_Union[ConfirmReply, _Mapping]] = ..., cancel: _Optional[_Union[CancelHandoff, _Mapping]] = ..., fetch_reply: _Optional[_Union[FetchReply, _Mapping]] = ...) -> None: ...

class PairHello(_message.Message):
    __slots__ = ("contract_version", "features", "instance_id", "incarnation", "source_incarnation", "pair_secret", "session", "layout", "handoffs")
    CONTRACT_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PAIR_SECRET_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    contract_version: int
    features: _containers.RepeatedScalarFieldContainer[str]
    instance_id: str
    incarnation: str
    source_incarnation: str
    pair_secret: bytes
    session: int
    layout: _instance_pb2.KvLayout
    handoffs: _containers.RepeatedCompositeFieldContainer[HandoffId]
    def __init__(self, contract_version: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., source_incarnation: _Optional[str] = ..., pair_secret: _Optional[bytes] = ..., session: _Optional[int] = ..., layout: _Optional[_Union[_instance_pb2.KvLayout, _Mapping]] = ..., handoffs: _Optional[_Iterable[_Union[HandoffId, _Mapping]]] = ...) -> None: ...

class PairWelcome(_message.Message):
    __slots__ = ("contract_version", "features", "incarnation")
    CONTRACT_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    contract_version: int
    features: _containers.RepeatedScalarFieldContainer[str]
    incarnation: str
    def __init__(self, contract_version: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., incarnation: _Optional[str] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("handoff", "num_tokens", "num_blocks", "traceparent")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    num_tokens: int
    num_blocks: int
    traceparent: str
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class BeginReply(_message.Message):
    __slots__ = ("handoff", "accepted", "not_now", "refused")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NOT_NOW_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    accepted: BeginAccepted
    not_now: BeginNotNow
    refused: BeginRefused
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., accepted: _Optional[_Union[BeginAccepted, _Mapping]] = ..., not_now: _Optional[_Union[BeginNotNow, _Mapping]] = ..., refused: _Optional[_Union[BeginRefused, _Mapping]] = ...) -> None: ...

class BeginAccepted(_message.Message):
    __slots__ = ("first_block",)
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    def __init__(self, first_block: _Optional[int] = ...) -> None: ...

class BeginNotNow(_message.Message):
    __slots__ = ("retry_after_ms",)
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    retry_after_ms: int
    def __init__(self, retry_after_ms: _Optional[int] = ...) -> None: ...

class BeginRefused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Announce(_message.Message):
    __slots__ = ("handoff", "first_block", "source_block_ids", "cached_tokens", "age_us")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_US_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    first_block: int
    source_block_ids: bytes
    cached_tokens: int
    age_us: int
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., first_block: _Optional[int] = ..., source_block_ids: _Optional[bytes] = ..., cached_tokens: _Optional[int] = ..., age_us: _Optional[int] = ...) -> None: ...

class Confirm(_message.Message):
    __slots__ = ("handoff", "end_block", "tag")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    end_block: int
    tag: bytes
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., end_block: _Optional[int] = ..., tag: _Optional[bytes] = ...) -> None: ...

class ConfirmReply(_message.Message):
    __slots__ = ("handoff", "end_block", "answer", "age_us")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    AGE_US_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    end_block: int
    answer: ConfirmAnswer
    age_us: int
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., end_block: _Optional[int] = ..., answer: _Optional[_Union[ConfirmAnswer, str]] = ..., age_us: _Optional[int] = ...) -> None: ...

class CancelHandoff(_message.Message):
    __slots__ = ("handoff", "reason")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    reason: str
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("handoff", "first_block", "block_hashes", "traceparent")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    first_block: int
    block_hashes: bytes
    traceparent: str
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., first_block: _Optional[int] = ..., block_hashes: _Optional[bytes] = ..., traceparent: _Optional[str] = ...) -> None: ...

class FetchReply(_message.Message):
    __slots__ = ("handoff", "found", "none")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    found: FetchFound
    none: FetchNone
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., found: _Optional[_Union[FetchFound, _Mapping]] = ..., none: _Optional[_Union[FetchNone, _Mapping]] = ...) -> None: ...

class FetchFound(_message.Message):
    __slots__ = ("first_block", "source_block_ids")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    source_block_ids: bytes
    def __init__(self, first_block: _Optional[int] = ..., source_block_ids: _Optional[bytes] = ...) -> None: ...

class FetchNone(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...
