from baton_contracts.discovery.v1 import instance_pb2 as _instance_pb2
from baton_contracts.worker.v1 import handoff_service_pb2 as _handoff_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Side(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIDE_UNSPECIFIED: _ClassVar[Side]
    SIDE_SOURCE: _ClassVar[Side]
    SIDE_SINK: _ClassVar[Side]

class HandoffEventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HANDOFF_EVENT_KIND_UNSPECIFIED: _ClassVar[HandoffEventKind]
    HANDOFF_EVENT_KIND_BEGUN: _ClassVar[HandoffEventKind]
    HANDOFF_EVENT_KIND_PROGRESS: _ClassVar[HandoffEventKind]
    HANDOFF_EVENT_KIND_ENDED: _ClassVar[HandoffEventKind]

class HandoffOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HANDOFF_OUTCOME_UNSPECIFIED: _ClassVar[HandoffOutcome]
    HANDOFF_OUTCOME_CONFIRMED: _ClassVar[HandoffOutcome]
    HANDOFF_OUTCOME_CANCELLED: _ClassVar[HandoffOutcome]
    HANDOFF_OUTCOME_FENCED: _ClassVar[HandoffOutcome]
    HANDOFF_OUTCOME_NOT_PINNED: _ClassVar[HandoffOutcome]
    HANDOFF_OUTCOME_DATA_LOSS: _ClassVar[HandoffOutcome]
    HANDOFF_OUTCOME_FAILED: _ClassVar[HandoffOutcome]
SIDE_UNSPECIFIED: Side
SIDE_SOURCE: Side
SIDE_SINK: Side
HANDOFF_EVENT_KIND_UNSPECIFIED: HandoffEventKind
HANDOFF_EVENT_KIND_BEGUN: HandoffEventKind
HANDOFF_EVENT_KIND_PROGRESS: HandoffEventKind
HANDOFF_EVENT_KIND_ENDED: HandoffEventKind
HANDOFF_OUTCOME_UNSPECIFIED: HandoffOutcome
HANDOFF_OUTCOME_CONFIRMED: HandoffOutcome
HANDOFF_OUTCOME_CANCELLED: HandoffOutcome
HANDOFF_OUTCOME_FENCED: HandoffOutcome
HANDOFF_OUTCOME_NOT_PINNED: HandoffOutcome
HANDOFF_OUTCOME_DATA_LOSS: HandoffOutcome
HANDOFF_OUTCOME_FAILED: HandoffOutcome

class BooksRequest(_message.Message):
    __slots__ = ("hello", "events", "sums", "peers_down")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    PEERS_DOWN_FIELD_NUMBER: _ClassVar[int]
    hello: BooksHello
    events: _containers.RepeatedCompositeFieldContainer[HandoffEvent]
    sums: BooksSums
    peers_down: _containers.RepeatedCompositeFieldContainer[PeerDown]
    def __init__(self, hello: _Optional[_Union[BooksHello, _Mapping]] = ..., events: _Optional[_Iterable[_Union[HandoffEvent, _Mapping]]] = ..., sums: _Optional[_Union[BooksSums, _Mapping]] = ..., peers_down: _Optional[_Iterable[_Union[PeerDown, _Mapping]]] = ...) -> None: ...

class BooksHello(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: _instance_pb2.Instance
    def __init__(self, instance: _Optional[_Union[_instance_pb2.Instance, _Mapping]] = ...) -> None: ...

class HandoffEvent(_message.Message):
    __slots__ = ("handoff", "side", "kind", "peer_incarnation", "held_bytes", "confirmed_bytes", "traceparent", "outcome", "transport")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PEER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    handoff: _handoff_service_pb2.HandoffId
    side: Side
    kind: HandoffEventKind
    peer_incarnation: str
    held_bytes: int
    confirmed_bytes: int
    traceparent: str
    outcome: HandoffOutcome
    transport: str
    def __init__(self, handoff: _Optional[_Union[_handoff_service_pb2.HandoffId, _Mapping]] = ..., side: _Optional[_Union[Side, str]] = ..., kind: _Optional[_Union[HandoffEventKind, str]] = ..., peer_incarnation: _Optional[str] = ..., held_bytes: _Optional[int] = ..., confirmed_bytes: _Optional[int] = ..., traceparent: _Optional[str] = ..., outcome: _Optional[_Union[HandoffOutcome, str]] = ..., transport: _Optional[str] = ...) -> None: ...

class BooksSums(_message.Message):
    __slots__ = ("pinned_bytes", "reserved_bytes", "stranded_bytes")
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STRANDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    pinned_bytes: int
    reserved_bytes: int
    stranded_bytes: int
    def __init__(self, pinned_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., stranded_bytes: _Optional[int] = ...) -> None: ...

class PeerDown(_message.Message):
    __slots__ = ("incarnation", "reason")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    reason: str
    def __init__(self, incarnation: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class BooksResponse(_message.Message):
    __slots__ = ("introductions", "peers_down")
    INTRODUCTIONS_FIELD_NUMBER: _ClassVar[int]
    PEERS_DOWN_FIELD_NUMBER: _ClassVar[int]
    introductions: _containers.RepeatedCompositeFieldContainer[Introduction]
    peers_down: _containers.RepeatedCompositeFieldContainer[PeerDown]
    def __init__(self, introductions: _Optional[_Iterable[_Union[Introduction, _Mapping]]] = ..., peers_down: _Optional[_Iterable[_Union[PeerDown, _Mapping]]] = ...) -> None: ...

class Introduction(_message.Message):
    __slots__ = ("peer", "pair_secret", "refusal")
    PEER_FIELD_NUMBER: _ClassVar[int]
    PAIR_SECRET_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    peer: _instance_pb2.Instance
    pair_secret: bytes
    refusal: str
    def __init__(self, peer: _Optional[_Union[_instance_pb2.Instance, _Mapping]] = ..., pair_secret: _Optional[bytes] = ..., refusal: _Optional[str] = ...) -> None: ...

class GetBooksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetBooksResponse(_message.Message):
    __slots__ = ("live_handoffs", "held_bytes", "mismatch_bytes", "agreed_handoffs", "disagreed_handoffs", "reporting_incarnations")
    LIVE_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    MISMATCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGREED_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    DISAGREED_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    REPORTING_INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    live_handoffs: int
    held_bytes: int
    mismatch_bytes: int
    agreed_handoffs: int
    disagreed_handoffs: int
    reporting_incarnations: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, live_handoffs: _Optional[int] = ..., held_bytes: _Optional[int] = ..., mismatch_bytes: _Optional[int] = ..., agreed_handoffs: _Optional[int] = ..., disagreed_handoffs: _Optional[int] = ..., reporting_incarnations: _Optional[_Iterable[str]] = ...) -> None: ...
