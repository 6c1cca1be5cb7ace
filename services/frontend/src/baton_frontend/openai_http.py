"""Handlers of the OpenAI-compatible endpoints: read, plan, submit, answer; translate errors once."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec
from aiohttp import web
from baton_runtime import semconv
from baton_runtime.errors import BatonError
from baton_runtime.log import get_logger
from baton_runtime.telemetry import context_from, traceparent
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.util.types import AttributeValue

from baton_frontend import openapi
from baton_frontend.admission import Admission
from baton_frontend.event_writer import DirectResponse, EventWriter, write_json
from baton_frontend.generation import Generator, ModelInfo
from baton_frontend.model_registry import LoadedModel, ModelRegistry
from baton_frontend.openai_answers import Health, ModelCard, ModelList, Readiness
from baton_frontend.openai_calls import PlannedCall, plan_chat, plan_completion
from baton_frontend.openai_errors import ApiError, from_baton_error
from baton_frontend.openai_format import Endpoint, ResponseFormat
from baton_frontend.openai_schema import parse_chat, parse_completion
from baton_frontend.sinks import Call, CollectingSink, StreamSink, finish_stream
from baton_frontend.tail_sampling import TailSampling

log = get_logger(__name__)
CLIENT_CLOSED_REQUEST = 499
_ID_PREFIX: dict[Endpoint, str] = {"chat": "chatcmpl-", "completion": "cmpl-"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Limits of the HTTP side."""

    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0  # from the head of a request to the end of its body
    max_generations: int = 64  # choices of one call: prompts times n
    slow_reader_limit_bytes: int = 1 << 20  # text held for a reader that does not keep up, beside 64 KiB in the transport
    slow_reader_timeout_s: float = 30.0  # without the transport's buffer draining


@dataclass(slots=True)
class HttpRecord:
    """What became of one POST; handed to the observer at its end. Times are time.monotonic()."""

    route: str
    started_at: float
    model: str = ""  # served name, empty if none was found
    status: int = 500  # stays so only if a handler has a bug
    is_stream: bool = False
    error_code: str | None = None  # also set if a stream that began with 200 ended with an error event
    prepared_at: float | None = None  # parsed, rendered, tokenized
    first_token_at: float | None = None
    ended_at: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    request_id: str = ""  # of the first choice; empty before anything was submitted
    traceparent: str = ""  # of the call's span; empty without tracing
    body_bytes: int = 0  # taken from the admission, given back at the end

    @property
    def prepare_s(self) -> float:
        """From the head of the call to its admission: reading, parsing, rendering, tokenizing."""
        return 0.0 if self.prepared_at is None else self.prepared_at - self.started_at

    def headers(self) -> dict[str, str]:
        """By which the call is found again in logs and traces."""
        ids = {"X-Request-Id": self.request_id or secrets.token_hex(8)}
        return {**ids, "traceparent": self.traceparent} if self.traceparent else ids

    def header_lines(self) -> bytes:
        """As `headers`, each ended by CRLF."""
        return "".join([f"{name}: {value}\r\n" for name, value in self.headers().items()]).encode()


class HttpObserver(Protocol):
    """Metrics hook; called on the loop, must not block."""

    def on_call_end(self, record: HttpRecord) -> None:
        """Exactly once per POST to an OpenAI endpoint."""


class NoObserver:
    """Observes nothing."""

    def on_call_end(self, record: HttpRecord) -> None:
        """Nothing."""


