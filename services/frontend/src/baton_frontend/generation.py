"""The seam between the HTTP side and the request side of the frontend.

The HTTP side turns one user call into one `Generation` per choice and submits each to a `Generator` with a `TokenSink`.
The request side places it, survives deaths of workers, and calls the sink. Neither imports the other.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from baton_runtime.errors import BatonError
from opentelemetry.context import Context

from baton_frontend.latency_budget import LatencyBudget

EndReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model that can be asked for now; from the instance records of its workers."""

    served_name: str
    path: str  # folder with config and tokenizer
    max_model_tokens: int  # prompt and output together
    vocab_size: int
    fingerprint: str
    hash_block_tokens: int


@dataclass(slots=True)
class Crashes:
    """Workers that died while they ran a choice of one prompt: its choices share it, for it may be the prompt that kills."""

    incarnations: tuple[str, ...] = ()

    def note(self, incarnation: str, pair: Sequence[str]) -> None:
        """A worker died under an attempt of this pair. Both of a pair, as when their machine dies, are one."""
        if not any(other in self.incarnations for other in pair):
            self.incarnations += (incarnation,)


@dataclass(frozen=True, slots=True)
class Generation:
    """One choice of one user call, validated and tokenized, ready to be placed. Ranges as in baton.worker.v1.Sampling."""

    model: str  # served name
    prompt_token_ids: "array[int]"  # typecode "I", at least one; shared by the choices of a call: never changed
    max_tokens: int  # output tokens in all, at least 1; prompt + max_tokens fits max_model_tokens
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None  # None: drawn at admission. In [0, 2**64)
    choice: int = 0  # index within the user call
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    end_token_ids: frozenset[int] = frozenset()  # whatever ends the output: those above, and the model's own unless ignore_eos
    top_logprobs: int | None = None  # None: no logprobs
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    interactive: bool = True  # False: batch class
    deadline_s: float | None = None  # time left from submit on; None: the frontend's default
    wants_latency_budget: bool = False  # in its end
    operation: Literal["chat", "text_completion"] = "chat"  # gen_ai.operation.name, for spans and logs
    crashes: Crashes = field(default_factory=Crashes, compare=False)  # of all choices of the prompt; the generator's to fill

    @property
    def num_tokens(self) -> int:
        """Prompt and output together, at most."""
        return len(self.prompt_token_ids) + self.max_tokens


class TokenLogprob(NamedTuple):
    """Log probabilities of one drawn token: natural logarithm, before temperature."""

    logprob: float
    top_token_ids: Sequence[int]  # most likely first
    top_logprobs: Sequence[float]  # same length


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """The one end of a generation."""

    reason: EndReason
    error: BatonError | None = None  # set with "failed"
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose KV nobody had to compute
    output_tokens: int = 0  # delivered to the sink
    resumed: int = 0  # times the generation was placed again after its first token or start
    stop_token_id: int | None = None  # set with "stop" if a token ended it
    exposed_handoff_s: float = 0.0  # what handoffs added to the time to the first token, in all attempts
    latency_budget: LatencyBudget | None = None  # where the generation asked for it


class TokenSink(Protocol):
    """Where tokens go: implemented at the HTTP edge.

    Called synchronously on the event loop, in order, every position exactly once; does not block and does not raise.
    Never called from inside `Generator.submit`. A call may itself call `GenerationHandle.cancel`, of this generation or
    of another one, and on_end may come from inside that cancel.
    """

    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """The next tokens, one or more. logprobs has the same length if the generation asked for them, else None.

        A stop or end-of-sequence token may come as the last token; the sink does not show its text.
        """

    def on_end(self, end: GenerationEnd) -> None:
        """Exactly once, after the last on_tokens."""


class GenerationHandle(Protocol):
    """One generation under way."""

    @property
    def request_id(self) -> str:
        """ "<frontend incarnation>-<number>"."""

    def cancel(self) -> None:
        """End it: the client left, or a stop string matched at the edge. Idempotent, harmless after the end.

        No on_tokens follows. on_end("cancelled") follows, from inside this call or later; at the latest after a bound
        of the generator's (a silent worker does not hold it back), with the usage known by then.
        """


class Generator(Protocol):
    """Runs generations; implemented by the request side (and by `baton_frontend.testing.FakeGenerator`)."""

    def submit(self, generation: Generation, sink: TokenSink, trace_context: Context | None) -> GenerationHandle:
        """Take over a generation; its end will reach the sink exactly once.

        Raises: BatonError (AdmissionFull, Draining, Unavailable, ...): refused at once, the sink is never called.
        """

    def model(self, served_name: str) -> ModelInfo | None:
        """One of `models`; None if no live worker serves it."""

    def models(self) -> list[ModelInfo]:
        """Models some live worker serves now; one entry per served name."""
