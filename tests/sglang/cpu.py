"""How to run SGLang's servers on a CPU: `make test-sglang` installs them into an environment of their own and names its Python."""

import os
import shlex
from pathlib import Path

PYTHON = os.environ.get("BATON_SGLANG_PYTHON", "")
ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parent / "standins"),
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


def settings(*, is_pair: bool) -> dict[str, str]:
    """Environment of Baton's services, by whether prefill and decode are apart."""
    variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    command = shlex.join(["env", *variables, str(Path(PYTHON).absolute()), "-m", "sglang.launch_server"])
    found = {"BATON_DECODE_CAN_PREFILL": str(not is_pair).lower()}
    for service, own in (("PREFILL", PREFILL), ("DECODE", DECODE)):
        found[f"BATON_{service}_SGLANG_COMMAND"] = command
        found[f"BATON_{service}_SGLANG_ARGS"] = f"{FLAGS} {PAIR} {own}" if is_pair else FLAGS
    return found
