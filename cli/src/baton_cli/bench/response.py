"""One HTTP response as it comes in, and what its events say once all of it is there.

While bytes come only their lengths and times are kept, so that the client does not slow down what it measures; everything is read at
the end of the response. Plain synchronous classes; times are time.monotonic().
"""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_EVENT = re.compile(rb"^data: ?(.*?)\r?\n\r?\n", re.DOTALL | re.MULTILINE)
_MAX_ERROR_CHARS = 60  # errors are counted by their text


class BadResponse(Exception):
    """The bytes are no response this client understands. The text says what was found."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    message: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def piece(self) -> str:
        """Text of this choice in this event, or of the whole answer."""
        said = self.delta or self.message
        return (said.content if said is not None else self.text) or ""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None
    type: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | str | None = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass
class Answer:
    """What one response said. text, finishes: of all choices together.

    event_times: of each event with text; events that came in one read have the same time.
    error: code, type or text of an error instead of, or after, an answer.
    """

    status: int
    text: str = ""
    event_times: list[float] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    completion_tokens: int | None = None
    error: str = ""
    is_done: bool = False
    retry_after: str = ""


class Response:
    """Feed it what was read; it is complete when `feed` says so."""

    __slots__ = ("_body_start", "_is_chunked", "_length", "_lengths", "_raw", "_times", "headers", "keeps_alive", "status")

    def __init__(self) -> None:
        self._raw = bytearray()
        self._times = array("d")
        self._lengths = array("I")
        self._body_start = 0  # 0: the head is not complete
        self._is_chunked = False
        self._length: int | None = None
        self.status = 0
        self.headers: dict[str, str] = {}
        self.keeps_alive = True

    def feed(self, data: bytes, now: float) -> bool:
        """More bytes. Returns: whether the response is complete. Raises: BadResponse."""
        self._raw += data
        self._times.append(now)
        self._lengths.append(len(data))
        if not self._body_start and not self._read_head():
            return False
        if self._is_chunked:
            return self._raw.endswith(_LAST_CHUNK) or (self._raw.endswith(b"0\r\n\r\n") and len(self._raw) == self._body_start + 5)
        return self._length is not None and len(self._raw) >= self._body_start + self._length

    @property
    def has_begun(self) -> bool:
        """Whether any byte has come."""
        return bool(self._raw)

    def ended(self) -> bool:
        """The connection was closed. Returns: whether that completes the response (one without a length)."""
        self.keeps_alive = False
        return bool(self._body_start) and not self._is_chunked and self._length is None

    def answer(self) -> Answer:
        """What a complete response says. Raises: BadResponse."""
        found = Answer(self.status, retry_after=self.headers.get("retry-after", ""))
        if "text/event-stream" in self.headers.get("content-type", ""):
            self._read_events(found)
        elif self._body_start:
            body = b"".join(bytes(self._raw[start:end]) for start, end in self._pieces())
            self._take(found, body, self._times[-1])
            found.is_done = True
        if self.status != 200 and not found.error:
            found.error = f"http_{self.status}"
        return found

    def _read_head(self) -> bool:
        end = self._raw.find(_HEAD_END)
        if end < 0:
            return False
        lines = bytes(self._raw[:end]).decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise BadResponse(f"not an HTTP/1 response: {lines[0][:80]!r}")
        self.status = int(rest[:3])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        self._body_start = end + len(_HEAD_END)
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if not self._is_chunked and "content-length" in self.headers:
            length = self.headers["content-length"]
            if not length.isdigit():
                raise BadResponse(f"not a length: {length[:40]!r}")
            self._length = int(length)
        options = {option.strip() for option in self.headers.get("connection", "").lower().split(",")}
        is_kept = "close" not in options and (version != "HTTP/1.0" or "keep-alive" in options)
        self.keeps_alive = is_kept and (self._is_chunked or self._length is not None)
        return True

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Where in the raw bytes the body lies: [start, end) of each chunk."""
        raw, at = self._raw, self._body_start
        if not self._is_chunked:
            yield at, len(raw)
            return
        while (line_end := raw.find(b"\r\n", at)) >= 0:
            try:
                size = int(bytes(raw[at:line_end]).partition(b";")[0], 16)
            except ValueError:
                raise BadResponse(f"not the size of a chunk: {bytes(raw[at:line_end])[:40]!r}") from None
            start = line_end + 2
            if not size:
                return
            yield start, min(start + size, len(raw))
            at = start + size + 2

    def _read_events(self, found: Answer) -> None:
        body = bytearray()
        ends: list[tuple[int, int]] = []  # of each chunk: in the body, in the raw bytes
        for start, end in self._pieces():
            body += self._raw[start:end]
            ends.append((len(body), end))
        chunk = read = 0
        read_end = self._lengths[0] if self._lengths else 0
        for event in _EVENT.finditer(body):
            while chunk < len(ends) - 1 and ends[chunk][0] < event.end():
                chunk += 1
            raw_end = ends[chunk][1] - (ends[chunk][0] - event.end())
            while read < len(self._lengths) - 1 and read_end < raw_end:
                read += 1
                read_end += self._lengths[read]
            self._take(found, event[1], self._times[read])

    def _take(self, found: Answer, data: bytes, at: float) -> None:
        if data == b"[DONE]":
            found.is_done = True
            return
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if self.status == 200:
                raise BadResponse(f"{error}: {data[:80]!r}") from None
            return  # an error page of something in between
        if event.error is not None:
            error_ = event.error
            text = error_ if isinstance(error_, str) else str(error_.code or error_.type or error_.message)
            found.error = text[:_MAX_ERROR_CHARS] or "unnamed"
        if event.usage is not None:
            found.completion_tokens = event.usage.completion_tokens
        piece = ""
        for choice in event.choices:
            piece += choice.piece
            if choice.finish_reason is not None:
                found.finish_reasons.append(choice.finish_reason)
        if piece:
            found.text += piece
            found.event_times.append(at)
