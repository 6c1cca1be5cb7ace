"""The real engine over the torch runner: scheduler, block manager and model together, against generate().

BATON_TEST_DEVICE=cuda: both there.
"""

import os
import random
from array import array
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from baton_engine.api import EndReason, EngineRequest, SamplingParams, SequenceKey, StepOutput, Work  # noqa: E402
from baton_engine.paged_engine import PagedEngine  # noqa: E402
from baton_engine.pool import KvPool  # noqa: E402
from baton_engine.scheduler import SchedulerLimits  # noqa: E402
from baton_engine.testing import make_random_model  # noqa: E402
from baton_engine.torch_runner import TorchRunner  # noqa: E402
from baton_runtime.hashing import block_hashes, cache_root  # noqa: E402

DEVICE = os.environ.get("BATON_TEST_DEVICE", "cpu")
BLOCK = 16
LENGTHS = (1, 2, 15, 16, 17, 18, 33, 47, 100, 200)
NUM_NEW = 12


class Bench:
    """One engine and what came out of it."""

    def __init__(self, folder: Path, num_blocks: int = 128, max_chunk_tokens: int = 48) -> None:
        runner = TorchRunner(folder, block_tokens=BLOCK, device=DEVICE, num_threads=1)
        pool = KvPool(np.zeros((num_blocks, runner.layout.block_bytes), np.uint8), runner.layout)
        self.engine = PagedEngine(runner, pool, limits=SchedulerLimits(BLOCK, max_chunk_tokens=max_chunk_tokens))
        pool.data[:] = 0xFF  # NaN: nothing that was never written may matter
        self.root = cache_root(runner.info.fingerprint)
        self.outputs: list[StepOutput] = []

    def request(self, name: str, tokens: list[int], work: Work = Work.WHOLE, num_prompt: int = 0, **params: object) -> EngineRequest:
        sampling = SamplingParams(**({"max_tokens": NUM_NEW, "ignore_eos": True} | params))  # type: ignore[arg-type]
        return EngineRequest(SequenceKey(name, 1), array("I", tokens), num_prompt or len(tokens), self.root, work, sampling=sampling)

    def hashes(self, tokens: list[int]) -> list[bytes]:
        return block_hashes(self.root, array("I", tokens[:-1]), BLOCK, BLOCK)

    def run(self) -> dict[str, list[int]]:
        """Steps until idle; all tokens so far per request, in order of position."""
        while self.engine.has_work():
            self.engine.plan()
            self.outputs.append(self.engine.step())
            self.engine.blocks.check()
        tokens: dict[str, list[int]] = defaultdict(list)
        for output in self.outputs:
            for key, token in zip(output.keys, output.token_ids, strict=True):
                tokens[key.request_id].append(token)
        return dict(tokens)

    def end(self, name: str) -> tuple[EndReason, int]:
        [end] = [end for output in self.outputs for end in output.ends if end.key.request_id == name]
        return end.reason, end.cached_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    draw = random.Random(8)
    return {str(length): [draw.randrange(3, 300) for _ in range(length)] for length in LENGTHS}


@pytest.fixture(scope="module")
def wanted(folder: Path, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)

    def generate(prompt: list[int]) -> list[int]:
        settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        ids = torch.tensor([prompt], device=DEVICE)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()

    return {name: generate(prompt) for name, prompt in prompts.items()}


def test_batch_gives_the_tokens_of_generate(folder: Path, prompts: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    bench = Bench(folder)
    for name, prompt in prompts.items():
        bench.engine.add(bench.request(name, prompt))
    assert bench.run() == wanted
    assert bench.engine.blocks.counts().used == 0


def test_handoff_gives_the_tokens_of_generate(folder: Path, prompts: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    source, sink = Bench(folder), Bench(folder, num_blocks=100)
    for name, prompt in prompts.items():
        request = source.request(name, prompt, Work.PREFILL_ONLY)
        source.engine.blocks.acquire(request.key, source.hashes(prompt), -(-request.num_kv_tokens // BLOCK))
        source.engine.add(request)
    source.run()
    ready = {key: [] for key in (SequenceKey(name, 1) for name in prompts)}
    for output in source.outputs:
        for announced in output.ready:
            ready[announced.key] += announced.block_ids
    for name, prompt in prompts.items():
        request, hashes = sink.request(name, prompt, Work.DECODE_ONLY), sink.hashes(prompt)
        num_blocks = -(-request.num_kv_tokens // BLOCK)
        sink.engine.blocks.reserve(request.key, hashes, num_blocks)
        sink.engine.pool.data[list(sink.engine.blocks.table(request.key))] = source.engine.pool.data[ready[request.key]]
        sink.engine.blocks.commit(request.key, num_blocks, hashes)
        source.engine.blocks.unpin(request.key)
        sink.engine.add(request)
    source.engine.pool.data[:] = 0xFF
    assert sink.run() == wanted


def test_prefix_hits_do_not_change_the_tokens(folder: Path, prompts: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    bench = Bench(folder)
    bench.engine.add(bench.request("first", prompts["200"]))
    bench.run()
    bench.engine.add(bench.request("again", prompts["200"]))
    bench.engine.add(bench.request("longer", prompts["200"] + wanted["200"][:5], num_prompt=200))
    tokens = bench.run()
    assert bench.end("again")[1] == 192
    assert tokens["again"] == tokens["first"] == wanted["200"]
    assert tokens["longer"] == wanted["200"][5:]


def test_preempted_sequences_resume_with_the_same_tokens(folder: Path, prompts: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """A pool too small for all: what is preempted comes back with its tokens so far, as a frontend does it."""
    bench, names, told = Bench(folder, num_blocks=14), ["47", "100", "33", "18"], defaultdict[str, list[int]](list)
    for name in names:
        bench.engine.add(bench.request(name, prompts[name]))
    for attempt in range(20):
        bench.outputs.clear()
        for name, tokens in bench.run().items():
            told[name.split("#")[0]] += tokens
        ends = [end for output in bench.outputs for end in output.ends if end.reason is EndReason.PREEMPTED]
        for name in (end.key.request_id.split("#")[0] for end in ends):
            bench.engine.add(bench.request(f"{name}#{attempt}", prompts[name] + told[name], num_prompt=len(prompts[name])))
        if not ends:
            break
    assert told == {name: wanted[name] for name in names}


def test_sampled_resume_in_another_engine_draws_the_same(folder: Path, prompts: dict[str, list[int]]) -> None:
    params = {"seed": 3, "temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.4}
    first, second = Bench(folder), Bench(folder, max_chunk_tokens=10)
    for name, prompt in prompts.items():
        first.engine.add(first.request(name, prompt, **params))
    whole = first.run()
    for name, prompt in prompts.items():
        second.engine.add(second.request(name, prompt + whole[name][:5], num_prompt=len(prompt), **params))
    assert second.run() == {name: tokens[5:] for name, tokens in whole.items()}


def test_end_token_stops_and_is_masked_before_min_tokens(folder: Path, prompts: dict[str, list[int]]) -> None:
    bench = Bench(folder)
    bias = {"ignore_eos": False, "logit_bias": {2: 100.0}}
    bench.engine.add(bench.request("now", prompts["33"], **bias))
    bench.engine.add(bench.request("later", prompts["33"], min_tokens=4, **bias))
    tokens = bench.run()
    assert tokens["now"] == [2]
    assert len(tokens["later"]) == 5
    assert tokens["later"].index(2) == 4
    assert bench.end("later")[0] is EndReason.STOP
