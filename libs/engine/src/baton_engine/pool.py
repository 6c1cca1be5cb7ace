"""The memory that holds KV blocks: one contiguous buffer, block after block."""

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Shape of one block: (num_shards, num_layers, 2, block_tokens, num_kv_heads / num_shards, head_dim), C order.

    Each tensor-parallel shard's part of a block is contiguous. As baton.discovery.v1.KvLayout. num_kv_heads: of all shards.
    """

    num_layers: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # a key of ITEM_BYTES; the 8-bit ones only where the engine keeps the KV itself
    num_shards: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if self.num_shards < 1 or self.num_kv_heads % self.num_shards:
            raise ValueError(f"{self.num_kv_heads} KV heads cannot be split over {self.num_shards} shards")

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """Shape of one block."""
        return (self.num_shards, self.num_layers, 2, self.block_tokens, self.num_kv_heads // self.num_shards, self.head_dim)

    @property
    def item_bytes(self) -> int:
        """Bytes of one value."""
        return ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return prod(self.shape) * self.item_bytes

    @property
    def num_planes(self) -> int:
        """Planes of a block, (shard, layer, K or V): a block is num_planes times block_tokens slots of one token each."""
        return self.num_shards * self.num_layers * 2

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in one plane."""
        return self.num_kv_heads // self.num_shards * self.head_dim * self.item_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlace:
    """Where a pool's bytes lie, for transports that register memory with hardware.

    address: of the first byte, as the process or the device counts; device: number of the accelerator, None for host memory.
    """

    address: int
    num_bytes: int
    device: int | None = None


@dataclass(frozen=True, slots=True)
class KvPool:
    """A worker's KV memory. Block i is data[i]; only this process writes to it.

    data has shape (num_blocks, block_bytes), uint8. Allocated by the worker (shared memory, so that neighbours on the host
    can map it read-only) and given to the engine, which views it in its own type.
    """

    data: npt.NDArray[np.uint8]
    layout: BlockLayout

    def __post_init__(self) -> None:
        if self.data.ndim != 2 or self.data.shape[1] != self.layout.block_bytes or self.data.dtype != np.uint8:
            raise ValueError(f"pool of {self.data.dtype} {self.data.shape} does not hold blocks of {self.layout.block_bytes} bytes")

    @classmethod
    def without_memory(cls, num_blocks: int, layout: BlockLayout) -> "KvPool":
        """Sizes only, for an engine that keeps its KV itself: reading gives zeros, writing fails, no memory is taken."""
        return cls(np.broadcast_to(np.zeros(1, np.uint8), (num_blocks, layout.block_bytes)), layout)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return int(self.data.shape[0])

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return self.layout.block_bytes

    @property
    def place(self) -> MemoryPlace:
        """Where the bytes lie: host memory. A pool on a device says its own."""
        return MemoryPlace(self.data.ctypes.data, self.data.nbytes)
