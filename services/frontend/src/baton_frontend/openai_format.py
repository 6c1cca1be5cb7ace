"""How answers look on the wire: chunks of a stream and whole responses, for both endpoints.

A text chunk is `prefix + escaped text + suffix`; prefix and suffix are made once per choice, so that a token costs one
concatenation. Everything is ASCII, so that no reader of lines trips over U+2028 in a text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from baton_frontend.generation import TokenLogprob
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

    def as_json(self, endpoint: Endpoint, text: TokenText) -> dict[str, object]:
        """The form of the endpoint."""
        if endpoint == "chat":
            return {"content": [_chat_logprob(token, entry, text) for token, entry in zip(self.token_ids, self.entries, strict=True)]}
        names = [_name(text, token_id) for token_id in self.token_ids]
        return {
            "tokens": names,
            "token_logprobs": [finite(entry.logprob) for entry in self.entries],
            "top_logprobs": [
                {_name(text, token): finite(value) for token, value in zip(entry.top_token_ids, entry.top_logprobs, strict=True)}
                for entry in self.entries
            ],
            "text_offset": self.text_offsets,
        }


def finite(value: float) -> float:
    """JSON has no infinity; OpenAI uses -9999.0 for "never"."""
    return value if value > -9999.0 else -9999.0


def _name(text: TokenText, token_id: int) -> str:
    return text.token_bytes(token_id).decode("utf-8", "replace")


def _chat_logprob(token_id: int, entry: TokenLogprob, text: TokenText) -> dict[str, object]:
    tops = [_one_logprob(token, value, text) for token, value in zip(entry.top_token_ids, entry.top_logprobs, strict=True)]
    return {**_one_logprob(token_id, entry.logprob, text), "top_logprobs": tops}


def _one_logprob(token_id: int, logprob: float, text: TokenText) -> dict[str, object]:
    data = text.token_bytes(token_id)
    return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What all chunks of one call share."""

    endpoint: Endpoint
    response_id: str  # "chatcmpl-..." or "cmpl-..."
    created: int  # unix time, s
    model: str
    has_usage: bool  # include_usage was asked: every chunk says usage: null

    def prefix(self, index: int) -> bytes:
        """Start of a text chunk of choice index, up to where the escaped text goes."""
        opening = '"delta":{"content":"' if self.endpoint == "chat" else '"text":"'
        return f'data: {self._head(".chunk")},"choices":[{{"index":{index},{opening}'.encode()

    def suffix(self, logprobs: dict[str, object] | None = None, token_ids: Sequence[int] | None = None) -> bytes:
        """End of a text chunk, from behind the escaped text."""
        extra = "" if token_ids is None else f',"token_ids":{json.dumps(list(token_ids))}'
        closing = '"}' if self.endpoint == "chat" else '"'
        return f'{closing},"logprobs":{json.dumps(logprobs)},"finish_reason":null{extra}}}]{self._usage_null()}}}\n\n'.encode()

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

    def finish_event(self, index: int, finish_reason: str, stop_reason: str | int | None, resumed: int) -> bytes:
        """Last chunk of a choice."""
        choice: dict[str, object] = {"index": index, "logprobs": None, "finish_reason": finish_reason}
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

    def response(self, choices: list[dict[str, object]], usage: Usage, resumed: int, extra: dict[str, object]) -> bytes:
        """A whole response."""
        rest = json.dumps({"choices": choices, "usage": usage.as_json(), **extra, **_resumed(resumed)})
        return f"{self._head('')},{rest[1:]}".encode()

    def choice(self, index: int, text: str, finish_reason: str, stop_reason: str | int | None, extra: dict[str, Any]) -> dict[str, object]:
        """One choice of a whole response."""
        choice: dict[str, object] = {"index": index, "logprobs": None, "finish_reason": finish_reason, **extra}
        choice.update({"message": {"role": "assistant", "content": text}} if self.endpoint == "chat" else {"text": text})
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return choice

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
