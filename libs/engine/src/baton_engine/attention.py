"""Attention over block-major KV blocks: what one step writes and reads, and the function that does it.

A step is one forward pass over all its tokens, flattened to a batch of one row: first the decode items, in groups of similar
length, then the chunks. Linear layers see all tokens at once; attention works per group and per chunk.

`Attend` is the seam for other kernels: one function of (plan, layer, q, k, v, scale), chosen at start by `attend_for`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from baton_engine.runner import ChunkItem

_LEAST_GROUP_BLOCKS = 8  # decode items of up to this many blocks are padded together


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode items [first, last) of the flat row, all attending to at most table.shape[1] blocks of their own."""

    first: int
    last: int
    table: Tensor  # [last - first, blocks], int64, padded with each sequence's own first block
    mask: Tensor  # [last - first, 1, 1, blocks * block_tokens], 0 where the slot counts, else -inf


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [first, last) of the flat row: one sequence's tokens [start, end)."""

    first: int
    last: int
    start: int
    end: int
    blocks: Tensor  # [ceil(end / block_tokens)], int64
    mask: Tensor | None  # [end - start, end], 0 where attended, else -inf; None if start is 0: then it is plain causal.
    # In half precision on CUDA a CausalBias that says the same: FlashAttention takes no mask, and what takes one and grouped
    # heads writes all scores to memory.


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. Row means position in the flat row of tokens."""

    pool: Tensor  # [num_blocks, num_layers, 2, block_tokens, num_kv_heads, head_dim]
    token_ids: Tensor  # [1, tokens], int64
    positions: Tensor  # [1, tokens], int64
    write_blocks: Tensor  # [tokens], int64: where each token's KV goes
    write_slots: Tensor  # [tokens], int64
    groups: Sequence[DecodeGroup]
    chunks: Sequence[Chunk]
    first_rows: Sequence[int]  # per item, in the caller's order
    last_rows: Sequence[int]


Attend = Callable[[StepPlan, int, Tensor, Tensor, Tensor, float], Tensor]


def attend_for(device: torch.device) -> Attend:
    """The attention function for a device.

    Gather and SDPA for CPU and CUDA alike. On CUDA a kernel that reads blocks in place would be faster
    (torch.nn.attention.varlen with a block table, or flashinfer); it belongs here.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device.type} is not supported; supported are cpu, cuda")
    return gather_attend


