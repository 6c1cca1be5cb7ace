"""From settings to an engine on its memory, and to the record other services see. Blocking: called in a thread."""

import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from baton_contracts.discovery.v1.instance_pb2 import Capability, Instance, KvLayout, Model, Service, TransportOffer
from baton_engine.api import Engine
from baton_engine.errors import ProfileError
from baton_engine.factory import LoadedEngine, build_engine, default_hash_block_tokens
from baton_engine.hf_model import memory_limit_bytes
from baton_engine.pool import BlockLayout, KvPool
from baton_handoff.native import NativeTransport
from baton_handoff.transports import PoolMemory, Transport, make_transports, sweep_stale
from baton_runtime.errors import ConfigError
from baton_runtime.rpc import advertised_address, split_address

from baton_worker.config import WorkerConfig

if TYPE_CHECKING:
    from baton_engine.sglang.engine import SglangEngine


@dataclass(frozen=True, slots=True)
class OpenedEngine:
    """An open engine, how its prefixes are hashed, and the ways of handing its KV over, not yet open."""

    engine: Engine
    hash_block_tokens: int
    transports: list[Transport]


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """A loaded engine and the memory its pool lies in, which must be closed."""

    loaded: LoadedEngine
    pool: KvPool
    memory: PoolMemory


def load_engine(config: WorkerConfig, service: str) -> LoadedEngine:
    """Read the model or the profile.

    Raises: ConfigError naming `<service>.<setting>`: no such folder, not a model, too large, no such profile.
    """
    try:
        return build_engine(
            config.engine,
            config.model,
            config.profile,
            block_tokens=config.block_tokens,
            hash_block_tokens=config.hash_block_tokens,
            num_shards=config.num_shards,
            max_batch_sequences=config.max_batch_sequences,
            max_chunk_tokens=config.max_chunk_tokens,
            max_waiting=config.max_waiting,
            device=config.device,
            num_threads=config.torch_threads or None,
        )
    except ProfileError as error:  # of the sim: its field is a place in a file of the profile or of the model folder
        setting = "model" if config.model is not None and error.field.startswith(str(config.model)) else "profile"
        raise ConfigError(f"{service}.{setting}", error.message) from error
    except ConfigError as error:
        raise _named(service, error) from error


def allocate(config: WorkerConfig, service: str, loaded: LoadedEngine, incarnation: str) -> EngineMemory:
    """Take the memory of the KV pool, after removing what dead workers left in shared memory.

    Raises: ConfigError naming num_blocks or kv_memory_bytes if it does not fit.
    """
    try:
        num_blocks = config.num_blocks or loaded.num_blocks(config.pool_bytes)
    except ConfigError as error:
        raise _named(service, error) from error
    needed, available = num_blocks * loaded.layout.block_bytes, memory_limit_bytes()
    if needed > available:
        field = "num_blocks" if config.num_blocks else "kv_memory_bytes"
        raise ConfigError(f"{service}.{field}", f"{num_blocks} KV blocks need {_gib(needed)}, available are {_gib(available)}")
    if "shm" in config.transports:
        sweep_stale()
    pool, memory = PoolMemory.allocate(num_blocks, loaded.layout, incarnation, shared="shm" in config.transports)
    return EngineMemory(loaded, pool, memory)


def bind_engine(made: EngineMemory, service: str) -> Engine:
    """The engine on its memory, not yet open. Raises: ConfigError if weights and pool together do not fit."""
    try:
        return made.loaded.bind(made.pool)
    except ConfigError as error:
        raise _named(service, error) from error


def transports_of(config: WorkerConfig, service: str, made: EngineMemory, incarnation: str) -> list[Transport]:
    """The transports of the settings, best first, not yet open. Raises: ConfigError if none can be used."""
    host, _ = split_address(config.advertise)
    try:
        return make_transports(config.transports, made.memory, made.pool, incarnation, config.transfer_listen, host)
    except ValueError as error:
        raise ConfigError(f"{service}.transports", str(error)) from error


