"""Prompts to token ids without stopping the event loop.

`Tokenizer.encode` holds the GIL, so a thread would not help; `encode_batch_fast` releases it. Short texts that come in one turn
of the loop are encoded together: in place if there is little of them (a hop to a thread costs 25 to 90 us), else in one job of a
small pool of threads. Longer ones are jobs of their own (measured: 8k tokens in place stall the loop 4 ms, in the pool 0.2 ms).
"""

import asyncio
import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType
from typing import NoReturn, TypeVar

from baton_runtime.errors import BatonError, Draining, Internal, QueueFull
from tokenizers import Tokenizer

from baton_frontend.segment_cache import MIN_SEGMENT_CHARS, Borders, SegmentCache

INLINE_LIMIT_CHARS = 1024
_T = TypeVar("_T")


class WorkPool:
    """A few threads with a bounded queue. Full: refuses at once."""

    def __init__(self, num_threads: int = 2, limit: int = 64) -> None:
        """limit: jobs under way and waiting together."""
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")
        self._limit = limit
        self._lock = threading.Lock()
        self._depth = 0

    async def run(self, job: Callable[[], _T]) -> _T:
        """Run in a thread. Cancelling the caller drops a job that waits; one that runs goes on and its result is lost.

        Raises: QueueFull; Draining once closed.
        """
        return await self.submit(job)

    def submit(self, job: Callable[[], _T]) -> "asyncio.Future[_T]":
        """As `run`, without waiting."""
        with self._lock:
            if self._depth >= self._limit:
                raise QueueFull(depth=self._depth, limit=self._limit, retry_after_ms=100)
            self._depth += 1
        try:
            future = self._executor.submit(job)
        except RuntimeError as error:  # closed
            self._left(None)
            raise Draining() from error
        future.add_done_callback(self._left)
        return asyncio.wrap_future(future)

    def _left(self, _: "Future[_T] | None") -> None:
        with self._lock:
            self._depth -= 1

    def stats(self) -> dict[str, int]:
        """Jobs under way and waiting, and their limit."""
        return {"depth": self._depth, "limit": self._limit}

    def close(self) -> None:
        """Drop what waits, do not wait for what runs. Idempotent."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "WorkPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class PromptTokenizer:
    """Encodes prompts of one model."""

    def __init__(self, tokenizer: Tokenizer, pool: WorkPool, borders: Borders | None = None, cache: SegmentCache | None = None) -> None:
        """tokenizer: truncation and padding stored with it are switched off: a prompt is never changed silently.

        borders: where prompts may be cut (`find_borders`); None: they are always encoded whole.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.pool = pool
        self._borders = borders
        self._gathered: list[_Gathered] = []
        self.cache = cache if cache is not None else SegmentCache()

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list["array[int]"]:
        """Token ids of each text. add_special_tokens: as the model's tokenizer does for plain text; False after a chat template.

        Raises: QueueFull.
        """
        if self._borders is not None and not add_special_tokens and len(texts) == 1 and len(texts[0]) > MIN_SEGMENT_CHARS:
            return [await self._encode_segments(texts[0], self._borders)]
        return await self._encode_whole(list(texts), add_special_tokens)

    async def _encode_segments(self, text: str, borders: Borders) -> "array[int]":
        """Encode only what is not cached, in one batch. pieces alternate: segment, border, segment, ..."""
        pieces = borders.pattern.split(text)
        known = {segment: self.cache.get(segment) for segment in pieces[::2] if segment}
        missing = [segment for segment, ids in known.items() if ids is None]
        fresh = dict(zip(missing, await self._encode_whole(missing, False), strict=True)) if missing else {}
        result = array("I")
        for index, piece in enumerate(pieces):
            if index % 2:
                result.append(borders.token_ids[piece])
            elif piece:
                ids = known[piece]
                result.extend(fresh[piece] if ids is None else ids)
        for segment, ids in fresh.items():
            self.cache.put(segment, ids)
        return result

    async def _encode_whole(self, texts: list[str], add_special_tokens: bool) -> list["array[int]"]:
        num_chars = sum(map(len, texts))
        if num_chars > INLINE_LIMIT_CHARS:
            return await self.pool.run(lambda: self._encode_now(texts, add_special_tokens))
        loop = asyncio.get_running_loop()
        if not self._gathered:
            loop.call_soon(self._encode_gathered)
        gathered = _Gathered(texts, num_chars, add_special_tokens, loop.create_future())
        self._gathered.append(gathered)
        return await gathered.token_ids

    def _encode_now(self, texts: list[str], add_special_tokens: bool) -> list["array[int]"]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [array("I", encoding.ids) for encoding in encodings]

    def _encode_gathered(self) -> None:
        """What came in this turn of the loop."""
        gathered, self._gathered = self._gathered, []
        if sum(one.num_chars for one in gathered) <= INLINE_LIMIT_CHARS:
            for one in gathered:
                _settle([one], partial(self._encode_now, one.texts, one.add_special_tokens))
            return
        for add_special_tokens in {one.add_special_tokens for one in gathered}:
            batch = [one for one in gathered if one.add_special_tokens is add_special_tokens]
            texts = [text for one in batch for text in one.texts]
            try:
                encoded = self.pool.submit(partial(self._encode_now, texts, add_special_tokens))
            except BatonError as error:
                _settle(batch, partial(_raise, error))
            else:
                encoded.add_done_callback(partial(self._settle_batch, batch))

    def _settle_batch(self, batch: Sequence["_Gathered"], encoded: "asyncio.Future[list[array[int]]]") -> None:
        if encoded.cancelled() or encoded.exception() is None:
            _settle(batch, encoded.result)
            return
        for one in batch:  # one text failed all: each for itself
            _settle([one], partial(self._encode_now, one.texts, one.add_special_tokens))


@dataclass(slots=True)
class _Gathered:
    """One call of `encode` that waits for the end of the loop's turn."""

    texts: list[str]
    num_chars: int
    add_special_tokens: bool
    token_ids: "asyncio.Future[list[array[int]]]"


def _settle(batch: Sequence[_Gathered], encode: "Callable[[], list[array[int]]]") -> None:
    """Give every caller of the batch its part, or the error."""
    try:
        encoded = iter(encode())
    except BaseException as error:  # a panic of the library is no Exception, and whoever waits must hear of it
        told = error if isinstance(error, Exception) else Draining() if isinstance(error, asyncio.CancelledError) else Internal("tokenizer")
        for one in batch:
            if not one.token_ids.done():
                one.token_ids.set_exception(told)
        return
    for one in batch:
        parts = list(islice(encoded, len(one.texts)))
        if not one.token_ids.done():  # its caller may have left
            one.token_ids.set_result(parts)


def _raise(error: BatonError) -> NoReturn:
    raise error
