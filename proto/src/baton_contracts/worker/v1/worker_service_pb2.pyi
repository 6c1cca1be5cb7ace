from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_BATCH: _ClassVar[Priority]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_DEADLINE: _ClassVar[FinishReason]
    FINISH_REASON_PREFILLED: _ClassVar[FinishReason]
    FINISH_REASON_HANDOFF_FAILED: _ClassVar[FinishReason]
    FINISH_REASON_PREEMPTED: _ClassVar[FinishReason]
    FINISH_REASON_REFUSED: _ClassVar[FinishReason]
    FINISH_REASON_STALE: _ClassVar[FinishReason]
    FINISH_REASON_ENGINE_ERROR: _ClassVar[FinishReason]
    FINISH_REASON_UNKNOWN: _ClassVar[FinishReason]
    FINISH_REASON_INVALID: _ClassVar[FinishReason]

class HandoffFailureCause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HANDOFF_FAILURE_CAUSE_UNSPECIFIED: _ClassVar[HandoffFailureCause]
    HANDOFF_FAILURE_CAUSE_PEER_FENCED: _ClassVar[HandoffFailureCause]
    HANDOFF_FAILURE_CAUSE_PATH_DOWN: _ClassVar[HandoffFailureCause]
    HANDOFF_FAILURE_CAUSE_PEER_CANCELLED: _ClassVar[HandoffFailureCause]
    HANDOFF_FAILURE_CAUSE_NOT_PINNED: _ClassVar[HandoffFailureCause]
    HANDOFF_FAILURE_CAUSE_DATA_LOSS: _ClassVar[HandoffFailureCause]
    HANDOFF_FAILURE_CAUSE_NO_INTRODUCTION: _ClassVar[HandoffFailureCause]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_BATCH: Priority
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_DEADLINE: FinishReason
FINISH_REASON_PREFILLED: FinishReason
FINISH_REASON_HANDOFF_FAILED: FinishReason
FINISH_REASON_PREEMPTED: FinishReason
FINISH_REASON_REFUSED: FinishReason
FINISH_REASON_STALE: FinishReason
FINISH_REASON_ENGINE_ERROR: FinishReason
FINISH_REASON_UNKNOWN: FinishReason
FINISH_REASON_INVALID: FinishReason
HANDOFF_FAILURE_CAUSE_UNSPECIFIED: HandoffFailureCause
HANDOFF_FAILURE_CAUSE_PEER_FENCED: HandoffFailureCause
HANDOFF_FAILURE_CAUSE_PATH_DOWN: HandoffFailureCause
HANDOFF_FAILURE_CAUSE_PEER_CANCELLED: HandoffFailureCause
HANDOFF_FAILURE_CAUSE_NOT_PINNED: HandoffFailureCause
HANDOFF_FAILURE_CAUSE_DATA_LOSS: HandoffFailureCause
HANDOFF_FAILURE_CAUSE_NO_INTRODUCTION: HandoffFailureCause

class AttachRequest(_message.Message):
    __slots__ = ("hello", "starts", "cancels", "ack_frame")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    ACK_FRAME_FIELD_NUMBER: _ClassVar[int]
    hello: AttachHello
    starts: _containers.RepeatedCompositeFieldContainer[Start]
    cancels: _containers.RepeatedCompositeFieldContainer[Cancel]
    ack_frame: int
    def __init__(self, hello: _Optional[_Union[AttachHello, _Mapping]] = ..., starts: _Optional[_Iterable[_Union[Start, _Mapping]]] = ..., cancels: _Optional[_Iterable[_Union[Cancel, _Mapping]]] = ..., ack_frame: _Optional[int] = ...) -> None: ...

