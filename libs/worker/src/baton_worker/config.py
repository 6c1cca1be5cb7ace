"""Settings that prefill and decode share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from baton_runtime.config import CommonConfig

# Half a million tokens of the sim; about 20,000 tokens of a model with half a billion parameters.
DEFAULT_POOL_BYTES = {"sim": 64 << 20, "torch": 512 << 20}
Count = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class WorkerConfig(CommonConfig):
    """What every worker can be told, besides CommonConfig.

    engine: "sim" (pretends, with real blocks), "torch" (runs the model) or "sglang" (starts an SGLang server and owns it; an extra:
        docs/engine-sglang.md). With sglang, num_blocks, kv_memory_bytes, device, transports and all that is said to be of another engine
        is not looked at; max_waiting, model, served_name, block_tokens (its page size) and transfer_listen are.
    model: Hugging Face model folder; optional for sim, which takes its tokenizer's ids and sizes from it.
    served_name: name clients use; empty: the folder's name, or "sim".
    profile: sim only: "instant", "polynomial", or the path of a profile.
    device: torch only: "cpu", "cuda", "cuda:0".
    torch_threads: torch only: threads of the process for compute; 0: torch's own choice.
    num_blocks: KV blocks of the pool; 0: as many as fit into kv_memory_bytes.
    kv_memory_bytes: memory of the KV pool, in bytes; used if num_blocks is 0. 0: 64 MiB for sim, 512 MiB for torch.
    block_tokens: tokens per KV block.
    hash_block_tokens: granularity of the block hash chain, divides block_tokens; 0: 16 if that does, else block_tokens.
    num_shards: sim only: tensor-parallel shards the KV heads are split over, divides them.
    max_batch_sequences: sequences in one step.
    max_chunk_tokens: prompt tokens in one step; prefill takes on two such chunks ahead. sglang: as the server's --chunked-prefill-size.
    max_waiting: sequences that may wait (in the engine, and for a handoff) before new ones are refused.
    max_readers: handoffs of which this worker is the source that may be read at a time (announced, not confirmed).
    max_readers_per_sink: of them, those of one other worker; below max_readers, so that one that hangs leaves places to others.
    transports: ways of handing over KV blocks: "shm", "nixl" (an extra: docs/transports.md), "tcp"; in this order of preference.
    transfer_listen: host:port of the tcp transport; nixl listens on the same host, on any port. sglang: its server binds this host, and
        of prefill the port is where decode servers meet it (bootstrap).
    fetch_min_tokens: cached prefix tokens that another instance must have beyond our own for them to be fetched instead of computed
        (and the fetch must be predicted to be sooner); 0: nothing is ever fetched.
    fetch_min_limit_s: a fetch may take as long as computing what it is for is predicted to take, but at least this, in seconds.
    sglang_command: what starts an SGLang server, as in a shell; its Python may be any other.
    sglang_args: further flags of it, as in a shell: "--tp-size 4 --mem-fraction-static 0.85".
    sglang_tokenizer: whether it loads the tokenizer; needed for min_tokens only.
    sglang_start_s: how long it may take to become ready, in seconds.
    sglang_pinned_s: how long it may hold KV that no sequence explains before it is restarted, in seconds.
    """

    engine: Literal["sim", "torch", "sglang"] = "sim"
    model: Path | None = None
    served_name: str = ""
    profile: str = "polynomial"
    device: str = "cpu"
    torch_threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    num_blocks: Annotated[int, msgspec.Meta(ge=0)] = 0
    kv_memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    block_tokens: Count = 16
    hash_block_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    num_shards: Count = 1
    max_batch_sequences: Count = 256
    max_chunk_tokens: Count = 2048
    max_waiting: Count = 256
    max_readers: Count = 8
    max_readers_per_sink: Count = 4
    transports: tuple[Literal["shm", "nixl", "tcp"], ...] = ("shm", "tcp")
    transfer_listen: str = "127.0.0.1:0"
    fetch_min_tokens: Annotated[int, msgspec.Meta(ge=0)] = 128
    fetch_min_limit_s: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    sglang_command: str = "python3 -m sglang.launch_server"
    sglang_args: str = ""
    sglang_tokenizer: bool = False
    sglang_start_s: Annotated[float, msgspec.Meta(gt=0)] = 900.0
    sglang_pinned_s: Annotated[float, msgspec.Meta(ge=5)] = 30.0

    @property
    def pool_bytes(self) -> int:
        """kv_memory_bytes, or what stands in for it."""
        return self.kv_memory_bytes or DEFAULT_POOL_BYTES[self.engine]

    @property
    def name_for_clients(self) -> str:
        """served_name, or what stands in for it."""
        if self.served_name:
            return self.served_name
        return self.model.resolve().name if self.model is not None else "sim"
