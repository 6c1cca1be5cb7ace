"""What the checks and figures on a GPU share: findings that survive single failures, models, and the device's facts."""

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))  # machine.py

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MAX_MODEL_TOKENS = 16384


class Findings:
    """Named results in one JSON file, written after each, so that what was found survives whatever comes later."""

    def __init__(self, path: Path, **about: object) -> None:
        self._path = path
        self._started = time.monotonic()
        self.failed: list[str] = []
        self.data: dict[str, Any] = {"about": about, "results": {}, "failures": {}}
        self._write()

    def run(self, name: str, measure: Callable[[], object]) -> None:
        """Keep what measure returns; an exception is a failure with its traceback, and the next one goes on."""
        began = time.monotonic()
        try:
            result = measure()
        except Exception:
            text = traceback.format_exc()
            self.failed.append(name)
            self.data["failures"][name] = text[-4000:]
            tail = "\n".join(text.splitlines()[-12:])
            print(f"FAIL {name} ({time.monotonic() - began:.1f} s)\n{tail}", flush=True)
        else:
            self.data["results"][name] = result
            print(f"PASS {name} ({time.monotonic() - began:.1f} s) {json.dumps(result)[:600]}", flush=True)
        self._write()

    def _write(self) -> None:
        self.data["about"]["seconds"] = round(time.monotonic() - self._started, 1)
        self._path.write_text(json.dumps(self.data, indent=1))


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Append the seconds of the block."""
    started = time.perf_counter()
    yield
    into.append(time.perf_counter() - started)


def median(values: list[float]) -> float:
    """Rounded to six digits."""
    return float(f"{statistics.median(values):.6g}")


def device_facts(device: str) -> dict[str, object]:
    """The card and the versions that the figures depend on."""
    import torch
    import transformers
    from machine import machine

    facts: dict[str, object] = {"torch": torch.__version__, "transformers": transformers.__version__, **machine()}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        facts |= {"card": properties.name, "card_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return facts


def make_model(folder: Path, device: str, dtype: str, shape: dict[str, int], vocab_size: int = 0) -> Path:
    """A random Llama folder with a tokenizer, made on the device. vocab_size 0: the tokenizer's (a few hundred tokens)."""
    import torch
    from baton_engine.testing import make_random_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    make_random_model(folder, num_layers=1)  # for its tokenizer and chat template
    vocab_size = vocab_size or json.loads((folder / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=MAX_MODEL_TOKENS,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=[2, 0],
        **shape,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.to("cpu").save_pretrained(folder)
    return folder
