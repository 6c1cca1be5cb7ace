"""What is said to an SGLang server and what it says, as of 0.5.23. All requests are by token ids, all answers are streams of them."""

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import aiohttp
import msgspec
from baton_runtime.rpc import split_address

from baton_engine.api import EngineRequest, Priority, SamplingParams, Work

_DATA, _DONE = b"data: ", b"[DONE]"
_KEEP_ALIVE_S = 2.0  # below the server's 5 s: a request on a connection that it closes at that moment would be lost
_LINE_BYTES = 4 << 20  # an answer with 20 log probabilities for each of thousands of tokens is one line
T = TypeVar("T")


class ChildUnavailable(Exception):
    """The server cannot be reached, or broke off. message: for the log."""


class ChildRefused(Exception):
    """The server refused a request or ended it with an error. message: its own words, for the log; they hold no prompt."""


class FinishReason(msgspec.Struct, frozen=True):
    """type: "stop", "length" or "abort"; matched: the token or text that stopped it; message: of an abort."""

    type: str
    matched: int | str | list[int] | None = None
    message: str | None = None


class MetaInfo(msgspec.Struct, frozen=True):
    """Beside the tokens of one piece of an answer. The columns of log probabilities are as long as its output_ids; an entry is
    (log probability, token id, text), one list of them per token in output_top_logprobs."""

    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    output_token_logprobs: list[tuple[float | None, int, Any]] = []
    output_top_logprobs: list[list[tuple[float | None, int, Any]] | None] = []


class Piece(msgspec.Struct, frozen=True):
    """One piece of an answer: the tokens since the piece before (`--incremental-streaming-output`)."""

    output_ids: list[int] = []
    meta_info: MetaInfo = msgspec.field(default_factory=MetaInfo)
    error: Any = None


class Disaggregation(msgspec.Struct, frozen=True):
    """Requests in the queues of a handoff."""

    prefill_bootstrap_queue_reqs: int = 0
    prefill_inflight_queue_reqs: int = 0
    decode_prealloc_queue_reqs: int = 0
    decode_transfer_queue_reqs: int = 0
    decode_retracted_queue_reqs: int = 0

    @property
    def num_requests(self) -> int:
        """In all of them."""
        return sum(getattr(self, name) for name in self.__struct_fields__)


class Load(msgspec.Struct, frozen=True):
    """One scheduler's load. num_used_tokens: KV slots that somebody holds, in whole pages; the reusable prefix cache is not among them."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_used_tokens: int = 0
    disaggregation: Disaggregation = msgspec.field(default_factory=Disaggregation)


class _Loads(msgspec.Struct, frozen=True):
    loads: list[Load]


class ServerInfo(msgspec.Struct, frozen=True):
    """The settings it has come to. max_total_num_tokens: KV slots of one scheduler; max_req_input_len: of the longest
    prompt; context_length: None: the model's own."""

    version: str
    max_total_num_tokens: int
    max_req_input_len: int
    page_size: int
    context_length: int | None = None
    max_running_requests: int | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    skip_tokenizer_init: bool = False
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False
    disaggregation_transfer_backend: str = ""
    dp_size: int = 1


