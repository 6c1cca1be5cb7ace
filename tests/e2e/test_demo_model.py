"""The committed demo model, run by the torch runner over blocks: its answers come from the KV of the prompt."""

import random
from array import array

import numpy as np
import pytest
from baton_cli.up import demo_model
from baton_engine.api import SamplingParams, SequenceKey
from baton_engine.hf_model import inspect_model_folder
from baton_engine.pool import KvPool
from baton_engine.runner import ChunkItem
from baton_engine.torch_runner import TorchRunner
from tokenizers import Tokenizer

FOLDER = demo_model()
KEY = SequenceKey("r", 1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    runner = TorchRunner(FOLDER, num_threads=1)
    runner.bind(KvPool(np.zeros((64, runner.layout.block_bytes), np.uint8), runner.layout))
    return runner


def prefill(runner: TorchRunner, prompt: list[int]) -> np.ndarray:
    """Bytes of the blocks of all tokens but the last."""
    pool = runner._pool
    assert pool is not None
    pool.tensor.zero_()
    tokens = array("I", prompt)
    runner.run([ChunkItem(KEY, tokens, 0, len(tokens) - 1, range(30), False, SamplingParams(), len(tokens))])
    return pool.tensor[:30].numpy().copy()


def decode(runner: TorchRunner, prompt: list[int], blocks: np.ndarray) -> list[int]:
    """Greedy output until the end token, on blocks put under other numbers."""
    pool = runner._pool
    assert pool is not None
    pool.tensor.zero_()
    table = list(range(60, 30, -1))
    pool.tensor.numpy()[table] = blocks
    tokens = array("I", prompt)
    for _ in range(8):
        [draw] = runner.run([ChunkItem(KEY, tokens, len(tokens) - 1, len(tokens), table, True, SamplingParams(), len(prompt))])
        assert draw is not None
        tokens.extend(draw.token_ids)
        if draw.token_ids[0] in runner.info.eos_token_ids:
            break
    return list(tokens[len(prompt) :])


def facts(choose: random.Random, words: list[str]) -> list[tuple[str, str]]:
    return [(word, " ".join(str(choose.randrange(10)) for _ in range(3))) for word in words]


def test_answer_comes_from_the_handed_over_kv_and_ends_by_itself(runner: TorchRunner, tokenizer: Tokenizer) -> None:
    choose = random.Random(0)
    words = [token.removeprefix("\u2581") for token, i in tokenizer.get_vocab().items() if i >= 17]
    right = {"own": 0, "other": 0, "zero": 0}
    for _ in range(25):
        names = choose.sample(sorted(words), 16)
        told, others = facts(choose, names), facts(choose, names)
        word, answer = choose.choice(told)

        def prompt(pairs: list[tuple[str, str]], word: str = word) -> list[int]:
            return list(tokenizer.encode(" ; ".join(f"{w} = {v}" for w, v in pairs) + f" ; {word} ?").ids)

        own, other = prefill(runner, prompt(told)), prefill(runner, prompt(others))
        for name, blocks in (("own", own), ("other", other), ("zero", np.zeros_like(own))):
            said = decode(runner, prompt(told), blocks)
            right[name] += tokenizer.decode(said) == answer and said[-1] in runner.info.eos_token_ids
    assert right == {"own": 25, "other": 0, "zero": 0}


def test_text_reads_well_and_punctuation_needs_no_spaces(tokenizer: Tokenizer) -> None:
    want = tokenizer.encode("red = 4 7 1 ; blue = 2 2 8 ; red ?").ids
    assert tokenizer.encode("Red=471; blue=228;red?").ids == want
    assert tokenizer.decode(want) == "red = 4 7 1 ; blue = 2 2 8 ; red ?"
    assert tokenizer.decode(want[3:6]) == "4 7 1"
    assert tokenizer.encode("whatever", add_special_tokens=False).tokens == ["<unk>"]


def test_folder_is_small_and_complete() -> None:
    folder = inspect_model_folder(FOLDER)
    assert folder.eos_token_ids == {2}
    assert folder.max_model_tokens >= 2048
    assert folder.chat_template
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4_000_000


def test_chat_template_puts_an_answer_right_behind_its_question() -> None:
    pytest.importorskip("jinja2")
    transformers = pytest.importorskip("transformers")
    chat = [
        {"role": "user", "content": "red = 4 7 1 ; red ?"},
        {"role": "assistant", "content": "4 7 1"},
        {"role": "user", "content": " blue = 2 2 8 "},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "blue ?"},
    ]
    text = transformers.AutoTokenizer.from_pretrained(FOLDER).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s>red = 4 7 1 ; red ? 4 7 1 ; blue = 2 2 8 ; blue ?"
