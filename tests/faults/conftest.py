"""What the fault tests share: a timed sim engine whose steps are long enough to hit, and a model folder with room."""

from pathlib import Path

import pytest
from cluster import roomy_model

# 1 ms per prompt token and 10 ms per decode step: a 2,000-token prompt is on its way for 2 s in chunks of at most 250 ms.
SLOW_PROFILE = """
description = "slow enough to be hit in the middle"
[prefill_ms]
per_token = 1.0
[decode_ms]
constant = 10.0
"""


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the slow profile."""
    file = tmp_path_factory.mktemp("profile") / "slow.toml"
    file.write_text(SLOW_PROFILE)
    return str(file)


@pytest.fixture(scope="session", name="roomy_model")
def make_roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's folder with a longer context."""
    return roomy_model(tmp_path_factory.mktemp("model") / "roomy")