class OpenAIHandlers:
    """The endpoints, over a Generator."""

    def __init__(
        self,
        generator: Generator,
        registry: ModelRegistry,
        settings: HttpSettings,
        *,
        admission: Admission | None = None,
        tracer: trace.Tracer | None = None,
        tail: TailSampling | None = None,
        observer: HttpObserver | None = None,
        is_ready: Callable[[], bool] | None = None,
    ) -> None:
        """admission: the one of the generator. tail: of traces that are not sampled.

        is_ready: whether new work would be taken (default: some model is served).
        """
        self._generator = generator
        self._registry = registry
        self._settings = settings
        self._admission = admission if admission is not None else Admission()
        self._tracer = tracer if tracer is not None else trace.NoOpTracer()
        self._tail = tail
        self._observer = observer if observer is not None else NoObserver()
        self._is_ready = is_ready if is_ready is not None else lambda: bool(generator.models())
        self._started_at = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        """All routes."""
        return [
            web.post("/v1/chat/completions", self.chat_completions),
            web.post("/v1/completions", self.completions),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{model:.+}", self.model),
            web.get("/health", self.health),
            web.get("/ready", self.ready),
            web.get("/openapi.json", self.openapi),
        ]

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._answer(request, "chat")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._answer(request, "completion")

    async def models(self, _: web.Request) -> web.Response:
        """GET /v1/models."""
        return _json(ModelList("list", [self._model_card(info) for info in self._generator.models()]))

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{model}."""
        try:
            return _json(self._model_card(self._find(request.match_info["model"])))
        except ApiError as error:
            return error_response(error)

    async def health(self, _: web.Request) -> web.Response:
        """GET /health: 200 while the process lives; says whether it is ready."""
        return _json(Health("ok", self._is_ready(), [info.served_name for info in self._generator.models()]))

    async def ready(self, _: web.Request) -> web.Response:
        """GET /ready: 200 if new work is taken, else 503."""
        is_ready = self._is_ready()
        return _json(Readiness(is_ready), status=200 if is_ready else 503)

    async def openapi(self, _: web.Request) -> web.Response:
        """GET /openapi.json."""
        return web.Response(body=openapi.document(), content_type="application/json")

    def _model_card(self, info: ModelInfo) -> ModelCard:
        return ModelCard(info.served_name, "model", self._started_at, "baton", info.max_model_tokens)

    def _find(self, name: str) -> ModelInfo:
        if (info := self._generator.model(name)) is not None:
            return info
        models = self._generator.models()
        if not models:
            raise ApiError(503, "no model is served now: no worker has registered yet", code="no_model", retry_after_ms=1000)
        known = ", ".join(sorted(info.served_name for info in models))
        raise ApiError(404, f"model {name!r} does not exist; served: {known}", param="model", code="model_not_found")

    async def _answer(self, request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
        record = HttpRecord(request.path, time.monotonic())
        span = self._tracer.start_span(
            f"POST {request.path}",
            context_from(request.headers.get("traceparent", "")),
            trace.SpanKind.SERVER,
            {semconv.HTTP_REQUEST_METHOD: "POST", semconv.HTTP_ROUTE: request.path},
        )
        context = trace.set_span_in_context(span)
        record.traceparent = traceparent(context)
        try:
            self._admission.check()
            planned = await self._plan(request, endpoint, record)
            self._admission.give_bytes(record.body_bytes)  # of the body nothing is kept but its tokens
            record.body_bytes = 0
            answer = self._stream if planned.is_stream else self._collect
            response = await answer(request, planned, record, context)
            record.status = response.status
            return response
        except (ApiError, BatonError) as error:
            refusal = error if isinstance(error, ApiError) else from_baton_error(error)
            record.status, record.error_code = refusal.status, refusal.code
            headers = record.headers()
            log.debug("http_refused", request_id=headers["X-Request-Id"], status=refusal.status, code=refusal.code, error=refusal.message)
            return error_response(refusal, headers)
        except (asyncio.CancelledError, ConnectionError):
            record.status = CLIENT_CLOSED_REQUEST
            raise
        finally:
            record.ended_at = time.monotonic()
            self._admission.give_bytes(record.body_bytes)
            span.set_attribute(semconv.HTTP_RESPONSE_STATUS_CODE, record.status)
            if record.prepared_at is not None and span.is_recording():
                span.set_attribute(semconv.BATON_BUDGET_PREPARE_MS, round(record.prepare_s * 1000, 3))
            if record.error_code is not None:
                span.set_attribute(semconv.ERROR_TYPE, record.error_code)
            if self._tail is not None and not span.is_recording() and self._tail.call_over(span, record.status):
                _emit_late(self._tail, span, request, record)
            span.end()
            self._observer.on_call_end(record)

    async def _plan(self, request: web.Request, endpoint: Endpoint, record: HttpRecord) -> PlannedCall:
        data = await self._read(request, record)
        limit = self._settings.max_generations
        if endpoint == "chat":
            chat = parse_chat(data)
            planned = await plan_chat(chat, *await self._model(chat.model, record), limit)
        else:
            completion = parse_completion(data)
            planned = await plan_completion(completion, *await self._model(completion.model, record), limit)
        record.is_stream = planned.is_stream
        record.prompt_tokens = sum({id(g.prompt_token_ids): len(g.prompt_token_ids) for g in planned.generations}.values())
        record.prepared_at = time.monotonic()
        return planned

    async def _model(self, name: str, record: HttpRecord) -> tuple[ModelInfo, LoadedModel]:
        info = self._find(name)
        record.model = info.served_name
        return info, await self._registry.load(info)

    async def _read(self, request: web.Request, record: HttpRecord) -> bytes:
        """The body, held against the bound on bytes before it is read; without a length (chunked, compressed) as it comes."""
        limit = self._settings.max_body_bytes
        self._hold_body(record, request.content_length or 0, limit)
        try:
            if request.content.is_eof():  # all of it is here: the usual case
                body = request.content.read_nowait()
                self._hold_body(record, len(body), limit)
                return body
            async with asyncio.timeout(self._settings.body_timeout_s):
                return await self._read_parts(request, record, limit)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {self._settings.body_timeout_s:g} s", code="body_timeout") from error
        except (web.RequestPayloadError, web.HTTPBadRequest) as error:
            raise ApiError(400, "the body could not be read; check its length and encoding", code="invalid_body") from error

    async def _read_parts(self, request: web.Request, record: HttpRecord, limit: int) -> bytes:
        body = bytearray()
        async for part in request.content.iter_any():
            body += part
            self._hold_body(record, len(body), limit)
        return bytes(body)

    def _hold_body(self, record: HttpRecord, num_bytes: int, limit: int) -> None:
        if num_bytes > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes (frontend.max_body_bytes); send less", code="body_too_large")
        if num_bytes > record.body_bytes:
            self._admission.take_bytes(num_bytes - record.body_bytes)
            record.body_bytes = num_bytes

    async def _collect(self, request: web.Request, planned: PlannedCall, record: HttpRecord, context: Context) -> web.StreamResponse:
        call = Call()
        sinks = [CollectingSink(call, generation, planned.new_text(generation)) for generation in planned.generations]
        try:
            call.submit(self._generator, sinks, context)
            await call.changed(lambda: call.is_over)
        finally:
            call.cancel()
            _note(record, call)
            usage, resumed = call.usage(), call.resumed()
            call.forget()
        if call.failure is not None:
            raise call.failure
        form = _format(planned, call, record)
        extra: dict[str, object] = {}
        if planned.has_token_ids and planned.endpoint == "chat":
            extra["prompt_token_ids"] = planned.generations[0].prompt_token_ids.tolist()
        choices = [sink.as_json(index, form, planned.loaded.names) for index, sink in enumerate(sinks)]
        body = form.response(choices, usage, resumed, extra)
        return write_json(request, body, record.header_lines())

    async def _stream(self, request: web.Request, planned: PlannedCall, record: HttpRecord, context: Context) -> web.StreamResponse:
        call = Call()
        sinks = [
            StreamSink(call, generation, planned.new_text(generation), index, planned.loaded.text, planned.loaded.names)
            for index, generation in enumerate(planned.generations)
        ]
        writer: EventWriter | None = None
        try:
            # The generator calls no sink from inside submit, so there is time to bind them to their writer.
            call.submit(self._generator, sinks, context)
            form = _format(planned, call, record)
            record.request_id = call.response_id
            writer = self._open_writer(request, call, record)
            call.on_ended = partial(finish_stream, call, writer, form)
            for sink in sinks:
                sink.bind(writer, form)
            await self._follow(call, writer, sinks)
        finally:
            call.cancel()
            if writer is not None:
                writer.close()
            _note(record, call)
            call.forget()
        if call.failure is not None and not writer.started:
            raise call.failure
        return DirectResponse(writer.keep_alive)

    def _open_writer(self, request: web.Request, call: Call, record: HttpRecord) -> EventWriter:
        def on_lost() -> None:
            call.cancel()
            call.wake()

        limit = self._settings.slow_reader_limit_bytes
        return EventWriter(request, record.header_lines(), self._admission, limit_bytes=limit, on_slow=call.wake, on_lost=on_lost)

    async def _follow(self, call: Call, writer: EventWriter, sinks: list[StreamSink]) -> None:
        """Wait for the end; the sinks write by themselves unless the reader is slow."""
        while not (call.is_over or writer.is_lost):
            await call.changed(lambda: call.is_over or writer.is_slow or writer.is_lost)
            if writer.is_slow and not writer.is_lost:
                await writer.drained(self._settings.slow_reader_timeout_s)
                if not call.is_over:
                    for sink in sinks:
                        sink.flush()


def _format(planned: PlannedCall, call: Call, record: HttpRecord) -> ResponseFormat:
    return ResponseFormat(
        planned.endpoint,
        _ID_PREFIX[planned.endpoint] + call.response_id,
        int(time.time()),
        planned.generations[0].model,
        has_usage=planned.has_usage,
        prepare_s=record.prepare_s,
    )


def _note(record: HttpRecord, call: Call) -> None:
    record.request_id = call.response_id
    record.first_token_at = call.first_token_at
    record.output_tokens = sum(choice.text.num_tokens for choice in call.choices)
    if call.failure is not None:
        record.error_code = call.failure.code


def _request_id() -> dict[str, str]:
    """Of what is no call of a model."""
    return {"X-Request-Id": secrets.token_hex(8)}


def _emit_late(tail: TailSampling, span: trace.Span, request: web.Request, record: HttpRecord) -> None:
    """The call's span, not recorded while it ran."""
    attributes: dict[str, AttributeValue] = {
        semconv.HTTP_REQUEST_METHOD: "POST",
        semconv.HTTP_ROUTE: record.route,
        semconv.HTTP_RESPONSE_STATUS_CODE: record.status,
        semconv.BATON_BUDGET_PREPARE_MS: round(record.prepare_s * 1000, 3),
    }
    if record.error_code is not None:
        attributes[semconv.ERROR_TYPE] = record.error_code
    parent = trace.get_current_span(context_from(request.headers.get("traceparent", ""))).get_span_context()
    error = f"HTTP {record.status}" if record.status >= 500 else ""
    duration_s = record.ended_at - record.started_at
    tail.spans.emit(span, f"POST {record.route}", trace.SpanKind.SERVER, parent, duration_s, attributes, error=error)


def _json(content: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json", headers=_request_id())


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> web.Response:
    """An error in OpenAI's form. headers: beside its own; default: a request id."""
    all_headers = {**error.headers(), **(headers or _request_id())}
    response = web.Response(body=error.body(), status=error.status, content_type="application/json", headers=all_headers)
    if error.code == "draining":
        response.force_close()  # so that the client's next request goes elsewhere
    return response


@web.middleware
async def openai_error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Everything that is no answer of ours (unknown path, wrong method, bug) in OpenAI's form too."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _http_error(request, error)
    except ConnectionError:  # the client is gone: aiohttp knows what to do
        raise
    except Exception:  # the outermost handler: nothing leaks, the log has it
        error_id = secrets.token_hex(8)
        log.exception("http_handler_failed", path=request.path, error_id=error_id)
        return error_response(ApiError(500, f"internal error {error_id}", code="internal"))


def _http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    if error.status == 404:
        refusal = ApiError(404, f"{request.path} does not exist here", code="unknown_url")
    elif isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        refusal = ApiError(405, f"{request.method} is not allowed on {request.path}; use {allowed}", code="method_not_allowed")
    else:
        refusal = ApiError(error.status, error.reason, code="http_error")
    response = error_response(refusal)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response
