"""The KV pool as a tensor: the worker's own memory on CPU, a copy of it on any other device."""

import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from baton_runtime.log import get_logger
from torch import Tensor

from baton_engine.pool import KvPool
from baton_engine.runner import ChunkItem

log = get_logger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of this process

# Measured on an NVIDIA H200 (bench/results/gpu-2026-11-26-h200-2.txt), bus 55 GB/s: a copy call takes 8 us or more however small it is.
# To the device and to the host, GB/s: runs of 256 KiB reach 30 and 31 by call, 46 and 37 by one kernel for all blocks; runs of 512 KiB
# 42 and 43 by call, 45 and 32 by kernel, so there and back calls are faster from here on.
LEAST_RUN_BYTES = 512 << 10
_FEW_RUNS = 4  # the kernel's way is three launches and an index that is sent, so it cannot be cheaper than this many calls
_PIECE_BYTES = 64 << 20  # of device memory that the kernel's way takes for a moment


class TorchPool:
    """View of a KvPool as [num_blocks, num_layers, 2, block_tokens, num_kv_heads, head_dim].

    On CPU `tensor` is the pool's memory itself. Elsewhere the pool in host memory stays the truth that handoffs read and
    write, and `tensor` is a copy on the device. What leaves a worker is stored to the host after the step that wrote it:
    every block of a prompt computed for another worker, else blocks that are full (only those are ever shared; the last one
    of a sequence that decodes here would be copied again for each token). A sequence whose earlier KV this device did not
    just compute (a prefix hit, a pull) is loaded before its first step. Copies are of whole blocks: a call for each run of
    neighbours if runs are long, else one kernel on the device that reads or writes the host's blocks itself.
    """

    def __init__(self, pool: KvPool, device: torch.device, *, mirrored: bool | None = None, least_run_bytes: int = LEAST_RUN_BYTES) -> None:
        """mirrored: keep a copy; default: unless the device is the CPU. least_run_bytes: mean length from which runs go by call."""
        dtype: torch.dtype = getattr(torch, pool.layout.dtype)
        self._host = torch.from_numpy(pool.data).view(dtype).view(pool.num_blocks, *pool.layout.shape[1:])  # one shard
        self.is_mirrored = device.type != "cpu" if mirrored is None else mirrored
        # Zeros, because a slot that is masked out must still be finite.
        self.tensor: Tensor = torch.zeros(self._host.shape, dtype=dtype, device=device) if self.is_mirrored else self._host
        self.is_pinned = device.type == "cuda" and self._pin(device)
        self._least_run_bytes = least_run_bytes
        self._words = _words(self.tensor)
        self._mapped = self._map()
        self._store_stream = torch.cuda.Stream(device) if self.tensor.is_cuda else None  # type: ignore[no-untyped-call]
        self._computed: dict[Hashable, int] = {}  # key: leading tokens whose KV is on the device

    def load(self, items: Sequence[ChunkItem]) -> None:
        """Before a step: bring earlier KV of its sequences to the device where it may be missing.

        Also zeroes blocks that the step enters without filling them, as the engine did on the host: see ModelRunner.
        """
        if not self.is_mirrored:
            return
        block_tokens = self.tensor.shape[3]
        missing: list[int] = []
        entered = []
        for item in items:
            if item.start > 0 and self._computed.get(item.key) != item.start:
                missing += item.table[: (item.start - 1) // block_tokens + 1]
            last = item.end // block_tokens
            if item.end % block_tokens and last * block_tokens >= item.start:
                entered.append(item.table[last])
        self._copy(missing, to_host=False)
        if entered:
            self.tensor[torch.tensor(entered, dtype=torch.int64, device=self.tensor.device)] = 0

    @contextmanager
    def storing(self, items: Sequence[ChunkItem]) -> Iterator[None]:
        """After a step that did not fail: copy to the host what may leave this worker, while the block runs.

        It is there when the block ends. The block may use the device, but not the pool.
        """
        if not self.is_mirrored:
            yield
            return
        block_tokens = self.tensor.shape[3]
        leaving: list[int] = []
        for item in items:
            end_block = item.end // block_tokens if item.draws else -(-item.end // block_tokens)
            leaving += item.table[item.start // block_tokens : end_block]
            self._computed[item.key] = item.end
        stream = self._store_stream
        if stream is None or not leaving:
            self._copy(leaving, to_host=True)
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        try:
            with torch.cuda.stream(stream):
                self._copy(leaving, to_host=True)
            yield
        finally:
            stream.synchronize()

    def clear(self, blocks: Tensor, slots: Tensor) -> None:
        """Zero slots, so that nothing that is not finite stays behind a failed sequence."""
        self.tensor[blocks, :, :, slots] = 0

    def forget(self, key: Hashable) -> None:
        """The sequence ended."""
        self._computed.pop(key, None)

    def _copy(self, blocks: Sequence[int], *, to_host: bool) -> None:
        """Start to copy these blocks, on the current stream."""
        runs = list(_runs(blocks))
        block_bytes = self._host[0].nbytes
        if self._mapped is None or len(runs) <= _FEW_RUNS or len(blocks) * block_bytes >= len(runs) * self._least_run_bytes:
            source, target = (self.tensor, self._host) if to_host else (self._host, self.tensor)
            for first, end in runs:
                target[first:end].copy_(source[first:end], non_blocking=True)
            return
        source, target = (self._words, self._mapped) if to_host else (self._mapped, self._words)
        index = torch.tensor(blocks, dtype=torch.int64, device=target.device)
        step = max(1, _PIECE_BYTES // block_bytes)
        for first in range(0, len(blocks), step):
            piece = index[first : first + step]
            target.index_copy_(0, piece, source[piece])

    def _map(self) -> Tensor | None:
        """The host's blocks as kernels on the device address them; None if they cannot, or there is nothing to copy."""
        if not self.is_mirrored:
            return None
        host = _words(self._host)
        if not self.tensor.is_cuda:
            return host
        if not self.is_pinned:
            return None
        mapped = torch.as_tensor(_DeviceArray(host), device=self.tensor.device)
        return mapped if mapped.data_ptr() == host.data_ptr() else None  # else it is a copy

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


class _DeviceArray:
    """Pinned host memory in the form in which torch takes over a device's arrays.

    The device may use the host's address where cudaDevAttrCanUseHostPointerForRegisteredMem holds: 64-bit Linux.
    """

    def __init__(self, host: Tensor) -> None:
        address, type_name = (host.data_ptr(), False), f"<i{host.itemsize}"
        self.__cuda_array_interface__ = {"shape": tuple(host.shape), "typestr": type_name, "data": address, "version": 3}


def _words(blocks: Tensor) -> Tensor:
    """Blocks as [blocks, words], of the largest word that divides a block: kernels copy element by element."""
    flat = blocks.flatten(1)
    word = next(word for word in (torch.int64, torch.int32, torch.int16) if flat[0].nbytes % word.itemsize == 0)
    return flat.view(word)


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
