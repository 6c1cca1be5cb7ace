from baton_contracts.worker.v1 import worker_service_pb2 as _worker_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteRequest(_message.Message):
    __slots__ = ("queries", "withdrawn_query_ids", "paths_down", "fenced_incarnations", "ended_query_ids")
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_QUERY_IDS_FIELD_NUMBER: _ClassVar[int]
    PATHS_DOWN_FIELD_NUMBER: _ClassVar[int]
    FENCED_INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    ENDED_QUERY_IDS_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[Query]
    withdrawn_query_ids: _containers.RepeatedScalarFieldContainer[int]
    paths_down: _containers.RepeatedCompositeFieldContainer[PathDown]
    fenced_incarnations: _containers.RepeatedScalarFieldContainer[str]
    ended_query_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, queries: _Optional[_Iterable[_Union[Query, _Mapping]]] = ..., withdrawn_query_ids: _Optional[_Iterable[int]] = ..., paths_down: _Optional[_Iterable[_Union[PathDown, _Mapping]]] = ..., fenced_incarnations: _Optional[_Iterable[str]] = ..., ended_query_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Query(_message.Message):
    __slots__ = ("query_id", "request_id", "attempt", "model", "priority", "num_tokens", "block_hashes", "max_new_tokens", "excluded_incarnations", "deadline_ms", "traceparent")
    QUERY_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    query_id: int
    request_id: str
    attempt: int
    model: str
    priority: _worker_service_pb2.Priority
    num_tokens: int
    block_hashes: bytes
    max_new_tokens: int
    excluded_incarnations: _containers.RepeatedScalarFieldContainer[str]
    deadline_ms: int
    traceparent: str
    def __init__(self, query_id: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., model: _Optional[str] = ..., priority: _Optional[_Union[_worker_service_pb2.Priority, str]] = ..., num_tokens: _Optional[int] = ..., block_hashes: _Optional[bytes] = ..., max_new_tokens: _Optional[int] = ..., excluded_incarnations: _Optional[_Iterable[str]] = ..., deadline_ms: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class PathDown(_message.Message):
    __slots__ = ("prefill_incarnation", "decode_incarnation")
    PREFILL_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    prefill_incarnation: str
    decode_incarnation: str
    def __init__(self, prefill_incarnation: _Optional[str] = ..., decode_incarnation: _Optional[str] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    def __init__(self, answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("query_id", "placement", "refusal")
    QUERY_ID_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    query_id: int
    placement: Placement
    refusal: Refusal
    def __init__(self, query_id: _Optional[int] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("decode", "prefill", "predicted_queue_us", "predicted_prefill_us", "predicted_transfer_us", "fetch_from", "predicted_fetch_us")
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TRANSFER_US_FIELD_NUMBER: _ClassVar[int]
    FETCH_FROM_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FETCH_US_FIELD_NUMBER: _ClassVar[int]
    decode: Target
    prefill: Target
    predicted_queue_us: int
    predicted_prefill_us: int
    predicted_transfer_us: int
    fetch_from: Target
    predicted_fetch_us: int
    def __init__(self, decode: _Optional[_Union[Target, _Mapping]] = ..., prefill: _Optional[_Union[Target, _Mapping]] = ..., predicted_queue_us: _Optional[int] = ..., predicted_prefill_us: _Optional[int] = ..., predicted_transfer_us: _Optional[int] = ..., fetch_from: _Optional[_Union[Target, _Mapping]] = ..., predicted_fetch_us: _Optional[int] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("instance_id", "incarnation", "address", "cached_tokens")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: str
    address: str
    cached_tokens: int
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "message", "retry_after_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    retry_after_ms: int
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...
