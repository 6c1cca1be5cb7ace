"""Child processes of `baton up`: start, restart with back-off, stop in time."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from baton_runtime.children import die_with_parent


@dataclass
class Child:
    """One process and its log file."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path
    process: asyncio.subprocess.Process | None = None
    started_at: float = 0.0
    restarts: int = 0
    failures: int = 0  # exits in a row before it ran for STABLE_S

    async def start(self) -> None:
        """Start the process; its output is appended to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *die_with_parent(self.command, signal.SIGTERM),
                env={**os.environ, **self.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C goes to the supervisor alone, which stops the others in order
            )
        self.started_at = time.monotonic()

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.returncode is None

    def send(self, signum: signal.Signals) -> None:
        """Signal the process if it still runs."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signum)

    def exit_text(self) -> str:
        """How it ended, in words."""
        return "running" if self.process is None or self.process.returncode is None else describe_exit(self.process.returncode)

    def last_lines(self, count: int = 12) -> str:
        """The end of the log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
        except FileNotFoundError:
            return "(no output)"


@dataclass(frozen=True)
class Backoff:
    """Delay before the next restart: doubled per failure in a row, from first_s to at most limit_s."""

    first_s: float = 0.5
    limit_s: float = 10.0
    stable_s: float = 30.0  # a process that ran this long counts as healthy again

    def delay_s(self, failures: int) -> float:
        """Delay after that many failures in a row (at least 1)."""
        return float(min(self.first_s * 2 ** (failures - 1), self.limit_s))


@dataclass
class Supervisor:
    """Keeps children running until told to stop.

    on_exit and on_restart are told what happened, for the terminal and the log.
    """

    backoff: Backoff = field(default_factory=Backoff)
    children: list[Child] = field(default_factory=list)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def keep(self, child: Child) -> None:
        """Restart child whenever it ends, until stopping is set."""
        while not self.stopping.is_set():
            assert child.process is not None
            code = await child.process.wait()
            if self.stopping.is_set():
                return
            stable = time.monotonic() - child.started_at > self.backoff.stable_s
            child.failures = 1 if stable else child.failures + 1
            delay = self.backoff.delay_s(child.failures)
            say(f"{child.name} ended ({describe_exit(code)}), restart {child.restarts + 1} in {delay:g} s; log: {child.log}")
            try:
                async with asyncio.timeout(delay):
                    await self.stopping.wait()
            except TimeoutError:
                child.restarts += 1
                await child.start()

    async def stop(self, limit_s: float) -> None:
        """End every child, the last one (etcd) after the others, so that these can sign off there. Idempotent.

        limit_s: time for all of it; who is still there near its end is killed.
        """
        self.stopping.set()
        await _end(self.children[:-1], limit_s * 3 / 4)
        await _end(self.children[-1:], limit_s / 4)


async def _end(children: list[Child], limit_s: float) -> None:
    """SIGTERM, then SIGKILL to those that have not ended after limit_s."""
    for child in children:
        child.send(signal.SIGTERM)
        child.send(signal.SIGCONT)  # a stopped process would not even see the SIGTERM
    try:
        async with asyncio.timeout(limit_s):
            await _ended(children)
    except TimeoutError:
        for child in children:
            child.send(signal.SIGKILL)
        await _ended(children)


async def _ended(children: list[Child]) -> None:
    for child in children:
        if child.process is not None:
            await child.process.wait()


def describe_exit(code: int) -> str:
    """An exit code in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def say(text: str) -> None:
    """One line to the user, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)
