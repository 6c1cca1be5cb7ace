"""The KV pool as a tensor: the worker's own memory on CPU, a copy of it on any other device."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from baton_engine.pool import KvPool
from baton_engine.runner import ChunkItem


class TorchPool:
    """View of a KvPool as [num_blocks, num_layers, 2, block_tokens, num_kv_heads, head_dim].

    On CPU `tensor` is the pool's memory itself. Elsewhere the pool in host memory stays the truth that handoffs read and
    write, and `tensor` is a copy on the device: what a step writes is stored to the host after it, and a sequence whose
    earlier KV this device did not just compute (a prefix hit, a pull) is loaded before its first step.
    """

    def __init__(self, pool: KvPool, device: torch.device, *, mirrored: bool | None = None) -> None:
        """mirrored: keep a copy; default: unless the device is the CPU."""
        dtype: torch.dtype = getattr(torch, pool.layout.dtype)
        self._host = torch.from_numpy(pool.data).view(dtype).view(pool.num_blocks, *pool.layout.shape[1:])  # one shard
        self._is_mirrored = device.type != "cpu" if mirrored is None else mirrored
        # Zeros, because a slot that is masked out must still be finite.
        self.tensor: Tensor = torch.zeros(self._host.shape, dtype=dtype, device=device) if self._is_mirrored else self._host
        self._computed: dict[Hashable, int] = {}  # key: leading tokens whose KV is on the device

    def load(self, items: Sequence[ChunkItem]) -> None:
        """Before a step: bring earlier KV of its sequences to the device where it may be missing."""
        if not self._is_mirrored:
            return
        block_tokens = self.tensor.shape[3]
        for item in items:
            if item.start > 0 and self._computed.get(item.key) != item.start:
                blocks = torch.tensor(item.table[: (item.start - 1) // block_tokens + 1], dtype=torch.int64)
                self.tensor[blocks.to(self.tensor.device)] = self._host[blocks].to(self.tensor.device)
            self._computed[item.key] = item.end

    def store(self, blocks: Tensor, slots: Tensor) -> None:
        """After a step: copy the slots it wrote to the host. blocks, slots: [tokens], int64."""
        if self._is_mirrored:
            self._host[blocks.cpu(), :, :, slots.cpu()] = self.tensor[blocks, :, :, slots].cpu()

    def clear(self, blocks: Tensor, slots: Tensor) -> None:
        """Zero slots, so that nothing that is not finite stays behind a failed sequence."""
        self.tensor[blocks, :, :, slots] = 0

    def forget(self, key: Hashable) -> None:
        """The sequence ended."""
        self._computed.pop(key, None)
