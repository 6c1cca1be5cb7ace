"""The text of one choice: token text, tokens that end it, stop strings, and what was asked for per token."""

from collections.abc import Sequence

from baton_frontend.generation import TokenLogprob
from baton_frontend.openai_format import LogprobColumns
from baton_frontend.stop_strings import StopMatcher
from baton_frontend.token_text import TextStream


class ChoiceText:
    """Takes tokens, gives text that can be shown. The result does not depend on how the tokens were cut into calls."""

    __slots__ = ("_matcher", "_min_tokens", "_num_chars", "_silent", "columns", "is_plain", "num_tokens", "stream", "token_ids")

    def __init__(
        self,
        stream: TextStream,
        *,
        stops: Sequence[str] = (),
        silent_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        wants_logprobs: bool = False,
        wants_token_ids: bool = False,
    ) -> None:
        """silent_token_ids: tokens that end the output from position min_tokens on; their text is not shown.

        Stop strings begin to count at position min_tokens as well.
        """
        self.stream = stream
        self.num_tokens = 0
        self.columns = LogprobColumns() if wants_logprobs else None
        self.token_ids: list[int] | None = [] if wants_token_ids else None
        self.is_plain = not (stops or silent_token_ids or wants_logprobs or wants_token_ids)
        self._matcher = StopMatcher(stops) if stops else None
        self._silent = silent_token_ids
        self._min_tokens = min_tokens
        self._num_chars = 0

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return None if self._matcher is None else self._matcher.matched

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> str:
        """Text to show now. Once a stop string matched, tokens are ignored and not counted."""
        if self.is_plain:
            self.num_tokens += len(token_ids)
            return self.stream.push(token_ids)
        shown = []
        for index, token_id in enumerate(token_ids):
            if self.matched is not None:
                break
            shown.append(self._push_one(token_id, None if logprobs is None else logprobs[index]))
        return "".join(shown)

    def _push_one(self, token_id: int, logprob: TokenLogprob | None) -> str:
        if self.token_ids is not None:
            self.token_ids.append(token_id)
        if self.columns is not None and logprob is not None:
            self.columns.token_ids.append(token_id)
            self.columns.entries.append(logprob)
            self.columns.text_offsets.append(self._num_chars)
        counts = self.num_tokens >= self._min_tokens
        self.num_tokens += 1
        text = "" if counts and token_id in self._silent else self.stream.push((token_id,))
        self._num_chars += len(text)
        return self._matcher.push(text) if self._matcher is not None and counts else text

    def finish(self) -> str:
        """The last of the text."""
        text = self.stream.finish()
        return text if self._matcher is None else self._matcher.push(text) + self._matcher.finish()

    def take_extras(self) -> tuple[LogprobColumns | None, list[int] | None]:
        """Logprobs and token ids since the last call; None for what was not asked for."""
        extras = self.columns, self.token_ids
        if self.columns is not None:
            self.columns = LogprobColumns()
        if self.token_ids is not None:
            self.token_ids = []
        return extras
