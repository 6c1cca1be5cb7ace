"""How answers look on the wire: chunks of a stream and whole responses, for both endpoints.

A text chunk is `prefix + escaped text + suffix`; prefix and suffix are made once per choice, so that a token costs one
concatenation. Everything is ASCII, so that no reader of lines trips over U+2028 in a text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from baton_frontend.generation import TokenLogprob
from baton_frontend.latency_budget import LatencyBudget, milliseconds
from baton_frontend.token_text import TokenText

Endpoint = Literal["chat", "completion"]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole call."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict[str, object]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class LogprobColumns:
    """Log probabilities of the tokens of one chunk or one whole choice, in output order."""

    token_ids: list[int] = field(default_factory=list)
    entries: list[TokenLogprob] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)  # of each token within the choice's text, in characters

    def as_json(self, endpoint: Endpoint, names: "TokenNames") -> str:
        """The form of the endpoint, as JSON."""
        if endpoint == "chat":
            return f'{{"content":[{",".join(map(names.chat_entry, self.token_ids, self.entries))}]}}'
        tokens = ",".join([names.name(token_id) for token_id in self.token_ids])
        logprobs = ",".join([_number(entry.logprob) for entry in self.entries])
        tops = ",".join(map(names.completion_tops, self.entries))
        return f'{{"tokens":[{tokens}],"token_logprobs":[{logprobs}],"top_logprobs":[{tops}],"text_offset":{self.text_offsets}}}'


def _number(value: float) -> str:
    """JSON has no infinity; OpenAI uses -9999.0 for "never"."""
    return repr(value) if value > -9999.0 else "-9999.0"


class TokenNames:
    """JSON of single tokens for logprobs, made at first use and kept: at most one entry per token id."""

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._parts: dict[int, tuple[str, str]] = {}

    def _of(self, token_id: int) -> tuple[str, str]:
        parts = self._parts.get(token_id)
        if parts is None:
            data = self._text.token_bytes(token_id)
            parts = self._parts[token_id] = json.dumps(data.decode("utf-8", "replace")), str(list(data))
        return parts

    def name(self, token_id: int) -> str:
        """The token as a JSON string."""
        return self._of(token_id)[0]

    def chat_entry(self, token_id: int, entry: TokenLogprob) -> str:
        """One element of logprobs.content."""
        tops = ",".join([f"{{{self._fields(i, value)}}}" for i, value in zip(entry.top_token_ids, entry.top_logprobs, strict=True)])
        return f'{{{self._fields(token_id, entry.logprob)},"top_logprobs":[{tops}]}}'

    def _fields(self, token_id: int, logprob: float) -> str:
        name, data = self._of(token_id)
        return f'"token":{name},"logprob":{_number(logprob)},"bytes":{data}'

    def completion_tops(self, entry: TokenLogprob) -> str:
        """One element of top_logprobs. Of tokens with equal names the most likely counts."""
        tops: dict[str, str] = {}
        for token_id, value in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
            tops.setdefault(self.name(token_id), _number(value))
        return f"{{{','.join([f'{name}:{value}' for name, value in tops.items()])}}}"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What all chunks of one call share."""

    endpoint: Endpoint
    response_id: str  # "chatcmpl-..." or "cmpl-..."
    created: int  # unix time, s
    model: str
    has_usage: bool  # include_usage was asked: every chunk says usage: null
    prepare_s: float = 0.0  # from the head of the call to its admission; part of a latency budget

    def prefix(self, index: int) -> bytes:
        """Start of a text chunk of choice index, up to where the escaped text goes."""
        opening = '"delta":{"content":"' if self.endpoint == "chat" else '"text":"'
        return f'data: {self._head(".chunk")},"choices":[{{"index":{index},{opening}'.encode()

    def suffix(self, logprobs: str = "null", token_ids: list[int] | None = None) -> bytes:
        """End of a text chunk, from behind the escaped text. logprobs: JSON."""
        extra = "" if token_ids is None else f',"token_ids":{token_ids}'
        closing = '"}' if self.endpoint == "chat" else '"'
        return f'{closing},"logprobs":{logprobs},"finish_reason":null{extra}}}]{self._usage_null()}}}\n\n'.encode()

    def first_event(self, index: int, prompt_token_ids: Sequence[int] | None) -> bytes:
        """Chunk before any text: the role, and the prompt's ids if asked for. Empty if there is nothing to say."""
        if self.endpoint == "completion":
            if prompt_token_ids is None:
                return b""
            choice: dict[str, object] = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
            choice["prompt_token_ids"] = list(prompt_token_ids)
            return self._event([choice])
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._event([choice], {} if prompt_token_ids is None else {"prompt_token_ids": list(prompt_token_ids)})

    def finish_event(
        self, index: int, finish_reason: str, stop_reason: str | int | None, resumed: int, budget: LatencyBudget | None = None
    ) -> bytes:
        """Last chunk of a choice. budget: None if it was not asked for."""
        choice: dict[str, object] = {"index": index, "logprobs": None, "finish_reason": finish_reason, **self.budget(budget)}
        if self.endpoint == "chat":
            choice["delta"] = {}
        else:
            choice["text"] = ""
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return self._event([choice], _resumed(resumed))

    def usage_event(self, usage: Usage) -> bytes:
        """The chunk asked for by include_usage."""
        return f'data: {self._head(".chunk")},"choices":[],"usage":{json.dumps(usage.as_json())}}}\n\n'.encode()

    def response(self, choices: Sequence[str], usage: Usage, resumed: int, extra: dict[str, object]) -> bytes:
        """A whole response. choices: JSON of each."""
        rest = json.dumps({"usage": usage.as_json(), **extra, **_resumed(resumed)})
        return f'{self._head("")},"choices":[{",".join(choices)}],{rest[1:]}'.encode()

    def choice(
        self, index: int, text: str, finish_reason: str, stop_reason: str | int | None, extra: dict[str, object], logprobs: str
    ) -> str:
        """JSON of one choice of a whole response. logprobs: JSON."""
        choice: dict[str, object] = {"index": index, "finish_reason": finish_reason, **extra}
        choice.update({"message": {"role": "assistant", "content": text}} if self.endpoint == "chat" else {"text": text})
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return f'{{"logprobs":{logprobs},{json.dumps(choice)[1:]}'

    def budget(self, budget: LatencyBudget | None) -> dict[str, object]:
        """What a choice says of its latency budget; nothing if it was not asked for."""
        if budget is None:
            return {}
        return {"baton": {"latency_budget": {"prepare_ms": milliseconds(self.prepare_s), **budget.in_ms()}}}

    def _event(self, choices: list[dict[str, object]], extra: dict[str, object] | None = None) -> bytes:
        rest = json.dumps({"choices": choices, **(extra or {})})
        return f"data: {self._head('.chunk')},{rest[1:-1]}{self._usage_null()}}}\n\n".encode()

    def _head(self, kind: str) -> str:
        name = f"chat.completion{kind}" if self.endpoint == "chat" else "text_completion"
        return f'{{"id":"{self.response_id}","object":"{name}","created":{self.created},"model":{json.dumps(self.model)}'

    def _usage_null(self) -> str:
        return ',"usage":null' if self.has_usage else ""


def _resumed(resumed: int) -> dict[str, object]:
    return {"baton": {"resumed": resumed}} if resumed else {}


def error_event(body: bytes) -> bytes:
    """An error in the middle of a stream."""
    return b"data: " + body + b"\n\n"
