"""The text before a stop string is shown, nothing of it and nothing after it."""

import random

import pytest
from baton_frontend.stop_strings import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    return shown + matcher.finish(), matcher.matched


def test_text_ends_before_the_stop_string() -> None:
    assert run(["END"], ["one EN", "D two"]) == ("one ", "END")


def test_a_start_that_does_not_go_on_is_shown_in_the_end() -> None:
    assert run(["END"], ["one EN", "E EN"]) == ("one ENE EN", None)


def test_nothing_of_a_possible_stop_string_is_shown_early() -> None:
    matcher = StopMatcher(["<stop>"])
    assert matcher.push("a<st") == "a"
    assert matcher.push("o") == ""
    assert matcher.push("x<") == "<stox"


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert run(["bcde", "cd"], ["abcdef"]) == ("ab", "cd")


def test_of_two_complete_at_once_the_longer_wins() -> None:
    assert run(["cd", "bcd"], ["abcd"]) == ("a", "bcd")


def test_nothing_is_shown_after_a_match() -> None:
    matcher = StopMatcher(["x"])
    matcher.push("ax")
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


@pytest.mark.parametrize("seed", range(30))
def test_the_result_does_not_depend_on_the_cut(seed: int) -> None:
    generator = random.Random(seed)
    text = "".join(generator.choices("ab", k=60))
    stops = ["".join(generator.choices("ab", k=generator.randint(3, 8))) for _ in range(3)]
    cuts = sorted(generator.sample(range(60), 12))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, 60], strict=True)]
    assert run(stops, pieces) == run(stops, list(text)) == run(stops, [text])
