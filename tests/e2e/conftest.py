"""What the tests of tokens share: a random model folder and transformers' own continuation of a prompt."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama folder."""
    from baton_engine.testing import make_random_model  # torch, which most tests here do without

    folder = tmp_path_factory.mktemp("model") / "random-llama"
    make_random_model(folder)
    return folder


@pytest.fixture(scope="session")
def generate(model: Path) -> Callable[[list[int]], list[int]]:
    """transformers' own greedy continuation, 24 tokens unless told otherwise. BATON_TEST_DEVICE: where; see bench/gpu."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    device = os.environ.get("BATON_TEST_DEVICE", "cpu")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)

    def run(prompt: list[int], num_tokens: int = 24) -> list[int]:
        with torch.no_grad():
            ids = reference.generate(
                torch.tensor([prompt], device=device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return ids[0, len(prompt) :].tolist()

    return run
