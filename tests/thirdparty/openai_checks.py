"""The openai package against a running Baton."""

import openai
from checks import LIMIT_TOKENS, MESSAGES, MODEL, URL, equal, run, text_with_border

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


def chat(**options: object) -> object:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **{"max_tokens": 24, **options})


def pieces_of(answer: object) -> list[str]:
    return [bytes(entry.bytes).decode("utf-8", "replace") for entry in answer.choices[0].logprobs.content]


def refused(kind: type[openai.APIStatusError], call: object, **fields: object) -> openai.APIStatusError:
    try:
        call()
    except kind as error:
        for name, value in fields.items():
            equal(getattr(error, name), value)
        return error
    raise AssertionError(f"no {kind.__name__}")


def models_are_listed_and_retrieved() -> None:
    equal([model.id for model in client.models.list()], [MODEL])
    equal(client.models.retrieve(MODEL).id, MODEL)


def a_chat_ends_with_its_length_and_usage() -> None:
    answer = chat()
    equal((answer.choices[0].finish_reason, answer.usage.completion_tokens, answer.object), ("length", 24, "chat.completion"))
    equal(answer.usage.total_tokens, answer.usage.prompt_tokens + 24)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert answer._request_id


def a_streamed_chat_has_the_same_text_and_usage() -> None:
    whole = chat()
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]), whole.choices[0].message.content)
    equal((chunks[0].choices[0].delta.role, chunks[-2].choices[0].finish_reason, chunks[-1].choices), ("assistant", "length", []))
    equal(chunks[-1].usage.completion_tokens, 24)


async def an_async_stream_left_midway_is_cancelled_and_the_next_answered() -> None:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as other:
        stream = await other.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2000, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        answer = await other.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3)
        equal(answer.usage.completion_tokens, 3)


def the_stream_helper_puts_the_answer_together() -> None:
    stop, before = text_with_border(pieces_of(chat(logprobs=True)))
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=24, stop=stop) as stream:
        equal(stream.get_final_completion().choices[0].message.content, before)


def n_gives_that_many_choices() -> None:
    answer = chat(n=3, temperature=1.5, max_tokens=8)
    equal(([choice.index for choice in answer.choices], answer.usage.completion_tokens), ([0, 1, 2], 24))
    texts = ["", "", ""]
    for chunk in chat(n=3, max_tokens=8, temperature=1.5, seed=5, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    equal(texts, [choice.message.content for choice in chat(n=3, max_tokens=8, temperature=1.5, seed=5).choices])


def a_stop_string_across_a_token_border_is_not_shown() -> None:
    stop, before = text_with_border(pieces_of(chat(logprobs=True)))
    stopped = chat(stop=["never said", stop])
    equal((stopped.choices[0].message.content, stopped.choices[0].finish_reason), (before, "stop"))
    assert stopped.usage.completion_tokens < 24
    equal("".join(chunk.choices[0].delta.content or "" for chunk in chat(stop=stop, stream=True)), before)


def chat_logprobs_are_of_the_text() -> None:
    choice = chat(logprobs=True, top_logprobs=4).choices[0]
    equal(b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode("utf-8", "replace"), choice.message.content)
    assert all(len(entry.top_logprobs) == 4 and entry.logprob <= 0 for entry in choice.logprobs.content)
    chunks = list(chat(logprobs=True, top_logprobs=4, stream=True))
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    equal([entry.token for entry in streamed], [entry.token for entry in choice.logprobs.content])


def completions_take_lists_and_logprobs() -> None:
    answer = client.completions.create(model=MODEL, prompt=["One two", "three"], max_tokens=6, logprobs=2)
    equal([choice.index for choice in answer.choices], [0, 1])
    for choice in answer.choices:
        equal((len(choice.logprobs.tokens), len(choice.logprobs.token_logprobs), len(choice.logprobs.text_offset)), (6, 6, 6))
    chunks = list(client.completions.create(model=MODEL, prompt=["One two", "three"], max_tokens=6, stream=True))
    for index in (0, 1):
        equal("".join(c.choices[0].text for c in chunks if c.choices[0].index == index), answer.choices[index].text)
    ids = client.completions.create(model=MODEL, prompt=[300, 301, 302], max_tokens=2)
    equal(ids.usage.prompt_tokens, 3)


def a_seed_repeats_its_draws() -> None:
    equal(chat(seed=7, temperature=1.0).choices[0].message.content, chat(seed=7, temperature=1.0).choices[0].message.content)


def max_completion_tokens_and_service_tier_are_taken() -> None:
    answer = chat(max_tokens=openai.omit, max_completion_tokens=5, service_tier="flex")
    equal(answer.usage.completion_tokens, 5)


def unknown_fields_are_ignored() -> None:
    equal(chat(extra_body={"made_up": {"a": 1}}).usage.completion_tokens, 24)


def errors_are_the_clients_own_and_name_the_field() -> None:
    refused(openai.NotFoundError, lambda: client.chat.completions.create(model="other", messages=MESSAGES), code="model_not_found")
    refused(openai.BadRequestError, lambda: chat(temperature=7), param="temperature")
    refused(openai.BadRequestError, lambda: chat(stream_options={"include_usage": True}), param="stream_options")
    refused(openai.BadRequestError, lambda: chat(extra_body={"baton": {"clas": "batch"}}), param="baton.clas")
    too_long = [300] * (LIMIT_TOKENS + 1)
    error = refused(openai.BadRequestError, lambda: client.completions.create(model=MODEL, prompt=too_long), code="context_length_exceeded")
    assert str(LIMIT_TOKENS) in error.message, error.message
    assert str(LIMIT_TOKENS + 1) in error.message, error.message


run(
    models_are_listed_and_retrieved,
    a_chat_ends_with_its_length_and_usage,
    a_streamed_chat_has_the_same_text_and_usage,
    an_async_stream_left_midway_is_cancelled_and_the_next_answered,
    the_stream_helper_puts_the_answer_together,
    n_gives_that_many_choices,
    a_stop_string_across_a_token_border_is_not_shown,
    chat_logprobs_are_of_the_text,
    completions_take_lists_and_logprobs,
    a_seed_repeats_its_draws,
    max_completion_tokens_and_service_tier_are_taken,
    unknown_fields_are_ignored,
    errors_are_the_clients_own_and_name_the_field,
)
