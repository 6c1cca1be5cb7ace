import json
import sys
from pathlib import Path

import pytest
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_engine.api import Engine
from baton_runtime.errors import ConfigError
from baton_worker.assembly import (
    EngineMemory,
    OpenedEngine,
    allocate,
    bind_engine,
    instance_record,
    load_engine,
    make_sglang,
    transports_of,
)
from baton_worker.config import WorkerConfig


def test_missing_model_folder_is_a_configuration_error_naming_it(tmp_path: Path) -> None:
    for engine in ("sim", "torch"):
        with pytest.raises(ConfigError) as refusal:
            load_engine(WorkerConfig(engine=engine, model=tmp_path / "none", profile="instant"), "decode")
        assert refusal.value.field == "decode.model"
        assert str(refusal.value).startswith(f"decode.model: {tmp_path / 'none'}")


def test_torch_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"decode\.model"):
        load_engine(WorkerConfig(engine="torch"), "decode")


def test_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"prefill\.profile.*instant"):
        load_engine(WorkerConfig(profile="nope"), "prefill")


def test_pool_larger_than_memory_is_refused_naming_the_setting_that_asked_for_it() -> None:
    loaded = load_engine(WorkerConfig(profile="instant"), "decode")
    with pytest.raises(ConfigError, match=r"decode\.num_blocks.*GiB"):
        allocate(WorkerConfig(num_blocks=2_000_000_000), "decode", loaded, "i")
    with pytest.raises(ConfigError, match=r"decode\.kv_memory_bytes"):
        allocate(WorkerConfig(kv_memory_bytes=1 << 50), "decode", loaded, "i")


def test_pool_smaller_than_a_block_is_refused() -> None:
    config = WorkerConfig(profile="instant", block_tokens=1 << 16, kv_memory_bytes=1 << 16)
    with pytest.raises(ConfigError, match=r"prefill\.kv_memory_bytes"):
        allocate(config, "prefill", load_engine(config, "prefill"), "i")


def test_record_says_model_layout_transports_and_capabilities(tmp_path: Path) -> None:
    config = WorkerConfig(profile="instant", num_blocks=8, transports=("tcp",), zone="a", served_name="m")
    loaded = load_engine(config, "decode")
    made = allocate(config, "decode", loaded, "i" * 16)
    engine = bind_engine(made, "decode")
    record = record_of(config, made, engine)
    assert (record.model.served_name, record.model.fingerprint, record.zone) == ("m", engine.info.fingerprint, "a")
    assert (record.layout.block_tokens, record.layout.block_bytes) == (16, made.pool.block_bytes)
    assert record.model.hash_block_tokens == 16
    assert list(record.capabilities) == [pb.CAPABILITY_WHOLE]
    assert (record.version, record.contracts_version) == ("0.1.0", "0.1.0")
    made.memory.close()


def record_of(config: WorkerConfig, made: EngineMemory, engine: Engine) -> pb.Instance:
    return instance_record(
        config,
        service=pb.SERVICE_DECODE,
        distribution="baton-worker",
        instance_id="decode-0",
        incarnation="i" * 16,
        grpc_address="127.0.0.1:1",
        metrics_address="127.0.0.1:2",
        opened=OpenedEngine(engine, made.loaded.hash_block_tokens, []),
        transports=[],
        capabilities=[pb.CAPABILITY_WHOLE],
    )


def test_no_transport_is_a_configuration_error() -> None:
    config = WorkerConfig(profile="instant", num_blocks=8, transports=())
    made = allocate(config, "decode", load_engine(config, "decode"), "i" * 16)
    with pytest.raises(ConfigError, match=r"decode\.transports"):
        transports_of(config, "decode", made, "i" * 16)
    made.memory.close()


def test_name_for_clients_falls_back_to_the_folder(tmp_path: Path) -> None:
    assert WorkerConfig().name_for_clients == "sim"
    assert WorkerConfig(model=tmp_path).name_for_clients == tmp_path.name
    assert WorkerConfig(model=tmp_path, served_name="x").name_for_clients == "x"


def test_shards_the_engine_cannot_have_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"prefill\.num_shards: 4 KV heads cannot be split over 3"):
        load_engine(WorkerConfig(profile="instant", num_shards=3), "prefill")


def sglang(tmp_path: Path, **about: object) -> WorkerConfig:
    """Settings over a model folder that only an engine which is not ours can run."""
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    config = {"architectures": ["GptOssForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8}
    config |= {"max_position_embeddings": 4096, "vocab_size": 100, "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"weight": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (folder / "tokenizer.json").write_text("{}")
    return WorkerConfig(**{"engine": "sglang", "model": folder, "sglang_command": sys.executable} | about)  # type: ignore[arg-type]


def test_sglang_is_started_in_the_mode_that_fits_what_the_instance_may_be_given(tmp_path: Path) -> None:
    config = sglang(tmp_path, transfer_listen="127.0.0.1:8998", sglang_args="--tp-size 4")
    modes = {
        (pb.CAPABILITY_PREFILL_FOR,): ["--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", "8998"],
        (pb.CAPABILITY_DECODE_FROM,): ["--disaggregation-mode", "decode"],
        (pb.CAPABILITY_WHOLE,): [],
    }
    for capabilities, flags in modes.items():
        command = make_sglang(config, "decode", capabilities).child.command()
        assert [
            word for word in command if word in ("--disaggregation-mode", "prefill", "decode", "--disaggregation-bootstrap-port", "8998")
        ] == flags
        assert command[-2:] == ["--tp-size", "4"]
        assert ("--kv-events-config" in command) == (capabilities != (pb.CAPABILITY_DECODE_FROM,))


def test_servers_tell_each_other_the_address_that_is_advertised_and_none_that_nobody_can_reach(tmp_path: Path) -> None:
    for listen, advertise, expected in (
        ("127.0.0.2:0", "", "127.0.0.2"),
        ("0.0.0.0:8998", "127.0.0.3:7000", "127.0.0.3"),
        ("0.0.0.0:8998", "", ""),
        ("0.0.0.0:8998", "no-such-host.invalid", ""),
    ):
        engine = make_sglang(sglang(tmp_path, transfer_listen=listen, advertise=advertise), "decode", [pb.CAPABILITY_DECODE_FROM])
        assert engine.child.settings.host_ip == expected


def test_what_is_wrong_with_the_settings_of_sglang_is_named(tmp_path: Path) -> None:
    whole = [pb.CAPABILITY_WHOLE]
    with pytest.raises(ConfigError, match=r"decode\.model"):
        make_sglang(WorkerConfig(engine="sglang"), "decode", whole)
    with pytest.raises(ConfigError, match=r"decode\.sglang_command.*nowhere"):
        make_sglang(sglang(tmp_path, sglang_command="nowhere"), "decode", whole)
    with pytest.raises(ConfigError, match=r"prefill\.model: .*no such folder"):
        make_sglang(WorkerConfig(engine="sglang", model=tmp_path / "none"), "prefill", whole)