class AttachHello(_message.Message):
    __slots__ = ("contract_version", "features", "instance_id", "incarnation", "session", "resumes")
    CONTRACT_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    contract_version: int
    features: _containers.RepeatedScalarFieldContainer[str]
    instance_id: str
    incarnation: str
    session: int
    resumes: _containers.RepeatedCompositeFieldContainer[Resume]
    def __init__(self, contract_version: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., session: _Optional[int] = ..., resumes: _Optional[_Iterable[_Union[Resume, _Mapping]]] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("slot", "request_id", "attempt", "next_position")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    slot: int
    request_id: str
    attempt: int
    next_position: int
    def __init__(self, slot: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., next_position: _Optional[int] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("slot", "request_id", "attempt", "traceparent", "deadline_ms", "priority", "token_ids", "num_prompt_tokens", "cache_root", "sampling", "whole", "prefill_for", "decode_from", "fetch_from")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ROOT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FOR_FIELD_NUMBER: _ClassVar[int]
    DECODE_FROM_FIELD_NUMBER: _ClassVar[int]
    FETCH_FROM_FIELD_NUMBER: _ClassVar[int]
    slot: int
    request_id: str
    attempt: int
    traceparent: str
    deadline_ms: int
    priority: Priority
    token_ids: bytes
    num_prompt_tokens: int
    cache_root: bytes
    sampling: Sampling
    whole: Whole
    prefill_for: PrefillFor
    decode_from: DecodeFrom
    fetch_from: FetchFrom
    def __init__(self, slot: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., traceparent: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., cache_root: _Optional[bytes] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., whole: _Optional[_Union[Whole, _Mapping]] = ..., prefill_for: _Optional[_Union[PrefillFor, _Mapping]] = ..., decode_from: _Optional[_Union[DecodeFrom, _Mapping]] = ..., fetch_from: _Optional[_Union[FetchFrom, _Mapping]] = ...) -> None: ...

class Whole(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefillFor(_message.Message):
    __slots__ = ("decode_instance_id", "decode_incarnation")
    DECODE_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    decode_instance_id: str
    decode_incarnation: str
    def __init__(self, decode_instance_id: _Optional[str] = ..., decode_incarnation: _Optional[str] = ...) -> None: ...

class DecodeFrom(_message.Message):
    __slots__ = ("prefill_instance_id", "prefill_incarnation", "prefill_address")
    PREFILL_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    prefill_instance_id: str
    prefill_incarnation: str
    prefill_address: str
    def __init__(self, prefill_instance_id: _Optional[str] = ..., prefill_incarnation: _Optional[str] = ..., prefill_address: _Optional[str] = ...) -> None: ...

class FetchFrom(_message.Message):
    __slots__ = ("instance_id", "incarnation", "address", "num_tokens")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: str
    address: str
    num_tokens: int
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("seed", "choice", "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "top_logprobs", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    SEED_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    seed: int
    choice: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: int
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    def __init__(self, seed: _Optional[int] = ..., choice: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., ignore_eos: bool = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[int] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("welcome", "frame", "beat", "slots", "positions", "token_ids", "logprobs", "finished")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    welcome: AttachWelcome
    frame: int
    beat: Beat
    slots: bytes
    positions: bytes
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    finished: _containers.RepeatedCompositeFieldContainer[Finished]
    def __init__(self, welcome: _Optional[_Union[AttachWelcome, _Mapping]] = ..., frame: _Optional[int] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., slots: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[Finished, _Mapping]]] = ...) -> None: ...

class AttachWelcome(_message.Message):
    __slots__ = ("contract_version", "features", "instance_id", "incarnation")
    CONTRACT_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    contract_version: int
    features: _containers.RepeatedScalarFieldContainer[str]
    instance_id: str
    incarnation: str
    def __init__(self, contract_version: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("step", "running_step_age_us", "predicted_step_us")
    STEP_FIELD_NUMBER: _ClassVar[int]
    RUNNING_STEP_AGE_US_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_STEP_US_FIELD_NUMBER: _ClassVar[int]
    step: int
    running_step_age_us: int
    predicted_step_us: int
    def __init__(self, step: _Optional[int] = ..., running_step_age_us: _Optional[int] = ..., predicted_step_us: _Optional[int] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("slot", "position", "logprob", "top_token_ids", "top_logprobs")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    position: int
    logprob: float
    top_token_ids: bytes
    top_logprobs: bytes
    def __init__(self, slot: _Optional[int] = ..., position: _Optional[int] = ..., logprob: _Optional[float] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("slot", "reason", "stop_token_id", "usage", "handoff_failure", "error")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FAILURE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    slot: int
    reason: FinishReason
    stop_token_id: int
    usage: Usage
    handoff_failure: HandoffFailure
    error: ErrorDetail
    def __init__(self, slot: _Optional[int] = ..., reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., handoff_failure: _Optional[_Union[HandoffFailure, _Mapping]] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("input_tokens", "cached_tokens", "output_tokens", "handoff_bytes", "queue_us", "exposed_handoff_us", "fetched_tokens")
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_HANDOFF_US_FIELD_NUMBER: _ClassVar[int]
    FETCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    handoff_bytes: int
    queue_us: int
    exposed_handoff_us: int
    fetched_tokens: int
    def __init__(self, input_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., handoff_bytes: _Optional[int] = ..., queue_us: _Optional[int] = ..., exposed_handoff_us: _Optional[int] = ..., fetched_tokens: _Optional[int] = ...) -> None: ...

class HandoffFailure(_message.Message):
    __slots__ = ("peer_incarnation", "cause", "confirmed_tokens")
    PEER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    peer_incarnation: str
    cause: HandoffFailureCause
    confirmed_tokens: int
    def __init__(self, peer_incarnation: _Optional[str] = ..., cause: _Optional[_Union[HandoffFailureCause, str]] = ..., confirmed_tokens: _Optional[int] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "message", "retry_after_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    retry_after_ms: int
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class WatchWorkerRequest(_message.Message):
    __slots__ = ("instance_id",)
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    def __init__(self, instance_id: _Optional[str] = ...) -> None: ...

class WatchWorkerResponse(_message.Message):
    __slots__ = ("sequence_number", "beat", "incarnation", "snapshot", "stored", "removed", "load")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    beat: Beat
    incarnation: str
    snapshot: bool
    stored: bytes
    removed: bytes
    load: WorkerLoad
    def __init__(self, sequence_number: _Optional[int] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., incarnation: _Optional[str] = ..., snapshot: bool = ..., stored: _Optional[bytes] = ..., removed: _Optional[bytes] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("blocks", "running_sequences", "waiting_sequences", "waiting_prefill_tokens", "active_kv_tokens", "samples", "draining")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    blocks: BlockCounts
    running_sequences: int
    waiting_sequences: int
    waiting_prefill_tokens: int
    active_kv_tokens: int
    samples: _containers.RepeatedCompositeFieldContainer[StepSample]
    draining: bool
    def __init__(self, blocks: _Optional[_Union[BlockCounts, _Mapping]] = ..., running_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., waiting_prefill_tokens: _Optional[int] = ..., active_kv_tokens: _Optional[int] = ..., samples: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ..., draining: bool = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("prefill_tokens", "decode_sequences", "kv_tokens", "duration_us")
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    prefill_tokens: int
    decode_sequences: int
    kv_tokens: int
    duration_us: int
    def __init__(self, prefill_tokens: _Optional[int] = ..., decode_sequences: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., duration_us: _Optional[int] = ...) -> None: ...

class BlockCounts(_message.Message):
    __slots__ = ("total", "free", "cached", "pinned", "reserved", "used")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    total: int
    free: int
    cached: int
    pinned: int
    reserved: int
    used: int
    def __init__(self, total: _Optional[int] = ..., free: _Optional[int] = ..., cached: _Optional[int] = ..., pinned: _Optional[int] = ..., reserved: _Optional[int] = ..., used: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("instance_id", "incarnation", "load", "integrity_error", "block_bytes", "stranded_bytes", "live_handoffs", "live_sequences", "safe_to_stop")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_ERROR_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    STRANDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIVE_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    LIVE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SAFE_TO_STOP_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: str
    load: WorkerLoad
    integrity_error: str
    block_bytes: int
    stranded_bytes: int
    live_handoffs: int
    live_sequences: int
    safe_to_stop: bool
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., integrity_error: _Optional[str] = ..., block_bytes: _Optional[int] = ..., stranded_bytes: _Optional[int] = ..., live_handoffs: _Optional[int] = ..., live_sequences: _Optional[int] = ..., safe_to_stop: bool = ...) -> None: ...
