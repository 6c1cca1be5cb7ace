import asyncio

import numpy as np
import pytest
from baton_engine.factory import build_engine
from baton_engine.pool import KvPool
from baton_engine.virtual import request_of, tokens_of
from baton_runtime.errors import ConfigError


def test_sim_engine_in_two_stages():
    loaded = build_engine("sim", profile="instant", block_tokens=32)
    assert loaded.layout.block_tokens == 32
    assert loaded.info.vocab_size == 32000
    assert loaded.num_blocks(10 * loaded.layout.block_bytes + 5) == 10


async def test_bound_engine_runs():
    loaded = build_engine("sim")
    engine = loaded.bind(KvPool(np.zeros((16, loaded.layout.block_bytes), dtype=np.uint8), loaded.layout))
    await engine.open()
    engine.start(request_of("a", tokens_of(20)))
    async with asyncio.timeout(10):
        async for output in engine.outputs():
            if output.ends:
                break
    await engine.close()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "vllm"}, "engine"),
        ({"kind": "torch"}, "model"),
        ({"kind": "sim", "profile": "warp"}, "warp"),
        ({"kind": "sim", "block_tokens": 24, "hash_block_tokens": 16}, "block_tokens"),
    ],
)
def test_bad_setting_is_named(options, field):
    with pytest.raises(ConfigError, match=field):
        build_engine(**options)


def test_memory_for_less_than_a_block_is_refused():
    with pytest.raises(ConfigError, match="kv_memory_bytes"):
        build_engine("sim").num_blocks(10)


def test_pool_of_another_layout_is_refused():
    loaded, other = build_engine("sim"), build_engine("sim", block_tokens=32)
    with pytest.raises(ValueError, match="pool of"):
        loaded.bind(KvPool(np.zeros((4, other.layout.block_bytes), dtype=np.uint8), other.layout))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kind": "sim", "num_shards": 3}, "num_shards: 4 KV heads cannot be split over 3 shards"),
        ({"kind": "torch", "num_shards": 2}, "num_shards: is 2: the torch engine runs on one device"),
    ],
)
def test_shards_an_engine_cannot_have_are_refused_with_the_reason(options, problem):
    with pytest.raises(ConfigError, match=problem):
        build_engine(**options)


def test_block_sizes_that_sixteen_divides_have_one_hash_granularity():
    assert [build_engine("sim", block_tokens=size).hash_block_tokens for size in (16, 64, 8, 24)] == [16, 16, 8, 24]
