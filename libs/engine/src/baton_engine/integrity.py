"""The block manager's integrity check: everything that is kept incrementally is computed again from tables and pins."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from baton_engine.blocks import BlockManager


def find_problems(manager: BlockManager) -> list[str]:
    """What is wrong, one sentence each; empty if sound. The manager's lock is held by the caller."""
    refs = Counter(block for table in manager._tables.values() for block in table.blocks)
    pins = Counter(block for owner_pins in manager._pins.values() for block in owner_pins.blocks.values())
    reserved = {block for table in manager._tables.values() for block in table.blocks[table.committed :]}
    return [*_wrong_refs(manager, refs, pins), *_wrong_states(manager, refs, pins, reserved), *_wrong_sums(manager, refs, pins, reserved)]


def _wrong_refs(manager: BlockManager, refs: Counter[int], pins: Counter[int]) -> list[str]:
    problems = []
    for block in range(manager._total):
        if refs[block] != manager._refs[block]:
            problems.append(f"block {block} is in {refs[block]} tables but counted {manager._refs[block]} times")
        if pins[block] != manager._pin_refs[block]:
            problems.append(f"block {block} has {pins[block]} pins but counted {manager._pin_refs[block]}")
        if refs[block] > 1 and manager._hash[block] is None and block not in manager._distrusted:
            problems.append(f"block {block} is unpublished and in {refs[block]} tables")
    for owner, table in manager._tables.items():
        if len(set(table.blocks)) != len(table.blocks):
            problems.append(f"the table of {owner} names a block twice")
    return problems


def _wrong_states(manager: BlockManager, refs: Counter[int], pins: Counter[int], reserved: set[int]) -> list[str]:
    problems = []
    free = Counter(manager._free)
    for block in range(manager._total):
        held = bool(refs[block] or pins[block])
        states = free[block] + (block in manager._cached) + held
        if states != 1:
            problems.append(f"block {block} is in {states} states: free {free[block]}, cached {block in manager._cached}, held {held}")
        if block in reserved and (refs[block] != 1 or pins[block] or manager._hash[block] is not None):
            problems.append(f"reserved block {block} is shared, pinned or published")
        block_hash = manager._hash[block]
        if block_hash is not None and manager._by_hash.get(block_hash) != block:
            problems.append(f"block {block} has a hash that leads elsewhere")
        if block in manager._distrusted and (block_hash is not None or not held):
            problems.append(f"distrusted block {block} is published or not held")
        if free[block] and block_hash is not None:
            problems.append(f"free block {block} is published")
        if block in manager._cached and block_hash is None:
            problems.append(f"cached block {block} is not published")
    if len(manager._by_hash) != sum(block_hash is not None for block_hash in manager._hash):
        problems.append("there are more hashes than published blocks")
    return problems


def _wrong_sums(manager: BlockManager, refs: Counter[int], pins: Counter[int], reserved: set[int]) -> list[str]:
    pinned = sum(1 for block in pins if not refs[block])
    used = len(refs) - len(reserved)
    free, cached = len(manager._free), len(manager._cached)
    problems = []
    if pinned != manager._pinned:
        problems.append(f"{pinned} blocks are pinned but {manager._pinned} counted")
    if len(reserved) != manager._reserved:
        problems.append(f"{len(reserved)} blocks are reserved but {manager._reserved} counted")
    if (total := free + cached + pinned + len(reserved) + used) != manager._total:
        parts = f"free {free} + cached {cached} + pinned {pinned} + reserved {len(reserved)} + used {used}"
        problems.append(f"{parts} = {total}, not {manager._total}")
    return problems
