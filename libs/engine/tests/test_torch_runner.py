"""The torch runner against transformers' own generate(), token for token. BATON_TEST_DEVICE=cuda: both on that device."""

import os
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from baton_engine.api import SamplingParams, SequenceKey  # noqa: E402
from baton_engine.errors import StepFailed  # noqa: E402
from baton_engine.hf_model import ModelTooLarge  # noqa: E402
from baton_engine.pool import KvPool  # noqa: E402
from baton_engine.runner import ChunkItem, StepLoad  # noqa: E402
from baton_engine.testing import make_random_model  # noqa: E402
from baton_engine.torch_pool import TorchPool  # noqa: E402
from baton_engine.torch_runner import TorchRunner  # noqa: E402
from baton_runtime.errors import ConfigError  # noqa: E402

DEVICE = os.environ.get("BATON_TEST_DEVICE", "cpu")
BLOCK = 16
NUM_BLOCKS = 128
LENGTHS = (1, 15, 16, 17, 33, 47, 100, 200)
NUM_NEW = 20
NAN_BYTE = 0xFF  # four of them are a float32 NaN


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("model") / "llama")


def make_runner(folder: Path, num_blocks: int = NUM_BLOCKS) -> TorchRunner:
    runner = TorchRunner(folder, block_tokens=BLOCK, device=DEVICE, num_threads=1)
    data = np.zeros((num_blocks, runner.layout.block_bytes), np.uint8)
    runner.bind(KvPool(data, runner.layout))
    assert not data.any()  # warm-up leaves nothing behind
    data[:] = NAN_BYTE  # what was never written must never matter
    return runner


def host(runner: TorchRunner) -> np.ndarray:
    assert runner._pool is not None
    return runner._pool._host.numpy().view(np.uint8).reshape(runner._pool._host.shape[0], -1)


def prompts() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(3, 300) for _ in range(length)] for length in LENGTHS]


def generate(folder: Path, prompt: list[int], num_new: int = NUM_NEW) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    settings = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([prompt], device=DEVICE)
    return model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **settings)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[list[int]]:
    return [generate(folder, prompt) for prompt in prompts()]


@pytest.fixture(scope="module")
def llama_wanted(llama: Path) -> list[list[int]]:
    return [generate(llama, prompt) for prompt in prompts()]


@dataclass
class Sequence_:
    """A sequence by hand: what the scheduler keeps."""

    key: SequenceKey
    tokens: "array[int]"
    num_prompt: int
    table: list[int]
    done: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)

    @property
    def output(self) -> list[int]:
        return list(self.tokens[self.num_prompt :])


class Hand:
    """A scheduler by hand over one runner, with scattered block ids."""

    def __init__(self, runner: TorchRunner, seed: int = 0) -> None:
        self.runner = runner
        self.free = list(range(NUM_BLOCKS))
        random.Random(seed).shuffle(self.free)

    def add(self, prompt: Sequence[int], sampling: SamplingParams | None = None, delivered: Sequence[int] = ()) -> Sequence_:
        number = len(self.free)
        tokens = array("I", [*prompt, *delivered])
        sequence = Sequence_(SequenceKey(f"r{number}", 1), tokens, len(prompt), [], sampling=sampling or SamplingParams())
        self.grow(sequence)
        return sequence

    def grow(self, sequence: Sequence_) -> None:
        while len(sequence.table) * BLOCK < len(sequence.tokens):
            block = self.free.pop()
            host(self.runner)[block] = 0  # as the engine does before a block is entered
            sequence.table.append(block)

    def step(self, parts: Iterable[tuple[Sequence_, int]]) -> None:
        """Compute KV up to `end` for each; draw where that is all there is."""
        parts = list(parts)
        items = []
        for sequence, end in parts:
            draws = end == len(sequence.tokens)
            items.append(
                ChunkItem(sequence.key, sequence.tokens, sequence.done, end, sequence.table, draws, sequence.sampling, sequence.num_prompt)
            )
        drawn = self.runner.run(items)
        for (sequence, end), item, result in zip(parts, items, drawn, strict=True):
            sequence.done = end
            assert (result is not None) == item.draws
            if result is not None:
                sequence.tokens.extend(result.token_ids)
                self.grow(sequence)

    def finish(self, sequences: Sequence[Sequence_], num_new: int = NUM_NEW) -> list[list[int]]:
        while running := [s for s in sequences if len(s.tokens) - s.num_prompt < num_new]:
            self.step((s, len(s.tokens)) for s in running)
        return [s.output for s in sequences]


