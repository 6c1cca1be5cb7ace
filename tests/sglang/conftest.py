"""SGLang for the tests of this folder: `make test-sglang` installs it into an environment of its own and names its Python."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

PYTHON = os.environ.get("BATON_SGLANG_PYTHON", "")
if not PYTHON:
    collect_ignore_glob = ["test_*.py"]

STANDINS = Path(__file__).parent / "standins"
ENVIRONMENT = {
    "PYTHONPATH": str(STANDINS),
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # penalties would be compiled, half a minute each
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
# A whole machine's memory would go into the KV pool without a limit.
FLAGS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none --dtype float32 "
    "--max-total-tokens 8192 --max-running-requests 32 --sleep-on-idle"
)
PAIR = "--disaggregation-transfer-backend nixl"
# Two requests in one prefill step crash the overlapped schedule on a CPU; the default of where retracted KV goes wants CUDA.
PREFILL, DECODE = "--disable-overlap-schedule", "--disaggregation-decode-retraction-backup cpu_tensor"


@pytest.fixture(scope="session")
def settings() -> Callable[[bool], dict[str, str]]:
    """Environment of Baton's services, by whether prefill and decode are apart."""

    def make(is_pair: bool) -> dict[str, str]:
        variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        command = shlex.join(["env", *variables, str(Path(PYTHON).absolute()), "-m", "sglang.launch_server"])
        found = {}
        for service, own in (("PREFILL", PREFILL), ("DECODE", DECODE)):
            found[f"BATON_{service}_SGLANG_COMMAND"] = command
            found[f"BATON_{service}_SGLANG_ARGS"] = f"{FLAGS} {PAIR} {own}" if is_pair else FLAGS
        return found

    return make


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model."""
    from baton_engine.testing import make_random_model

    return make_random_model(tmp_path_factory.mktemp("sglang") / "model")


@pytest.fixture(scope="session")
def reference(model: Path) -> Callable[[list[int], int], list[int]]:
    """The greedy tokens of transformers' generate()."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def generate(token_ids: list[int], count: int) -> list[int]:
        with torch.no_grad():
            found = loaded.generate(torch.tensor([token_ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        return found[0, len(token_ids) :].tolist()

    return generate
