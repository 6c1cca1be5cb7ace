"""The endpoints over a real server: answers, streams, refusals, cancellation."""

import asyncio
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from baton_frontend.latency_budget import LatencyBudget
from baton_frontend.openai_http import HttpSettings
from baton_frontend.openai_schema import ChatBody
from baton_frontend.testing_models import word_level_tokenizer, write_model
from baton_runtime.errors import Draining, Internal, QueueFull, Unavailable
from tokenizers import Tokenizer

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 8}
TEXT = {"model": "tiny", "prompt": "hello world", "max_tokens": 8}
Serve = Any


async def post(url: str, body: object, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any], Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as session, session.post(url + path, data=data) as response:
        return response.status, await response.json(), response.headers


async def stream(url: str, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[dict[str, Any]]:
    """Events of a stream; checks that it ends with [DONE]."""
    async with aiohttp.ClientSession() as session, session.post(url + path, json={**body, "stream": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        events = (await response.read()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def chat_text(events: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_chat_answers_with_text_and_usage(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as served:
        status, answer, headers = await post(served.url, CHAT)
    prompt = tokenizer.encode("<|begin|><|user|>hello world<|end|><|assistant|>", add_special_tokens=False).ids
    generation = served.generator.started[0].generation
    assert generation.prompt_token_ids.tolist() == prompt
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": tokenizer.decode((prompt * 8)[:8])},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 8,
        "total_tokens": len(prompt) + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["id"] == "chatcmpl-" + headers["X-Request-Id"]
    assert "baton" not in answer


async def test_a_chat_of_many_messages_is_answered(serve: Serve) -> None:
    async with serve(max_model_tokens=10_000) as served:
        status, _, _ = await post(served.url, {**CHAT, "messages": CHAT["messages"] * 300})
        refused, answer, _ = await post(served.url, {**CHAT, "messages": CHAT["messages"] * 5000})
    assert (status, refused, answer["error"]["code"]) == (200, 400, "context_length_exceeded")
    assert len(served.generator.started[0].generation.prompt_token_ids) > 900


async def test_a_streamed_chat_has_the_same_text_and_ends_with_usage(serve: Serve) -> None:
    async with serve() as served:
        _, whole, _ = await post(served.url, CHAT)
        events = await stream(served.url, {**CHAT, "stream_options": {"include_usage": True}})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chat_text(events) == whole["choices"][0]["message"]["content"]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1


async def test_merged_tokens_give_the_same_text(serve: Serve) -> None:
    async with serve() as served, serve(tokens_per_step=5) as merged:
        one_by_one, in_groups = await stream(served.url, CHAT), await stream(merged.url, CHAT)
    assert chat_text(one_by_one) == chat_text(in_groups)
    assert len(one_by_one) > len(in_groups)


async def test_a_stream_has_one_event_per_token(serve: Serve) -> None:
    async with serve(tokens_of=lambda g: [70, 71, 72]) as served:
        events = await stream(served.url, CHAT)
    assert len(events) == 1 + 3 + 1
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_running_stream_does_not_keep_the_text_of_its_prompt(serve: Serve) -> None:
    async with serve(is_manual=True) as served, aiohttp.ClientSession() as session:
        streaming = asyncio.create_task(session.post(served.url + "/v1/chat/completions", json={**CHAT, "stream": True}))
        await until(lambda: bool(served.generator.started))
        served.generator.started[0].push(70)
        response = await streaming
        gc.collect()
        assert [thing for thing in gc.get_objects() if type(thing) is ChatBody] == []
        response.close()


async def test_characters_cut_by_tokens_arrive_whole(serve: Serve, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é好😀 ok", add_special_tokens=False).ids
    async with serve(tokens_of=lambda g: ids) as served:
        assert chat_text(await stream(served.url, {**CHAT, "max_tokens": 50})) == "é好😀 ok"


async def test_completion_takes_text_lists_and_token_ids(serve: Serve, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello").ids
    async with serve() as served:
        for prompt, expected in (
            ("hello", [ids]),
            (["hello", "world"], [ids, tokenizer.encode("world").ids]),
            (ids, [ids]),
            ([ids, [5, 6]], [ids, [5, 6]]),
        ):
            before = len(served.generator.started)
            status, answer, _ = await post(served.url, {**TEXT, "prompt": prompt}, "/v1/completions")
            assert status == 200
            assert answer["object"] == "text_completion"
            assert [s.generation.prompt_token_ids.tolist() for s in served.generator.started[before:]] == expected
            assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
            assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
            assert answer["choices"][0]["text"] == tokenizer.decode((expected[0] * 8)[:8])


async def test_n_gives_choices_of_one_prompt(serve: Serve) -> None:
    async with serve() as served:
        status, answer, _ = await post(served.url, {**TEXT, "n": 3, "seed": -1}, "/v1/completions")
        events = await stream(served.url, {**TEXT, "n": 3}, "/v1/completions")
    assert status == 200
    assert [s.generation.choice for s in served.generator.started[:3]] == [0, 1, 2]
    assert {s.generation.seed for s in served.generator.started[:3]} == {2**64 - 1}
    assert answer["usage"]["prompt_tokens"] == len(served.generator.started[0].generation.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == 24
    assert sorted(e["choices"][0]["index"] for e in events if e["choices"][0]["finish_reason"]) == [0, 1, 2]


@pytest.mark.parametrize("tokens_per_step", [1, 4, 100])
async def test_a_stop_string_ends_the_text_and_the_generation(serve: Serve, tokenizer: Tokenizer, tokens_per_step: int) -> None:
    ids = tokenizer.encode("one two END three four", add_special_tokens=False).ids
    body = {**CHAT, "max_tokens": 100, "stop": ["END", "never"]}
    async with serve(tokens_of=lambda g: ids, tokens_per_step=tokens_per_step) as served:
        _, whole, _ = await post(served.url, body)
        events = await stream(served.url, {**body, "stream_options": {"include_usage": True}})
    assert whole["choices"][0]["message"]["content"] == chat_text(events) == "one two "
    assert whole["choices"][0]["finish_reason"] == events[-2]["choices"][0]["finish_reason"] == "stop"
    assert whole["choices"][0]["stop_reason"] == events[-2]["choices"][0]["stop_reason"] == "END"
    assert whole["usage"]["completion_tokens"] == events[-1]["usage"]["completion_tokens"]
    assert all(started.is_cancelled or tokens_per_step == 100 for started in served.generator.started)
    assert not served.generator.live


async def test_tokens_after_a_stop_string_are_not_counted(serve: Serve, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("END three four", add_special_tokens=False).ids
    upto = next(n for n in range(len(ids)) if "END" in tokenizer.decode(ids[:n]))
    async with serve(tokens_of=lambda g: ids, tokens_per_step=100) as served:
        _, answer, _ = await post(served.url, {**CHAT, "max_tokens": 100, "stop": "END"})
    assert answer["usage"]["completion_tokens"] == upto


async def test_a_stop_token_has_no_text_but_counts(serve: Serve, tokenizer: Tokenizer) -> None:
    word = tokenizer.token_to_id("o")
    async with serve(is_manual=True) as served:
        task = asyncio.create_task(stream(served.url, {**CHAT, "stop_token_ids": [word], "stream_options": {"include_usage": True}}))
        await until(lambda: bool(served.generator.live))
        started = served.generator.live[0]
        assert started.generation.stop_token_ids == (word,)
        started.push(tokenizer.token_to_id("h"), word)
        started.end("stop", stop_token_id=word, cached_tokens=3, resumed=2)
        events = await task
    assert chat_text(events) == "h"
    assert events[-2]["choices"][0]["stop_reason"] == word
    assert events[-2]["baton"] == {"resumed": 2}
    assert events[-1]["usage"]["completion_tokens"] == 2
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_a_prompt_that_one_choice_had_to_compute_does_not_count_as_cached(serve: Serve) -> None:
    """The second choice found what the first had computed."""
    async with serve(is_manual=True) as served:
        task = asyncio.create_task(post(served.url, {**CHAT, "n": 2}))
        await until(lambda: len(served.generator.live) == 2)
        for started, cached in zip(served.generator.live, (1, 4), strict=True):
            started.push(70)
            started.end("length", cached_tokens=cached)
        _, answer, _ = await task
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_a_generation_knows_every_token_that_ends_it(serve: Serve, tokenizer: Tokenizer) -> None:
    """Should its worker die after the last token and before the last word, the owner goes by these."""
    own = tokenizer.token_to_id("<|end|>")
    async with serve() as served:
        for ignore_eos in (False, True):
            await post(served.url, {**CHAT, "stop_token_ids": [9], "ignore_eos": ignore_eos})
        found = [started.generation.end_token_ids for started in served.generator.started]
    assert found == [frozenset({9, own}), frozenset({9})]


async def test_min_tokens_keeps_stop_strings_quiet(serve: Serve, tokenizer: Tokenizer) -> None:
    one = tokenizer.token_to_id("o")
    async with serve(tokens_of=lambda g: [one] * g.max_tokens) as served:
        _, answer, _ = await post(served.url, {**CHAT, "stop": "o", "min_tokens": 5})
    assert answer["choices"][0]["message"]["content"] == "ooooo"
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_chat_logprobs(serve: Serve, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id("h"), tokenizer.token_to_id("<|user|>")]
    body = {**CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    async with serve(tokens_of=lambda g: ids) as served:
        _, whole, _ = await post(served.url, body)
        events = await stream(served.url, body)
    content = whole["choices"][0]["logprobs"]["content"]
    assert [(e["token"], e["logprob"], bytes(e["bytes"])) for e in content] == [("h", -0.5, b"h"), ("<|user|>", -0.5, b"<|user|>")]
    assert [len(e["top_logprobs"]) for e in content] == [2, 2]
    assert [e for event in events for e in (event["choices"][0]["logprobs"] or {"content": []})["content"]] == content


async def test_completion_logprobs(serve: Serve, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi there").ids
    async with serve(tokens_of=lambda g: ids) as served:
        _, answer, _ = await post(served.url, {**TEXT, "max_tokens": len(ids), "logprobs": 1}, "/v1/completions")
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == answer["choices"][0]["text"] == "hi there"
    assert logprobs["token_logprobs"] == [-0.5] * len(ids)
    assert [len(top) for top in logprobs["top_logprobs"]] == [1] * len(ids)
    assert logprobs["text_offset"] == [len(tokenizer.decode(ids[:n])) for n in range(len(ids))]


async def test_token_ids_are_returned_on_request(serve: Serve) -> None:
    ids = [70, 1, 71]
    async with serve(tokens_of=lambda g: ids) as served:
        _, chat, _ = await post(served.url, {**CHAT, "return_token_ids": True})
        _, text, _ = await post(served.url, {**TEXT, "return_token_ids": True}, "/v1/completions")
        chat_events = await stream(served.url, {**CHAT, "return_token_ids": True})
        text_events = await stream(served.url, {**TEXT, "return_token_ids": True}, "/v1/completions")
    prompts = [started.generation.prompt_token_ids.tolist() for started in served.generator.started]
    assert (chat["prompt_token_ids"], chat["choices"][0]["token_ids"]) == (prompts[0], ids)
    assert (text["choices"][0]["prompt_token_ids"], text["choices"][0]["token_ids"]) == (prompts[1], ids)
    assert chat_events[0]["prompt_token_ids"] == prompts[2]
    assert text_events[0]["choices"][0]["prompt_token_ids"] == prompts[3]
    for events in (chat_events, text_events):
        assert [i for event in events for i in event["choices"][0].get("token_ids", [])] == ids


async def test_all_sampling_fields_reach_the_generation(serve: Serve) -> None:
    body = {
        **CHAT,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 42,
        "ignore_eos": True,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100},
        "baton": {"class": "batch", "deadline_s": 9.5},
    }
    async with serve() as served:
        status, _, _ = await post(served.url, body)
    g = served.generator.started[0].generation
    assert status == 200
    assert (g.max_tokens, g.min_tokens, g.temperature, g.top_p, g.top_k, g.min_p, g.seed) == (8, 2, 0.5, 0.9, 7, 0.1, 42)
    assert (g.ignore_eos, g.frequency_penalty, g.presence_penalty, g.repetition_penalty) == (True, 0.1, 0.2, 1.1)
    assert (dict(g.logit_bias), g.interactive, g.deadline_s, g.operation) == ({5: -100.0}, False, 9.5, "chat")


async def test_numbers_no_message_could_carry_do_no_harm(serve: Serve) -> None:
    async with serve() as served:
        status, _, _ = await post(served.url, {**CHAT, "top_k": 2**70, "top_p": 0})
        g = served.generator.started[0].generation
        assert (status, g.top_k, g.top_p > 0) == (200, served.generator.models()[0].vocab_size, True)
        for field in ("n", "max_tokens", "min_tokens", "seed", "top_logprobs"):
            status, answer, _ = await post(served.url, {**CHAT, "logprobs": True, field: 2**70})
            assert (status, field in answer["error"]["message"]) == (400, True)
        status, _, _ = await post(served.url, {**TEXT, "prompt": [2**70]}, "/v1/completions")
        assert status == 400


async def test_n_choices_of_a_streamed_chat_keep_apart(serve: Serve, tokenizer: Tokenizer) -> None:
    words = [tokenizer.encode(word, add_special_tokens=False).ids for word in ("one END", "two", "three")]
    body = {**CHAT, "n": 3, "stop": "END", "max_tokens": 50, "stream_options": {"include_usage": True}, "logprobs": True}
    async with serve(tokens_of=lambda g: words[g.choice]) as served:
        events = await stream(served.url, body)
    assert [chat_text(events, index) for index in range(3)] == ["one ", "two", "three"]
    choices = [choice for event in events for choice in event["choices"]]
    assert [sum(c["index"] == index and c["finish_reason"] is not None for c in choices) for index in range(3)] == [1, 1, 1]
    entries = [sum(len((c["logprobs"] or {"content": []})["content"]) for c in choices if c["index"] == index) for index in range(3)]
    assert sum(entries) == events[-1]["usage"]["completion_tokens"]
    assert entries[1:] == [len(words[1]), len(words[2])]


async def test_max_tokens_defaults_to_the_room_for_chat_and_16_for_text(serve: Serve) -> None:
    async with serve() as served:
        await post(served.url, {"model": "tiny", "messages": CHAT["messages"]})
        await post(served.url, {"model": "tiny", "prompt": "x"}, "/v1/completions")
    chat, text = (started.generation for started in served.generator.started)
    assert chat.max_tokens == 256 - len(chat.prompt_token_ids)
    assert text.max_tokens == 16


async def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(serve: Serve) -> None:
    async with serve(max_model_tokens=64) as served:
        status, answer, _ = await post(served.url, {**TEXT, "prompt": [5] * 60}, "/v1/completions")
        chat_status, chat_answer, _ = await post(served.url, {"model": "tiny", "messages": [{"role": "user", "content": "x" * 90}]})
    assert (status, chat_status) == (400, 400)
    assert answer["error"]["code"] == chat_answer["error"]["code"] == "context_length_exceeded"
    assert (answer["error"]["param"], chat_answer["error"]["param"]) == ("prompt", "messages")
    assert re.search(
        r"prompt is too long: this model's maximum context length is 64 tokens.*has 60 and max_tokens is 8\b", answer["error"]["message"]
    )
    assert re.search(r"prompt is too long: this model's maximum context length is 64 tokens.*has 94\b", chat_answer["error"]["message"])
    assert served.generator.started == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": None}, "messages"),
        ({"model": 5}, "model"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": list("abcdefghijklmnopq")}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop_token_ids": [100000]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"baton": {"class": "urgent"}}, "baton.class"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"echo": True}, "echo"),
        ({"baton": {"made_up": 1}}, "baton.made_up"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": "x" * 257}, "stop"),
        ({"top_p": -0.1}, "top_p"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
    ],
)
async def test_a_bad_field_is_refused_by_name(serve: Serve, change: dict[str, Any], param: str) -> None:
    async with serve() as served:
        status, answer, _ = await post(served.url, {**CHAT, **change})
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    assert param.split(".")[-1] in answer["error"]["message"]
    assert served.generator.started == []


@pytest.mark.parametrize("prompt", [[], "", [[]], ["a", 5], [1, [2]], [100000], [-1], 5])
async def test_a_bad_prompt_is_refused(serve: Serve, prompt: object) -> None:
    async with serve() as served:
        status, answer, _ = await post(served.url, {**TEXT, "prompt": prompt}, "/v1/completions")
    assert status == 400
    assert answer["error"]["param"].startswith("prompt")


async def test_harmless_fields_and_neutral_values_are_accepted(serve: Serve) -> None:
    extra = {"user": "me", "metadata": {"a": "b"}, "store": False, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    extra |= {"top_k": -1, "service_tier": "flex", "n": 1, "stop": None, "logit_bias": None, "best_of": 1, "parallel_tool_calls": True}
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    async with serve() as served:
        status, answer, _ = await post(served.url, {**CHAT, **extra, "messages": [{"role": "developer", "content": content}]})
    assert status == 200, answer
    assert not served.generator.started[0].generation.interactive


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"model": "tiny"}'])
async def test_a_body_that_is_no_request_is_400(serve: Serve, data: bytes) -> None:
    async with serve() as served:
        status, answer, _ = await post(served.url, data)
    assert status == 400
    assert answer["error"]["message"]


async def test_a_large_body_is_413(serve: Serve) -> None:
    async with serve(settings=HttpSettings(max_body_bytes=1000)) as served:
        status, answer, _ = await post(served.url, {**CHAT, "user": "x" * 2000})
        async with aiohttp.ClientSession() as session, session.post(served.url + "/v1/completions", data=_endless()) as response:
            assert response.status == 413
    assert status == 413
    assert "1000" in answer["error"]["message"]


async def _endless() -> Any:
    for _ in range(100):
        yield b"x" * 100


async def test_a_body_that_does_not_come_is_408(serve: Serve) -> None:
    async with serve(settings=HttpSettings(body_timeout_s=0.05)) as served:
        reader, writer = await asyncio.open_connection(*served.address.split(":"))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_unknown_model_path_and_method_are_told_in_openais_form(serve: Serve) -> None:
    async with serve() as served:
        status, answer, _ = await post(served.url, {**CHAT, "model": "gpt"})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert "tiny" in answer["error"]["message"]
        status, answer, _ = await post(served.url, {}, "/v1/nothing")
        assert (status, answer["error"]["code"]) == (404, "unknown_url")
        async with aiohttp.ClientSession() as session, session.get(served.url + "/v1/completions") as response:
            assert response.status == 405
            assert "POST" in (await response.json())["error"]["message"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"),
    [
        (QueueFull(5, 5, 1200), 429, "2"),
        (Draining("f"), 503, "1"),
        (Unavailable("no decode instance"), 503, "1"),
        (Internal("ab12"), 500, None),
    ],
)
async def test_a_refusal_is_a_status_also_for_streams(
    serve: Serve, is_stream: bool, refusal: Any, status: int, retry_after: str | None
) -> None:
    async with serve() as served:
        served.generator.refusal = refusal
        got, answer, headers = await post(served.url, {**CHAT, "stream": is_stream})
    assert (got, headers.get("Retry-After")) == (status, retry_after)
    assert answer["error"]["code"]
    assert [(record.status, record.error_code) for record in served.records] == [(status, answer["error"]["code"])]


async def test_a_choice_refused_late_takes_the_others_with_it(serve: Serve) -> None:
    async with serve(is_manual=True) as served:
        served.generator.refusal, served.generator.refuse_from = QueueFull(1, 1), 2
        status, _, _ = await post(served.url, {**CHAT, "n": 3})
    assert status == 429
    assert [started.is_cancelled for started in served.generator.started] == [True, True]


async def test_a_failure_before_the_first_token_is_a_status(serve: Serve) -> None:
    async with serve(is_manual=True) as served:
        for is_stream in (False, True):
            task = asyncio.create_task(post(served.url, {**CHAT, "stream": is_stream}))
            await until(lambda: bool(served.generator.live))
            served.generator.live[0].end("failed", error=Unavailable("every decode instance is gone"))
            status, answer, _ = await task
            assert (status, answer["error"]["code"]) == (503, "unavailable")


async def test_choices_of_a_prompt_share_what_died_under_them(serve: Serve) -> None:
    async with serve() as served:
        await post(served.url, {**TEXT, "prompt": ["a", "b"], "n": 2}, "/v1/completions")
        crashes = [id(started.generation.crashes) for started in served.generator.started]
    assert crashes[0] == crashes[1] != crashes[2] == crashes[3]


async def test_a_failure_in_mid_stream_is_an_error_event(serve: Serve) -> None:
    async with serve(is_manual=True) as served:
        task = asyncio.create_task(stream(served.url, {**CHAT, "n": 2}))
        await until(lambda: len(served.generator.live) == 2)
        first, second = served.generator.live
        first.push(70)
        first.end("failed", error=Internal("engine_crash"))
        assert second.is_cancelled
        events = await task
    assert events[-1]["error"]["type"] == "server_error"
    assert (served.records[0].status, served.records[0].error_code) == (200, "internal")


async def test_an_end_without_any_token_is_an_empty_answer(serve: Serve) -> None:
    async with serve(tokens_of=lambda g: [], tokens_per_step=1) as served:
        _, whole, _ = await post(served.url, CHAT)
        events = await stream(served.url, CHAT)
    assert whole["choices"][0]["message"]["content"] == chat_text(events) == ""
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_a_client_that_leaves_cancels_in_every_phase(serve: Serve) -> None:
    async with serve(is_manual=True) as served:
        for is_stream, num_tokens in ((False, 0), (False, 3), (True, 0), (True, 3)):
            body = json.dumps({**CHAT, "n": 2, "stream": is_stream}).encode()
            _, writer = await asyncio.open_connection(*served.address.split(":"))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await until(lambda: len(served.generator.live) == 2)
            for started in served.generator.live:
                if num_tokens:
                    started.push(*[70] * num_tokens)
            writer.close()
            await until(lambda: not served.generator.live)
        await until(lambda: len(served.records) == 4)
    assert all(started.is_cancelled for started in served.generator.started)
    assert {record.status for record in served.records} == {499}


async def test_an_answered_call_leaves_nothing_for_the_collector(serve: Serve) -> None:
    """It runs seldom (tune_gc): rings of answered calls would take tens of MiB until then."""
    async with serve() as served:
        await post(served.url, CHAT)  # what is made once
        gc.collect()
        gc.disable()
        try:
            for body in (CHAT, {**CHAT, "n": 2}, {**CHAT, "stop": ["o"]}):
                await post(served.url, body)
                await stream(served.url, body)
            served.generator.started.clear()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            found = [thing for thing in gc.garbage if type(thing).__module__.startswith("baton_frontend")]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert [type(thing).__name__ for thing in found] == []


async def test_a_late_end_after_the_client_left_does_no_harm(serve: Serve) -> None:
    async with serve(is_manual=True) as served:
        body = json.dumps({**CHAT, "stream": True}).encode()
        _, writer = await asyncio.open_connection(*served.address.split(":"))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await until(lambda: bool(served.generator.live))
        started = served.generator.live[0]
        started.ends_on_cancel = False
        started.push(70)
        writer.close()
        await until(lambda: started.is_cancelled)
        started.end("cancelled")
        status, _, _ = await post(served.url, {}, "/nothing")
    assert status == 404


async def test_trace_context_reaches_the_generator(serve: Serve) -> None:
    from opentelemetry import trace

    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serve() as served, aiohttp.ClientSession() as session:
        await session.post(served.url + "/v1/chat/completions", json=CHAT, headers={"traceparent": traceparent})
        context = served.generator.started[0].trace_context
    assert f"{trace.get_current_span(context).get_span_context().trace_id:032x}" == traceparent.split("-")[1]


@pytest.mark.parametrize("body", [CHAT, {**CHAT, "stream": True}, {**CHAT, "max_tokens": -1}, {**CHAT, "model": "none"}])
async def test_every_answer_and_error_names_its_request_and_trace(serve: Serve, body: dict[str, Any]) -> None:
    sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serve() as served, aiohttp.ClientSession() as session:
        response = await session.post(served.url + "/v1/chat/completions", json=body, headers={"traceparent": sent})
        await response.read()
    headers = response.headers
    assert headers["traceparent"].split("-")[1] == sent.split("-")[1]
    assert headers["X-Request-Id"]


async def test_models_health_and_metrics(serve: Serve) -> None:
    async with serve() as served, aiohttp.ClientSession() as session:

        async def get(path: str) -> Any:
            async with session.get(served.url + path) as response:
                return response.status, await response.json(content_type=None) if path != "/metrics" else await response.text()

        status, models = await get("/v1/models")
        assert (status, models["data"][0]["id"], models["data"][0]["max_model_len"]) == (200, "tiny", 256)
        assert (await get("/v1/models/tiny"))[1]["id"] == "tiny"
        assert (await get("/v1/models/none"))[0] == 404
        assert await get("/health") == (200, {"status": "ok", "ready": True, "models": ["tiny"]})
        assert await get("/ready") == (200, {"ready": True})
        assert await get("/metrics") == (200, "up 1\n")
        async with session.head(served.url + "/health") as response:
            assert response.status == 200


async def test_without_a_model_health_lives_and_calls_are_503(serve: Serve) -> None:
    async with serve(is_served=False) as served:
        status, _, headers = await post(served.url, CHAT)
        async with (
            aiohttp.ClientSession() as session,
            session.get(served.url + "/ready") as ready,
            session.get(served.url + "/health") as health,
        ):
            assert (ready.status, health.status, (await health.json())["ready"]) == (503, 200, False)
    assert (status, headers["Retry-After"]) == (503, "1")


async def test_a_model_without_template_answers_completions_only(serve: Serve, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "words", word_level_tokenizer(), eos_token="<eos>", template=None)
    async with serve(folder=folder, tokens_of=lambda g: [12, 9, 10]) as served:
        status, answer, _ = await post(served.url, CHAT)
        assert (status, answer["error"]["code"]) == (400, "chat_template_missing")
        status, answer, _ = await post(served.url, {**TEXT, "prompt": "red ="}, "/v1/completions")
        assert answer["choices"][0]["text"] == " 4 1 2"
        events = await stream(served.url, {**TEXT, "prompt": "red ="}, "/v1/completions")
        assert "".join(event["choices"][0]["text"] for event in events) == " 4 1 2"


async def test_a_model_that_cannot_be_read_is_503(serve: Serve, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "broken", word_level_tokenizer(), eos_token="<eos>")
    async with serve(folder=folder) as served:
        (folder / "tokenizer.json").write_text("{}")
        for _ in range(2):
            status, answer, _ = await post(served.url, CHAT)
            assert status == 503
            assert "tokenizer" in answer["error"]["message"]


@pytest.mark.parametrize("is_asked", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_each_choice_says_where_its_time_went_if_asked(serve: Serve, path: str, is_asked: bool) -> None:
    body = {**(CHAT if "chat" in path else TEXT), "n": 2, "baton": {"latency_budget": is_asked}}
    async with serve(is_manual=True) as served, asyncio.TaskGroup() as tasks:
        whole = tasks.create_task(post(served.url, body, path))
        streamed = tasks.create_task(stream(served.url, body, path))
        await until(lambda: len(served.generator.started) == 4)
        assert all(started.generation.wants_latency_budget == is_asked for started in served.generator.started)
        for started in served.generator.started:
            started.push(70)
            route_s = 0.001 * (1 + started.generation.choice)
            started.end("length", latency_budget=LatencyBudget(route_s, None, 0.25) if is_asked else None)
    choices = [(await whole)[1]["choices"]]
    choices.append([event["choices"][0] for event in await streamed if event["choices"][0]["finish_reason"]])
    for found in choices:
        budgets = {choice["index"]: choice.get("baton", {}).get("latency_budget") for choice in found}
        if not is_asked:
            assert budgets == {0: None, 1: None}
            continue
        assert [budgets[index]["route_ms"] for index in (0, 1)] == [1.0, 2.0]
        assert (budgets[0]["queue_ms"], budgets[0]["prefill_ms"]) == (None, 250.0)
        assert budgets[0]["prepare_ms"] > 0
