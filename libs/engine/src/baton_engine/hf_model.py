"""From a checked Hugging Face folder to what an engine is, and whether it fits. Imports neither torch nor transformers."""

import os
from dataclasses import dataclass
from pathlib import Path

from baton_runtime.errors import ConfigError
from baton_runtime.model_folder import DTYPE_BYTES, ModelFolder, ModelFolderError, inspect_model_folder, weights_bytes

from baton_engine.api import EngineInfo
from baton_engine.pool import BlockLayout

__all__ = [
    "MemoryNeed",
    "ModelFolderError",
    "ModelTooLarge",
    "block_layout",
    "engine_info",
    "inspect_model_folder",
    "memory_limit_bytes",
    "memory_need",
]

# Interpreter, torch and the activations of one step: 384 MiB measured with 36 million parameters, a chunk of 512 tokens after
# 7,488 others, float32 on CPU (2026-11-21). Wider models take more for activations; this is an estimate, not a guarantee.
_WORK_BYTES = 512 << 20


class ModelTooLarge(ConfigError):
    """Weights and KV pool do not fit into memory; the message says what needs how much."""

    def __init__(self, message: str) -> None:
        super().__init__("kv_memory_bytes", message)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Estimated memory of one worker in bytes."""

    weights_bytes: int
    pool_bytes: int
    work_bytes: int = _WORK_BYTES

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.pool_bytes + self.work_bytes

    def check(self, limit_bytes: int) -> None:
        """Raises: ModelTooLarge if the process may have less memory than this."""
        if self.total_bytes > limit_bytes:
            raise ModelTooLarge(
                f"needs {_gib(self.total_bytes)} (weights {_gib(self.weights_bytes)}, KV pool {_gib(self.pool_bytes)}, "
                f"working memory {_gib(self.work_bytes)}), available are {_gib(limit_bytes)}; choose a smaller KV pool or model"
            )


def block_layout(folder: ModelFolder, block_tokens: int, dtype: str | None = None) -> BlockLayout:
    """Shape of the KV blocks of this model; dtype None: that of the stored weights."""
    dtype = dtype or folder.dtype
    if dtype not in DTYPE_BYTES:
        raise ModelFolderError(f"dtype {dtype} is not supported; supported are {', '.join(DTYPE_BYTES)}")
    return BlockLayout(folder.num_layers, block_tokens, folder.num_kv_heads, folder.head_dim, dtype)


def engine_info(folder: ModelFolder, max_model_tokens: int | None = None) -> EngineInfo:
    """What the engine tells the world; max_model_tokens can only lower the model's own limit."""
    limit = min(folder.max_model_tokens, max_model_tokens or folder.max_model_tokens)
    return EngineInfo(limit, folder.vocab_size, folder.eos_token_ids, folder.fingerprint)


def memory_need(folder: ModelFolder, layout: BlockLayout, num_blocks: int) -> MemoryNeed:
    """Memory for the weights in the layout's dtype and a pool of num_blocks blocks."""
    return MemoryNeed(weights_bytes(folder, layout.dtype), num_blocks * layout.block_bytes)


def memory_limit_bytes() -> int:
    """Memory this process may have in all: what it has and what is left, by the kernel's estimate or its control group's limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return available + resident_pages * os.sysconf("SC_PAGE_SIZE")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
