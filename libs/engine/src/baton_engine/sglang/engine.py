"""`Engine` over an SGLang server that it starts and owns. The server's life is the engine's: when it ends, so does the engine."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from baton_runtime.errors import InvalidArgument
from baton_runtime.layouts import NATIVE
from baton_runtime.log import get_logger
from baton_runtime.model_folder import ModelFolder, inspect_model_folder

from baton_engine.api import EndReason, EngineBeat, EngineInfo, EngineRequest, EngineStats, SequenceKey, StepOutput, Work
from baton_engine.blocks import BlockManager
from baton_engine.errors import EngineFailed, ReceiveFailed, SequenceTooLong
from baton_engine.paged_engine import check_request
from baton_engine.pool import ITEM_BYTES, BlockLayout, KvPool
from baton_engine.sglang import kv_events
from baton_engine.sglang.child import Child, SglangSettings
from baton_engine.sglang.http_api import ChildRefused, ChildUnavailable, ServerInfo, generate_body
from baton_engine.sglang.kv_events import CachedPrefixes
from baton_engine.sglang.pin_watch import PinWatch
from baton_engine.sglang.sequences import ChildSequence, ChildSequences

# An abort of a request that the server has not registered yet is lost: it is said again.
ABORT_AGAIN_S, ABORT_AGAIN_MAX_S = 0.25, 2.0
# The server is asked whether it is well so often, unless it has said something; it takes a second at least to answer.
HEALTH_S, HEALTH_TIMEOUT_S = 2.0, 10.0
# A sign is expected within the first; after the second the server is taken for dead.
SIGN_S, HANG_S = 4.0, 30.0
LOADS_S = 1.0
# Unexplained KV counts as stranded from then on, as elsewhere (docs/handoff.md, section 4).
STRANDED_S = 5.0
DEFAULT_MAX_RUNNING = 256

log = get_logger(__name__)


class SglangEngine:
    """A server over one model folder, in one of three modes: whole requests, prefill or decode of handed-over ones.

    Made, opened and closed on one event loop. info, pool, blocks and cache are there after open(): the server tells the sizes.
    pool has sizes and no memory, blocks is a mirror (`sequences`), cache the server's own prefix cache, child its process.
    """

    info: EngineInfo
    pool: KvPool
    blocks: BlockManager

    def __init__(self, settings: SglangSettings, folder: ModelFolder, clock: Callable[[], float] = time.monotonic) -> None:
        """folder: of settings.model. Raises: ConfigError naming sglang_command, sglang_args or block_tokens."""
        settings.check()
        self._settings = settings
        self._folder = folder
        self._clock = clock
        self.child = Child(settings)
        self._client = self.child.client()
        self.cache = CachedPrefixes(settings.hash_block_tokens)
        self._pins = PinWatch(settings.pinned_s)
        self._runs: dict[ChildSequence, asyncio.Task[None]] = {}
        self._arrivals: dict[ChildSequence, asyncio.Event] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._outputs_ready = asyncio.Event()
        self._heard_at = 0.0
        self._is_open = False
        self._is_over = False
        self._failure: EngineFailed | None = None

    @property
    def bootstrap_port(self) -> int:
        """Where decode servers meet this one; 0: this is no prefill server."""
        return self.child.bootstrap_port

    @property
    def handoff_name(self) -> str:
        """Names the way it hands KV over. Servers whose names differ must not be paired: SGLang promises nothing across versions."""
        return f"{NATIVE}sglang-{self.server.version}-{self.server.disaggregation_transfer_backend}-page{self.server.page_size}"

    async def open(self) -> None:
        """See Engine.open. Raises: EngineFailed."""
        await self._client.open()
        if self.child.events_port:  # before the server: it publishes without being asked, and never again
            self._spawn(self._follow_cache(self.child.events_port), "sglang cache events")
        try:
            await self._start_child()
        except EngineFailed as error:
            log.error("sglang_did_not_start", why=error.message)
            raise
        self._heard_at = self._clock()
        self._is_open = True
        self._spawn(self._watch_child(), "sglang process")
        self._spawn(self._watch_health(), "sglang health")
        self._spawn(self._watch_loads(), "sglang loads")

    async def close(self) -> None:
        """See Engine.close."""
        was_open, self._is_open = self._is_open, False
        for task in (*self._background, *self._runs.values()):
            task.cancel()
        if was_open:
            self._end_all(EndReason.CANCELLED, "engine closed")
        try:
            await self._client.close()
        finally:
            await self.child.end()

    def start(self, request: EngineRequest) -> None:
        """See Engine.start."""
        self._check(request)
        now = self._clock()
        if request.work is Work.DECODE_ONLY:
            self._sequences.take_over(request)
        elif request.work is Work.PREFILL_ONLY:
            if request.native is None:
                raise InvalidArgument("native", "is missing: this engine hands over by itself")
            self._post(self._sequences.add_prefill(request, _new_rid(request), now))
        else:
            self._sequences.add_waiting(request, _new_rid(request), now)
            self._admit()
        self._wake()

    async def receive(self, request: EngineRequest) -> None:
        """See NativeEngine.receive."""
        self._check(request)
        sequence = self._sequences.join(request, _new_rid(request), self._clock())
        arrived = self._arrivals[sequence] = asyncio.Event()
        self._post(sequence)
        try:
            await arrived.wait()
        except asyncio.CancelledError:
            sequence.is_cancelled = True
            # A task of its own: whoever cancels once more does not wait for the server, but the server ends it all the same.
            await asyncio.shield(self._spawn(self._abort_joined(sequence), "sglang abort"))
            raise
        finally:
            del self._arrivals[sequence]
        if sequence.failure:
            self._sequences.drop(sequence)
            raise ReceiveFailed(sequence.failure)

    def cancel(self, key: SequenceKey) -> None:
        """See Engine.cancel."""
        if not self._is_open:
            return
        sequence = self._sequences.cancel(key)
        if sequence is not None:
            self._spawn(self._abort(sequence), "sglang abort")
        self._wake()

    def pause(self, key: SequenceKey) -> None:
        """See Engine.pause. The server goes on; what it draws is kept here, at most max_tokens per sequence."""
        self._sequences.pause(key)

    def resume(self, key: SequenceKey) -> None:
        """See Engine.resume."""
        self._sequences.resume(key)
        self._wake()

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """See Engine.outputs. What the server's streams delivered in one turn of the loop is one step."""
        while True:
            if self._sequences.has_output:
                yield self._sequences.take_output()
            elif self._is_over:
                break
            else:
                await self._outputs_ready.wait()
                self._outputs_ready.clear()
        if self._failure is not None:
            raise EngineFailed("the engine died") from self._failure

    def beat(self) -> EngineBeat:
        """See Engine.beat. The server tells no steps; one that says nothing at all is taken for one in a long step."""
        silent_s = self._clock() - self._heard_at
        if silent_s < SIGN_S:
            return EngineBeat(self._sequences.step, 0.0, 0.0)
        return EngineBeat(self._sequences.step, silent_s, SIGN_S)

    def stats(self) -> EngineStats:
        """See Engine.stats."""
        return self._sequences.stats()

    def unexplained_bytes(self) -> int:
        """See NativeEngine.unexplained_bytes."""
        if self._pins.unexplained_s(self._clock()) < STRANDED_S:
            return 0
        pages = -(-self._pins.unexplained.num_tokens // self._settings.page_size)
        return pages * self.pool.block_bytes

    # Sequences.

    def _check(self, request: EngineRequest) -> None:
        if not self._is_open:
            raise EngineFailed("the engine is not open")
        check_request(request, self.info, self.pool.num_blocks * self._settings.page_size)
        if len(request.token_ids) > self.server.max_req_input_len:
            raise SequenceTooLong(len(request.token_ids), self.server.max_req_input_len)
        if request.sampling.min_tokens and self.server.skip_tokenizer_init:
            raise InvalidArgument("sampling.min_tokens", "needs sglang_tokenizer = true on the worker: SGLang masks by its tokenizer")

    def _admit(self) -> None:
        for sequence in self._sequences.take_postable(self._clock()):
            self._post(sequence)

    def _post(self, sequence: ChildSequence) -> None:
        task = asyncio.get_running_loop().create_task(self._run(sequence), name=f"sglang {sequence.key.request_id}")
        self._runs[sequence] = task
        task.add_done_callback(partial(self._run_is_over, sequence))

    def _run_is_over(self, sequence: ChildSequence, task: "asyncio.Task[None]") -> None:
        self._runs.pop(sequence, None)
        self._die_of(task)  # what an answer did to our books is not known then
        self._arrived(sequence)
        if self._is_open:
            self._admit()
        self._wake()

    async def _run(self, sequence: ChildSequence) -> None:
        """Ask for it and take in its answer. Whatever ends it, the sequence ends once."""
        why = "the answer broke off"
        try:
            async for piece in self._client.generate(generate_body(sequence.rid, sequence.request, self.server)):
                self._heard_at = self._clock()
                self._sequences.heard(sequence, piece, self._heard_at)
                self._arrived(sequence)
                self._wake()
        except (ChildUnavailable, ChildRefused) as error:
            why = str(error)
        finally:
            if not sequence.is_over:
                if not sequence.is_cancelled and self._is_open:
                    log.warning("sglang_request_failed", request_id=sequence.key.request_id, attempt=sequence.key.attempt, why=why)
                self._sequences.failed(sequence, why)

    def _arrived(self, sequence: ChildSequence) -> None:
        arrived = self._arrivals.get(sequence)
        if arrived is not None and (sequence.drawn or sequence.is_over):
            arrived.set()

    async def _abort(self, sequence: ChildSequence) -> None:
        """Returns when the server has ended it."""
        again_s = ABORT_AGAIN_S
        while (run := self._runs.get(sequence)) is not None:
            with suppress(ChildUnavailable, ChildRefused):
                await self._client.abort(sequence.rid)
            await asyncio.wait({run}, timeout=again_s)
            again_s = min(2 * again_s, ABORT_AGAIN_MAX_S)

    async def _abort_joined(self, sequence: ChildSequence) -> None:
        await self._abort(sequence)
        self._sequences.drop(sequence)

    def _wake(self) -> None:
        if self._sequences.has_output or self._is_over:
            self._outputs_ready.set()

    # The server.

    async def _start_child(self) -> None:
        await self.child.start(self._client)
        try:
            self.server = await self._client.server_info()
        except (ChildUnavailable, ChildRefused) as error:
            raise EngineFailed(f"SGLang does not tell its settings: {error}") from error
        self._set_sizes(self.server)
        for rank in range(1, self.server.dp_size if self.child.events_port else 1):  # data-parallel ranks publish apart
            self._spawn(self._follow_cache(self.child.events_port + rank), "sglang cache events")

    def _set_sizes(self, server: ServerInfo) -> None:
        if server.page_size != self._settings.page_size:
            # The router's hashes, the mirror and the other side of a handoff count in pages of this size.
            raise EngineFailed(f"SGLang changed the page size to {server.page_size}: set block_tokens to it, here and in its pairs")
        layout = _layout(self._folder, server)
        num_blocks = max(1, server.max_total_num_tokens * server.dp_size // server.page_size)
        # Not what its pool makes of it, which may differ between the two sides of a pair.
        limit = min(self._folder.max_model_tokens, server.context_length or self._folder.max_model_tokens)
        self.info = EngineInfo(limit, self._folder.vocab_size, self._folder.eos_token_ids, self._folder.fingerprint, "native")
        self.pool = KvPool.without_memory(num_blocks, layout)
        self.blocks = BlockManager(num_blocks)
        max_running = server.max_running_requests or DEFAULT_MAX_RUNNING
        self._sequences = ChildSequences(self.blocks, server.page_size, max_running, self._settings.max_waiting)
        self.blocks.subscribe_available(self._blocks_available)

    def _blocks_available(self) -> None:
        if self._is_open:
            asyncio.get_running_loop().call_soon(self._admit)

    async def _watch_child(self) -> None:
        self._die(f"SGLang ended with {await self.child.wait()}")

    async def _watch_health(self) -> None:
        while True:
            if self._clock() - self._heard_at >= HEALTH_S and await self._client.is_healthy(HEALTH_TIMEOUT_S):
                self._heard_at = self._clock()
            if self._clock() - self._heard_at > HANG_S:
                return self._die(f"SGLang has not answered for {HANG_S:g} s")
            await asyncio.sleep(HEALTH_S)

    async def _watch_loads(self) -> None:
        was_unexplained = False
        while True:
            await asyncio.sleep(LOADS_S)
            for orphan in self._sequences.orphans():
                self._give_up(orphan)
            explained_tokens, num_posted = self._sequences.explained_tokens(), self._sequences.num_posted
            try:
                loads = await self._client.loads()
            except (ChildUnavailable, ChildRefused) as error:
                log.warning("sglang_loads_unknown", why=str(error))
                continue
            now = self._clock()
            must_restart = self._pins.judge(loads, explained_tokens, num_posted, now)
            is_unexplained = self._pins.unexplained_s(now) >= STRANDED_S
            unexplained = self._pins.unexplained
            if is_unexplained and not was_unexplained:
                log.warning("sglang_kv_unexplained", num_tokens=unexplained.num_tokens, num_requests=unexplained.num_requests)
            was_unexplained = is_unexplained
            if must_restart:
                held = f"KV of {unexplained.num_tokens} tokens, {unexplained.num_requests} requests"
                return self._die(f"SGLang has held {held} for {self._settings.pinned_s:g} s that no sequence explains")

    def _give_up(self, orphan: ChildSequence) -> None:
        """The handoff ended between its first token and its last confirm: nobody will take it over."""
        if orphan.is_over:
            self._sequences.drop(orphan)
        elif not orphan.is_cancelled:
            orphan.is_cancelled = True
            self._spawn(self._abort_joined(orphan), "sglang abort")

    async def _follow_cache(self, port: int) -> None:
        await kv_events.follow(f"tcp://127.0.0.1:{port}", self.cache.apply, self.cache.clear)

    def _die(self, why: str) -> None:
        if not self._is_open:
            return
        log.error("sglang_failed", why=why, num_sequences=len(self._sequences.live))
        self._is_open = False
        self._failure = EngineFailed(why)
        self._end_all(EndReason.ENGINE_ERROR, why)

    def _end_all(self, reason: EndReason, message: str) -> None:
        self._is_over = True
        live = self._sequences.live
        self._sequences.end_all(reason, message)
        for sequence in live:
            self._arrived(sequence)
        self._outputs_ready.set()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background_is_over)
        return task

    def _background_is_over(self, task: "asyncio.Task[None]") -> None:
        self._background.discard(task)
        self._die_of(task)

    def _die_of(self, task: "asyncio.Task[None]") -> None:
        """Of a fault of ours: no task may end with an error."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("sglang_task_failed", task=task.get_name(), exc_info=error)
            self._die(f"{task.get_name()}: {type(error).__name__}")


def read_folder(settings: SglangSettings) -> ModelFolder:
    """What is in the model folder; SGLang runs more architectures than our own engine. Blocking. Raises: ModelFolderError."""
    return inspect_model_folder(settings.model, any_architecture=True)


def _layout(folder: ModelFolder, server: ServerInfo) -> BlockLayout:
    """Shape of one page as the books count it. auto: the KV has the model's type."""
    candidates = (server.kv_cache_dtype, server.dtype, folder.dtype, "bfloat16")
    dtype = next(name for name in candidates if name in ITEM_BYTES)
    return BlockLayout(folder.num_layers, server.page_size, folder.num_kv_heads, folder.head_dim, dtype)


def _new_rid(request: EngineRequest) -> str:
    """SGLang's scheduler aborts every request whose id begins with the one it is told: none may be the beginning of another."""
    return f"{secrets.token_hex(8)}-{request.key.request_id}:{request.key.attempt}"