def generate_body(rid: str, request: EngineRequest, info: ServerInfo) -> dict[str, Any]:
    """Body of POST /generate."""
    delivered = len(request.token_ids) - request.num_prompt_tokens
    body: dict[str, Any] = {
        "rid": rid,
        "input_ids": request.token_ids.tolist(),
        "stream": True,
        # What shares no cache with us must not share KV there either; it comes back with the cache events.
        "cache_salt": request.cache_root.hex(),
        "sampling_params": _sampling_params(request.sampling, delivered),
    }
    if request.sampling.top_logprobs is not None:
        body |= {"return_logprob": True, "top_logprobs_num": request.sampling.top_logprobs}
    if info.enable_priority_scheduling:
        is_urgent = (request.priority is Priority.INTERACTIVE) != info.schedule_low_priority_values_first
        body["priority"] = int(is_urgent)
    if request.native is not None and request.work is not Work.WHOLE:
        host, port = split_address(request.native.address)
        body |= {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": request.native.room}
    return body


def _sampling_params(sampling: SamplingParams, delivered: int) -> dict[str, Any]:
    """Only what differs from SGLang's defaults, but for what differs between its defaults and ours."""
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_tokens - delivered,
        "ignore_eos": sampling.ignore_eos,
    }
    given = {
        "top_p": (sampling.top_p, 1.0),
        "min_p": (sampling.min_p, 0.0),
        "frequency_penalty": (sampling.frequency_penalty, 0.0),
        "presence_penalty": (sampling.presence_penalty, 0.0),
        "repetition_penalty": (sampling.repetition_penalty, 1.0),
        "top_k": (sampling.top_k, 0),
        "min_new_tokens": (max(0, sampling.min_tokens - delivered), 0),
    }
    params |= {name: value for name, (value, default) in given.items() if value != default}
    if sampling.stop_token_ids:
        params["stop_token_ids"] = sorted(sampling.stop_token_ids)
    if sampling.logit_bias:
        params["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    return params


class ChildClient:
    """One server. All calls raise ChildUnavailable if it cannot be reached."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url = base_url
        self.api_key = api_key
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """In the loop it is used in."""
        self._session = aiohttp.ClientSession(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {self.api_key}"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            read_bufsize=_LINE_BYTES,
        )

    async def close(self) -> None:
        """Break every connection. Idempotent."""
        if self._session is not None:
            await self._session.close()

    async def generate(self, body: dict[str, Any]) -> AsyncIterator[Piece]:
        """The pieces of an answer, the last with a finish_reason. Raises: ChildRefused."""
        try:
            async with self._http.post("/generate", data=msgspec.json.encode(body), headers=_JSON) as response:
                if response.status != 200:
                    raise ChildRefused(f"status {response.status}: {_error_text(await response.read())}")
                async for line in response.content:
                    if not line.startswith(_DATA):
                        continue
                    data = line[len(_DATA) :].strip()
                    if data == _DONE:
                        return
                    piece = _decoded(data, Piece)
                    if piece.error is not None:
                        raise ChildRefused(_error_text(data))
                    yield piece
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ChildUnavailable(f"{type(error).__name__}: {error}") from error

    async def abort(self, rid: str) -> None:
        """Ask it to end a request; one that it does not know, or not yet, is ignored there."""
        await self._ask("POST", "/abort_request", 5.0, {"rid": rid})

    async def is_healthy(self, timeout_s: float) -> bool:
        """Whether its scheduler and detokenizer answer; takes a second at least."""
        try:
            await self._ask("GET", "/health", timeout_s)
        except (ChildUnavailable, ChildRefused):
            return False
        return True

    async def loads(self, timeout_s: float = 5.0) -> list[Load]:
        """Load of each of its schedulers. Raises: ChildRefused."""
        return _decoded(await self._ask("GET", "/v1/loads", timeout_s), _Loads).loads

    async def server_info(self) -> ServerInfo:
        """Its settings. Raises: ChildRefused."""
        return _decoded(await self._ask("GET", "/server_info", 30.0), ServerInfo)

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise ChildUnavailable("the client is not open")
        return self._session

    async def _ask(self, method: str, path: str, timeout_s: float, body: dict[str, Any] | None = None) -> bytes:
        data = msgspec.json.encode(body) if body is not None else None
        limit = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._http.request(method, path, data=data, headers=_JSON, timeout=limit) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ChildUnavailable(f"{path}: {type(error).__name__}: {error}") from error
        if response.status != 200:
            raise ChildRefused(f"{path}: status {response.status}: {_error_text(answer)}")
        return answer


_JSON = {"Content-Type": "application/json"}


def _decoded(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ChildRefused(f"an answer of a form not known here (SGLang 0.5.23 is): {error}") from error


def _error_text(answer: bytes) -> str:
    """Its message, in whichever of its forms, shortened."""
    try:
        parsed = msgspec.json.decode(answer)
    except msgspec.DecodeError:
        return answer[:200].decode(errors="replace")
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:300]
