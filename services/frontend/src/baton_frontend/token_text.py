"""Token ids to text, one stream at a time.

Where the tokenizer's decoder allows it, a table by token id is made once per model and checked against the tokenizer on
random sequences; a token then costs one list lookup. Other decoders go through the tokenizer with a window of tokens.

The text of a stream is `tokenizer.decode(output_ids, skip_special_tokens=True)`, however the ids were cut into calls. One
exception, for SentencePiece with byte fallback: the tokenizer turns a whole run of byte tokens into U+FFFD if any of it
is no UTF-8, also what a stream has shown already; we replace only what is wrong.
"""

import json
import random
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, Literal, Protocol

from tokenizers import Tokenizer

TableKind = Literal["byte_level", "byte_fallback", "probed"]
NUM_VERIFY_SEQUENCES = 10_000
_VERIFY_BATCH = 500
_MAX_VERIFY_TOKENS = 24


class TextStream(Protocol):
    """Text of one output."""

    ready: bool  # the table may be used directly: no bytes are pending and the first token is past

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is complete with these tokens; may be empty."""

    def finish(self) -> str:
        """Text still pending at the end."""


class TokenText(Protocol):
    """Text of a model's tokens."""

    @property
    def escaped(self) -> Sequence[bytes | None]:
        """By id: the inside of a JSON string, ASCII; None: not whole UTF-8, use a stream. Empty: there is no table."""

    def open(self, prompt_tail: Sequence[int]) -> TextStream:
        """Start an output. prompt_tail: last ids of the prompt the text goes on from; empty if it stands alone (chat)."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token for logprobs; special tokens by name."""


def escape(text: str) -> bytes:
    """The inside of a JSON string in ASCII, so that no reader of lines trips over U+2028 and its like."""
    return encode_basestring_ascii(text)[1:-1].encode("ascii")


def pending_bytes(data: bytes) -> int:
    """How many last bytes are a true prefix of one character (0 to 3)."""
    for length in range(1, min(3, len(data)) + 1):
        lead = data[-length]
        if lead < 0x80:
            return 0
        if lead >= 0xC0:
            return length if _is_prefix(data[-length:]) else 0
    return 0


def _is_prefix(tail: bytes) -> bool:
    lead = tail[0]
    needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    if not 0xC2 <= lead <= 0xF4 or needed <= len(tail):
        return False
    # Second bytes that would make an overlong form, a surrogate or something past U+10FFFF are wrong already.
    low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(lead, (0x80, 0xBF))
    return len(tail) < 2 or low <= tail[1] <= high


class TokenTable:
    """Bytes of every token id, and the same ready to be put into JSON."""

    def __init__(self, kind: TableKind, raw: list[bytes | None], first: list[bytes | None] | None, names: list[bytes]) -> None:
        """raw: by id, None for tokens decoding skips (special, unused ids); first: the same at the start of a text, None if equal."""
        self.kind = kind
        self.raw = raw
        self.first = first
        self._names = names
        shared: dict[bytes | None, bytes | None] = {}
        self.escaped: list[bytes | None] = [shared.setdefault(ready, ready) for ready in map(_escaped_or_none, raw)]

    def open(self, prompt_tail: Sequence[int]) -> "TableStream":
        """Start an output."""
        return TableStream(self, at_start=self.first is not None and not prompt_tail)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token."""
        if token_id >= len(self.raw):
            return b""
        raw = self.raw[token_id]
        return self._names[token_id] if raw is None else raw


def _escaped_or_none(raw: bytes | None) -> bytes | None:
    if raw is None:
        return b""
    try:
        return escape(raw.decode())
    except UnicodeDecodeError:
        return None


class TableStream:
    """A text made from a table."""

    __slots__ = ("_at_start", "_pending", "_table", "ready")

    def __init__(self, table: TokenTable, at_start: bool) -> None:
        self._table = table
        self._at_start = at_start
        self._pending = b""
        self.ready = not at_start

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is complete with these tokens."""
        raw = self._table.raw
        size = len(raw)
        pieces = [self._pending]
        for token_id in token_ids:
            piece = raw[token_id] if token_id < size else None
            if piece is None:
                continue
            if self._at_start:
                assert self._table.first is not None
                piece = self._table.first[token_id] or b""
                self._at_start = False
            pieces.append(piece)
        data = b"".join(pieces)
        pending = pending_bytes(data)
        self._pending = data[len(data) - pending :]
        self.ready = not pending and not self._at_start
        return data[: len(data) - pending].decode("utf-8", "replace")

    def finish(self) -> str:
        """An unfinished character becomes U+FFFD."""
        text, self._pending = self._pending.decode("utf-8", "replace"), b""
        return text


class DecoderText:
    """Text through the tokenizer itself, for decoders no table can stand for."""

    escaped: Sequence[bytes | None] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def open(self, prompt_tail: Sequence[int]) -> "DecoderStream":
        """Start an output."""
        return DecoderStream(self._tokenizer, prompt_tail)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()


