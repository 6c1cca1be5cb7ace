"""The life of a service process: start, serve, drain, close.

    def main() -> None:
        run(lambda: DecodeService(load(DecodeConfig, "decode", config_file("decode"))))

SIGTERM, SIGINT or the call InstanceService.Drain: drain (at most drain_grace_s, or what the call says), then close. A second signal ends
the drain and closes at once; the first one during a drain that a call began does not, for supervisors send it to whom they drained.
Exit codes: 0 stopped as asked, 1 failed, 2 the configuration is wrong (one line on stderr).
"""

import abc
import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import ClassVar, NoReturn

import uvloop

from baton_runtime import tls
from baton_runtime.config import CommonConfig, effective
from baton_runtime.drain import Drain, Holdings
from baton_runtime.errors import ConfigError
from baton_runtime.log import configure_logging, get_logger

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2
CLOSE_LIMIT_S = 4.0
# How long callers of Drain may take to hear of its end, and what their last message gets to leave the process.
TELL_LIMIT_S, LAST_MESSAGE_S = 1.0, 0.05
STALL_TICK_S = 0.1
# How long a thread may keep the interpreter while another waits for it: an engine's thread between two native calls keeps the loop
# waiting for so long, with Python's default 5 ms.
SWITCH_INTERVAL_S = 0.001
# glibc gives each thread a heap of its own, up to eight per processor; what one thread frees, those of other heaps cannot use. gRPC's
# threads allocate and free messages for one another, so that a process grew for as long as it ran (a router by 2 MB in 20 minutes,
# 2026-11-25). MALLOC_ARENA_MAX in the environment wins.
MAX_HEAPS, _M_ARENA_MAX = 2, -8

log = get_logger(__name__)


def new_incarnation() -> str:
    """Name of one life of an instance: 16 random lower-case hex digits."""
    return secrets.token_hex(8)


class Service(abc.ABC):
    """A process's one service. Made inside the running loop; start, drain and close run in one task.

    In start(), enter components into `closing` in the order in which they start; `close()` ends them in reverse order. Put
    background work into `tasks`: a TaskGroup that ends with the service; an exception in it closes the process (exit 1).
    """

    name: ClassVar[str]

    def __init__(self, config: CommonConfig) -> None:
        self.config = config
        self.incarnation = new_incarnation()
        self.instance_id = config.instance_id or f"{self.name}-{self.incarnation[:6]}"
        self.drain_state = Drain(config.drain_grace_s)
        self.closing = contextlib.AsyncExitStack()
        self.tasks = asyncio.TaskGroup()

    @abc.abstractmethod
    async def start(self) -> None:
        """Return once the service serves. Last steps: `log_ready`, then register in discovery."""

    async def drain(self) -> None:  # noqa: B027  # nothing to do is a valid answer
        """Leave discovery, refuse new work, return when what runs is over. May be cancelled at any await.

        `drain_state.remaining_s` is what is left of the grace; it may shrink at any time.
        """

    def holdings(self) -> Holdings:
        """What keeps a drain from its end; may be asked at any time, also before anything was started."""
        return Holdings()

    async def close(self) -> None:
        """End every component, in reverse order of their start. Idempotent."""
        await self.closing.aclose()

    def log_ready(self, grpc_address: str = "", http_address: str = "", metrics_address: str = "") -> None:
        """Log `service_ready`: from now on the service answers at these host:port addresses (empty: has none)."""
        log.info(
            "service_ready",
            grpc_address=grpc_address,
            http_address=http_address,
            metrics_address=metrics_address,
            pid=os.getpid(),
            # also bound by configure_logging; named here because supervisors read this one line
            instance_id=self.instance_id,
            incarnation=self.incarnation,
        )


def run(service_factory: Callable[[], Service]) -> NoReturn:
    """Run a service until a signal or a failure, then exit the process."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _limit_heaps()
    _allow_open_files()
    # Not closed: that would wait for the loop's own threads, be it for a look-up of a name that nobody answers any more (measured: 18 s).
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    code = runner.run(serve(service_factory))
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything of ours is closed. What the interpreter would still do takes seconds with torch loaded (measured: 2.7 s), and for
    # ever if a thread is stuck in a native call.
    os._exit(code)


async def serve(service_factory: Callable[[], Service]) -> int:
    """What `run` runs, in the caller's loop. Returns the exit code."""
    try:
        service = service_factory()
    except ConfigError as e:
        return _config_failed(e)
    config = service.config
    configure_logging(service.name, service.instance_id, service.incarnation, config.log_level, config.log_format)
    log.info("config_effective", config=effective(config))
    try:
        _set_tls(service.name, config)
    except ConfigError as e:
        return _config_failed(e, f"{service.name}.")
    try:
        return await _Life(service).run()
    except* ConfigError as group:
        return_code = _config_failed(_leaves(group)[0], f"{service.name}.")
    except* Exception as group:
        log.error("service_failed", exc_info=group)
        return_code = EXIT_FAILED
    return return_code


def _set_tls(name: str, config: CommonConfig) -> None:
    """Raises: ConfigError."""
    files = tls.files_of(name, config.tls_ca, config.tls_certificate, config.tls_key)
    tls.use(files)
    if files is None:
        log.info("tls_off", meaning="gRPC and etcd are plain: whoever reaches a port may use it")
    else:
        log.info("tls_on", ca=str(files.ca), certificate=str(files.certificate))


def _leaves(group: BaseExceptionGroup[ConfigError]) -> list[ConfigError]:
    found: list[ConfigError] = []
    for inner in group.exceptions:
        found += _leaves(inner) if isinstance(inner, BaseExceptionGroup) else [inner]
    return found


