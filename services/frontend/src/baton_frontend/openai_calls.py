"""From a parsed body to generations: prompt, limits, defaults. Everything that can be refused is refused here."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from baton_frontend.chat_template import ChatTemplate, TemplateRefused
from baton_frontend.choice_text import ChoiceText
from baton_frontend.generation import Crashes, Generation, ModelInfo
from baton_frontend.model_registry import LoadedModel
from baton_frontend.openai_errors import ApiError, invalid
from baton_frontend.openai_format import Endpoint
from baton_frontend.openai_schema import CallBody, ChatBody, CompletionBody

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
INLINE_MESSAGES = 200  # longer chats are rendered in a thread: a message costs some us
_PROMPT_TAIL_TOKENS = 8
_SMALLEST_TOP_P = 2.0**-126  # of normal float32, as which it travels; 0 would mean "not given" there


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call that can be submitted. generations: all choices of the first prompt, then of the second, ...

    It lives as long as the answer is streamed, so it keeps nothing of the body but what is still asked of it: the text of a long prompt
    would be most of a stream's memory.
    """

    endpoint: Endpoint
    is_stream: bool
    has_usage: bool  # in a stream: one more event with it
    has_token_ids: bool
    loaded: LoadedModel
    generations: tuple[Generation, ...]
    stops: tuple[str, ...]
    silent_token_ids: frozenset[int]

    def new_text(self, generation: Generation) -> ChoiceText:
        """The text of one choice, empty so far. A completion goes on from its prompt; a chat answer stands alone."""
        tail = generation.prompt_token_ids[-_PROMPT_TAIL_TOKENS:].tolist() if self.endpoint == "completion" else ()
        return ChoiceText(
            self.loaded.text.open(tail),
            stops=self.stops,
            silent_token_ids=self.silent_token_ids,
            min_tokens=generation.min_tokens,
            wants_logprobs=generation.top_logprobs is not None,
            wants_token_ids=self.has_token_ids,
        )


async def plan_chat(body: ChatBody, info: ModelInfo, loaded: LoadedModel, max_generations: int) -> PlannedCall:
    """Render, tokenize, check.

    Raises: ApiError, QueueFull.
    """
    if loaded.template is None:
        raise ApiError(
            400, f"model {info.served_name!r} has no chat template; use /v1/completions", param="model", code="chat_template_missing"
        )
    render = partial(_render, body, loaded.template)
    try:
        text = render() if len(body.messages) <= INLINE_MESSAGES else await loaded.tokenizer.pool.run(render)
    except TemplateRefused as error:
        raise invalid("messages", f"the model's chat template refused the messages: {error}") from error
    prompts = await loaded.tokenizer.encode([text], add_special_tokens=False)
    return _plan("chat", body, info, loaded, prompts, max_generations)


def _render(body: ChatBody, template: ChatTemplate) -> str:
    return template.render(
        [message.as_template_message() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs or {},
    )


async def plan_completion(body: CompletionBody, info: ModelInfo, loaded: LoadedModel, max_generations: int) -> PlannedCall:
    """Tokenize where needed, check.

    Raises: ApiError, QueueFull.
    """
    prompts = body.prompts()
    if len(prompts) * (body.n or 1) > max_generations:
        raise invalid("n", f"prompts times n is {len(prompts) * (body.n or 1)}; at most {max_generations} are allowed in one call")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        token_ids = await loaded.tokenizer.encode(texts, add_special_tokens=body.add_special_tokens is not False)
    else:
        token_ids = [_checked_ids(prompt, info.vocab_size) for prompt in prompts if isinstance(prompt, list)]
    return _plan("completion", body, info, loaded, token_ids, max_generations)


def _checked_ids(token_ids: list[int], vocab_size: int) -> "array[int]":
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise invalid("prompt", f"prompt has a token id outside [0, {vocab_size})")
    return array("I", token_ids)


def _plan(
    endpoint: Endpoint, body: CallBody, info: ModelInfo, loaded: LoadedModel, prompts: Sequence["array[int]"], max_generations: int
) -> PlannedCall:
    num_choices = body.n or 1
    if num_choices * len(prompts) > max_generations:
        raise invalid("n", f"n is {num_choices}; at most {max_generations} choices are allowed in one call")
    _check_ids("stop_token_ids", body.stop_token_ids or (), info.vocab_size)
    _check_ids("logit_bias", tuple(body.logit_bias or ()), info.vocab_size)
    ending = frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else loaded.eos_token_ids)
    generations = [
        _generation(endpoint, body, info, prompt, choice, _max_tokens(endpoint, body, info, len(prompt)), ending, crashes)
        for prompt, crashes in ((prompt, Crashes()) for prompt in prompts)
        for choice in range(num_choices)
    ]
    return PlannedCall(
        endpoint=endpoint,
        is_stream=bool(body.stream),
        has_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        has_token_ids=bool(body.return_token_ids),
        loaded=loaded,
        generations=tuple(generations),
        stops=body.stops(),
        silent_token_ids=_with_text(ending, loaded),
    )


