"""Settings of the frontend: BATON_FRONTEND_* and the table [frontend]."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
from baton_runtime.config import CommonConfig

_Seconds = Annotated[float, msgspec.Meta(gt=0.0, le=3600.0)]


@dataclass(frozen=True)
class FrontendConfig(CommonConfig):
    """What the frontend can be told beside the common settings. Its gRPC server (`listen`) is for operators: health and drain.

    http_listen: host:port of the OpenAI-compatible server; port 0: any free one.
    http_reuse_port: several frontends share the port; the kernel spreads connections.
    max_inflight: generations at a time; more are refused with 429.
    max_inflight_tokens: prompt and max_tokens of these generations, added up; more are refused with 429. 4 bytes each are held.
    max_held_bytes: bodies of calls that are not tokenized yet, and text held for slow readers; more bodies are refused with 429.
    retry_after_ms: advice given with such a refusal.
    max_body_bytes: longest HTTP request body; longer ones are refused with 413.
    max_header_bytes: longest request line, and longest header, of an HTTP request; longer ones are refused with 431.
    head_timeout_s: from a connection's opening, or the first byte of a later request on it, to the end of the request's head.
    idle_timeout_s: how long a connection is kept without a request.
    body_timeout_s: from the head of an HTTP request to the end of its body.
    max_generations: choices of one call (prompts times n).
    slow_reader_limit_bytes: text held for a client that does not read; beyond it is cut off.
    slow_reader_timeout_s: how long a client may read nothing at all.
    tokenizer_threads: threads for tokenizing long prompts.
    model_load_timeout_s: for reading a model's tokenizer and template.
    resumes_per_tick: failed attempts that are placed again per 50 ms, before new work.
    max_attempts: placements of one request that may fail.
    new_patience_s: how long a request that never ran keeps asking while it is refused.
    resume_patience_s: how long one that did keeps asking.
    trace_slow_ttft_s: a request that took longer to its first token (or to its end without one) is traced though not sampled.
    trace_slow_tpot_s: the same for its time per output token.
    trace_late_per_s: so many traces are kept afterwards per second (errors, resumed, slow); 0: none.
    default_deadline_s: from admission to the end of a request that does not give `baton.deadline_s`; its stream then ends with an error.
    route_limit_s: how long a question to a router may stay unanswered.
    """

    http_listen: str = "127.0.0.1:8000"
    http_reuse_port: bool = False
    max_inflight: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 4096
    max_inflight_tokens: Annotated[int, msgspec.Meta(ge=1)] = 256 << 20
    max_held_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 512 << 20
    retry_after_ms: Annotated[int, msgspec.Meta(ge=1, le=3_600_000)] = 1000
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024, le=64 << 20)] = 8 << 20
    max_header_bytes: Annotated[int, msgspec.Meta(ge=256, le=1 << 20)] = 8190
    head_timeout_s: _Seconds = 10.0
    idle_timeout_s: _Seconds = 75.0
    body_timeout_s: _Seconds = 30.0
    max_generations: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    slow_reader_limit_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 1 << 20
    slow_reader_timeout_s: _Seconds = 30.0
    tokenizer_threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    model_load_timeout_s: _Seconds = 60.0
    resumes_per_tick: Annotated[int, msgspec.Meta(ge=1)] = 32
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] = 8
    new_patience_s: _Seconds = 2.0
    resume_patience_s: _Seconds = 30.0
    trace_slow_ttft_s: _Seconds = 5.0
    trace_slow_tpot_s: _Seconds = 0.25
    trace_late_per_s: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 50
    default_deadline_s: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)] = 600.0
    route_limit_s: _Seconds = 600.0

    def __post_init__(self) -> None:
        """Raises: ValueError if two settings cannot both be kept."""
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_held_bytes {self.max_held_bytes} is below max_body_bytes {self.max_body_bytes}: raise it to at least that"
            )
