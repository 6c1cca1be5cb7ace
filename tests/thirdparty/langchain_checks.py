"""langchain-openai against a running Baton."""

import openai
from checks import LIMIT_TOKENS, MESSAGES, MODEL, URL, equal, run, text_with_border
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

TEXT = MESSAGES[0]["content"]


def model(**options: object) -> ChatOpenAI:
    settings = {"model": MODEL, "max_completion_tokens": 16, "temperature": 0, "max_retries": 0, **options}
    return ChatOpenAI(base_url=f"{URL}/v1", api_key="none", **settings)


def invoke_answers_with_usage() -> None:
    answer = model().invoke(TEXT)
    equal((answer.usage_metadata["output_tokens"], answer.response_metadata["finish_reason"]), (16, "length"))
    equal(answer.response_metadata["model_name"], MODEL)


def a_conversation_is_sent_back_as_it_came() -> None:
    first = model().invoke([("system", "Be short."), ("user", TEXT)])
    equal(model().invoke([("user", TEXT), first, ("user", "And then?")]).usage_metadata["output_tokens"], 16)


def a_stream_has_the_same_text_and_usage() -> None:
    chunks = list(model(stream_usage=True).stream(TEXT))
    equal("".join(chunk.content for chunk in chunks), model().invoke(TEXT).content)
    equal(sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata), 16)


async def async_invoke_and_stream_agree() -> None:
    text = "".join([chunk.content async for chunk in model().astream(TEXT)])
    equal(text, (await model().ainvoke(TEXT)).content)


def a_batch_keeps_its_order() -> None:
    texts = [TEXT, "Who runs?", "What is next?", "Where to?"]
    equal([a.content for a in model().batch(texts)], [model().invoke(text).content for text in texts])


def n_gives_that_many_generations() -> None:
    result = model(n=2, temperature=1.5).generate([[HumanMessage(TEXT)]])
    equal(len(result.generations[0]), 2)


def a_stop_string_across_a_token_border_is_not_shown() -> None:
    whole = model(logprobs=True).invoke(TEXT)
    pieces = [bytes(e["bytes"]).decode("utf-8", "replace") for e in whole.response_metadata["logprobs"]["content"]]
    stop, before = text_with_border(pieces)
    equal(model().invoke(TEXT, stop=[stop]).content, before)
    equal("".join(chunk.content for chunk in model().stream(TEXT, stop=[stop])), before)


def logprobs_are_of_the_text() -> None:
    content = model(logprobs=True, top_logprobs=3).invoke(TEXT).response_metadata["logprobs"]["content"]
    equal([len(entry["top_logprobs"]) for entry in content], [3] * 16)


def the_text_model_completes_and_streams() -> None:
    llm = OpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", max_tokens=8, temperature=0, max_retries=0)
    equal("".join(llm.stream("One two")), llm.invoke("One two"))


def raised(kind: type[Exception], call: object) -> Exception:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def errors_are_langchains_and_openais() -> None:
    raised(openai.BadRequestError, lambda: model(temperature=9).invoke(TEXT))
    raised(openai.NotFoundError, lambda: model(model="other").invoke(TEXT))
    error = raised(ContextOverflowError, lambda: model().invoke("a b " * LIMIT_TOKENS))
    assert str(LIMIT_TOKENS) in str(error), error


run(
    invoke_answers_with_usage,
    a_conversation_is_sent_back_as_it_came,
    a_stream_has_the_same_text_and_usage,
    async_invoke_and_stream_agree,
    a_batch_keeps_its_order,
    n_gives_that_many_generations,
    a_stop_string_across_a_token_border_is_not_shown,
    logprobs_are_of_the_text,
    the_text_model_completes_and_streams,
    errors_are_langchains_and_openais,
)
