"""The text of a stream is what the tokenizer decodes, however the ids are cut."""

import json
import random
import sysconfig
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from baton_frontend.testing_models import (
    SAMPLE_TEXT,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
    word_level_tokenizer,
    word_piece_tokenizer,
)
from baton_frontend.token_text import (
    DecoderText,
    TableStream,
    TokenTable,
    TokenText,
    build_token_text,
    escape,
    find_difference,
    pending_bytes,
)
from tokenizers import Regex, Tokenizer, decoders

NUM_VERIFY = 500


def streamed(text: TokenText, ids: list[int], cut: int, prompt_tail: tuple[int, ...] = ()) -> str:
    stream = text.open(prompt_tail)
    return "".join([stream.push(ids[i : i + cut]) for i in range(0, len(ids), cut)]) + stream.finish()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (byte_level_tokenizer, "byte_level"),
        (byte_fallback_tokenizer, "byte_fallback"),
        (word_piece_tokenizer, "probed"),
        (word_level_tokenizer, "probed"),
        (metaspace_tokenizer, "probed"),
    ],
)
@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_table_text_equals_the_tokenizers(make: Callable[[], Tokenizer], kind: str, cut: int) -> None:
    tokenizer = make()
    text, reason = build_token_text(tokenizer, tokenizer.get_vocab_size(), NUM_VERIFY)
    assert isinstance(text, TokenTable), reason
    assert text.kind == kind
    for sample in SAMPLE_TEXT:
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        assert streamed(text, ids, cut) == tokenizer.decode(ids)


def corpus() -> list[str]:
    """Some 600,000 characters: Python's own sources and documents, and every character that has a name, in pieces of a page."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))[:60]
    text = "".join(file.read_text(encoding="utf-8") for file in files)[:450_000]
    named = "".join(chr(code) for code in range(0x20, 0x20000) if unicodedata.name(chr(code), ""))
    step = 1500
    return [whole[at : at + step] for whole in (text, named) for at in range(0, len(whole), step)]


@pytest.mark.parametrize(
    ("make", "kind"), [(byte_level_tokenizer, "byte_level"), (byte_fallback_tokenizer, "byte_fallback"), (word_piece_tokenizer, "probed")]
)
@pytest.mark.timeout(120)
def test_over_a_large_corpus_the_table_gives_the_tokenizers_text(make: Callable[..., Tokenizer], kind: str) -> None:
    """With vocabularies learnt from part of it, and cut as frames might cut it."""
    pages = corpus()
    assert sum(map(len, pages)) > 500_000
    tokenizer = make(pages[::20], 4000)
    text, reason = build_token_text(tokenizer, tokenizer.get_vocab_size(), NUM_VERIFY)
    assert isinstance(text, TokenTable), reason
    assert text.kind == kind
    cuts = random.Random(7)
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(pages, add_special_tokens=False)]
    for page_ids, expected in zip(ids, tokenizer.decode_batch(ids), strict=True):
        assert streamed(text, page_ids, cuts.randint(1, 9)) == expected


def test_a_text_that_goes_on_from_a_prompt_keeps_its_first_space() -> None:
    tokenizer = word_level_tokenizer()
    text, _ = build_token_text(tokenizer, tokenizer.get_vocab_size(), NUM_VERIFY)
    ids = tokenizer.encode("4 7 1").ids
    assert streamed(text, ids, 1) == "4 7 1"
    assert streamed(text, ids, 1, prompt_tail=(2,)) == " 4 7 1"


def test_special_tokens_have_no_text_but_a_name() -> None:
    tokenizer = byte_level_tokenizer()
    text, _ = build_token_text(tokenizer, tokenizer.get_vocab_size(), NUM_VERIFY)
    end = tokenizer.token_to_id("<|end|>")
    assert streamed(text, [end], 1) == ""
    assert text.escaped[end] == b""
    assert text.token_bytes(end) == b"<|end|>"


def test_ids_the_tokenizer_does_not_know_have_no_text() -> None:
    tokenizer = byte_level_tokenizer()
    text, _ = build_token_text(tokenizer, 1000, NUM_VERIFY)
    assert len(text.escaped) == 1000
    assert streamed(text, [999, 5000], 1) == ""
    assert text.token_bytes(5000) == b""


def test_wrong_bytes_never_raise_and_hold_back_at_most_three_bytes() -> None:
    tokenizer = byte_fallback_tokenizer()
    text, _ = build_token_text(tokenizer, tokenizer.get_vocab_size(), NUM_VERIFY)
    generator = random.Random(5)
    for _ in range(300):
        ids = [tokenizer.token_to_id(f"<0x{generator.randrange(256):02X}>") for _ in range(12)]
        data = b"".join([bytes([int(tokenizer.id_to_token(i)[3:5], 16)]) for i in ids])
        assert streamed(text, ids, 1, prompt_tail=(ids[0],)) == data.decode("utf-8", "replace")


def test_a_table_that_is_wrong_is_found_out() -> None:
    tokenizer = byte_level_tokenizer()
    text, _ = build_token_text(tokenizer, tokenizer.get_vocab_size(), NUM_VERIFY)
    assert isinstance(text, TokenTable)
    text.raw[tokenizer.token_to_id("o")] = b"0"
    assert find_difference(text, tokenizer, NUM_VERIFY) is not None


def odd_tokenizer() -> Tokenizer:
    """A decoder that looks at neighbours, so that no table can stand for it."""
    tokenizer = byte_level_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Replace(Regex("o(?=[a-z ])"), "0")])
    return tokenizer


def test_other_decoders_fall_back_to_the_tokenizer() -> None:
    tokenizer = odd_tokenizer()
    text, reason = build_token_text(tokenizer, tokenizer.get_vocab_size(), 10_000)
    assert isinstance(text, DecoderText)
    assert "differs" in reason


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer, word_piece_tokenizer, word_level_tokenizer])
def test_the_fallback_gives_the_same_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    for sample in SAMPLE_TEXT:
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        assert streamed(DecoderText(tokenizer), ids, 1) == streamed(DecoderText(tokenizer), ids, 7) == tokenizer.decode(ids)


def test_escaped_text_is_ascii_json() -> None:
    text = 'a "b" \\ \n \u2028 é 😀 \x07'
    assert json.loads(b'"' + escape(text) + b'"') == text


@pytest.mark.parametrize(
    "data", [b"", b"a", "é".encode(), "😀".encode(), b"\xff", b"\xc0", b"\xe0\x80", b"\xed\xa0", b"\xf5", b"\xf4\x90", b"\x80\x80\x80"]
)
def test_nothing_is_pending_where_no_character_can_come(data: bytes) -> None:
    assert pending_bytes(data) == 0


@pytest.mark.parametrize("character", ["é", "好", "😀", "\u0800", "\ud7ff", "\U0010ffff"])
def test_a_true_prefix_is_pending(character: str) -> None:
    data = character.encode()
    assert [pending_bytes(b"x" + data[:length]) for length in range(1, len(data))] == list(range(1, len(data)))


def test_a_stream_is_ready_for_the_table_only_between_whole_characters() -> None:
    tokenizer = byte_level_tokenizer()
    text, _ = build_token_text(tokenizer, tokenizer.get_vocab_size(), NUM_VERIFY)
    stream = text.open(())
    assert isinstance(stream, TableStream)
    assert stream.ready
    ids = [tokenizer.token_to_id(c) for c in ("Ã", "©")]  # the two bytes of é
    assert (stream.push(ids[:1]), stream.ready) == ("", False)
    assert (stream.push(ids[1:]), stream.ready) == ("é", True)
