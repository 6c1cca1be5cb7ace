"""What the sim engine computes: bytes of KV and next tokens, as pure functions of the tokens so far.

state(t) = sum over i <= t of mix(i, token i), modulo 2^64: it depends on every token up to t and on its position, and
continues from any t. Of token t the plane p (layer * 2 + K or V) holds, over all its heads, the words mix(state(t) + p) + i * step
for i = 0, 1, ..., so bytes that belong to another sequence, token, layer or head, or to K instead of V, are recognised.

Nothing in it depends on block size or shards: blocks that are resliced correctly are those that the other layout's owner would
have computed.
"""

from array import array

import numpy as np
import numpy.typing as npt

from baton_engine.pool import BlockLayout

U64 = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

_PLANE_STEP = 0x9E3779B97F4A7C15  # splitmix64's increment: neighbouring planes get unrelated words
_WORD_STEP = 0xA24BAED4963EE407  # odd, so that no word of a row is repeated
_NEXT_TOKEN_SALT = 0xD1B54A32D192ED03


def mix(values: U64) -> U64:
    """splitmix64's finalizer (Steele, Lea, Flood 2014), element by element."""
    values = values + np.uint64(_PLANE_STEP)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def token_terms(token_ids: npt.NDArray[np.uint32], positions: U64) -> U64:
    """What each token adds to the state."""
    return mix((positions << np.uint64(32)) | token_ids.astype(np.uint64))


def states(token_ids: "array[int] | npt.NDArray[np.uint32]") -> U64:
    """state(t) for every token of a sequence, shape (num_tokens,)."""
    tokens = np.asarray(token_ids, dtype=np.uint32)
    return np.cumsum(token_terms(tokens, np.arange(len(tokens), dtype=np.uint64)), dtype=np.uint64)


def slot_bytes(layout: BlockLayout, token_states: U64) -> Bytes:
    """Contents of the slots of tokens with these states, shape (num_tokens, layout.num_planes, layout.slot_bytes)."""
    num_shards, num_rows = layout.num_shards, layout.num_layers * 2
    row_bytes = num_shards * layout.slot_bytes  # all heads
    planes = np.arange(num_rows, dtype=np.uint64) * np.uint64(_PLANE_STEP)
    steps = np.arange(-(-row_bytes // 8), dtype=np.uint64) * np.uint64(_WORD_STEP)
    words = mix(token_states[:, None] + planes[None, :])[:, :, None] + steps
    rows = words.view(np.uint8)[:, :, :row_bytes]
    if num_shards == 1:
        return rows
    by_shard = rows.reshape(-1, num_rows, num_shards, layout.slot_bytes).transpose(0, 2, 1, 3)
    return by_shard.reshape(-1, layout.num_planes, layout.slot_bytes)


def expected_block_bytes(layout: BlockLayout, token_ids: "array[int]", block_index: int) -> Bytes:
    """Contents of block block_index of a sequence whose KV is computed for all token_ids, shape (block_bytes,).

    Slots beyond the last token are zero. For tests of anything that moves blocks.
    """
    start, end = block_index * layout.block_tokens, min(len(token_ids), (block_index + 1) * layout.block_tokens)
    rows = slot_bytes(layout, states(token_ids)[start:end])
    block = np.zeros((layout.num_planes, layout.block_tokens, layout.slot_bytes), dtype=np.uint8)
    block[:, : len(rows)] = rows.transpose(1, 0, 2)
    return block.reshape(-1)


def next_tokens(last_states: U64, allowed: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The token after each sequence whose last token has that state; one of allowed."""
    tokens: npt.NDArray[np.uint32] = allowed[mix(last_states ^ np.uint64(_NEXT_TOKEN_SALT)) % np.uint64(len(allowed))]
    return tokens
