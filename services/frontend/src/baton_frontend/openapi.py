"""The OpenAPI 3.1 document served at /openapi.json.

Request bodies are described from the types that check them (openai_schema.py), refused fields from the table that refuses them, error
statuses from the table that translates errors: there is no second list to forget.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec

from baton_frontend import openai_answers as answers
from baton_frontend.openai_errors import STATUS_OF
from baton_frontend.openai_schema import NEUTRAL, ChatBody, CompletionBody

Json = dict[str, Any]
_REF = "#/components/schemas/{name}"
_TYPES = (
    ChatBody,
    CompletionBody,
    answers.ChatCompletion,
    answers.ChatCompletionChunk,
    answers.Completion,
    answers.CompletionChunk,
    answers.ErrorAnswer,
    answers.ModelCard,
    answers.ModelList,
    answers.Health,
    answers.Readiness,
)
_ERRORS = {
    400: "A field is wrong, too long or refused; `param` names it.",
    403: "Not allowed.",
    404: "There is no such model or path; the message says what is served.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "A queue is full; nothing was started. Send it again after `Retry-After`.",
    500: "Our fault; the log has the details under the request id.",
    503: "Draining, no worker, or the model cannot be read. Send it again after `Retry-After`.",
    504: "The deadline passed: `baton.deadline_s`, or the server's default.",
}
_CALL_ERRORS = sorted({400, 404, 408, 413, 500} | {status for _, status, _ in STATUS_OF})
_HEADERS: Json = {
    "X-Request-Id": {"description": "By which the call is found in logs and traces.", "schema": {"type": "string"}},
    "traceparent": {"description": "The span of the call (W3C Trace Context), with tracing.", "schema": {"type": "string"}},
}
_RETRY_HEADERS: Json = {
    "Retry-After": {"description": "Seconds, rounded up.", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
    "Retry-After-Ms": {"description": "The same in milliseconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
}
_EVENTS = """With `stream: true`: server-sent events. Each is a line `data: ` with one JSON object ({chunk}) and an empty line.
A call that fails after its first event sends an ErrorAnswer as an event; before it, errors are statuses.
The last event is always `data: [DONE]`."""


@cache
def document() -> bytes:
    """The document as JSON; made once."""
    content = {
        "openapi": "3.1.0",
        "info": {
            "title": "Baton",
            "version": version("baton-frontend"),
            "description": "OpenAI-compatible HTTP API of Baton. Fields of a body that are not listed are ignored, except within `baton`.",
        },
        "paths": _paths(),
        "components": {"schemas": _schemas()},
    }
    return msgspec.json.encode(content)


def _schemas() -> Json:
    _, components = msgspec.json.schema_components(_TYPES, ref_template=_REF)
    for kind in (ChatBody, CompletionBody):
        properties = components[kind.__name__]["properties"]
        for name, (neutral, fix) in NEUTRAL.items():
            if name in properties:
                properties[name] = {"enum": [None, *neutral], "default": None, "description": _refusal(fix)}
    return components


def _refusal(fix: str) -> str:
    return f"Refused with any other value: {fix}." if fix else "No effect."


def _paths() -> Json:
    model = {"name": "model", "in": "path", "required": True, "description": "Served name.", "schema": {"type": "string", "minLength": 1}}
    text = {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {
        "/v1/chat/completions": {"post": _call("createChatCompletion", ChatBody, answers.ChatCompletion, answers.ChatCompletionChunk)},
        "/v1/completions": {"post": _call("createCompletion", CompletionBody, answers.Completion, answers.CompletionChunk)},
        "/v1/models": {"get": _query("listModels", "What some live worker serves now.", {200: answers.ModelList})},
        "/v1/models/{model}": {
            "get": {**_query("retrieveModel", "One of them.", {200: answers.ModelCard}, (404, 503)), "parameters": [model]}
        },
        "/health": {"get": _query("health", "200 while the process lives; says whether it is ready.", {200: answers.Health})},
        "/ready": {"get": _query("ready", "200 if new work is taken, else 503.", {200: answers.Readiness, 503: answers.Readiness})},
        "/metrics": {"get": {"operationId": "metrics", "summary": "Metrics of this process.", "responses": {"200": text}}},
        "/openapi.json": {
            "get": {
                "operationId": "openapi",
                "summary": "This document.",
                "responses": {"200": {"description": "OpenAPI 3.1.", "content": {"application/json": {"schema": {"type": "object"}}}}},
            }
        },
    }


def _call(operation: str, body: type, answer: type, chunk: type) -> Json:
    content = {"application/json": {"schema": _ref(answer)}, "text/event-stream": {"schema": _event(chunk)}}
    success = {"description": "The whole answer, or a stream of events.", "headers": _HEADERS, "content": content}
    return {
        "operationId": operation,
        "summary": (body.__doc__ or "").strip(),
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        "responses": {"200": success, **_errors(_CALL_ERRORS, _HEADERS)},
    }


def _event(chunk: type) -> Json:
    """One event, as an object of its fields: how tools read the schema of text/event-stream (OpenAPI 3.1 itself does not say)."""
    content = {"anyOf": [_ref(chunk), _ref(answers.ErrorAnswer)]}
    data = [{"const": "[DONE]"}, {"type": "string", "contentMediaType": "application/json", "contentSchema": content}]
    properties = {"data": {"anyOf": data}}
    return {"type": "object", "description": _EVENTS.format(chunk=chunk.__name__), "properties": properties, "required": ["data"]}


def _query(operation: str, summary: str, successes: Mapping[int, type], errors: Sequence[int] = ()) -> Json:
    responses = {str(status): {"description": summary, "content": _json(kind)} for status, kind in successes.items()}
    return {"operationId": operation, "summary": summary, "responses": {**responses, **_errors(errors, {})}}


def _errors(statuses: Sequence[int], headers: Json) -> Json:
    return {
        str(status): {
            "description": _ERRORS[status],
            "headers": {**headers, **(_RETRY_HEADERS if status in (429, 503) else {})},
            "content": _json(answers.ErrorAnswer),
        }
        for status in statuses
    }


def _json(kind: type) -> Json:
    return {"application/json": {"schema": _ref(kind)}}


def _ref(kind: type) -> Json:
    return {"$ref": _REF.format(name=kind.__name__)}
