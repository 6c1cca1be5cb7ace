"""What the tests of SGLang share."""

from collections.abc import Callable
from pathlib import Path

import pytest


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
