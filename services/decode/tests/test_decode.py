from pathlib import Path

import pytest
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_decode.config import DecodeConfig
from baton_decode.main import DecodeService
from baton_runtime.config import load
from baton_runtime.errors import ConfigError


async def test_decode_takes_handed_over_and_whole_requests() -> None:
    assert list(DecodeService(DecodeConfig()).capabilities) == [pb.CAPABILITY_DECODE_FROM, pb.CAPABILITY_WHOLE]


async def test_decode_that_must_not_prefill_takes_no_whole_requests() -> None:
    assert list(DecodeService(DecodeConfig(can_prefill=False)).capabilities) == [pb.CAPABILITY_DECODE_FROM]


async def test_an_sglang_server_takes_whole_requests_or_handed_over_ones() -> None:
    assert list(DecodeService(DecodeConfig(engine="sglang")).capabilities) == [pb.CAPABILITY_WHOLE]
    assert list(DecodeService(DecodeConfig(engine="sglang", can_prefill=False)).capabilities) == [pb.CAPABILITY_DECODE_FROM]


def test_settings_come_from_the_environment() -> None:
    environment = {"BATON_DECODE_TRANSPORTS": "tcp", "BATON_DECODE_MODEL": "/m", "BATON_DECODE_CAN_PREFILL": "false"}
    config = load(DecodeConfig, "decode", environ=environment)
    assert (config.transports, config.model, config.can_prefill) == (("tcp",), Path("/m"), False)


@pytest.mark.parametrize(
    ("name", "value"), [("ENGINE", "vllm"), ("NUM_BLOCKS", "-1"), ("TRANSPORTS", "shm,rdma"), ("MAX_WAITING", "0"), ("BLOCK_TOKEN", "16")]
)
def test_wrong_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"decode\.{name.lower()}"):
        load(DecodeConfig, "decode", environ={f"BATON_DECODE_{name}": value})
