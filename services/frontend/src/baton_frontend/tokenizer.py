"""Prompts to token ids without stopping the event loop.

`Tokenizer.encode` holds the GIL, so a thread would not help; `encode_batch_fast` releases it. Short texts are encoded in
place (a hop to a thread costs 25 to 90 us), longer ones in a small pool of threads (measured: 8k tokens in place stall
the loop 4 ms, in the pool 0.2 ms).
"""

import asyncio
import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from baton_runtime.errors import Draining, QueueFull
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
        return await asyncio.wrap_future(future)

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
        def encode() -> list["array[int]"]:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [array("I", encoding.ids) for encoding in encodings]

        if sum(map(len, texts)) <= INLINE_LIMIT_CHARS:
            return encode()
        return await self.pool.run(encode)
