"""Cached segments give the same ids as the whole prompt, in bounded memory."""

import random
from array import array

import pytest
from baton_frontend.segment_cache import SegmentCache, find_borders
from baton_frontend.testing_models import SAMPLE_TEXT, byte_fallback_tokenizer, byte_level_tokenizer
from baton_frontend.tokenizer import PromptTokenizer, WorkPool
from tokenizers import AddedToken, Tokenizer


async def encode(prompts: PromptTokenizer, text: str) -> list[int]:
    return (await prompts.encode([text], add_special_tokens=False))[0].tolist()


@pytest.mark.parametrize("seed", range(20))
async def test_cut_prompts_have_the_ids_of_whole_ones(tokenizer: Tokenizer, seed: int) -> None:
    generator = random.Random(seed)
    borders = find_borders(tokenizer)
    assert borders is not None
    parts = [*SAMPLE_TEXT, *borders.token_ids, "", " ", "\n", "a longer turn of a conversation, long enough to be kept in the cache"]
    with WorkPool(num_threads=1) as pool:
        prompts = PromptTokenizer(tokenizer, pool, borders)
        for _ in range(20):
            text = "".join(generator.choices(parts, k=10))
            assert await encode(prompts, text) == tokenizer.encode(text, add_special_tokens=False).ids
        assert prompts.cache.num_hits > 0


async def test_only_the_new_turn_is_encoded(tokenizer: Tokenizer) -> None:
    system, turn = "You are helpful. " * 20, "A turn that is long enough to be kept for the next call. " * 2
    with WorkPool(num_threads=1) as pool:
        prompts = PromptTokenizer(tokenizer, pool, find_borders(tokenizer))
        await encode(prompts, f"<|system|>{system}<|end|><|user|>{turn}<|end|>")
        await encode(prompts, f"<|system|>{system}<|end|><|user|>{turn}<|end|><|user|>new<|end|>")
    stats = prompts.cache.stats()
    assert (stats["hits"], stats["segments"]) == (2, 2)


def test_special_tokens_that_take_spaces_are_no_borders() -> None:
    tokenizer = byte_fallback_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    borders = find_borders(tokenizer)
    assert borders is None or "<mask>" not in borders.token_ids


def test_a_special_token_that_another_one_overlaps_is_no_border() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["x<|end"])
    borders = find_borders(tokenizer)
    assert borders is not None
    assert "<|end|>" not in borders.token_ids
    assert "<|user|>" in borders.token_ids


def test_the_cache_stays_within_its_bytes_and_drops_what_was_not_used() -> None:
    cache = SegmentCache(limit_bytes=4000)
    texts = [f"{number:0100d}" for number in range(50)]
    for text in texts:
        cache.put(text, array("I", range(25)))
        assert cache.get(texts[0]) is not None
        assert cache.stats()["bytes"] <= 4000
    assert cache.get(texts[1]) is None
    assert cache.get(texts[-1]) is not None


def test_short_and_huge_segments_are_not_kept() -> None:
    cache = SegmentCache(limit_bytes=4000)
    cache.put("short", array("I", [1]))
    cache.put("x" * 2000, array("I", [1]))
    assert cache.stats()["segments"] == 0
