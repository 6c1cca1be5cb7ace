"""Which of our sequences the server has, and what is to be reported of them. Plain and synchronous; the I/O is in `engine`.

    WHOLE          waits here until the mirror has room for it -> posted
    PREFILL_ONLY   posted by start; its table was made by the handoff
    DECODE_ONLY    posted by receive, when the source is about to hand over: joined; taken over by start once the source has confirmed

The block manager is a mirror: a sequence owns as many blocks as the server should need for it, so that admission, books and metrics
count what they count for our own engines. Their ids mean nothing.
"""

import enum
import heapq
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from baton_runtime.errors import InvalidArgument, QueueFull

from baton_engine.api import (
    BlocksReady,
    EndReason,
    EngineRequest,
    EngineStats,
    Priority,
    SequenceEnd,
    SequenceKey,
    StepOutput,
    TokenLogprobs,
    Work,
)
from baton_engine.blocks import BlockManager
from baton_engine.errors import CacheFull
from baton_engine.sglang.http_api import FinishReason, Piece

BATCH_AGEING_S = 10.0  # a batch sequence counts as younger by so much, as in the handoff
RETRY_AFTER_MS = 250
NO_LOGPROB = -9999.0  # SGLang gives none where it masked the token


class Phase(enum.Enum):
    """waiting: not posted. joined: posted, its outputs are kept back until start takes it over. running: posted, outputs go out."""

    WAITING = "waiting"
    JOINED = "joined"
    RUNNING = "running"


@dataclass(slots=True, eq=False)
class ChildSequence:
    """One sequence. position: of the next token the server draws; is_over: the server has ended it, or never had it."""

    request: EngineRequest
    rid: str
    phase: Phase
    posted_at: float = 0.0
    position: int = 0
    drawn: int = 0
    cached_tokens: int = 0
    num_blocks: int = 0
    last_token_at: float = 0.0
    is_paused: bool = False
    is_cancelled: bool = False
    is_over: bool = False
    failure: str = ""  # of a joined one that ended before its KV was here
    held_tokens: list[int] = field(default_factory=list)
    held_logprobs: list[TokenLogprobs] = field(default_factory=list)
    held_end: SequenceEnd | None = None

    @property
    def key(self) -> SequenceKey:
        """Whose it is."""
        return self.request.key

    @property
    def num_tokens(self) -> int:
        """Tokens given and drawn."""
        return len(self.request.token_ids) + self.drawn

    @property
    def held_position(self) -> int:
        """Output position of the first token kept back."""
        return self.position - len(self.held_tokens)


