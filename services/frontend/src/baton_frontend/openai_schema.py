"""The bodies of /v1/chat/completions and /v1/completions: what is accepted, in which range, and what is refused by name.

A field this server knows either works, or is harmless and ignored, or is refused: none that would change the answer is dropped
silently. Fields it does not know are ignored, so that a client newer than this server is served. What these types say is also
what /openapi.json says (openapi.py).
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from baton_frontend.openai_errors import ApiError, invalid

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1

_UInt = Annotated[int, Meta(ge=0)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


def _schema(**keywords: object) -> Meta:
    """What is checked by hand, for a better message or because msgspec cannot: said in the served document all the same."""
    return Meta(extra_json_schema=keywords)


_TOKEN_ID_KEYS = Meta(max_length=1024, extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"}})
_Stop = Annotated[str, _schema(minLength=1, maxLength=MAX_STOP_CHARS)]


class TextPart(Struct):
    """One part of a message's content; only text."""

    type: Literal["text"]
    text: str


class Message(Struct):
    """One message of a chat. developer is read as system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None

    # Clients send an answer of ours, or of another server, back as it came.
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    tool_calls: Annotated[list[Any], _schema(maxItems=0)] | None = None
    function_call: Annotated[Any, _schema(type="null")] = None

    def as_template_message(self) -> dict[str, object]:
        """As chat templates expect it: content is one text."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or ())
        message: dict[str, object] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message


class StreamOptions(Struct):
    """include_usage: one more chunk with usage before [DONE]. include_obfuscation is accepted and has no effect."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class BatonOptions(Struct, forbid_unknown_fields=True):
    """Our extension: the class of the request, the time it has, and whether its choices say where the time went.

    A wrong name in it is a mistake, and refused.
    """

    class_: Literal["interactive", "batch"] | None = msgspec.field(name="class", default=None)
    deadline_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    latency_budget: bool | None = None


class CallBody(Struct, kw_only=True):
    """What both endpoints share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: _UInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None  # 0: the most likely token
    top_k: Annotated[int, Meta(ge=-1)] | None = None  # -1, 0, and all from the size of the vocabulary on: all
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, _schema(minimum=MIN_SEED, maximum=MAX_SEED)] | None = None
    stop: _Stop | Annotated[list[_Stop], _schema(maxItems=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[_UInt], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=2)] | None = None  # it divides logits
    logit_bias: Annotated[dict[_UInt, Annotated[float, Meta(ge=-100, le=100)]], _TOKEN_ID_KEYS] | None = None
    return_token_ids: bool | None = None
    service_tier: Literal["auto", "default", "scale", "priority", "flex"] | None = None  # flex: batch class
    baton: BatonOptions | None = None

    # Harmless: kept by OpenAI for its own books, no effect on the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    # Would change the answer; only their neutral values pass (see NEUTRAL).
    best_of: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    include_stop_str_in_output: Any = None
    truncate_prompt_tokens: Any = None
    prompt_logprobs: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    priority: Any = None

    def stops(self) -> tuple[str, ...]:
        """Stop strings, checked."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise invalid("stop", f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed")
        if not all(stops):
            raise invalid("stop", "stop contains an empty string; remove it")
        if any(len(stop) > MAX_STOP_CHARS for stop in stops):
            raise invalid("stop", f"a stop string is longer than {MAX_STOP_CHARS} characters; shorten it")
        return tuple(dict.fromkeys(stops))

    def checked_seed(self) -> int | None:
        """The seed as an unsigned 64-bit number."""
        if self.seed is not None and not MIN_SEED <= self.seed <= MAX_SEED:
            raise invalid("seed", "seed must be a 64-bit integer")
        return None if self.seed is None else self.seed % 2**64

    def is_interactive(self) -> bool:
        """The class: baton.class before service_tier."""
        if self.baton is not None and self.baton.class_ is not None:
            return self.baton.class_ == "interactive"
        return self.service_tier != "flex"

    def wanted_max_tokens(self) -> int | None:
        """Limit on output tokens the caller gave, if any."""
        return self.max_tokens

    def wanted_top_logprobs(self) -> int | None:
        """None: no logprobs; else how many alternatives per token."""
        return None


class ChatBody(CallBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    documents: Any = None
    continue_final_message: Any = None
    echo: Any = None

    def wanted_max_tokens(self) -> int | None:
        """max_completion_tokens is the newer name of max_tokens; both are allowed if they agree."""
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise invalid("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def wanted_top_logprobs(self) -> int | None:
        """top_logprobs needs logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(CallBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[_UInt]]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None
    echo: Any = None
    suffix: Any = None

    def wanted_top_logprobs(self) -> int | None:
        """logprobs is the number of alternatives."""
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts: all texts, or all token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise invalid("prompt", "prompt is an empty list; give a text or token ids")
        texts = [item for item in self.prompt if isinstance(item, str)]
        lists = [item for item in self.prompt if isinstance(item, list)]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        if len(texts) == len(self.prompt):
            return texts
        if len(lists) == len(self.prompt):
            return lists
        raise invalid("prompt", "prompt mixes texts and token ids; use one form")


