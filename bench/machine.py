"""What figures were measured on, without names; and how a process is made ready to be measured."""

import gc
import os
import platform
from pathlib import Path

import numpy as np


def machine() -> dict[str, object]:
    """Processor, kernel, versions, and how busy the machine was before."""
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "num_cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_average_before": os.getloadavg()[0],
    }


def settle() -> None:
    """As services do once they have started (baton_runtime.lifecycle): a full collection takes tens of ms, in whichever thread meets it."""
    gc.collect()
    gc.freeze()