def make_sglang(config: WorkerConfig, service: str, capabilities: Collection["Capability"]) -> "SglangEngine":
    """An SGLang server of the mode that fits what the instance may be given, not yet started.

    Raises: ConfigError naming model, or a setting of sglang.
    """
    try:
        from baton_engine.sglang.child import SglangSettings
        from baton_engine.sglang.engine import SglangEngine, read_folder
    except ImportError as error:
        raise ConfigError(f"{service}.engine", f"sglang needs the extra baton-engine[sglang]: {error}") from error
    if config.model is None:
        raise ConfigError(f"{service}.model", "the sglang engine needs a model folder")
    host, port = split_address(config.transfer_listen)
    settings = SglangSettings(
        model=config.model.resolve(),
        mode=_sglang_mode(capabilities),
        command=config.sglang_command,
        args=config.sglang_args,
        host=host.strip("[]"),
        host_ip=_ip_of(split_address(config.advertise)[0] or host),
        bootstrap_port=port or 0,
        page_size=config.block_tokens,
        hash_block_tokens=sglang_hash_block_tokens(config),
        loads_tokenizer=config.sglang_tokenizer,
        start_s=config.sglang_start_s,
        pinned_s=config.sglang_pinned_s,
        max_waiting=config.max_waiting,
    )
    try:
        return SglangEngine(settings, read_folder(settings))
    except ConfigError as error:
        raise _named(service, error) from error


def sglang_hash_block_tokens(config: WorkerConfig) -> int:
    """hash_block_tokens, or what stands in for it, by the rule of our own engines."""
    return config.hash_block_tokens or default_hash_block_tokens(config.block_tokens)


def native_transport(config: WorkerConfig, engine: "SglangEngine") -> NativeTransport:
    """What an open SGLang server offers to others."""
    host, _ = split_address(config.advertise)
    port = engine.bootstrap_port
    return NativeTransport(engine.handoff_name, advertised_address(config.transfer_listen, port, host) if port else "")


def _ip_of(host: str) -> str:
    """An address that others can use for it; "" if there is none to be seen from here."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return ""
    return "" if found in ("0.0.0.0", "::") else str(found)


def _sglang_mode(capabilities: Collection["Capability"]) -> str:
    if Capability.CAPABILITY_PREFILL_FOR in capabilities:
        return "prefill"
    return "null" if Capability.CAPABILITY_WHOLE in capabilities else "decode"


def instance_record(
    config: WorkerConfig,
    *,
    service: "Service",
    distribution: str,
    instance_id: str,
    incarnation: str,
    grpc_address: str,
    metrics_address: str,
    opened: OpenedEngine,
    transports: Sequence[Transport],
    capabilities: Sequence["Capability"],
) -> Instance:
    """What this worker says about itself in discovery. transports are open."""
    info = opened.engine.info
    return Instance(
        service=service,
        instance_id=instance_id,
        incarnation=incarnation,
        version=version(distribution),
        contracts_version=version("baton-contracts"),
        grpc_address=grpc_address,
        metrics_address=metrics_address,
        pid=os.getpid(),
        zone=config.zone,
        model=Model(
            served_name=config.name_for_clients,
            fingerprint=info.fingerprint,
            path=str(config.model.resolve()) if config.model is not None else "",
            hash_block_tokens=opened.hash_block_tokens,
            max_model_tokens=info.max_model_tokens,
            vocab_size=info.vocab_size,
        ),
        layout=layout_message(opened.engine.pool.layout),
        transports=[TransportOffer(name=transport.name, parameters=transport.offer()) for transport in transports],
        capabilities=capabilities,
    )


def layout_message(layout: BlockLayout) -> KvLayout:
    """A layout as it travels."""
    return KvLayout(
        block_tokens=layout.block_tokens,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        block_bytes=layout.block_bytes,
        num_shards=layout.num_shards,
    )


def _named(service: str, error: ConfigError) -> ConfigError:
    """The same error with the service in front of the setting, as every other configuration error has it."""
    return ConfigError(f"{service}.{error.field}", error.message.removeprefix(f"{error.field}: "))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
