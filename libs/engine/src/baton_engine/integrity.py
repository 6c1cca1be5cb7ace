"""The block manager's integrity check: everything that is kept incrementally is computed again from tables and pins.

It works on a copy (`Ledger`), which takes about 25 ns per block to make under the manager's lock; the check itself takes ten times
that, and nobody waits for it.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ledger:
    """A block manager's state at one instant. tables: owner, block ids, number of them that are committed; pins: block ids per owner."""

    total: int
    free: Sequence[int]
    cached: set[int]
    refs: Sequence[int]
    pin_refs: Sequence[int]
    hashes: Sequence[bytes | None]
    by_hash: dict[bytes, int]
    distrusted: set[int]
    tables: Sequence[tuple[Hashable, Sequence[int], int]]
    pins: Sequence[Sequence[int]]
    num_reserved: int
    num_pinned: int
    num_promised: int


def find_problems(ledger: Ledger) -> list[str]:
    """What is wrong, one sentence each; empty if sound."""
    refs = Counter(block for _, blocks, _ in ledger.tables for block in blocks)
    pins = Counter(block for blocks in ledger.pins for block in blocks)
    reserved = {block for _, blocks, committed in ledger.tables for block in blocks[committed:]}
    return [
        *_wrong_refs(ledger, refs, pins),
        *_wrong_states(ledger, refs, pins),
        *_wrong_reserved(ledger, refs, pins, reserved),
        *_wrong_hashes(ledger, refs, pins),
        *_wrong_sums(ledger, refs, pins, reserved),
    ]


def _wrong_refs(ledger: Ledger, refs: Counter[int], pins: Counter[int]) -> Iterator[str]:
    for block in _differing(ledger.refs, refs):
        yield f"block {block} is in {refs[block]} tables but counted {ledger.refs[block]} times"
    for block in _differing(ledger.pin_refs, pins):
        yield f"block {block} has {pins[block]} pins but counted {ledger.pin_refs[block]}"
    for owner, blocks, _ in ledger.tables:
        if len(set(blocks)) != len(blocks):
            yield f"the table of {owner} names a block twice"


def _differing(counted: Sequence[int], expected: Counter[int]) -> list[int]:
    column = [0] * len(counted)
    for block, count in expected.items():
        column[block] = count
    return [] if column == counted else [block for block, count in enumerate(counted) if count != column[block]]


def _wrong_states(ledger: Ledger, refs: Counter[int], pins: Counter[int]) -> Iterator[str]:
    held = refs.keys() | pins.keys()
    states = Counter(ledger.free)
    states.update(ledger.cached)
    states.update(held)
    if len(states) == ledger.total and set(states.values()) == {1}:
        return
    for block in range(ledger.total):
        if states[block] != 1:
            free = ledger.free.count(block)
            yield f"block {block} is in {states[block]} states: free {free}, cached {block in ledger.cached}, held {block in held}"


def _wrong_reserved(ledger: Ledger, refs: Counter[int], pins: Counter[int], reserved: set[int]) -> Iterator[str]:
    for block in reserved:
        if refs[block] != 1 or pins[block] or ledger.hashes[block] is not None:
            yield f"reserved block {block} is shared, pinned or published"


def _wrong_hashes(ledger: Ledger, refs: Counter[int], pins: Counter[int]) -> Iterator[str]:
    published = {block: block_hash for block, block_hash in enumerate(ledger.hashes) if block_hash is not None}
    for block, block_hash in published.items():
        if ledger.by_hash.get(block_hash) != block:
            yield f"block {block} has a hash that leads elsewhere"
    if len(ledger.by_hash) != len(published):
        yield "there are more hashes than published blocks"
    for block in ledger.distrusted:
        if block in published or not (block in refs or block in pins):
            yield f"distrusted block {block} is published or not held"
    for block in published.keys() & set(ledger.free):
        yield f"free block {block} is published"
    for block in ledger.cached - published.keys():
        yield f"cached block {block} is not published"
    for block, count in refs.items():
        if count > 1 and block not in published and block not in ledger.distrusted:
            yield f"block {block} is unpublished and in {count} tables"


def _wrong_sums(ledger: Ledger, refs: Counter[int], pins: Counter[int], reserved: set[int]) -> Iterator[str]:
    pinned = sum(1 for block in pins if not refs[block])
    used = len(refs) - len(reserved)
    free, cached = len(ledger.free), len(ledger.cached)
    if pinned != ledger.num_pinned:
        yield f"{pinned} blocks are pinned but {ledger.num_pinned} counted"
    if len(reserved) != ledger.num_reserved:
        yield f"{len(reserved)} blocks are reserved but {ledger.num_reserved} counted"
    if ledger.num_promised > free + cached:
        yield f"{ledger.num_promised} blocks are promised but only {free + cached} available"
    if (total := free + cached + pinned + len(reserved) + used) != ledger.total:
        parts = f"free {free} + cached {cached} + pinned {pinned} + reserved {len(reserved)} + used {used}"
        yield f"{parts} = {total}, not {ledger.total}"