class ChildSequences:
    """All sequences that are not over, by key. Times in seconds of one monotonic clock, given as arguments."""

    def __init__(self, blocks: BlockManager, block_tokens: int, max_running: int, max_waiting: int) -> None:
        self._blocks = blocks
        self._block_tokens = block_tokens
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._by_key: dict[SequenceKey, ChildSequence] = {}
        self._waiting: list[tuple[float, int, ChildSequence]] = []
        self._num_added = 0
        self._num_decoding = 0
        self._kv_tokens = 0
        self._prefilled_at = 0.0
        self._output = StepOutput(step=0)
        self._gaps: list[float] = []
        self._has_output = False
        self._step = 0

    # What may be asked.

    @property
    def step(self) -> int:
        """Outputs so far."""
        return self._step

    @property
    def has_output(self) -> bool:
        """Whether `take_output` has something to give."""
        return self._has_output

    @property
    def live(self) -> list[ChildSequence]:
        """All of them."""
        return list(self._by_key.values())

    @property
    def num_posted(self) -> int:
        """Those the server has."""
        return len(self._by_key) - self._num_waiting

    def stats(self) -> EngineStats:
        """Sizes now."""
        untouched = [s for s in self._by_key.values() if s.drawn == 0 and s.request.work is not Work.DECODE_ONLY]
        return EngineStats(
            running_sequences=self.num_posted,
            waiting_sequences=self._num_waiting,
            waiting_prefill_tokens=sum(len(sequence.request.token_ids) for sequence in untouched),
            active_kv_tokens=self._kv_tokens,
        )

    def explained_tokens(self) -> int:
        """KV slots the server may hold for what it has, in whole pages: all tokens, and a page that is being filled."""
        pages = (-(-s.num_tokens // self._block_tokens) + 1 for s in self._by_key.values() if s.phase is not Phase.WAITING)
        return sum(pages) * self._block_tokens

    def orphans(self) -> list[ChildSequence]:
        """Joined ones whose KV came, and whose table the handoff has given up since: nobody will take them over."""
        return [s for s in self._by_key.values() if s.phase is Phase.JOINED and s.drawn and not self._blocks.has_table(s.key)]

    @property
    def _num_waiting(self) -> int:
        return len(self._waiting)

    # What is asked for.

    def add_waiting(self, request: EngineRequest, rid: str, now: float) -> None:
        """A WHOLE sequence. Raises: QueueFull."""
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(len(self._waiting), self._max_waiting, RETRY_AFTER_MS)
        sequence = self._add(request, rid, Phase.WAITING)
        ageing = BATCH_AGEING_S if request.priority is Priority.BATCH else 0.0
        heapq.heappush(self._waiting, (now + ageing, self._num_added, sequence))

    def take_postable(self, now: float) -> Iterator[ChildSequence]:
        """WHOLE sequences that have room now, oldest first; each has its table and is to be posted."""
        while self._waiting and self.num_posted < self._max_running:
            _, _, sequence = self._waiting[0]
            sequence.num_blocks = self._blocks_for(len(sequence.request.token_ids))
            try:
                self._blocks.acquire(sequence.key, (), sequence.num_blocks, keep_free=self._blocks.growth_headroom)
            except CacheFull:
                return
            heapq.heappop(self._waiting)
            sequence.phase = Phase.RUNNING
            self._posted(sequence, now)
            yield sequence

    def add_prefill(self, request: EngineRequest, rid: str, now: float) -> ChildSequence:
        """A PREFILL_ONLY sequence, to be posted. Its table is ours from now on."""
        sequence = self._add(request, rid, Phase.RUNNING)
        self._posted(sequence, now)
        return sequence

    def join(self, request: EngineRequest, rid: str, now: float) -> ChildSequence:
        """A DECODE_ONLY sequence, to be posted. Its table stays the handoff's."""
        sequence = self._add(request, rid, Phase.JOINED)
        sequence.posted_at = now
        return sequence

    def take_over(self, request: EngineRequest) -> None:
        """Every block of a joined sequence is confirmed: its table is ours, what it has drawn goes out. Raises: InvalidArgument."""
        sequence = self._by_key.get(request.key)
        if sequence is None or sequence.phase is not Phase.JOINED:
            raise InvalidArgument("key", "the engine did not receive this sequence")
        sequence.phase = Phase.RUNNING
        sequence.num_blocks = len(self._blocks.table(request.key))
        self._output.started.append(request.key)
        self._has_output = True
        if sequence.drawn and not sequence.is_over:
            self._num_decoding += 1
            self._kv_tokens += sequence.num_tokens
        self._give_out(sequence)

    def cancel(self, key: SequenceKey) -> ChildSequence | None:
        """It is to end. One that the server has is returned: abort it there; one that waits has ended."""
        sequence = self._by_key.get(key)
        if sequence is None or sequence.is_cancelled:
            return None
        sequence.is_cancelled = True
        if sequence.phase is Phase.WAITING:
            self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
            heapq.heapify(self._waiting)
            self._end(sequence, EndReason.CANCELLED)
        elif sequence.is_over:
            self._give_out(sequence)  # it was kept back: the end it has is the one
        else:
            return sequence
        return None

    def pause(self, key: SequenceKey) -> None:
        """Keep back what it draws. The server goes on drawing, at most max_tokens."""
        sequence = self._by_key.get(key)
        if sequence is not None:
            sequence.is_paused = True

    def resume(self, key: SequenceKey) -> None:
        """Give out what was kept back."""
        sequence = self._by_key.get(key)
        if sequence is not None and sequence.is_paused:
            sequence.is_paused = False
            self._give_out(sequence)

    def drop(self, sequence: ChildSequence) -> None:
        """Forget a joined sequence that the server has ended and nobody takes over."""
        if self._by_key.get(sequence.key) is sequence:
            del self._by_key[sequence.key]

    def end_all(self, reason: EndReason, message: str) -> None:
        """The server is gone: everything ends. What nobody took over is forgotten."""
        for sequence in self.live:
            sequence.is_over = True
            if sequence.phase is Phase.JOINED:
                sequence.failure = message
                self.drop(sequence)
            else:
                sequence.is_paused = False
                self._end(sequence, reason, message=message)
        self._waiting.clear()

    # What the server says.

    def heard(self, sequence: ChildSequence, piece: Piece, now: float) -> None:
        """A piece of its answer."""
        meta = piece.meta_info
        sequence.cached_tokens = max(sequence.cached_tokens, meta.cached_tokens)
        is_prefill, finish = sequence.request.work is Work.PREFILL_ONLY, meta.finish_reason
        if piece.output_ids and not is_prefill:
            self._drew(sequence, piece, now)
        if finish is not None and is_prefill and finish.type != "abort":
            self._handed_over(sequence, now)
        elif finish is not None:
            self._finished(sequence, finish)
        self._give_out(sequence)

    def failed(self, sequence: ChildSequence, message: str) -> None:
        """Its answer broke off, or was an error. One that was aborted may end in either way."""
        if not sequence.is_over:
            self._finished(sequence, FinishReason("abort", message=message))
            self._give_out(sequence)

    def take_output(self) -> StepOutput:
        """What has come since the last call, as one step."""
        output, self._output = self._output, StepOutput(step=0)
        self._has_output = False
        self._step += 1
        output.step = self._step
        if output.token_ids:
            output.decode_sequences = self._num_decoding or len(set(output.keys))
            output.kv_tokens = self._kv_tokens
            if self._gaps:
                output.duration_s = max(output.duration_s, statistics.median(self._gaps))
        self._gaps.clear()
        return output

    # Below: changes of one sequence.

    def _add(self, request: EngineRequest, rid: str, phase: Phase) -> ChildSequence:
        if request.key in self._by_key:
            raise InvalidArgument("key", "this attempt is in the engine already")
        position = len(request.token_ids) - request.num_prompt_tokens
        sequence = self._by_key[request.key] = ChildSequence(request, rid, phase, position=position)
        self._num_added += 1
        return sequence

    def _posted(self, sequence: ChildSequence, now: float) -> None:
        sequence.posted_at = now
        self._output.started.append(sequence.key)
        self._has_output = True

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _drew(self, sequence: ChildSequence, piece: Piece, now: float) -> None:
        count = len(piece.output_ids)
        is_ours = sequence.phase is Phase.RUNNING
        if sequence.drawn:
            self._gaps.append((now - sequence.last_token_at) / count)
        elif is_ours:  # a WHOLE sequence: its prompt is computed
            self._prompt_computed(sequence, now)
            self._num_decoding += 1
            self._kv_tokens += len(sequence.request.token_ids)
        sequence.last_token_at = now
        sequence.held_logprobs += _logprobs(sequence, piece)
        sequence.held_tokens += piece.output_ids
        sequence.drawn += count
        sequence.position += count
        if is_ours:
            self._kv_tokens += count
            self._grow(sequence)

    def _prompt_computed(self, sequence: ChildSequence, now: float) -> None:
        """The server tells no steps: a prompt took the time since it was posted, or since the one before it was done."""
        self._output.prefill_tokens += max(0, len(sequence.request.token_ids) - sequence.cached_tokens)
        self._output.duration_s += now - max(sequence.posted_at, self._prefilled_at)
        self._prefilled_at = now
        self._has_output = True

    def _grow(self, sequence: ChildSequence) -> None:
        needed = self._blocks_for(sequence.num_tokens)
        if needed > sequence.num_blocks:
            try:
                self._blocks.grow(sequence.key, needed - sequence.num_blocks)
            except CacheFull:
                return  # the server is the one who knows whether it has room; it makes some by itself
            sequence.num_blocks = needed

    def _handed_over(self, sequence: ChildSequence, now: float) -> None:
        """A prefill server answers when the other side has it all: one token, which is the other side's to say."""
        self._prompt_computed(sequence, now)
        first, key = sequence.request.first_announced_block, sequence.key
        block_ids = self._blocks.pin(key, first, len(self._blocks.table(key)) - first)
        self._output.ready.append(BlocksReady(key, first, block_ids, sequence.cached_tokens, now))
        sequence.is_over = True
        self._end(sequence, EndReason.PREFILLED)

    def _finished(self, sequence: ChildSequence, finish: FinishReason) -> None:
        sequence.is_over = True
        if sequence.drawn and sequence.phase is Phase.RUNNING:
            self._num_decoding -= 1
            self._kv_tokens -= sequence.num_tokens
        message, stop_token_id = "", None
        if finish.type == "stop":
            reason, stop_token_id = EndReason.STOP, finish.matched if isinstance(finish.matched, int) else None
        elif finish.type == "length":
            reason = EndReason.LENGTH
        elif sequence.is_cancelled:
            reason = EndReason.CANCELLED
        else:
            reason, message = EndReason.ENGINE_ERROR, finish.message or f"SGLang ended it with {finish.type}"
        if sequence.phase is Phase.JOINED and not sequence.drawn:
            sequence.failure = message or "aborted"
        sequence.held_end = SequenceEnd(sequence.key, reason, sequence.drawn, sequence.cached_tokens, stop_token_id, message)

    def _give_out(self, sequence: ChildSequence) -> None:
        """Everything kept back, unless it must be."""
        if sequence.phase is Phase.JOINED or (sequence.is_paused and not sequence.is_cancelled):
            return
        if sequence.held_tokens:
            count = len(sequence.held_tokens)
            self._output.keys += [sequence.key] * count
            self._output.positions += range(sequence.held_position, sequence.position)
            self._output.token_ids += sequence.held_tokens
            self._output.logprobs += sequence.held_logprobs
            sequence.held_tokens, sequence.held_logprobs = [], []
            self._has_output = True
        if sequence.held_end is not None:
            end, sequence.held_end = sequence.held_end, None
            self._report_end(sequence, end)

    def _end(self, sequence: ChildSequence, reason: EndReason, *, message: str = "") -> None:
        self._report_end(sequence, SequenceEnd(sequence.key, reason, sequence.drawn, sequence.cached_tokens, message=message))

    def _report_end(self, sequence: ChildSequence, end: SequenceEnd) -> None:
        self._by_key.pop(sequence.key, None)
        self._blocks.release(sequence.key)
        self._output.ends.append(end)
        self._has_output = True


def _logprobs(sequence: ChildSequence, piece: Piece) -> list[TokenLogprobs]:
    chosen, tops = piece.meta_info.output_token_logprobs, piece.meta_info.output_top_logprobs
    if sequence.request.sampling.top_logprobs is None:
        return []
    found = []
    for index, (logprob, _, _) in enumerate(chosen[: len(piece.output_ids)]):
        top = tops[index] if index < len(tops) else None
        ids = [token_id for _, token_id, _ in top or ()]
        values = [NO_LOGPROB if value is None else value for value, _, _ in top or ()]
        value = NO_LOGPROB if logprob is None else logprob
        found.append(TokenLogprobs(sequence.key, sequence.position + index, value, ids, values))
    return found
