"""Answers of the HTTP API as types. Small ones are encoded from these; those of the token path are written by hand (openai_format.py), and
tests hold them against these types, which are what /openapi.json promises (openapi.py).

UNSET: the member may be absent.
"""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(Struct):
    """cached_tokens: prompt tokens whose KV nobody had to compute."""

    cached_tokens: int


class UsageAnswer(Struct):
    """Tokens of a whole call. A prompt shared by several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class BatonAnswer(Struct):
    """Our extension. resumed: times the call was placed again after a worker was lost. More members may come."""

    resumed: int


class ChoiceLatencyBudget(Struct):
    """Where the time of a choice went, in ms (docs/tracing.md). null: not known."""

    prepare_ms: float | None
    route_ms: float | None
    queue_ms: float | None
    prefill_ms: float | None
    pull_ms: float | None
    first_step_ms: float | None
    stream_ms: float | None


class ChoiceBaton(Struct):
    """Our extension of a choice, with `baton.latency_budget`."""

    latency_budget: ChoiceLatencyBudget


class TopLogprob(Struct):
    """A likely token. bytes: of its text, also where they are only a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """One output token, and the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """One element per output token."""

    content: list[ChatTokenLogprob]


class CompletionLogprobs(Struct):
    """Columns with one element per output token. text_offset: in characters from the start of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(Struct):
    """What the model said."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Struct, kw_only=True):
    """stop_reason: the stop string, or the token of stop_token_ids, that ended the choice. token_ids: with return_token_ids."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | UnsetType = UNSET
    baton: ChoiceBaton | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    """A whole chat answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_token_ids: list[int] | UnsetType = UNSET
    baton: BatonAnswer | UnsetType = UNSET


class Delta(Struct):
    """What a chunk adds to its choice's message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, kw_only=True):
    """As ChatChoice; finish_reason comes with the last chunk of the choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType = UNSET
    baton: ChoiceBaton | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, kw_only=True):
    """One event of a streamed chat. usage: only with include_usage; null but in the last chunk, which has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    baton: BatonAnswer | UnsetType = UNSET


class CompletionChunkChoice(Struct, kw_only=True):
    """As ChatChunkChoice, with a text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType = UNSET
    baton: ChoiceBaton | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(CompletionChunkChoice, kw_only=True):
    """As ChatChoice, with a text."""

    finish_reason: FinishReason


class CompletionChunk(Struct, kw_only=True):
    """One event of a streamed text completion. usage: as in ChatCompletionChunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: UsageAnswer | UnsetType | None = UNSET
    baton: BatonAnswer | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    """A whole text completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer
    baton: BatonAnswer | UnsetType = UNSET


class ErrorDetail(Struct):
    """message names the field and the fix; param: the field; code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Struct):
    """Every answer that is no success; also an event of a stream that fails after it began."""

    error: ErrorDetail


class ModelCard(Struct):
    """A model that can be asked for now. max_model_len: tokens of prompt and output together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Struct):
    """What some live worker serves now."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(Struct):
    """ready: new work is taken."""

    status: Literal["ok"]
    ready: bool
    models: list[str]


class Readiness(Struct):
    """ready: new work is taken."""

    ready: bool
