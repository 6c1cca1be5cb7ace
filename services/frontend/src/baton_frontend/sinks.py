"""Where the tokens of a call go: into a stream of events, or into one response at the end.

A `Call` holds the choices of one user call. Its sinks are called on the event loop by the generator; the HTTP handler
only waits for the call to end or for a slow reader.
"""

import abc
import asyncio
import time
from collections.abc import Callable, Sequence

from opentelemetry.context import Context

from baton_frontend.choice_text import ChoiceText
from baton_frontend.event_writer import EventWriter
from baton_frontend.generation import Generation, GenerationEnd, GenerationHandle, Generator, TokenLogprob
from baton_frontend.openai_errors import ApiError, from_baton_error
from baton_frontend.openai_format import DONE, ResponseFormat, TokenNames, Usage, error_event
from baton_frontend.token_text import TokenText, escape

_RICH_TOKEN_BYTES = 100  # roughly what a held token id or log probability takes on the wire


class Choice(abc.ABC):
    """One choice: its text so far and its end. Base of the two sinks."""

    __slots__ = ("call", "end", "generation", "handle", "text")

    def __init__(self, call: "Call", generation: Generation, text: ChoiceText) -> None:
        self.call = call
        self.generation = generation
        self.text = text
        self.handle: GenerationHandle | None = None  # from Call.submit until the end: it refers back to us
        self.end: GenerationEnd | None = None

    @abc.abstractmethod
    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """As in TokenSink."""

    @abc.abstractmethod
    def on_end(self, end: GenerationEnd) -> None:
        """As in TokenSink."""

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's finish_reason; None while it runs and if it did not finish."""
        if self.text.matched is not None:
            return "stop"
        return self.end.reason if self.end is not None and self.end.reason in ("stop", "length") else None

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or stop token asked for by the caller that ended the choice."""
        if self.text.matched is not None or self.end is None:
            return self.text.matched
        return self.end.stop_token_id if self.end.stop_token_id in self.generation.stop_token_ids else None

    def cancel(self) -> None:
        """End the generation. Idempotent."""
        if self.handle is not None:
            self.handle.cancel()

    def failure(self) -> ApiError | None:
        """Why the choice did not finish, if it did not."""
        if self.finish_reason is not None or self.end is None:
            return None
        if self.end.error is not None:
            return from_baton_error(self.end.error)
        return ApiError(503, "the server ended this request before it was finished; send it again", code="cancelled", retry_after_ms=1000)


class Call:
    """The choices of one user call."""

    __slots__ = ("_is_over", "_num_open", "_wake", "choices", "failure", "first_token_at", "on_ended", "response_id")

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self.failure: ApiError | None = None
        self.first_token_at: float | None = None  # time.monotonic()
        self.response_id = ""  # request id of the first choice
        self._num_open = 0
        self._is_over = False
        self.on_ended: Callable[[], None] | None = None  # called once, when the last choice has ended
        self._wake: asyncio.Future[None] | None = None

    def submit(self, generator: Generator, choices: Sequence["Choice"], trace_context: Context | None) -> None:
        """Start all choices, or none.

        Raises: BatonError; choices already started are cancelled then.
        """
        is_started = False
        try:
            for choice in choices:
                choice.handle = generator.submit(choice.generation, choice, trace_context)
                self.choices.append(choice)
                self._num_open += 1
            is_started = True
        finally:
            if not is_started:
                self.cancel()
        first = choices[0].handle
        assert first is not None
        self.response_id = first.request_id

    @property
    def is_over(self) -> bool:
        """All choices have ended."""
        return self._is_over

    def note_token(self) -> None:
        """Called by sinks at the first token of each choice."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()

    def note_end(self, choice: Choice) -> None:
        """Called by sinks, once per choice. The first choice that failed takes the others with it."""
        self._num_open -= 1
        failure = choice.failure()
        if failure is not None and self.failure is None:
            self.failure = failure
            self.cancel()
        if self._num_open == 0 and not self._is_over:
            self._is_over = True
            if self.on_ended is not None:
                self.on_ended()
            self.wake()

    def forget(self) -> None:
        """The answer is written, or nobody wants it: let go of choices and writer. A call and what it holds refer to each other, and the
        collector of such rings runs seldom here (`tune_gc`): thousands of answered calls would be kept until then.
        """
        self.choices.clear()
        self.on_ended = None

    def cancel(self) -> None:
        """End what runs. Idempotent."""
        for choice in self.choices:
            if choice.end is None:
                choice.cancel()

    def wake(self) -> None:
        """Let the handler look again."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def changed(self, is_due: Callable[[], bool]) -> None:
        """Wait until is_due; it is looked at after each wake."""
        while not is_due():
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    def usage(self) -> Usage:
        """Tokens of all choices. A prompt shared by several choices counts once, and as cached what none of them had to compute."""
        if len(self.choices) == 1:
            (only,) = self.choices
            cached = only.end.cached_tokens if only.end is not None else 0
            return Usage(len(only.generation.prompt_token_ids), only.text.num_tokens, cached)
        prompts: dict[int, tuple[int, int]] = {}
        for choice in self.choices:
            prompt = choice.generation.prompt_token_ids
            cached = choice.end.cached_tokens if choice.end is not None else 0
            prompts[id(prompt)] = (len(prompt), min(cached, prompts.get(id(prompt), (0, cached))[1]))
        completion = sum(choice.text.num_tokens for choice in self.choices)
        return Usage(sum(size for size, _ in prompts.values()), completion, sum(cached for _, cached in prompts.values()))

    def resumed(self) -> int:
        """Resumes of all choices together."""
        return sum(choice.end.resumed for choice in self.choices if choice.end is not None)


class CollectingSink(Choice):
    """Keeps a choice until its end."""

    __slots__ = ("_shown", "_token_ids")

    def __init__(self, call: Call, generation: Generation, text: ChoiceText) -> None:
        super().__init__(call, generation, text)
        self._token_ids: list[int] = []
        self._shown: list[str] = []

    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """Keep ids; make text only where a stop string may end it."""
        self.call.note_token()
        if self.text.is_plain:
            self._token_ids.extend(token_ids)
        elif self.text.matched is None:
            self._shown.append(self.text.push(token_ids, logprobs))
            if self.text.matched is not None:
                self.cancel()

    def on_end(self, end: GenerationEnd) -> None:
        """Make the rest of the text."""
        self.end, self.handle = end, None
        if self._token_ids:
            self._shown.append(self.text.push(self._token_ids, None))
        self._shown.append(self.text.finish())
        self.call.note_end(self)

    def as_json(self, index: int, form: ResponseFormat, names: TokenNames) -> str:
        """JSON of the finished choice."""
        logprobs, token_ids = self.text.take_extras()
        extra = form.budget(self.end.latency_budget if self.end is not None else None)
        if token_ids is not None:
            extra["token_ids"] = token_ids
            if form.endpoint == "completion":
                extra["prompt_token_ids"] = self.generation.prompt_token_ids.tolist()
        columns = "null" if logprobs is None else logprobs.as_json(form.endpoint, names)
        return form.choice(index, "".join(self._shown), self.finish_reason or "", self.stop_reason, extra, columns)


class StreamSink(Choice):
    """Writes a choice as events while it grows: one event per call of on_tokens, one write per event."""

    __slots__ = ("_escaped", "_form", "_has_begun", "_held", "_index", "_names", "_prefix", "_suffix", "_writer")

    def __init__(self, call: Call, generation: Generation, text: ChoiceText, index: int, tokens: TokenText, names: TokenNames) -> None:
        """index: of the choice within the response. Call `bind` before the first token."""
        super().__init__(call, generation, text)
        self._index = index
        self._names = names
        self._escaped = tokens.escaped
        self._held: list[bytes] = []
        self._has_begun = False

    def bind(self, writer: EventWriter, form: ResponseFormat) -> None:
        """Set where and in which form to write; known once the request has its id."""
        self._writer = writer
        self._form = form
        self._prefix = form.prefix(self._index)
        self._suffix = form.suffix()

    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """Write their text. The hot path: a table lookup, a join, a write."""
        if not self._has_begun:
            self._begin()
        text = self.text
        if not text.is_plain:
            self._push_rich(token_ids, logprobs)
            return
        text.num_tokens += len(token_ids)
        ready = self._lookup(token_ids) if text.stream.ready else None
        if ready is None:
            ready = escape(text.stream.push(token_ids))
        if ready:
            if self._writer.is_slow:
                self._hold(ready)
            else:
                self._writer.send_text(self._prefix, ready, self._suffix)
        else:
            self._writer.flush()

    def _lookup(self, token_ids: Sequence[int]) -> bytes | None:
        """Escaped text of whole tokens; None if the slow way is needed."""
        escaped = self._escaped
        try:
            if len(token_ids) == 1:
                return escaped[token_ids[0]]
            pieces = [escaped[token_id] for token_id in token_ids]
        except IndexError:
            return None
        return None if None in pieces else b"".join(pieces)  # type: ignore[arg-type]

    def on_end(self, end: GenerationEnd) -> None:
        """Write the last text and the finish reason; the call writes what comes after the last choice."""
        self.end, self.handle = end, None
        finish_reason = self.finish_reason
        if finish_reason is not None:
            if not self._has_begun:
                self._begin()
            self._emit(escape(self.text.finish()), is_last=True)
            self._writer.queue(self._form.finish_event(self._index, finish_reason, self.stop_reason, end.resumed, end.latency_budget))
        self.call.note_end(self)
        if not self.call.is_over and finish_reason is not None:
            self._writer.flush()

    def flush(self) -> None:
        """Write what was held while the reader was slow, as one event."""
        if self._held:
            self._emit(b"", is_last=False)

    def _begin(self) -> None:
        self._has_begun = True
        self.call.note_token()
        ids = self.generation.prompt_token_ids.tolist() if self.text.token_ids is not None else None
        self._writer.queue(self._form.first_event(self._index, ids))

    def _push_rich(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """Stop strings, logprobs and token ids."""
        if self.text.matched is not None:
            return
        shown = escape(self.text.push(token_ids, logprobs))
        if self._writer.is_slow:
            self._hold(shown, len(token_ids) * _RICH_TOKEN_BYTES * (1 + (self.generation.top_logprobs or 0)))
        else:
            self._emit(shown, is_last=False)
        if self.text.matched is not None:
            self.cancel()

    def _hold(self, text: bytes, other_bytes: int = 0) -> None:
        self._held.append(text)
        self._writer.hold(len(text) + other_bytes)

    def _emit(self, text: bytes, is_last: bool) -> None:
        """Write an event with everything that is pending; none if nothing is. The last one leaves with the finish event."""
        if self._held:
            text = b"".join((*self._held, text))
            self._held.clear()
        logprobs, token_ids = self.text.take_extras()
        if not (text or token_ids or (logprobs is not None and logprobs.entries)):
            if not is_last:
                self._writer.flush()
            return
        suffix = self._suffix
        if logprobs is not None or token_ids is not None:
            suffix = self._form.suffix("null" if logprobs is None else logprobs.as_json(self._form.endpoint, self._names), token_ids)
        if is_last:
            self._writer.queue(b"".join((self._prefix, text, suffix)))
        else:
            self._writer.send_text(self._prefix, text, suffix)


def finish_stream(call: Call, writer: EventWriter, form: ResponseFormat) -> None:
    """Write what comes after the last choice. Before the first event a failure is left to the handler: it can still be a status."""
    if call.failure is not None:
        if not writer.started:
            return
        writer.queue(error_event(call.failure.body()))
    elif form.has_usage:
        writer.queue(form.usage_event(call.usage()))
    writer.queue(DONE)
    writer.finish()
