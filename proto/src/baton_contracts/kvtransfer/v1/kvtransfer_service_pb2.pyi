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
    __slots__ = ("hello", "events", "sums", "peers_down", "sequence", "links")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    PEERS_DOWN_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    hello: BooksHello
    events: _containers.RepeatedCompositeFieldContainer[HandoffEvent]
    sums: BooksSums
    peers_down: _containers.RepeatedCompositeFieldContainer[PeerDown]
    sequence: int
    links: _containers.RepeatedCompositeFieldContainer[LinkReport]
    def __init__(self, hello: _Optional[_Union[BooksHello, _Mapping]] = ..., events: _Optional[_Iterable[_Union[HandoffEvent, _Mapping]]] = ..., sums: _Optional[_Union[BooksSums, _Mapping]] = ..., peers_down: _Optional[_Iterable[_Union[PeerDown, _Mapping]]] = ..., sequence: _Optional[int] = ..., links: _Optional[_Iterable[_Union[LinkReport, _Mapping]]] = ...) -> None: ...

class LinkReport(_message.Message):
    __slots__ = ("source_incarnation", "transport", "reason", "pulled_bytes", "bytes_per_s", "is_closed")
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    IS_CLOSED_FIELD_NUMBER: _ClassVar[int]
    source_incarnation: str
    transport: str
    reason: str
    pulled_bytes: int
    bytes_per_s: int
    is_closed: bool
    def __init__(self, source_incarnation: _Optional[str] = ..., transport: _Optional[str] = ..., reason: _Optional[str] = ..., pulled_bytes: _Optional[int] = ..., bytes_per_s: _Optional[int] = ..., is_closed: bool = ...) -> None: ...

