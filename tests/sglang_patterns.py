"""What the deployment patterns (docs/patterns.md) give to SGLang: settings, flags, and the arithmetic of their KV pools."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton_decode.config import DecodeConfig
from baton_engine.sglang.child import OWN_FLAGS
from baton_prefill.config import PrefillConfig
from baton_runtime.config import load

WORKERS: dict[str, type[PrefillConfig] | type[DecodeConfig]] = {"prefill": PrefillConfig, "decode": DecodeConfig}
# What Baton passes to its child by itself (a flag given twice would win over it).
BATONS_OWN = {*OWN_FLAGS, "--skip-server-warmup", "--base-gpu-id"}
GPU_MIB = 81559  # an H100 with "80 GB", as nvidia-smi says


@dataclass(frozen=True)
class Model:
    """What the KV of a model is made of: its config.json, and the size of its weights (checkpoint)."""

    full_layers: int
    sliding_layers: int
    kv_heads: int
    head_dim: int
    weights_gib: float
    bytes_per_value: int = 2  # --kv-cache-dtype bfloat16
    sliding_ratio: float = 0.8  # SGLang's --swa-full-tokens-ratio: slots of sliding layers per slot of full ones

    @property
    def handoff_bytes(self) -> int:
        """Of KV per prompt token, over all GPUs; sliding layers hand over their window only, which is left out."""
        return 2 * self.full_layers * self.kv_heads * self.head_dim * self.bytes_per_value

    def pool_tokens(self, tp: int, fraction: float) -> int:
        """Tokens that fit in the pool of an instance: each GPU holds its heads of all of them."""
        layers = self.full_layers + self.sliding_ratio * self.sliding_layers
        per_token = 2 * layers * (self.kv_heads // tp) * self.head_dim * self.bytes_per_value
        return int((fraction * GPU_MIB - self.weights_gib * 1024 / tp) * 2**20 / per_token)


MODELS = {
    "gpt-oss-120b": Model(full_layers=18, sliding_layers=18, kv_heads=8, head_dim=64, weights_gib=60.8),
    "llama-70b-two-nodes": Model(full_layers=80, sliding_layers=0, kv_heads=8, head_dim=128, weights_gib=67.7),
}


def flags(given: Mapping[str, str], service: str) -> dict[str, str]:
    """Flags of a worker's child -> their values ("" for one without)."""
    words = shlex.split(given[f"BATON_{service.upper()}_SGLANG_ARGS"])
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            assert word not in found, f"{word} is given twice"
            name = word
            found[name] = ""
        else:
            assert name, f"{word} belongs to no flag"
            assert not found[name], f"{name} has two values"
            found[name] = word
    return found


def loaded(given: Mapping[str, str], service: str) -> Any:
    """The settings of a worker, read as it would read them. Raises: ConfigError that names the setting."""
    prefix = f"BATON_{service.upper()}_"
    mine = {name: text for name, text in given.items() if name.startswith(prefix)}
    assert mine[f"{prefix}ENGINE"] == "sglang"
    return load(WORKERS[service], service, None, mine)


def must_fit(pattern: str, services: Mapping[str, Mapping[str, str]], gpus: Mapping[str, int]) -> None:
    """The environments of prefill and decode, and how many GPUs each has, against what a pair needs of one another."""
    given = {service: flags(services[service], service) for service in WORKERS}
    configs = {service: loaded(services[service], service) for service in WORKERS}
    for service in WORKERS:
        assert given[service].keys() & BATONS_OWN == set()
        assert int(given[service]["--tp-size"]) == gpus[service]
        assert MODELS[pattern].kv_heads % gpus[service] == 0  # else heads are held twice, and the arithmetic is another
    for flag in ("--tp-size", "--kv-cache-dtype", "--disaggregation-transfer-backend"):
        assert given["prefill"][flag] == given["decode"][flag], flag
    assert configs["prefill"].block_tokens == configs["decode"].block_tokens
    assert configs["prefill"].name_for_clients == configs["decode"].name_for_clients
    assert configs["decode"].can_prefill is False  # the mode in which a child takes handed-over prompts
    # Prefill takes on two chunks ahead (max_chunk_tokens): with fewer its server could not fill one.
    assert configs["prefill"].max_chunk_tokens == int(given["prefill"]["--chunked-prefill-size"])
    assert "--chunked-prefill-size" not in given["decode"]
