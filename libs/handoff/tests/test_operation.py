import numpy as np
import pytest
from baton_engine.pool import BlockLayout, KvPool
from baton_handoff.transports.base import MAX_OPERATION_BYTES
from baton_handoff.transports.operation import checked_ids
from baton_handoff.transports.reslice import Reslice

OWN = BlockLayout(num_layers=1, block_tokens=1, num_kv_heads=1, head_dim=MAX_OPERATION_BYTES // 16, dtype="float32")  # half of the limit
LARGE = BlockLayout(num_layers=1, block_tokens=4, num_kv_heads=1, head_dim=MAX_OPERATION_BYTES // 16, dtype="float32")  # twice the limit


def pool(num_blocks: int) -> KvPool:
    """Memory that is never touched."""
    return KvPool(np.empty((num_blocks, OWN.block_bytes), np.uint8), OWN)


def test_blocks_beyond_the_limit_of_an_operation_are_refused() -> None:
    checked_ids([0, 1], [0, 1], 8, pool(8), "t")
    with pytest.raises(ValueError, match="more than one operation"):
        checked_ids([0, 1, 2], [0, 1, 2], 8, pool(8), "t")


def test_one_block_of_a_source_is_one_operation_however_large() -> None:
    reslice = Reslice(LARGE, OWN)
    checked_ids([4, 5, 6, 7], [0, 1, 2, 3], 2, pool(8), "t", reslice)
    with pytest.raises(ValueError, match="more than one operation"):
        checked_ids([3, 4, 5, 6, 7], [4, 0, 1, 2, 3], 2, pool(8), "t", reslice)