def _config_failed(error: ConfigError, prefix: str = "") -> int:
    """prefix: "<service>.", for errors found where the service's name is not known (a port in use)."""
    message = error.message if error.message.startswith(prefix) else prefix + error.message
    sys.stderr.write(f"baton: configuration error: {message}\n")
    sys.stderr.flush()
    return EXIT_CONFIG


class _Life:
    """One service from start to close. Each phase waits in an asyncio.timeout that a signal or a call of Drain moves."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._signals = 0
        self._drain = service.drain_state
        self._is_draining = False
        self._phase: asyncio.Timeout | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        self._drain.on_ask = self._on_ask
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            async with self._service.tasks:
                try:
                    await self._start_and_wait()
                finally:
                    self._drain.end(is_complete=False)  # failed on the way
                    await self._close()
                self._service.tasks.create_task(_end_of_tasks(), name="end-of-tasks")
        except* _TasksEnded:
            pass
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        return EXIT_OK

    async def _start_and_wait(self) -> None:
        if await self._until_asked(self._service.start()):
            _freeze()
            await self._until_asked(asyncio.Event().wait())
            log.info("service_draining", grace_s=round(self._drain.remaining_s, 3))
            is_complete = await self._until_end(self._service.drain())
            log.info("service_drained", complete=is_complete, duration_s=round(self._drain.elapsed_s, 3))
        else:
            is_complete = True  # it never served
        self._drain.end(is_complete=is_complete)
        self._is_draining = False
        await self._within(TELL_LIMIT_S, self._tell(), is_ended=self._signals > 1)

    async def _tell(self) -> None:
        """Callers of Drain hear its end before the server closes."""
        if await self._drain.heard():
            await asyncio.sleep(LAST_MESSAGE_S)

    async def _until_asked(self, phase: Awaitable[object]) -> bool:
        """Run a phase until it is done (True), or a drain is asked for."""
        return await self._within(None, phase, is_ended=self._drain.is_asked)

    async def _until_end(self, drain: Awaitable[object]) -> bool:
        """Run the drain until it is done (True), or its grace or a second signal ends it."""
        self._is_draining = True
        return await self._within(self._drain.remaining_s, drain, is_ended=self._signals > 1)

    async def _within(self, limit_s: float | None, phase: Awaitable[object], *, is_ended: bool) -> bool:
        # is_ended: what came as the phase before was ending has found no scope to move.
        scope = self._phase = asyncio.timeout(0 if is_ended else limit_s)
        try:
            async with scope:
                await phase
        except TimeoutError:
            if not scope.expired():
                raise
            return False
        finally:
            self._phase = None
        return True

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        log.info("signal_received", signal=signal.Signals(number).name, count=self._signals)
        if self._signals == 1:
            self._drain.ask()
        else:
            self._end_phase_in(0.0)

    def _on_ask(self) -> None:
        self._end_phase_in(self._drain.remaining_s if self._is_draining else 0.0)

    def _end_phase_in(self, delay_s: float) -> None:
        if self._phase is not None and not self._phase.expired():
            self._phase.reschedule(asyncio.get_running_loop().time() + delay_s)

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self._service.close()
        except TimeoutError:
            log.error("close_timed_out", limit_s=CLOSE_LIMIT_S)
        log.info("service_closed")


def _limit_heaps() -> None:
    """Before any thread is started."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, MAX_HEAPS)


def _allow_open_files() -> None:
    """As many as the system lets us: the usual soft limit of 1,024 is one for programs with select, and a connection is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # a hard limit above what this kernel grants: the soft one stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _freeze() -> None:
    """Take what the start has made out of the sight of the garbage collector: it stays anyway, and each full collection would stop the
    loop to look at all of it (measured 2026-11-21: 14 ms with 50,000 objects, a worker without torch)."""
    gc.collect()
    gc.freeze()


class _TasksEnded(Exception):
    """Ends the service's TaskGroup, whose tasks run for ever, the way a TaskGroup ends: one of them fails."""


async def _end_of_tasks() -> None:
    raise _TasksEnded


def _boot_clock() -> float:
    # Counts the time a suspended machine sleeps, which CLOCK_MONOTONIC does not; peers have fenced us meanwhile.
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class LoopStallWatch:
    """Notices that this process's own loop stood still (stopped, suspended, blocked) for longer than its peers tolerate.

    on_stall(stood_still_s) is called once per stall, from the loop; it must fence handoffs and streams before they are touched.
    Run `run()` in a TaskGroup. A callback that happens to run before the watch does is not protected: those that must be
    call `check()` first.
    """

    def __init__(
        self, limit_s: float = 2.0, on_stall: Callable[[float], None] = lambda _: None, clock: Callable[[], float] = _boot_clock
    ) -> None:
        self._limit_s = limit_s
        self._on_stall = on_stall
        self._clock = clock
        self._last: float | None = None

    def check(self) -> bool:
        """True if the loop stood still since the last tick; on_stall has been called then. Cheap."""
        now = self._clock()
        stood_still_s = now - self._last - STALL_TICK_S if self._last is not None else 0.0
        if stood_still_s <= self._limit_s:
            return False
        self._last = now
        log.warning("loop_stalled", stood_still_s=round(stood_still_s, 3))
        self._on_stall(stood_still_s)
        return True

    async def run(self) -> None:
        """Tick every 100 ms until cancelled."""
        while True:
            self.check()
            self._last = self._clock()
            await asyncio.sleep(STALL_TICK_S)
