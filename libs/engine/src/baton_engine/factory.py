"""Makes engines in two stages, because the worker allocates the pool in shared memory between them.

loaded = build_engine("torch", Path("model"))          # reads weights; tells info and layout
pool = KvPool(memory(loaded.num_blocks(kv_memory_bytes), loaded.layout.block_bytes), loaded.layout)
engine = loaded.bind(pool)                             # then: await engine.open()
"""

from dataclasses import dataclass
from pathlib import Path

from baton_runtime.errors import ConfigError

from baton_engine.api import EngineInfo
from baton_engine.driver import DrivenEngine
from baton_engine.paged_engine import PagedEngine
from baton_engine.pool import BlockLayout, KvPool
from baton_engine.runner import ModelRunner
from baton_engine.scheduler import SchedulerLimits
from baton_engine.sim_profile import load_profile
from baton_engine.sim_runner import SimRunner

KINDS = ("sim", "torch")
# Workers exchange KV only if their hash chains have one granularity; so it must not follow from a block size that may differ.
DEFAULT_HASH_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine without its memory."""

    runner: ModelRunner
    limits: SchedulerLimits
    hash_block_tokens: int
    max_waiting: int

    @property
    def info(self) -> EngineInfo:
        """What it is."""
        return self.runner.info

    @property
    def layout(self) -> BlockLayout:
        """Shape of the blocks its pool must have."""
        return self.runner.layout

    def num_blocks(self, kv_memory_bytes: int) -> int:
        """Blocks that fit into so much memory. Raises: ConfigError if not even one does."""
        num_blocks = kv_memory_bytes // self.layout.block_bytes
        if num_blocks < 1:
            raise ConfigError("kv_memory_bytes", f"{kv_memory_bytes} is less than one block of {self.layout.block_bytes} bytes")
        return num_blocks

    def bind(self, pool: KvPool) -> DrivenEngine:
        """The engine on its memory, to be opened. The pool must have this layout. Call it once."""
        if pool.layout != self.layout:
            raise ValueError(f"pool of {pool.layout} for an engine of {self.layout}")
        step_engine = PagedEngine(self.runner, pool, limits=self.limits, hash_block_tokens=self.hash_block_tokens)
        return DrivenEngine(step_engine, max_waiting=self.max_waiting)


def default_hash_block_tokens(block_tokens: int) -> int:
    """Granularity of the hash chain where none is set."""
    return block_tokens if block_tokens % DEFAULT_HASH_BLOCK_TOKENS else DEFAULT_HASH_BLOCK_TOKENS


def build_engine(
    kind: str,
    model_path: Path | None = None,
    profile: str = "instant",
    *,
    block_tokens: int = 16,
    hash_block_tokens: int = 0,
    num_shards: int = 1,
    max_batch_sequences: int = 64,
    max_chunk_tokens: int = 2048,
    max_mixed_step_s: float = 0.25,
    max_waiting: int = 64,
    device: str = "cpu",
    num_threads: int | None = None,
) -> LoadedEngine:
    """Load an engine of kind "sim" or "torch".

    model_path: Hugging Face folder; optional for sim, which takes only sizes and token ids from it. profile: sim only, a
    shipped name or a path. hash_block_tokens: granularity of the hash chain, divides block_tokens; 0: 16 if that does, else
    block_tokens. num_shards: tensor-parallel shards that the KV heads are split over; sim only, which pretends.
    max_mixed_step_s: bound on predicted steps while sequences decode along. device, num_threads: torch only. Blocking; takes as
    long as reading the weights.
    Raises: ConfigError (ProfileError for a profile) naming the setting; ModelFolderError from the torch engine.
    """
    hash_block_tokens = hash_block_tokens or default_hash_block_tokens(block_tokens)
    if block_tokens < 1 or block_tokens % hash_block_tokens:
        raise ConfigError("block_tokens", f"{block_tokens} is not a multiple of hash_block_tokens={hash_block_tokens}")
    limits = SchedulerLimits(block_tokens, max_batch_sequences, max_chunk_tokens, max_mixed_step_s=max_mixed_step_s)
    if kind == "sim":
        runner: ModelRunner = _sim_runner(profile, block_tokens, model_path, num_shards)
    elif kind == "torch":
        if num_shards != 1:
            raise ConfigError("num_shards", f"is {num_shards}: the torch engine runs on one device, so its KV heads are in 1 shard")
        runner = _torch_runner(model_path, block_tokens, device, num_threads)
    else:
        raise ConfigError("engine", f"{kind!r} is not one of {', '.join(KINDS)}")
    return LoadedEngine(runner, limits, hash_block_tokens, max_waiting)


def _sim_runner(profile: str, block_tokens: int, model_path: Path | None, num_shards: int) -> ModelRunner:
    loaded = load_profile(profile)
    try:
        return SimRunner(loaded, block_tokens, model_path, num_shards=num_shards)
    except ValueError as error:
        raise ConfigError("num_shards", str(error)) from error


def _torch_runner(model_path: Path | None, block_tokens: int, device: str, num_threads: int | None) -> ModelRunner:
    if model_path is None:
        raise ConfigError("model", "the torch engine needs a model folder")
    try:
        from baton_engine.torch_runner import TorchRunner  # an extra: sim must work without torch
    except ImportError as error:
        raise ConfigError("engine", f"torch needs the extra baton-engine[torch]: {error}") from error
    return TorchRunner(model_path, block_tokens=block_tokens, device=device, num_threads=num_threads)
