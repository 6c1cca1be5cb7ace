from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DrainPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAIN_PHASE_UNSPECIFIED: _ClassVar[DrainPhase]
    DRAIN_PHASE_DRAINING: _ClassVar[DrainPhase]
    DRAIN_PHASE_DRAINED: _ClassVar[DrainPhase]
    DRAIN_PHASE_CUT_OFF: _ClassVar[DrainPhase]
DRAIN_PHASE_UNSPECIFIED: DrainPhase
DRAIN_PHASE_DRAINING: DrainPhase
DRAIN_PHASE_DRAINED: DrainPhase
DRAIN_PHASE_CUT_OFF: DrainPhase

class DrainRequest(_message.Message):
    __slots__ = ("incarnation", "grace")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    grace: _duration_pb2.Duration
    def __init__(self, incarnation: _Optional[str] = ..., grace: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("instance_id", "incarnation", "phase", "elapsed", "remaining", "holdings")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: str
    phase: DrainPhase
    elapsed: _duration_pb2.Duration
    remaining: _duration_pb2.Duration
    holdings: Holdings
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., phase: _Optional[_Union[DrainPhase, str]] = ..., elapsed: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., remaining: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., holdings: _Optional[_Union[Holdings, _Mapping]] = ...) -> None: ...

class Holdings(_message.Message):
    __slots__ = ("running", "live_handoffs", "pinned_blocks", "reserved_blocks")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    LIVE_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    running: int
    live_handoffs: int
    pinned_blocks: int
    reserved_blocks: int
    def __init__(self, running: _Optional[int] = ..., live_handoffs: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., reserved_blocks: _Optional[int] = ...) -> None: ...
