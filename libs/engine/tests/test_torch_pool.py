"""The copy of the KV pool on a device, here with the copy in host memory too. BATON_TEST_DEVICE=cuda: on that device."""

import mmap
import os
from array import array

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from baton_engine import torch_pool  # noqa: E402
from baton_engine.api import SamplingParams, SequenceKey  # noqa: E402
from baton_engine.pool import BlockLayout, KvPool  # noqa: E402
from baton_engine.runner import ChunkItem  # noqa: E402
from baton_engine.torch_pool import TorchPool  # noqa: E402

DEVICE = torch.device(os.environ.get("BATON_TEST_DEVICE", "cpu"))
LAYOUT = BlockLayout(num_layers=2, block_tokens=4, num_kv_heads=2, head_dim=8, dtype="float32")


def make_pool(num_blocks: int = 8, **settings: int) -> tuple[TorchPool, np.ndarray]:
    """The pool, and its host memory as [blocks, values]."""
    memory = mmap.mmap(-1, num_blocks * LAYOUT.block_bytes)  # pages of its own: CUDA pins none twice
    pool = KvPool(np.frombuffer(memory, np.uint8).reshape(num_blocks, LAYOUT.block_bytes), LAYOUT)
    return TorchPool(pool, DEVICE, mirrored=True, **settings), pool.data.view(np.float32)


def store(pool: TorchPool, items: list[ChunkItem]) -> None:
    with pool.storing(items):
        pass


def item(start: int, end: int, table: list[int], *, draws: bool = False, name: str = "r") -> ChunkItem:
    return ChunkItem(SequenceKey(name, 1), array("I", range(end)), start, end, table, draws, SamplingParams(), end)


def test_prompt_for_another_worker_is_on_the_host_after_its_step_also_its_partial_last_block() -> None:
    pool, host = make_pool()
    table = [5, 6, 1]
    step = [item(0, 10, table)]
    pool.load(step)
    for value, block in enumerate(table, start=1):
        pool.tensor[block] = value
    store(pool, step)
    assert [set(host[block]) for block in table] == [{1.0}, {2.0}, {3.0}]
    assert not host[[0, 2, 3, 4, 7]].any()


def test_block_of_a_sequence_that_decodes_here_is_on_the_host_once_it_is_full() -> None:
    pool, host = make_pool()
    for end in (6, 7, 8):
        step = [item(max(0, end - 1) if end > 6 else 0, end, [3, 2], draws=True)]
        pool.load(step)
        pool.tensor[3], pool.tensor[2] = 1, end
        store(pool, step)
        assert set(host[3]) == {1.0}
        assert set(host[2]) == ({8.0} if end == 8 else {0.0})


def test_what_came_by_a_pull_is_loaded_once_and_what_was_computed_here_is_not() -> None:
    pool, host = make_pool()
    host[[4, 5, 0]] = [[4.0], [5.0], [0.5]]
    step = [item(11, 12, [4, 5, 0], draws=True)]
    pool.load(step)
    assert [pool.tensor[block].unique().tolist() for block in (4, 5, 0)] == [[4.0], [5.0], [0.5]]
    store(pool, step)
    host[4] = 9
    pool.load([item(12, 13, [4, 5, 0, 7], draws=True)])
    assert pool.tensor[4].unique().tolist() == [4.0]
    pool.forget(SequenceKey("r", 1))
    pool.load([item(12, 13, [4, 5, 0, 7], draws=True)])
    assert pool.tensor[4].unique().tolist() == [9.0]


def test_sequence_whose_step_failed_beside_it_runs_again_from_the_devices_own_copy() -> None:
    """Its last block is not on the host yet: only full ones are."""
    pool, host = make_pool()
    first = [item(0, 6, [3, 2], draws=True)]
    pool.load(first)
    pool.tensor[2] = 7
    store(pool, first)
    assert not host[2].any()
    for _ in range(2):  # the first time the step fails: nothing is stored
        pool.load([item(6, 7, [3, 2], draws=True)])
        assert pool.tensor[2].unique().tolist() == [7.0]


@pytest.mark.parametrize("least_run_bytes", [0, 1 << 30], ids=["by run", "by kernel"])
def test_both_ways_copy_the_blocks_of_all_items_and_no_others(least_run_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulls write other blocks of the host at the same time, and sequences may share blocks."""
    monkeypatch.setattr(torch_pool, "_PIECE_BYTES", 3 * LAYOUT.block_bytes)  # several pieces
    pool, host = make_pool(32, least_run_bytes=least_run_bytes)
    host[:] = np.arange(32)[:, None] + 1
    prefix = [30, 3, 4, 11]
    tables = [[*prefix, 9, 7, 1], [*prefix, 20, 18, 16]]
    there = sorted({block for table in tables for block in table[:6]})
    pool.load([item(24, 28, table, name=name) for table, name in zip(tables, "ab", strict=True)])
    assert pool.tensor.flatten(1).unique_consecutive(dim=1)[:, 0].tolist() == [b + 1 if b in there else 0 for b in range(32)]
    pool.tensor += 100
    store(pool, [item(16, 28, table, name=name) for table, name in zip(tables, "ab", strict=True)])
    written = {block for table in tables for block in table[4:]}
    wanted = pool.tensor.flatten(1).cpu().numpy()
    for block in range(32):
        assert (host[block] == (wanted[block] if block in written else block + 1)).all(), block


def test_long_runs_go_by_call_and_short_ones_by_kernel_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    pool, _ = make_pool(32, least_run_bytes=2 * LAYOUT.block_bytes)
    assert pool._mapped is not None, "the device cannot address the host's blocks"
    by_kernel, by_call = torch.Tensor.index_copy_, torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *a: taken.append("kernel") or by_kernel(*a))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a, **k: taken.append("call") or by_call(*a, **k))
    for blocks, wanted in (
        ([*range(0, 10), *range(20, 30)], ["call"] * 2),
        ([0, 2, 4, 6], ["call"] * 4),
        ([0, 2, 4, 6, 8], ["kernel"]),
        ([block for start in range(0, 30, 3) for block in (start, start + 1)], ["call"] * 10),
        ([], []),
    ):
        taken.clear()
        pool.load([item(4 * len(blocks), 4 * len(blocks) + 4, [*blocks, 31])])
        assert taken == wanted, blocks


def test_blocks_are_on_the_host_also_when_what_ran_beside_the_copy_failed() -> None:
    pool, host = make_pool()
    pool.tensor[3] = 5
    with pytest.raises(ZeroDivisionError), pool.storing([item(0, 4, [3])]):
        raise ZeroDivisionError
    assert set(host[3]) == {5.0}


def test_block_that_is_entered_and_not_filled_holds_nothing_of_its_last_owner() -> None:
    pool, _ = make_pool()
    pool.tensor[:] = torch.nan
    pool.load([item(0, 6, [3, 2]), item(0, 4, [1], name="fills")])
    assert not pool.tensor[2].any()
    assert pool.tensor[1].isnan().all()