class DecoderStream:
    """A text made by decoding a window of the last tokens twice per token, with and without the new ones."""

    __slots__ = ("_shown", "_tokenizer", "_window", "ready")
    _MAX_HELD_TOKENS = 16  # longer runs that do not become whole characters are wrong for good

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_tail)
        self._shown = len(self._window)  # tokens of the window whose text is out
        self.ready = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is complete with these tokens; one at a time, so that the cut does not matter."""
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        before, now = self._decode(self._window[: self._shown]), self._decode(self._window)
        is_whole = len(now) > len(before) and not now.endswith("\ufffd")
        if not is_whole and len(self._window) - self._shown <= self._MAX_HELD_TOKENS:
            return ""
        del self._window[: self._shown]  # the last shown group stays as context of the next
        self._shown = len(self._window)
        return now[len(before) :]

    def finish(self) -> str:
        """Whatever is pending, as the tokenizer shows it."""
        text = self._decode(self._window)[len(self._decode(self._window[: self._shown])) :]
        self._shown = len(self._window)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def build_token_text(tokenizer: Tokenizer, vocab_size: int, num_verify: int = NUM_VERIFY_SEQUENCES) -> tuple[TokenText, str]:
    """Make the table and check it; takes up to some seconds for large vocabularies, so call it in a thread.

    Returns: the text, and why there is no table (empty if there is one).
    """
    table = _build_table(tokenizer, max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True)))
    if table is None:
        return DecoderText(tokenizer), "this decoder's text of a token depends on its neighbours"
    difference = find_difference(table, tokenizer, num_verify)
    if difference is not None:
        return DecoderText(tokenizer), f"the {table.kind} table differs from the tokenizer on token ids {difference}"
    return table, ""


def _build_table(tokenizer: Tokenizer, size: int) -> TokenTable | None:
    names: list[str | None] = [tokenizer.id_to_token(token_id) for token_id in range(size)]
    skipped = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    used = [None if token_id in skipped else name for token_id, name in enumerate(names)]
    name_bytes = [(name or "").encode() for name in names]
    kinds = _decoder_kinds(json.loads(tokenizer.to_str()).get("decoder"))
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        return TokenTable("byte_level", [None if name is None else _byte_level(name, alphabet) for name in used], None, name_bytes)
    if "ByteFallback" in kinds:
        raw = [None if name is None else _byte_fallback(name) for name in used]
        first = [piece[1:] if piece is not None and piece.startswith(b" ") else piece for piece in raw]
        return TokenTable("byte_fallback", raw, first if "Strip" in kinds else None, name_bytes)
    return _probe(tokenizer, used, name_bytes)


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {str(decoder.get("type"))}.union(*map(_decoder_kinds, decoder.get("decoders", ())))


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE names the 256 bytes (GPT-2's bytes_to_unicode)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_level(name: str, alphabet: dict[str, int]) -> bytes:
    # An added token is taken literally unless all of it is in the alphabet; the decoder does the same.
    return bytes([alphabet[c] for c in name]) if all(c in alphabet for c in name) else name.encode()


def _byte_fallback(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("\u2581", " ").encode()


def _probe(tokenizer: Tokenizer, used: list[str | None], names: list[bytes]) -> TokenTable | None:
    """Ask the tokenizer for each token alone and after an anchor (WordPiece, Metaspace, words joined by spaces)."""
    ids = [token_id for token_id, name in enumerate(used) if name is not None]
    alone = tokenizer.decode_batch([[token_id] for token_id in ids], skip_special_tokens=True)
    anchor, before = next(((i, text) for i, text in zip(ids, alone, strict=True) if text.isalnum() and text.isascii()), (None, ""))
    if anchor is None:
        return None
    after = tokenizer.decode_batch([[anchor, token_id] for token_id in ids], skip_special_tokens=True)
    raw: list[bytes | None] = [None] * len(used)
    first: list[bytes | None] = [None] * len(used)
    for token_id, alone_text, after_text in zip(ids, alone, after, strict=True):
        if not after_text.startswith(before):
            return None
        raw[token_id] = after_text[len(before) :].encode()
        first[token_id] = alone_text.encode()
    return TokenTable("probed", raw, None if first == raw else first, names)


def find_difference(table: TokenTable, tokenizer: Tokenizer, num_sequences: int) -> list[int] | None:
    """Token ids on which table and tokenizer differ, or None. Random ids, in batches, so that a thread leaves others the GIL."""
    generator = random.Random(num_sequences)
    size = len(table.raw)
    for _ in range(0, num_sequences, _VERIFY_BATCH):
        batch = [[generator.randrange(size) for _ in range(generator.randint(1, _MAX_VERIFY_TOKENS))] for _ in range(_VERIFY_BATCH)]
        for ids, expected in zip(batch, tokenizer.decode_batch(batch, skip_special_tokens=True), strict=True):
            stream = table.open(())
            if stream.push(ids) + stream.finish() != expected and not (table.kind == "byte_fallback" and "\ufffd" in expected):
                return ids
    return None
