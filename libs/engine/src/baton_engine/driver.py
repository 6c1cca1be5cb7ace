"""The asynchronous engine over a step engine: one thread that steps, and an event loop that talks to it.

The thread sleeps on a condition while there is nothing to do; commands, and blocks that became available, wake it. What it
produces crosses to the loop in batches. Every accepted start gets exactly one SequenceEnd: from the step engine, or from here
when that is gone, whichever way it went.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial

from baton_runtime.errors import BatonError, InvalidArgument, QueueFull
from baton_runtime.log import get_logger

from baton_engine.api import EndReason, EngineBeat, EngineRequest, EngineStats, SequenceEnd, SequenceKey, StepEngine, StepOutput, Work
from baton_engine.errors import EngineFailed
from baton_engine.paged_engine import check_request

_RETRY_AFTER_MS = (50, 5000)  # least and most that is advised
_RATE_WEIGHT = 0.1  # of the newest step in the moving mean of seconds per prompt token

log = get_logger(__name__)


class DrivenEngine:
    """Engine over a StepEngine. Made and used on one event loop; the step engine belongs to the thread from open() on.

    Full queues: start refuses beyond max_waiting WHOLE sequences that have not run yet; the thread waits when
    max_pending_outputs step outputs are not taken (the consumer lives in this process: then the process is in trouble, and
    memory stays bounded).
    """

    def __init__(
        self,
        engine: StepEngine,
        *,
        max_waiting: int = 64,
        max_pending_outputs: int = 1024,
        close_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = engine.info
        self.pool = engine.pool
        self.blocks = self.cache = engine.blocks
        self._engine = engine
        self._max_waiting = max_waiting
        self._max_pending_outputs = max_pending_outputs
        self._close_timeout_s = close_timeout_s
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outputs_ready = asyncio.Event()
        self._running: tuple[float, float] | None = None  # start and prediction of the step that runs; one write, one read
        self._step = 0
        self._prefill_token_s = 0.0
        self._condition = threading.Condition()  # guards everything below
        self._commands: deque[Callable[[], None]] = deque()
        self._live: set[SequenceKey] = set()  # started, end not reported
        self._queued: set[SequenceKey] = set()  # WHOLE ones of them that have not run
        self._outputs: deque[StepOutput] = deque()
        self._is_loop_told = False
        self._is_stopping = False  # takes no more work
        self._is_finishing = False  # takes no more outputs but the last
        self._is_over = False  # the last output is there
        self._failure: BaseException | None = None
        self.blocks.subscribe_available(self._wake)  # after the step engine's own subscription, which it must follow

    async def open(self) -> None:
        """See Engine.open."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._drive, name="baton-engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """See Engine.close. A thread that hangs in a step is left behind after close_timeout_s, its blocks with it."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, self._close_timeout_s)
            if self._thread.is_alive():
                log.error("engine_thread_hangs", step=self._step)
        self._finish(EndReason.CANCELLED, "engine closed")

    def start(self, request: EngineRequest) -> None:
        """See Engine.start."""
        check_request(request, self.info, self.pool.num_blocks * self.pool.layout.block_tokens)
        with self._condition:
            if self._thread is None or self._is_stopping:
                raise EngineFailed("the engine is not open")
            if request.key in self._live:
                raise InvalidArgument("key", "this attempt is in the engine already")
            if request.work is Work.WHOLE:
                if len(self._queued) >= self._max_waiting:
                    raise QueueFull(len(self._queued), self._max_waiting, self._retry_after_ms())
                self._queued.add(request.key)
            self._live.add(request.key)
            self._commands.append(partial(self._add, request))
            self._condition.notify_all()

    def cancel(self, key: SequenceKey) -> None:
        """See Engine.cancel."""
        self._command(partial(self._engine.cancel, key))

    def pause(self, key: SequenceKey) -> None:
        """See Engine.pause."""
        self._command(partial(self._engine.pause, key))

    def resume(self, key: SequenceKey) -> None:
        """See Engine.resume."""
        self._command(partial(self._engine.resume, key))

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """See Engine.outputs. Cancelling loses nothing that was not yielded."""
        while True:
            with self._condition:
                output = self._outputs.popleft() if self._outputs else None
                self._is_loop_told = bool(self._outputs)
                is_over = self._is_over
                if len(self._outputs) == self._max_pending_outputs - 1:
                    self._condition.notify_all()
            if output is not None:
                yield output
            elif is_over:
                break
            else:
                await self._outputs_ready.wait()
                self._outputs_ready.clear()
        if self._failure is not None:
            raise EngineFailed("the engine died") from self._failure

    def beat(self) -> EngineBeat:
        """See Engine.beat."""
        running = self._running
        if running is None:
            return EngineBeat(self._step, 0.0, 0.0)
        started_at, predicted_s = running
        return EngineBeat(self._step, max(0.0, self._clock() - started_at), predicted_s)

    def stats(self) -> EngineStats:
        """See Engine.stats."""
        return self._engine.stats()

    def _command(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify_all()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _retry_after_ms(self) -> int:
        """Time in which the queue moves on by one."""
        tokens = self._engine.stats().waiting_prefill_tokens
        least, most = _RETRY_AFTER_MS
        return max(least, min(most, int(1000 * tokens * self._prefill_token_s / self._max_waiting)))

    # Everything below runs in the engine's thread, but for _finish when the thread hangs.

    def _drive(self) -> None:
        """The thread: a supervisor of the step engine, which ends the engine and says so, whatever went wrong."""
        try:
            while (commands := self._wait_for_work()) is not None:
                self._turn(commands)
            self._end_all()
        except Exception as error:
            log.exception("engine_died", step=self._step)
            self._failure = error
            self._finish(EndReason.ENGINE_ERROR, f"engine died: {type(error).__name__}")
        else:
            self._finish(EndReason.CANCELLED, "engine closed")

    def _wait_for_work(self) -> deque[Callable[[], None]] | None:
        """Commands since the last time, once there is something to do; None if the engine is to end."""
        with self._condition:
            while not (self._is_stopping or self._commands or self._engine.has_work()):
                self._condition.wait()
            return None if self._is_stopping else self._take_commands()

    def _take_commands(self) -> deque[Callable[[], None]]:
        """Called with the condition held."""
        commands, self._commands = self._commands, deque()
        return commands

    def _turn(self, commands: deque[Callable[[], None]]) -> None:
        if self._plan_step(commands) is not None:
            self._run_step()

    def _plan_step(self, commands: deque[Callable[[], None]]) -> float | None:
        """Do what was asked since the last step, then plan the next one: its predicted length, None if there is none."""
        self._running = (self._clock(), 0.0)  # a plan that hangs must show as well
        for command in commands:
            command()
        if not self._engine.has_work():
            self._running = None
            return None
        predicted_s = self._engine.plan()
        self._running = (self._clock(), predicted_s)
        return predicted_s

    def _run_step(self) -> None:
        output = self._engine.step()
        self._step = output.step
        self._running = None
        self._emit(output)

    def _add(self, request: EngineRequest) -> None:
        try:
            self._engine.add(request)
        except BatonError as error:
            log.warning("sequence_refused_by_engine", request_id=request.key.request_id, attempt=request.key.attempt, reason=error.message)
            self.blocks.release(request.key)
            end = SequenceEnd(request.key, EndReason.ENGINE_ERROR, 0, 0, message=error.message)
            self._emit(StepOutput(self._step, ends=[end]))

    def _end_all(self) -> None:
        """The orderly end: what was asked before counts, then everything left is cancelled by the step engine itself."""
        with self._condition:
            commands = self._take_commands()
        for command in commands:
            command()
        with self._condition:
            keys = list(self._live)
        for key in keys:
            self._engine.cancel(key)
        self._engine.plan()
        self._emit(self._engine.step())

    def _emit(self, output: StepOutput) -> None:
        if output.prefill_tokens:
            token_s = output.duration_s / output.prefill_tokens
            self._prefill_token_s += _RATE_WEIGHT * (token_s - self._prefill_token_s)
        with self._condition:
            while len(self._outputs) >= self._max_pending_outputs and not self._is_stopping:
                self._condition.wait()
            output.ends = [end for end in output.ends if end.key in self._live]
            self._queued.difference_update(output.started)
            for end in output.ends:
                self._live.discard(end.key)
                self._queued.discard(end.key)
            if not self._is_finishing:
                self._outputs.append(output)
                self._tell_loop()

    def _finish(self, reason: EndReason, message: str) -> None:
        """Report the end of all that is left, once. After it nothing is emitted."""
        is_hung = self._thread is not None and self._thread.is_alive() and self._thread is not threading.current_thread()
        with self._condition:
            if self._is_finishing:
                return
            self._is_finishing = self._is_stopping = True
            ends = [SequenceEnd(key, reason, 0, 0, message=message) for key in self._live]
            self._live.clear()
            self._queued.clear()
        if not is_hung:  # a hung step may still write to its blocks
            for end in ends:
                self.blocks.release(end.key)
        with self._condition:
            if ends:
                self._outputs.append(StepOutput(self._step, ends=ends))
            self._is_over = True
            self._tell_loop()

    def _tell_loop(self) -> None:
        """Wake the consumer, once per batch. Called with the condition held."""
        if self._is_loop_told or self._loop is None:
            return
        self._is_loop_told = True
        try:
            self._loop.call_soon_threadsafe(self._outputs_ready.set)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._is_stopping = True
