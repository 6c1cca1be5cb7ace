"""litellm against a running Baton."""

import litellm
from checks import LIMIT_TOKENS, MESSAGES, MODEL, URL, equal, run, text_with_border

litellm.suppress_debug_info = True
COMMON = {"api_base": f"{URL}/v1", "api_key": "none", "max_retries": 0}


def chat(**options: object) -> object:
    return litellm.completion(model=f"openai/{MODEL}", messages=MESSAGES, **{"max_tokens": 16, **COMMON, **options})


def text_of(chunks: object) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def raised(kind: type[Exception], call: object) -> Exception:
    try:
        call()
    except kind as error:
        equal(type(error).__name__, kind.__name__)
        return error
    raise AssertionError(f"no {kind.__name__}")


def a_chat_answers_with_usage() -> None:
    answer = chat()
    equal((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 16))


def a_stream_has_the_same_text_and_usage() -> None:
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    equal(text_of(chunks), chat().choices[0].message.content)
    equal([chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)], [16])


async def async_calls_and_streams_agree() -> None:
    options = {"model": f"openai/{MODEL}", "messages": MESSAGES, "max_tokens": 16, **COMMON}
    whole = await litellm.acompletion(**options)
    stream = await litellm.acompletion(**options, stream=True)
    equal(text_of([chunk async for chunk in stream]), whole.choices[0].message.content)


def n_gives_that_many_choices() -> None:
    equal(len(chat(n=3, temperature=1.5).choices), 3)


def a_stop_string_across_a_token_border_is_not_shown() -> None:
    content = chat(logprobs=True).choices[0].logprobs.content
    stop, before = text_with_border([bytes(entry.bytes).decode("utf-8", "replace") for entry in content])
    equal(chat(stop=[stop]).choices[0].message.content, before)
    equal(text_of(chat(stop=[stop], stream=True)), before)


def logprobs_are_of_the_text() -> None:
    equal([len(entry.top_logprobs) for entry in chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content], [3] * 16)


def text_completions_answer_and_stream() -> None:
    options = {"model": f"text-completion-openai/{MODEL}", "prompt": "One two", "max_tokens": 8, **COMMON}
    whole = litellm.text_completion(**options)
    equal(whole.usage.completion_tokens, 8)
    equal("".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**options, stream=True)), whole.choices[0].text)


def errors_are_litellms() -> None:
    raised(litellm.NotFoundError, lambda: litellm.completion(model="openai/other", messages=MESSAGES, **COMMON))
    raised(litellm.BadRequestError, lambda: chat(temperature=9))
    too_long = [{"role": "user", "content": "a b " * LIMIT_TOKENS}]
    error = raised(litellm.ContextWindowExceededError, lambda: litellm.completion(model=f"openai/{MODEL}", messages=too_long, **COMMON))
    assert str(LIMIT_TOKENS) in str(error), error


run(
    a_chat_answers_with_usage,
    a_stream_has_the_same_text_and_usage,
    async_calls_and_streams_agree,
    n_gives_that_many_choices,
    a_stop_string_across_a_token_border_is_not_shown,
    logprobs_are_of_the_text,
    text_completions_answer_and_stream,
    errors_are_litellms,
)
