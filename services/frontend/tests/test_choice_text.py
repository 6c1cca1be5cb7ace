"""The text of a choice does not depend on how its tokens were cut into calls."""

import random
from typing import Any

import pytest
from baton_frontend.choice_text import ChoiceText
from baton_frontend.generation import TokenLogprob
from baton_frontend.testing_models import byte_level_tokenizer
from baton_frontend.token_text import build_token_text

TOKENIZER = byte_level_tokenizer()
TEXT, _ = build_token_text(TOKENIZER, TOKENIZER.get_vocab_size(), 500)
SAMPLE = "one two 你好 END three 😀 END"
IDS: list[int] = TOKENIZER.encode(SAMPLE, add_special_tokens=False).ids


def new(**options: Any) -> ChoiceText:
    return ChoiceText(TEXT.open(()), **options)


def run(choice: ChoiceText, cuts: list[list[int]]) -> str:
    return "".join([choice.push(cut, None) for cut in cuts]) + choice.finish()


@pytest.mark.parametrize("options", [{}, {"stops": ["END"]}, {"stops": ["never"]}, {"silent_token_ids": frozenset({IDS[3]})}])
@pytest.mark.parametrize("seed", range(5))
def test_every_cut_gives_the_same_text_and_count(options: dict[str, Any], seed: int) -> None:
    generator = random.Random(seed)
    ends = sorted({*generator.sample(range(1, len(IDS)), 5), len(IDS)})
    cuts = [IDS[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    whole, cut, single = new(**options), new(**options), new(**options)
    assert run(whole, [IDS]) == run(cut, cuts) == run(single, [[i] for i in IDS])
    assert whole.num_tokens == cut.num_tokens == single.num_tokens


def test_a_stop_string_counts_from_min_tokens_on() -> None:
    first_end = next(n for n in range(len(IDS)) if "END" in TOKENIZER.decode(IDS[:n]))
    choice = new(stops=["END"], min_tokens=first_end)
    assert run(choice, [IDS]) == "one two 你好 END three 😀 "
    assert choice.matched == "END"


def test_a_silent_token_is_shown_before_min_tokens_only() -> None:
    o = TOKENIZER.token_to_id("o")
    choice = new(silent_token_ids=frozenset({o}), min_tokens=2)
    assert run(choice, [[o, o, o]]) == "oo"
    assert choice.num_tokens == 3


def test_extras_are_those_since_the_last_time() -> None:
    choice = new(wants_logprobs=True, wants_token_ids=True)
    entry = TokenLogprob(-1.0, [], [])
    choice.push(IDS[:2], [entry] * 2)
    columns, ids = choice.take_extras()
    assert columns is not None
    assert (columns.token_ids, ids) == (IDS[:2], IDS[:2])
    choice.push(IDS[2:3], [entry])
    columns, ids = choice.take_extras()
    assert columns is not None
    assert (columns.text_offsets, ids) == ([len(TOKENIZER.decode(IDS[:2]))], IDS[2:3])


def test_only_a_choice_that_asks_for_nothing_is_plain() -> None:
    assert new().is_plain
    for options in ({"stops": ["x"]}, {"silent_token_ids": frozenset({1})}, {"wants_logprobs": True}, {"wants_token_ids": True}):
        assert not new(**options).is_plain
