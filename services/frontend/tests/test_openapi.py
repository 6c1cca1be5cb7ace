"""The served document: valid, of exactly the routes served, and what it promises of bodies and answers is so."""

import json
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from baton_frontend import openapi
from baton_frontend.http_server import HttpServer
from baton_frontend.model_registry import ModelRegistry
from baton_frontend.openai_answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, ErrorAnswer
from baton_frontend.openai_errors import STATUS_OF
from baton_frontend.openai_http import HttpSettings, OpenAIHandlers
from baton_frontend.openai_schema import NEUTRAL, ChatBody, CompletionBody
from baton_frontend.testing import FakeGenerator
from baton_frontend.tokenizer import WorkPool
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

Serve = Any
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 4}
TEXT = {"model": "tiny", "prompt": "hello world", "max_tokens": 4}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads(openapi.document())


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert [str(error) for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


def test_it_lists_exactly_the_routes_served(document: dict[str, Any]) -> None:
    app = web.Application()
    with WorkPool(num_threads=1) as pool:
        handlers = OpenAIHandlers(FakeGenerator([]), ModelRegistry(pool), HttpSettings())
        HttpServer.add_routes(app, handlers, metrics=lambda: b"")
    served = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert listed == {(method, path) for method, path in served if method != "HEAD"}


def test_bodies_are_the_types_that_check_them(document: dict[str, Any]) -> None:
    for kind, path in ((ChatBody, "/v1/chat/completions"), (CompletionBody, "/v1/completions")):
        schema = document["components"]["schemas"][kind.__name__]
        assert set(schema["properties"]) == {field.encode_name for field in msgspec.structs.fields(kind)}
        assert document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{kind.__name__}")
        for name, (neutral, _) in NEUTRAL.items():
            if name in schema["properties"]:
                assert schema["properties"][name]["enum"] == [None, *neutral]


def test_every_status_an_error_can_become_is_described(document: dict[str, Any]) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert {str(status) for _, status, _ in STATUS_OF} | {"500"} <= set(document["paths"][path]["post"]["responses"])


def test_the_schema_of_a_stream_is_that_of_one_event(document: dict[str, Any]) -> None:
    """As schemathesis and others read it: an object of the event's fields."""
    for path, chunk in (("/v1/chat/completions", ChatCompletionChunk), ("/v1/completions", CompletionChunk)):
        schema = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
        validator = Draft202012Validator({**schema, "components": document["components"]})
        assert validator.is_valid({"event": "message", "data": "{}"})
        assert validator.is_valid({"data": "[DONE]"})
        assert not validator.is_valid("data: {}")
        content = schema["properties"]["data"]["anyOf"][1]["contentSchema"]["anyOf"]
        assert [kind["$ref"].rpartition("/")[2] for kind in content] == [chunk.__name__, "ErrorAnswer"]


def same(data: bytes, kind: type) -> bool:
    """Whether nothing is missing from the answer, of another type, or beyond what its type says."""
    return msgspec.json.decode(msgspec.json.encode(msgspec.json.decode(data, type=kind))) == msgspec.json.decode(data)


@pytest.mark.parametrize("extra", [{}, {"n": 2, "return_token_ids": True, "stop": "zzz"}])
async def test_answers_are_what_their_types_say(serve: Serve, extra: dict[str, Any]) -> None:
    async with serve() as served, aiohttp.ClientSession() as session:

        async def ask(path: str, body: dict[str, Any]) -> bytes:
            async with session.post(served.url + path, json={**body, **extra}) as response:
                return await response.read()

        for path, body, logprobs, whole, chunk in (
            ("/v1/chat/completions", CHAT, {"logprobs": True, "top_logprobs": 2}, ChatCompletion, ChatCompletionChunk),
            ("/v1/completions", TEXT, {"logprobs": 2}, Completion, CompletionChunk),
        ):
            assert same(await ask(path, body), whole)
            assert same(await ask(path, {**body, **logprobs}), whole)
            asked = {**body, **logprobs, "stream": True, "stream_options": {"include_usage": True}}
            *events, last = [e.removeprefix(b"data: ") for e in (await ask(path, asked)).split(b"\n\n") if e]
            assert last == b"[DONE]"
            assert all(same(event, chunk) for event in events)
            assert same(await ask(path, {**body, "max_tokens": 0}), ErrorAnswer)


async def test_the_document_is_served(serve: Serve, document: dict[str, Any]) -> None:
    async with serve() as served, aiohttp.ClientSession() as session, session.get(served.url + "/openapi.json") as response:
        assert (response.status, await response.json()) == (200, document)
