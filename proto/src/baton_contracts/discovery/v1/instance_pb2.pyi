from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Service(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVICE_UNSPECIFIED: _ClassVar[Service]
    SERVICE_FRONTEND: _ClassVar[Service]
    SERVICE_ROUTER: _ClassVar[Service]
    SERVICE_PREFILL: _ClassVar[Service]
    SERVICE_DECODE: _ClassVar[Service]
    SERVICE_KVTRANSFER: _ClassVar[Service]

class Capability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPABILITY_UNSPECIFIED: _ClassVar[Capability]
    CAPABILITY_PREFILL_FOR: _ClassVar[Capability]
    CAPABILITY_DECODE_FROM: _ClassVar[Capability]
    CAPABILITY_WHOLE: _ClassVar[Capability]
SERVICE_UNSPECIFIED: Service
SERVICE_FRONTEND: Service
SERVICE_ROUTER: Service
SERVICE_PREFILL: Service
SERVICE_DECODE: Service
SERVICE_KVTRANSFER: Service
CAPABILITY_UNSPECIFIED: Capability
CAPABILITY_PREFILL_FOR: Capability
CAPABILITY_DECODE_FROM: Capability
CAPABILITY_WHOLE: Capability

class Instance(_message.Message):
    __slots__ = ("service", "instance_id", "incarnation", "version", "contracts_version", "grpc_address", "http_address", "metrics_address", "pid", "zone", "draining", "model", "layout", "transports", "capabilities")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTRACTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    service: Service
    instance_id: str
    incarnation: str
    version: str
    contracts_version: str
    grpc_address: str
    http_address: str
    metrics_address: str
    pid: int
    zone: str
    draining: bool
    model: Model
    layout: KvLayout
    transports: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    capabilities: _containers.RepeatedScalarFieldContainer[Capability]
    def __init__(self, service: _Optional[_Union[Service, str]] = ..., instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., version: _Optional[str] = ..., contracts_version: _Optional[str] = ..., grpc_address: _Optional[str] = ..., http_address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., pid: _Optional[int] = ..., zone: _Optional[str] = ..., draining: bool = ..., model: _Optional[_Union[Model, _Mapping]] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., transports: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., capabilities: _Optional[_Iterable[_Union[Capability, str]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("served_name", "fingerprint", "path", "hash_block_tokens", "max_model_tokens", "vocab_size")
    SERVED_NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    HASH_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    served_name: str
    fingerprint: str
    path: str
    hash_block_tokens: int
    max_model_tokens: int
    vocab_size: int
    def __init__(self, served_name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., path: _Optional[str] = ..., hash_block_tokens: _Optional[int] = ..., max_model_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("block_tokens", "num_layers", "num_kv_heads", "head_dim", "dtype", "block_bytes", "num_shards")
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    block_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_bytes: int
    num_shards: int
    def __init__(self, block_tokens: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., block_bytes: _Optional[int] = ..., num_shards: _Optional[int] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("name", "parameters")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    parameters: bytes
    def __init__(self, name: _Optional[str] = ..., parameters: _Optional[bytes] = ...) -> None: ...
