"""Stand-ins for tests and benchmarks of the HTTP side; no workers, no network."""

import asyncio
import itertools
from collections.abc import Callable, Sequence

from baton_runtime.errors import BatonError
from opentelemetry.context import Context

from baton_frontend.generation import EndReason, Generation, GenerationEnd, ModelInfo, TokenLogprob, TokenSink


def echo_prompt(generation: Generation) -> Sequence[int]:
    """The default text of a FakeGenerator: the prompt over and over, up to max_tokens."""
    return list(itertools.islice(itertools.cycle(generation.prompt_token_ids), generation.max_tokens))


class FakeGeneration:
    """One generation of a FakeGenerator. Without `is_manual` it runs by itself, otherwise the test pushes and ends."""

    def __init__(self, number: int, generation: Generation, sink: TokenSink, trace_context: Context | None) -> None:
        self.generation = generation
        self.trace_context = trace_context
        self.num_delivered = 0
        self.is_cancelled = False
        self.is_over = False
        self.ends_on_cancel = True  # False: the test calls end("cancelled") later
        self._sink = sink
        self._request_id = f"00c0ffee00c0ffee-{number}"

    @property
    def request_id(self) -> str:
        """As a real one looks."""
        return self._request_id

    def cancel(self) -> None:
        """Idempotent."""
        if self.is_over or self.is_cancelled:
            return
        self.is_cancelled = True
        if self.ends_on_cancel:
            self.end("cancelled")

    def push(self, *token_ids: int) -> None:
        """Deliver tokens in one call; dropped after a cancel, as the contract says."""
        if self.is_over or self.is_cancelled:
            return
        self.num_delivered += len(token_ids)
        self._sink.on_tokens(token_ids, self._logprobs(token_ids))

    def end(
        self,
        reason: EndReason,
        *,
        error: BatonError | None = None,
        cached_tokens: int = 0,
        resumed: int = 0,
        stop_token_id: int | None = None,
    ) -> None:
        """Deliver the end; only the first counts."""
        if self.is_over:
            return
        self.is_over = True
        prompt_tokens = len(self.generation.prompt_token_ids)
        self._sink.on_end(GenerationEnd(reason, error, prompt_tokens, cached_tokens, self.num_delivered, resumed, stop_token_id))

    def _logprobs(self, token_ids: Sequence[int]) -> list[TokenLogprob] | None:
        """Of the token -0.5, of the k-th alternative (ids 0, 1, ...) -(k + 1)."""
        num_top = self.generation.top_logprobs
        if num_top is None:
            return None
        return [TokenLogprob(-0.5, list(range(num_top)), [-1.0 - k for k in range(num_top)]) for _ in token_ids]


class FakeGenerator:
    """A Generator that writes what `tokens_of` says, `tokens_per_step` tokens in each turn of the loop."""

    def __init__(
        self,
        models: Sequence[ModelInfo],
        tokens_of: Callable[[Generation], Sequence[int]] = echo_prompt,
        *,
        tokens_per_step: int = 1,
        is_manual: bool = False,
    ) -> None:
        self.started: list[FakeGeneration] = []  # all, in order
        self.refusal: BatonError | None = None  # raised by submit while set
        self.refuse_from = 0  # submits before this number are taken in spite of it
        self._models = list(models)
        self._tokens_of = tokens_of
        self._tokens_per_step = tokens_per_step
        self._is_manual = is_manual

    def model(self, served_name: str) -> ModelInfo | None:
        """As given."""
        return next((info for info in self._models if info.served_name == served_name), None)

    def models(self) -> list[ModelInfo]:
        """As given."""
        return list(self._models)

    def submit(self, generation: Generation, sink: TokenSink, trace_context: Context | None) -> FakeGeneration:
        """As in Generator."""
        if self.refusal is not None and len(self.started) >= self.refuse_from:
            raise self.refusal
        started = FakeGeneration(len(self.started) + 1, generation, sink, trace_context)
        self.started.append(started)
        if not self._is_manual:
            tokens = list(self._tokens_of(generation))[: generation.max_tokens]
            asyncio.get_running_loop().call_soon(self._step, started, tokens)
        return started

    @property
    def live(self) -> list[FakeGeneration]:
        """Not over yet."""
        return [started for started in self.started if not started.is_over]

    def _step(self, started: FakeGeneration, tokens: list[int]) -> None:
        started.push(*tokens[: self._tokens_per_step])
        rest = tokens[self._tokens_per_step :]
        if started.is_cancelled:
            return
        if rest:
            asyncio.get_running_loop().call_soon(self._step, started, rest)
        else:
            started.end("length" if started.num_delivered >= started.generation.max_tokens else "stop")
