"""The KV pool as a tensor: the worker's own memory on CPU, a copy of it on any other device."""

import weakref
from collections.abc import Hashable, Iterator, Sequence

import torch
from baton_runtime.log import get_logger
from torch import Tensor

from baton_engine.pool import KvPool
from baton_engine.runner import ChunkItem

log = get_logger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of this process


class TorchPool:
    """View of a KvPool as [num_blocks, num_layers, 2, block_tokens, num_kv_heads, head_dim].

    On CPU `tensor` is the pool's memory itself. Elsewhere the pool in host memory stays the truth that handoffs read and
    write, and `tensor` is a copy on the device. What leaves a worker is stored to the host after the step that wrote it:
    every block of a prompt computed for another worker, else blocks that are full (only those are ever shared; the last one
    of a sequence that decodes here would be copied again for each token). A sequence whose earlier KV this device did not
    just compute (a prefix hit, a pull) is loaded before its first step. Copies are of whole blocks, neighbours at once.
    """

    def __init__(self, pool: KvPool, device: torch.device, *, mirrored: bool | None = None) -> None:
        """mirrored: keep a copy; default: unless the device is the CPU."""
        dtype: torch.dtype = getattr(torch, pool.layout.dtype)
        self._host = torch.from_numpy(pool.data).view(dtype).view(pool.num_blocks, *pool.layout.shape[1:])  # one shard
        self.is_mirrored = device.type != "cpu" if mirrored is None else mirrored
        # Zeros, because a slot that is masked out must still be finite.
        self.tensor: Tensor = torch.zeros(self._host.shape, dtype=dtype, device=device) if self.is_mirrored else self._host
        self.is_pinned = device.type == "cuda" and self._pin(device)
        self._computed: dict[Hashable, int] = {}  # key: leading tokens whose KV is on the device

    def load(self, items: Sequence[ChunkItem]) -> None:
        """Before a step: bring earlier KV of its sequences to the device where it may be missing.

        Also zeroes blocks that the step enters without filling them, as the engine did on the host: see ModelRunner.
        """
        if not self.is_mirrored:
            return
        block_tokens = self.tensor.shape[3]
        entered = []
        for item in items:
            if item.start > 0 and self._computed.get(item.key) != item.start:
                for first, end in _runs(item.table[: (item.start - 1) // block_tokens + 1]):
                    self.tensor[first:end].copy_(self._host[first:end], non_blocking=True)
            last = item.end // block_tokens
            if item.end % block_tokens and last * block_tokens >= item.start:
                entered.append(item.table[last])
        if entered:
            self.tensor[torch.tensor(entered, dtype=torch.int64, device=self.tensor.device)] = 0

    def store(self, items: Sequence[ChunkItem]) -> None:
        """After a step that did not fail: copy to the host what may leave this worker; it is there when this returns."""
        if not self.is_mirrored:
            return
        block_tokens = self.tensor.shape[3]
        is_copying = False
        for item in items:
            end_block = item.end // block_tokens if item.draws else -(-item.end // block_tokens)
            for first, end in _runs(item.table[item.start // block_tokens : end_block]):
                self._host[first:end].copy_(self.tensor[first:end], non_blocking=True)
                is_copying = True
            self._computed[item.key] = item.end
        if is_copying and self.tensor.is_cuda:
            torch.cuda.current_stream(self.tensor.device).synchronize()

    def clear(self, blocks: Tensor, slots: Tensor) -> None:
        """Zero slots, so that nothing that is not finite stays behind a failed sequence."""
        self.tensor[blocks, :, :, slots] = 0

    def forget(self, key: Hashable) -> None:
        """The sequence ended."""
        self._computed.pop(key, None)

    def _pin(self, device: torch.device) -> bool:
        """Lock the host's pages, so that the device copies to and from the blocks themselves; else CUDA copies twice.

        Returns: whether it could be done; there may be a limit on locked memory.
        """
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = self._host.data_ptr()
        with torch.cuda.device(device):
            code = int(cudart.cudaHostRegister(address, self._host.nbytes, _PORTABLE))
        if code:
            log.warning("kv_pool_not_pinned", cuda_error=code, num_bytes=self._host.nbytes)
            try:
                torch.zeros(1, device=device)  # CUDA reports an error again at the next launch, and forgets it then
            except RuntimeError:
                pass
            return False
        # The memory may be given back while this process goes on. At its end the driver does this itself.
        weakref.finalize(self, cudart.cudaHostUnregister, address).atexit = False
        return True


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring blocks that follow each other, as [first, end)."""
    first = end = -1
    for block in blocks:
        if block != end:
            if end > first:
                yield first, end
            first = block
        end = block + 1
    if end > first:
        yield first, end
