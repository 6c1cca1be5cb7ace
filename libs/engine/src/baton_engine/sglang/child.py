"""The server's process: started by the worker, in a process group of its own, ended with it."""

import asyncio
import os
import secrets
import shlex
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from baton_runtime.children import die_with_parent, free_port
from baton_runtime.errors import ConfigError
from baton_runtime.log import get_logger

from baton_engine.errors import EngineFailed
from baton_engine.sglang import kv_events
from baton_engine.sglang.http_api import ChildClient

PROBE_S = 0.5
SAY_EVERY_S = 15.0
# What SIGTERM gets. By then nothing runs; SGLang's own way out waits some seconds for requests to end (measured: 8 s).
END_GRACE_S = 1.0

# What the environment does not say otherwise. Log probabilities are those of the model, before temperature, as everywhere in Baton. A
# scheduler that crashes ends at once: its diagnoses keep the server up, and silent, for over a minute (measured: 66 s).
_ENVIRONMENT = {
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
}

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SglangSettings:
    """How to start the server. Names and meanings as in the worker's settings without their prefix sglang_.

    host: it binds; host_ip: at which other servers reach its own ports, empty: what it finds itself; bootstrap_port: of a prefill server,
    0: any free one. mode: "null", "prefill" or "decode".
    """

    model: Path
    mode: str
    command: str = "python3 -m sglang.launch_server"
    args: str = ""
    host: str = "127.0.0.1"
    host_ip: str = ""
    bootstrap_port: int = 0
    page_size: int = 16
    hash_block_tokens: int = 16
    loads_tokenizer: bool = False
    start_s: float = 900.0
    pinned_s: float = 30.0
    max_waiting: int = 256

    def check(self) -> None:
        """Raises: ConfigError naming sglang_command, sglang_args or block_tokens."""
        for name, text in (("sglang_command", self.command), ("sglang_args", self.args)):
            try:
                shlex.split(text)
            except ValueError as error:
                raise ConfigError(name, f"{text!r} is not a command line: {error}") from error
        words = shlex.split(self.command)
        if not words or shutil.which(words[0]) is None:
            raise ConfigError("sglang_command", f"{self.command!r}: there is no such program")
        own = {flag.split("=")[0] for flag in shlex.split(self.args)} & set(OWN_FLAGS)
        if own:
            raise ConfigError(
                "sglang_args", f"{', '.join(sorted(own))}: Baton sets that itself, from settings of its own (docs/engine-sglang.md)"
            )
        if self.page_size % self.hash_block_tokens:
            raise ConfigError("block_tokens", f"{self.page_size} is not a multiple of hash_block_tokens={self.hash_block_tokens}")


OWN_FLAGS = (
    "--model-path",
    "--host",
    "--port",
    "--page-size",
    "--api-key",
    "--skip-tokenizer-init",
    "--incremental-streaming-output",
    "--stream-output",
    "--disaggregation-mode",
    "--disaggregation-bootstrap-port",
    "--kv-events-config",
)


class Child:
    """One server process. bootstrap_port, events_port: 0 where its mode has none."""

    def __init__(self, settings: SglangSettings) -> None:
        self.settings = settings
        self._port = free_port(settings.host)
        self.bootstrap_port = (settings.bootstrap_port or free_port(settings.host)) if settings.mode == "prefill" else 0
        # In decode mode its prefix cache is off.
        self.events_port = free_port() if settings.mode != "decode" else 0
        self._api_key = secrets.token_hex(16)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def base_url(self) -> str:
        """Of its HTTP server."""
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "::") else self.settings.host
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    def client(self) -> ChildClient:
        """Talks to it."""
        return ChildClient(self.base_url, self._api_key)

    def command(self) -> list[str]:
        """Its command line. What the user gave comes last."""
        settings = self.settings
        words = shlex.split(settings.command)
        words[0] = shutil.which(words[0]) or words[0]
        flags = ["--model-path", str(settings.model), "--host", settings.host, "--port", str(self._port)]
        flags += ["--page-size", str(settings.page_size), "--api-key", self._api_key]
        flags += ["--incremental-streaming-output", "--skip-server-warmup", "--log-level-http", "warning"]
        if not settings.loads_tokenizer:
            flags.append("--skip-tokenizer-init")
        if settings.mode != "null":
            flags += ["--disaggregation-mode", settings.mode]
        if self.bootstrap_port:
            flags += ["--disaggregation-bootstrap-port", str(self.bootstrap_port)]
        if self.events_port:
            flags += ["--kv-events-config", kv_events.config_json(self.events_port)]
        return words + flags + shlex.split(settings.args)

    async def start(self, client: ChildClient) -> None:
        """Start it and wait until it answers; its log goes to our stderr. Raises: EngineFailed."""
        began = time.monotonic()
        own = {"SGLANG_HOST_IP": self.settings.host_ip} if self.settings.host_ip else {}
        environment = _ENVIRONMENT | own | os.environ
        command = die_with_parent(self.command(), signal.SIGKILL)
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=2, start_new_session=True, env=environment
        )
        log.info("sglang_starting", pid=self._process.pid, mode=self.settings.mode, url=self.base_url, limit_s=self.settings.start_s)
        said_at = began
        while not await client.is_healthy(timeout_s=30.0):
            now = time.monotonic()
            if self._process.returncode is not None:
                raise EngineFailed(f"SGLang ended with {self._process.returncode} while it started; its own log says why")
            if now - began > self.settings.start_s:
                raise EngineFailed(f"SGLang was not ready after {self.settings.start_s:g} s (sglang_start_s)")
            if now - said_at >= SAY_EVERY_S:
                said_at = now
                log.info("sglang_still_starting", elapsed_s=round(now - began), limit_s=self.settings.start_s)
            await asyncio.sleep(PROBE_S)
        log.info("sglang_ready", elapsed_s=round(time.monotonic() - began, 1))

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        assert self._process is not None, "it was started"
        return await self._process.wait()

    async def end(self) -> None:
        """End it and all of its processes. Idempotent; may be cancelled, it is killed then."""
        process = self._process
        if process is None:
            return
        try:
            self._signal(signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(END_GRACE_S):
                    await process.wait()
        finally:
            self._signal(signal.SIGKILL)
        await process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """To its whole group; its schedulers may outlive it."""
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