# Values of refused fields that ask for nothing. Everything else is answered 400 with the reason.
NEUTRAL: dict[str, tuple[tuple[object, ...], str]] = {
    "best_of": ((1,), "use n"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "length_penalty": ((1, 1.0), "beam search is not supported"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text; return_token_ids shows them"),
    "spaces_between_special_tokens": ((True, False), ""),
    "include_stop_str_in_output": ((False,), "the text ends before the stop string"),
    "truncate_prompt_tokens": ((), "prompts are never cut; shorten the prompt"),
    "prompt_logprobs": ((False,), "log probabilities of prompts are not supported"),
    "response_format": (({"type": "text"},), "only text is supported"),
    "structured_outputs": ((), "structured output is not supported"),
    "guided_json": ((), "structured output is not supported"),
    "guided_regex": ((), "structured output is not supported"),
    "guided_choice": ((), "structured output is not supported"),
    "guided_grammar": ((), "structured output is not supported"),
    "priority": ((0,), 'use baton: {"class": "batch"} or {"class": "interactive"}'),
    "tools": (([],), "tool calls are not supported"),
    "tool_choice": (("none", "auto"), "tool calls are not supported"),
    "parallel_tool_calls": ((True, False), ""),
    "functions": (([],), "tool calls are not supported"),
    "function_call": (("none", "auto"), "tool calls are not supported"),
    "modalities": ((["text"],), "only text is supported"),
    "audio": ((), "only text is supported"),
    "prediction": ((), "predicted outputs are not supported"),
    "reasoning_effort": ((), "pass what the model's template knows in chat_template_kwargs"),
    "verbosity": (("medium",), "it is not supported"),
    "web_search_options": ((), "web search is not supported"),
    "chat_template": ((), "the model's own template is used"),
    "documents": (([],), "put documents into messages"),
    "continue_final_message": ((False,), "use /v1/completions to go on with a text"),
    "echo": ((False,), "put the prompt before the text yourself"),
    "suffix": (("",), "insertion is not supported"),
}
_NEUTRAL_OF = {
    kind: tuple((name, *NEUTRAL[name]) for name in NEUTRAL if name in kind.__struct_fields__) for kind in (ChatBody, CompletionBody)
}

_B = TypeVar("_B", ChatBody, CompletionBody)
_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_FIELD = re.compile(r"(?:unknown|missing required) field `([^`]+)`")


def parse_chat(data: bytes) -> ChatBody:
    """Raises: ApiError 400 naming the field."""
    return _checked(_decode(_chat_decoder, data))


def parse_completion(data: bytes) -> CompletionBody:
    """Raises: ApiError 400 naming the field."""
    return _checked(_decode(_completion_decoder, data))


def _decode(decoder: "msgspec.json.Decoder[_B]", data: bytes) -> _B:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error


def _wrong_field(text: str) -> ApiError:
    path_found, field_found = _PATH.search(text), _FIELD.search(text)
    names = [path_found.group(1).replace("[...]", "") if path_found else "", field_found.group(1) if field_found else ""]
    path = ".".join(filter(None, names)) or None
    what = _PATH.sub("", text)
    if field_found and "unknown field" in what:
        return ApiError(400, f"{path} is not known; correct its name or remove it", param=path, code="unknown_parameter")
    if field_found:
        return ApiError(400, f"{path} is required", param=path, code="missing_required_parameter")
    return ApiError(400, f"{path or 'the body'}: {what[:1].lower()}{what[1:]}", param=path, code="invalid_value")


def _checked(body: _B) -> _B:
    for name, neutral, fix in _NEUTRAL_OF[type(body)]:
        value = getattr(body, name)
        if value is not None and not any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            raise invalid(name, f"{name} with this value is not supported: {fix}", "unsupported_parameter")
    if isinstance(body, ChatBody):
        for index, message in enumerate(body.messages):
            if message.tool_calls or message.function_call is not None:
                name = f"messages[{index}].{'tool_calls' if message.tool_calls else 'function_call'}"
                raise invalid(name, f"{name}: tool calls are not supported", "unsupported_parameter")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options needs stream: true")
    return body