def _with_text(token_ids: frozenset[int], loaded: LoadedModel) -> frozenset[int]:
    """Those that would be shown; the others need no watching, which keeps the stream on the fast path."""
    escaped = loaded.text.escaped
    return frozenset(token_id for token_id in token_ids if not escaped or (token_id < len(escaped) and escaped[token_id] != b""))


def _check_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        raise invalid(name, f"{name} has token id {max(token_ids)}; this model's ids are below {vocab_size}")


def _max_tokens(endpoint: Endpoint, body: CallBody, info: ModelInfo, prompt_tokens: int) -> int:
    """The limit on output tokens, so that prompt and output fit the model."""
    if prompt_tokens == 0:
        raise invalid("messages" if endpoint == "chat" else "prompt", "the prompt has no tokens; give at least one")
    room = info.max_model_tokens - prompt_tokens
    wanted = body.wanted_max_tokens()
    if room < 1 or (wanted is not None and wanted > room):
        asked = "" if wanted is None else f" and max_tokens is {wanted}"
        raise ApiError(
            400,
            # "prompt is too long" and "this model's maximum context length is": LangChain and litellm know the case by these words.
            "the prompt is too long: "
            f"this model's maximum context length is {info.max_model_tokens} tokens, prompt and output; the prompt has {prompt_tokens}"
            f"{asked}. Shorten the prompt{'' if wanted is None else ' or lower max_tokens'}",
            param="messages" if endpoint == "chat" else "prompt",
            code="context_length_exceeded",
        )
    if wanted is None:
        wanted = room if endpoint == "chat" else min(room, DEFAULT_COMPLETION_TOKENS)
    if (body.min_tokens or 0) > wanted:
        raise invalid("min_tokens", f"min_tokens {body.min_tokens} is above max_tokens {wanted}")
    return wanted


def _generation(
    endpoint: Endpoint,
    body: CallBody,
    info: ModelInfo,
    prompt: "array[int]",
    choice: int,
    max_tokens: int,
    end_token_ids: frozenset[int],
    crashes: Crashes,
) -> Generation:
    return Generation(
        model=info.served_name,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=_or(body.temperature, 1.0),
        top_p=max(_SMALLEST_TOP_P, _or(body.top_p, 1.0)),
        top_k=min(max(0, body.top_k or 0), info.vocab_size),
        min_p=body.min_p or 0.0,
        seed=body.checked_seed(),
        choice=choice,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        end_token_ids=end_token_ids,
        top_logprobs=body.wanted_top_logprobs(),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias or {},
        interactive=body.is_interactive(),
        deadline_s=body.baton.deadline_s if body.baton is not None else None,
        wants_latency_budget=body.baton is not None and bool(body.baton.latency_budget),
        operation="chat" if endpoint == "chat" else "text_completion",
        crashes=crashes,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