def test_greedy_tokens_are_those_of_generate(folder: Path, wanted: list[list[int]]) -> None:
    hand = Hand(make_runner(folder))
    assert hand.finish([hand.add(prompt) for prompt in prompts()]) == wanted


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_any_chunking_gives_the_same_tokens(llama: Path, llama_wanted: list[list[int]], chunk: int) -> None:
    hand = Hand(make_runner(llama))
    sequences = [hand.add(prompt) for prompt in prompts()]
    while waiting := [s for s in sequences if s.done < s.num_prompt]:
        hand.step((s, min(s.done + chunk, s.num_prompt)) for s in waiting)
    assert hand.finish(sequences) == llama_wanted


def test_mixed_batches_of_random_chunks_and_decodes_give_the_same_tokens(folder: Path, wanted: list[list[int]]) -> None:
    hand, choose = Hand(make_runner(folder)), random.Random(5)
    sequences = [hand.add(prompt) for prompt in prompts()]
    while running := [s for s in sequences if len(s.output) < NUM_NEW]:
        now = [s for s in running if choose.random() < 0.6] or running
        choose.shuffle(now)
        hand.step((s, min(len(s.tokens), s.done + choose.randint(1, 50))) for s in now)
    assert [s.output for s in sequences] == wanted


def test_prefix_hit_gives_the_same_tokens(llama: Path, llama_wanted: list[list[int]]) -> None:
    hand = Hand(make_runner(llama))
    first = hand.add(prompts()[-1])
    hand.step([(first, first.num_prompt - 1)])
    second = hand.add(prompts()[-1])
    shared = (second.num_prompt - 1) // BLOCK
    second.table[:shared] = first.table[:shared]
    second.done = shared * BLOCK
    assert hand.finish([second]) == [llama_wanted[-1]]


def test_blocks_exported_by_bytes_work_under_other_numbers_in_another_runner(folder: Path, wanted: list[list[int]]) -> None:
    source, sink = Hand(make_runner(folder), seed=1), Hand(make_runner(folder), seed=2)
    moved = []
    for prompt in prompts():
        sent, received = source.add(prompt), sink.add(prompt)
        if sent.num_prompt > 1:
            source.step([(sent, sent.num_prompt - 1)])
            host(sink.runner)[received.table] = host(source.runner)[sent.table]
            received.done = sent.num_prompt - 1
        moved.append(received)
    host(source.runner)[:] = NAN_BYTE
    assert sink.finish(moved) == wanted


def test_resume_from_delivered_tokens_goes_on_with_the_same_tokens(llama: Path) -> None:
    sampled = SamplingParams(seed=11, temperature=0.8, top_p=0.95, frequency_penalty=0.3, repetition_penalty=1.1)
    hand = Hand(make_runner(llama))
    whole = hand.finish([hand.add(prompt, sampled) for prompt in prompts()])
    again = Hand(make_runner(llama), seed=4)
    resumed = [again.add(prompt, sampled, delivered=out[:7]) for prompt, out in zip(prompts(), whole, strict=True)]
    assert again.finish(resumed) == whole


def test_sampled_tokens_do_not_depend_on_the_batch(llama: Path) -> None:
    sampled = SamplingParams(seed=5, temperature=1.0)
    hand = Hand(make_runner(llama))
    together = hand.finish([hand.add(prompt, sampled) for prompt in prompts()])
    alone = []
    for prompt in prompts():
        hand = Hand(make_runner(llama))
        alone += hand.finish([hand.add(prompt, sampled)])
    assert alone == together


