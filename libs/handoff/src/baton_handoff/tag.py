"""The tag of a Confirm: that both sides mean the same tokens, weights and shape. It is not a checksum of the bytes."""

import hashlib
import sys
from array import array
from dataclasses import dataclass

from baton_contracts.discovery.v1.instance_pb2 import KvLayout
from baton_engine.api import EngineRequest
from baton_engine.pool import BlockLayout
from baton_runtime.hashing import block_hashes
from baton_runtime.layouts import layout_text

TAG_BYTES = 16


@dataclass(frozen=True, slots=True)
class KvShape:
    """What the books must know of the worker's KV: identity of the model, block sizes. fingerprint as in Model.fingerprint.

    hash_block_tokens: 0: no block is ever shared, because the engine keeps the KV itself.
    """

    incarnation: str
    fingerprint: str
    layout: BlockLayout
    hash_block_tokens: int

    @property
    def block_tokens(self) -> int:
        """Tokens per block."""
        return self.layout.block_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return self.layout.block_bytes

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that num_tokens need."""
        return -(-num_tokens // self.layout.block_tokens)

    def hashes(self, request: EngineRequest) -> list[bytes]:
        """Hashes of the full blocks of what is handed over (all tokens but the last). Raises: InvalidArgument."""
        if not self.hash_block_tokens:
            return []
        handed_over = request.token_ids[: request.num_kv_tokens]
        return block_hashes(request.cache_root, handed_over, self.hash_block_tokens, self.block_tokens)


def layout_from_record(record: KvLayout) -> BlockLayout:
    """The layout of an instance record. Raises: ValueError for one no engine can have."""
    layout = BlockLayout(
        num_layers=record.num_layers,
        block_tokens=record.block_tokens,
        num_kv_heads=record.num_kv_heads,
        head_dim=record.head_dim,
        dtype=record.dtype,
        num_shards=record.num_shards,
    )
    if layout.block_bytes != record.block_bytes or layout.block_bytes < 1:
        raise ValueError(f"{layout_text(record)} makes blocks of {layout.block_bytes} bytes, not {record.block_bytes}")
    return layout


def fetch_tag(shape: KvShape, block_hash: bytes) -> bytes:
    """Tag of a fetch's Confirm, 16 bytes. block_hash: the chain hash of the last block read, which stands for all tokens up to there.

    Only what both sides must have in common is in it, so that each can compute it from its own layout.
    """
    layout = shape.layout
    values = f"layers={layout.num_layers} kv_heads={layout.num_kv_heads} head_dim={layout.head_dim} dtype={layout.dtype}"
    return hashlib.sha256(f"{shape.fingerprint}\nfetch {values}\n".encode() + block_hash).digest()[:TAG_BYTES]


class TagChain:
    """Tags of one sequence at rising block counts; each token is hashed once however many confirms there are.

    layout: the source's, in whose blocks both sides count; None: our own.
    """

    def __init__(
        self, shape: KvShape, cache_root: bytes, token_ids: "array[int]", num_tokens: int, layout: BlockLayout | None = None
    ) -> None:
        layout = layout or shape.layout
        self._digest = hashlib.sha256(f"{shape.fingerprint}\n{layout_text(layout)}\n".encode())
        self._digest.update(cache_root)
        self._column = memoryview(_little_endian(token_ids)).cast("B")
        self._block_tokens = layout.block_tokens
        self._num_tokens = num_tokens
        self._done_tokens = 0

    def at(self, end_block: int) -> bytes:
        """Tag over blocks [0, end_block), 16 bytes. end_block never falls from call to call."""
        end = min(end_block * self._block_tokens, self._num_tokens)
        assert end >= self._done_tokens, "tags are asked for in rising order"
        self._digest.update(self._column[4 * self._done_tokens : 4 * end])
        self._done_tokens = end
        return self._digest.copy().digest()[:TAG_BYTES]


def _little_endian(token_ids: "array[int]") -> "array[int]":
    if token_ids.itemsize != 4:
        raise ValueError(f"token ids of {token_ids.itemsize} bytes; a u32 column is needed")
    if sys.byteorder == "little":
        return token_ids
    swapped = token_ids[:]
    swapped.byteswap()
    return swapped