class BooksHello(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: _instance_pb2.Instance
    def __init__(self, instance: _Optional[_Union[_instance_pb2.Instance, _Mapping]] = ...) -> None: ...

class HandoffEvent(_message.Message):
    __slots__ = ("handoff", "side", "kind", "peer_incarnation", "held_bytes", "confirmed_bytes", "traceparent", "outcome", "transport", "pulled_bytes", "pull_us", "age_us")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PEER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PULL_US_FIELD_NUMBER: _ClassVar[int]
    AGE_US_FIELD_NUMBER: _ClassVar[int]
    handoff: _handoff_service_pb2.HandoffId
    side: Side
    kind: HandoffEventKind
    peer_incarnation: str
    held_bytes: int
    confirmed_bytes: int
    traceparent: str
    outcome: HandoffOutcome
    transport: str
    pulled_bytes: int
    pull_us: int
    age_us: int
    def __init__(self, handoff: _Optional[_Union[_handoff_service_pb2.HandoffId, _Mapping]] = ..., side: _Optional[_Union[Side, str]] = ..., kind: _Optional[_Union[HandoffEventKind, str]] = ..., peer_incarnation: _Optional[str] = ..., held_bytes: _Optional[int] = ..., confirmed_bytes: _Optional[int] = ..., traceparent: _Optional[str] = ..., outcome: _Optional[_Union[HandoffOutcome, str]] = ..., transport: _Optional[str] = ..., pulled_bytes: _Optional[int] = ..., pull_us: _Optional[int] = ..., age_us: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("introductions", "peers_down", "booked_sequence")
    INTRODUCTIONS_FIELD_NUMBER: _ClassVar[int]
    PEERS_DOWN_FIELD_NUMBER: _ClassVar[int]
    BOOKED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    introductions: _containers.RepeatedCompositeFieldContainer[Introduction]
    peers_down: _containers.RepeatedCompositeFieldContainer[PeerDown]
    booked_sequence: int
    def __init__(self, introductions: _Optional[_Iterable[_Union[Introduction, _Mapping]]] = ..., peers_down: _Optional[_Iterable[_Union[PeerDown, _Mapping]]] = ..., booked_sequence: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("live_handoffs", "held_bytes", "mismatch_bytes", "agreed_handoffs", "disagreed_handoffs", "reporting_incarnations", "links")
    LIVE_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    MISMATCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGREED_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    DISAGREED_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    REPORTING_INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    live_handoffs: int
    held_bytes: int
    mismatch_bytes: int
    agreed_handoffs: int
    disagreed_handoffs: int
    reporting_incarnations: _containers.RepeatedScalarFieldContainer[str]
    links: _containers.RepeatedCompositeFieldContainer[Link]
    def __init__(self, live_handoffs: _Optional[int] = ..., held_bytes: _Optional[int] = ..., mismatch_bytes: _Optional[int] = ..., agreed_handoffs: _Optional[int] = ..., disagreed_handoffs: _Optional[int] = ..., reporting_incarnations: _Optional[_Iterable[str]] = ..., links: _Optional[_Iterable[_Union[Link, _Mapping]]] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("sink_instance_id", "sink_incarnation", "source_instance_id", "report")
    SINK_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    SINK_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    sink_instance_id: str
    sink_incarnation: str
    source_instance_id: str
    report: LinkReport
    def __init__(self, sink_instance_id: _Optional[str] = ..., sink_incarnation: _Optional[str] = ..., source_instance_id: _Optional[str] = ..., report: _Optional[_Union[LinkReport, _Mapping]] = ...) -> None: ...

class WatchHandoffsRequest(_message.Message):
    __slots__ = ("instance_id", "request_id")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    request_id: str
    def __init__(self, instance_id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class WatchHandoffsResponse(_message.Message):
    __slots__ = ("revision", "snapshot", "delta", "end")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    revision: int
    snapshot: HandoffSnapshot
    delta: HandoffDelta
    end: WatchEnd
    def __init__(self, revision: _Optional[int] = ..., snapshot: _Optional[_Union[HandoffSnapshot, _Mapping]] = ..., delta: _Optional[_Union[HandoffDelta, _Mapping]] = ..., end: _Optional[_Union[WatchEnd, _Mapping]] = ...) -> None: ...

class HandoffSnapshot(_message.Message):
    __slots__ = ("handoffs", "left_out", "dropped_changes")
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_CHANGES_FIELD_NUMBER: _ClassVar[int]
    handoffs: _containers.RepeatedCompositeFieldContainer[HandoffView]
    left_out: int
    dropped_changes: int
    def __init__(self, handoffs: _Optional[_Iterable[_Union[HandoffView, _Mapping]]] = ..., left_out: _Optional[int] = ..., dropped_changes: _Optional[int] = ...) -> None: ...

class HandoffDelta(_message.Message):
    __slots__ = ("handoffs",)
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    handoffs: _containers.RepeatedCompositeFieldContainer[HandoffView]
    def __init__(self, handoffs: _Optional[_Iterable[_Union[HandoffView, _Mapping]]] = ...) -> None: ...

class WatchEnd(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class HandoffView(_message.Message):
    __slots__ = ("handoff", "source", "sink", "is_live", "age_us", "transport", "transport_reason", "pulled_bytes", "pull_us")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SINK_FIELD_NUMBER: _ClassVar[int]
    IS_LIVE_FIELD_NUMBER: _ClassVar[int]
    AGE_US_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_REASON_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PULL_US_FIELD_NUMBER: _ClassVar[int]
    handoff: _handoff_service_pb2.HandoffId
    source: HandoffSide
    sink: HandoffSide
    is_live: bool
    age_us: int
    transport: str
    transport_reason: str
    pulled_bytes: int
    pull_us: int
    def __init__(self, handoff: _Optional[_Union[_handoff_service_pb2.HandoffId, _Mapping]] = ..., source: _Optional[_Union[HandoffSide, _Mapping]] = ..., sink: _Optional[_Union[HandoffSide, _Mapping]] = ..., is_live: bool = ..., age_us: _Optional[int] = ..., transport: _Optional[str] = ..., transport_reason: _Optional[str] = ..., pulled_bytes: _Optional[int] = ..., pull_us: _Optional[int] = ...) -> None: ...

class HandoffSide(_message.Message):
    __slots__ = ("instance_id", "incarnation", "kind", "held_bytes", "confirmed_bytes", "outcome", "is_down")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    IS_DOWN_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: str
    kind: HandoffEventKind
    held_bytes: int
    confirmed_bytes: int
    outcome: HandoffOutcome
    is_down: bool
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., kind: _Optional[_Union[HandoffEventKind, str]] = ..., held_bytes: _Optional[int] = ..., confirmed_bytes: _Optional[int] = ..., outcome: _Optional[_Union[HandoffOutcome, str]] = ..., is_down: bool = ...) -> None: ...