def test_a_copied_pool_on_another_device_gives_the_same_tokens(llama: Path, llama_wanted: list[list[int]]) -> None:
    """What runs on CUDA, with the copy in host memory: handoff by bytes of the host pools."""

    def mirrored() -> Hand:
        runner = make_runner(llama)
        assert runner._pool is not None
        data = np.zeros((NUM_BLOCKS, runner.layout.block_bytes), np.uint8)
        runner._pool = TorchPool(KvPool(data, runner.layout), torch.device(DEVICE), mirrored=True)
        return Hand(runner)

    source, sink = mirrored(), mirrored()
    sequences = []
    for prompt in prompts()[1:]:
        sent, received = source.add(prompt), sink.add(prompt)
        source.step([(sent, sent.num_prompt // 2)])
        source.step([(sent, sent.num_prompt - 1)])
        host(sink.runner)[received.table] = host(source.runner)[sent.table]
        received.done = sent.num_prompt - 1
        sequences.append(received)
    assert sink.finish(sequences) == llama_wanted[1:]


def test_a_run_writes_only_its_own_slots(llama: Path) -> None:
    hand = Hand(make_runner(llama))
    sequence = hand.add(prompts()[4])
    hand.step([(sequence, 10)])
    before = host(hand.runner).copy()
    hand.step([(sequence, 20)])
    pool = host(hand.runner).view(np.float32).reshape(NUM_BLOCKS, *hand.runner.layout.shape[1:])
    old = before.view(np.float32).reshape(pool.shape)
    changed = (pool.view(np.uint32) != old.view(np.uint32)).any(axis=(1, 2, 4, 5))
    wrote = {(int(block), int(slot)) for block, slot in zip(*np.nonzero(changed), strict=True)}
    assert wrote == {(sequence.table[t // BLOCK], t % BLOCK) for t in range(10, 20)}


def test_damaged_kv_fails_only_the_guilty_sequence(llama: Path, llama_wanted: list[list[int]]) -> None:
    hand = Hand(make_runner(llama))
    good, bad = hand.add(prompts()[4]), hand.add(prompts()[5])
    hand.step([(good, 32), (bad, 46)])
    host(hand.runner)[bad.table[0]] = NAN_BYTE
    hand.runner.forget(bad.key)  # a device that has a copy takes what is in the host's block, as after a pull
    with pytest.raises(StepFailed) as failure:
        hand.step([(bad, 47), (good, 33)])
    assert failure.value.keys == {bad.key}
    assert hand.finish([good]) == [llama_wanted[4]]


def test_logprobs_are_those_of_the_whole_model(llama: Path) -> None:
    hand = Hand(make_runner(llama))
    prompt = prompts()[4]
    sequence = hand.add(prompt, SamplingParams(temperature=0.5, seed=1, top_logprobs=3))
    item = ChunkItem(
        sequence.key,
        sequence.tokens,
        0,
        len(prompt),
        sequence.table,
        True,
        SamplingParams(top_logprobs=3, logit_bias={5: 100.0}),
        len(prompt),
    )
    [draw] = hand.runner.run([item])
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt], device=DEVICE)).logits[0, -1].log_softmax(-1)
    assert draw is not None
    assert list(draw.token_ids) == [5]
    [found] = draw.logprobs
    assert found.logprob == pytest.approx(float(logprobs[5]), abs=1e-4)
    assert list(found.top_token_ids) == logprobs.topk(3).indices.tolist()
    assert list(found.top_logprobs) == pytest.approx(logprobs.topk(3).values.tolist(), abs=1e-4)


def test_bfloat16_pool_holds_the_models_keys(tmp_path: Path) -> None:
    runner = TorchRunner(make_random_model(tmp_path), block_tokens=BLOCK, device=DEVICE, dtype="bfloat16", num_threads=1)
    runner.bind(KvPool(np.zeros((NUM_BLOCKS, runner.layout.block_bytes), np.uint8), runner.layout))
    assert runner._pool is not None
    assert runner._pool.tensor.dtype == torch.bfloat16
    token_ids = array("I", prompts()[4])
    [draw] = runner.run([ChunkItem(SequenceKey("r", 1), token_ids, 0, 33, [7, 3, 9], True, SamplingParams(), 33)])
    assert draw is not None
    assert runner._pool.tensor[7].any()
    assert not runner._pool.tensor[9, :, :, 1:].any()


def test_predictions_are_positive_after_bind_and_never_fall_with_load(llama: Path) -> None:
    runner = make_runner(llama)
    small = runner.predict_s(StepLoad().plus(0, 16))
    assert small > 0.0
    assert runner.predict_s(StepLoad().plus(0, 160)) >= small
    assert runner.predict_s(StepLoad().plus(0, 16).plus(9, 10)) >= small


@pytest.mark.parametrize(
    ("device", "why"), [("cpux", "not a device"), ("meta", "meta is not supported"), ("cuda:99", "torch .* sees")], ids=str
)
def test_device_that_is_not_there_is_refused_by_name(llama: Path, device: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^device: .*{why}"):
        TorchRunner(llama, device=device)


def test_pool_of_another_layout_is_refused(llama: Path) -> None:
    runner = TorchRunner(llama, block_tokens=32)
    other = TorchRunner(llama, block_tokens=16).layout
    with pytest.raises(ValueError, match="given to a model"):
        runner.bind(KvPool(np.zeros((4, other.block_bytes), np.uint8), other))


def test_pool_that_does_not_fit_with_the_model_is_refused(llama: Path) -> None:
    runner = TorchRunner(llama, device=DEVICE, num_threads=1)
    huge = np.broadcast_to(np.zeros((1, runner.layout.block_bytes), np.uint8), (1 << 40, runner.layout.block_bytes))
    with pytest.raises(ModelTooLarge, match="KV pool"):
        runner.bind(KvPool(huge, runner.layout))