def plan_step(items: Sequence[ChunkItem], pool: Tensor) -> StepPlan:
    """Lay out one step on the pool's device."""
    block_tokens, device = pool.shape[3], pool.device
    decodes = sorted((i for i, item in enumerate(items) if item.is_decode), key=lambda i: _num_blocks(items[i], block_tokens))
    order = decodes + [i for i, item in enumerate(items) if not item.is_decode]
    rows = np.empty((3, sum(item.num_tokens for item in items)), dtype=np.int64)  # token id, position, block: to the device at once
    first_rows, last_rows = [0] * len(items), [0] * len(items)
    first = 0
    for i in order:
        item = items[i]
        last, first_block = first + item.num_tokens, item.start // block_tokens
        positions = np.arange(item.start, item.end)
        rows[0, first:last] = item.token_ids[item.start : item.end]
        rows[1, first:last] = positions
        rows[2, first:last] = np.array(item.table[first_block : _num_blocks(item, block_tokens)])[positions // block_tokens - first_block]
        first_rows[i], last_rows[i] = first, last - 1
        first = last
    token_ids, flat_positions, write_blocks = torch.from_numpy(rows).to(device)
    return StepPlan(
        pool=pool,
        token_ids=token_ids[None],
        positions=flat_positions[None],
        write_blocks=write_blocks,
        write_slots=flat_positions % block_tokens,
        groups=_decode_groups([items[i] for i in decodes], pool),
        chunks=[_chunk(items[i], first_rows[i], pool) for i in order[len(decodes) :]],
        first_rows=first_rows,
        last_rows=last_rows,
    )


def _num_blocks(item: ChunkItem, block_tokens: int) -> int:
    return (item.end - 1) // block_tokens + 1


def _decode_groups(items: Sequence[ChunkItem], pool: Tensor) -> list[DecodeGroup]:
    """Groups of consecutive items (ascending length) in which padding is at most as much as content."""
    groups: list[DecodeGroup] = []
    first = 0
    while first < len(items):
        limit = max(_LEAST_GROUP_BLOCKS, 2 * _num_blocks(items[first], pool.shape[3]))
        last = first + 1
        while last < len(items) and _num_blocks(items[last], pool.shape[3]) <= limit:
            last += 1
        groups.append(_decode_group(items[first:last], first, pool))
        first = last
    return groups


def _decode_group(items: Sequence[ChunkItem], first: int, pool: Tensor) -> DecodeGroup:
    block_tokens = pool.shape[3]
    counts = [_num_blocks(item, block_tokens) for item in items]
    width = max(counts)
    table = [[*item.table[:count], *[item.table[0]] * (width - count)] for item, count in zip(items, counts, strict=True)]
    ends = torch.tensor([item.end for item in items], dtype=torch.int64, device=pool.device)
    beyond = torch.arange(width * block_tokens, device=pool.device)[None] >= ends[:, None]
    mask = torch.zeros(beyond.shape, dtype=pool.dtype, device=pool.device).masked_fill_(beyond, -torch.inf)
    return DecodeGroup(first, first + len(items), torch.tensor(table, dtype=torch.int64, device=pool.device), mask[:, None, None])


def _chunk(item: ChunkItem, first: int, pool: Tensor) -> Chunk:
    blocks = torch.tensor(item.table[: _num_blocks(item, pool.shape[3])], dtype=torch.int64, device=pool.device)
    mask: Tensor | None = None
    if item.start > 0 and pool.is_cuda and pool.dtype != torch.float32:
        mask = causal_lower_right(item.num_tokens, item.end)
    elif item.start > 0:
        full = torch.full((item.num_tokens, item.end), -torch.inf, dtype=pool.dtype, device=pool.device)
        mask = full.triu_(item.start + 1)
    return Chunk(first, first + item.num_tokens, item.start, item.end, blocks, mask)


def gather_attend(plan: StepPlan, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Write k and v into the blocks, gather what each sequence attends to, and attend.

    q: [1, heads, tokens, head_dim]; k, v: [1, kv_heads, tokens, head_dim], after rotation. Returns [1, tokens, heads, head_dim].
    """
    keys, values = plan.pool[:, layer, 0], plan.pool[:, layer, 1]
    keys[plan.write_blocks, plan.write_slots] = k[0].transpose(0, 1)
    values[plan.write_blocks, plan.write_slots] = v[0].transpose(0, 1)
    parts = [_attend_group(group, q[0, :, group.first : group.last], keys, values, scale) for group in plan.groups]
    for chunk in plan.chunks:
        rows = slice(chunk.first, chunk.last)
        parts.append(_attend_chunk(chunk, q[:, :, rows], k[:, :, rows], v[:, :, rows], keys, values, scale))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _attend_group(group: DecodeGroup, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query per sequence. q: [heads, sequences, head_dim]; returns [sequences, heads, head_dim]."""
    sequences, kv_heads, head_dim = len(group.table), keys.shape[2], keys.shape[3]
    # The heads of a group share keys: they become the query axis, so that keys and values are not repeated.
    queries = q.transpose(0, 1).reshape(sequences, kv_heads, -1, head_dim)
    k, v = (kv[group.table].view(sequences, -1, kv_heads, head_dim).transpose(1, 2) for kv in (keys, values))
    return F.scaled_dot_product_attention(queries, k, v, attn_mask=group.mask, scale=scale).reshape(sequences, -1, head_dim)


def _attend_chunk(chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """A chunk of one sequence and all its tokens before. Returns [tokens, heads, head_dim]."""
    if chunk.mask is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    else:
        k, v = (kv[chunk.blocks].flatten(0, 1)[: chunk.end].transpose(0, 1)[None] for kv in (keys, values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=chunk.mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
