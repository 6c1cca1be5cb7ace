import pytest
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_prefill.config import PrefillConfig
from baton_prefill.main import PrefillService
from baton_runtime.config import load
from baton_runtime.errors import ConfigError


async def test_prefill_takes_prompts_for_decode_instances_only() -> None:
    assert list(PrefillService(PrefillConfig()).capabilities) == [pb.CAPABILITY_PREFILL_FOR]


def test_setting_of_decode_is_unknown_to_prefill() -> None:
    with pytest.raises(ConfigError, match=r"prefill\.can_prefill"):
        load(PrefillConfig, "prefill", environ={"BATON_PREFILL_CAN_PREFILL": "true"})
