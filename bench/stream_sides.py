"""Ours and the peer, as bench/stream_beside_peer.py sees them: real processes that serve one model, and say which pids they have."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from baton_cli import state, status, up
from baton_runtime.children import die_with_parent, free_port
from peer import INSTANT, MAX_CHUNK_TOKENS, MAX_SEQUENCES, NUM_BLOCKS, Peer
from stream_model import NAME

READY_LIMIT_S = 120.0
# The peer's mock engine keeps its own time. 1,024 sequences of these lengths fill 5.5 % of its KV blocks, where its model says 8.7 ms per
# decode step (the formula of our profile "polynomial"), divided by the speed; 1.6 ms come on top (measured at 0.25).
PEER_SPEEDS = {20: 0.18, 40: 0.37, 75: 0.74}
SETTINGS = {
    "BATON_DECODE_MAX_BATCH_SEQUENCES": MAX_SEQUENCES,
    "BATON_DECODE_MAX_WAITING": MAX_SEQUENCES,
    "BATON_DECODE_MAX_CHUNK_TOKENS": MAX_CHUNK_TOKENS,
    "BATON_DECODE_NUM_BLOCKS": NUM_BLOCKS,
    "BATON_ROUTER_MAX_WAITING_SEQUENCES": MAX_SEQUENCES,
}


class SideFailed(Exception):
    """It did not start; the text says why."""


class Side(Protocol):
    """What is measured. frontends: names, in pids, of the processes whose CPU is the frontend's."""

    name: str
    host: str
    port: int
    pids: dict[str, int]

    def start(self) -> None:
        """Return when it serves."""

    def stop(self) -> None:
        """End it. Idempotent."""


def frontends(pids: dict[str, int]) -> list[str]:
    """Names of the frontend's processes."""
    return [name for name in pids if name.startswith("frontend")]


class Ours:
    """`baton up`: the sim engine, one decode worker and no prefill worker, everything else as it comes."""

    name = "baton"

    def __init__(self, model: Path, folder: Path, tokens_per_s: int | None) -> None:
        """tokens_per_s: of each stream, None: no waiting. folder: for logs and state."""
        self.host, self.port = "127.0.0.1", 0
        self.pids: dict[str, int] = {}
        self._folder = folder / f"baton-{tokens_per_s or 'instant'}"
        self._model = model
        self._tokens_per_s = tokens_per_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when every router hears every worker. Raises: SideFailed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        options = ["--engine", "sim", "--profile", self._profile(), "--model", str(self._model), "--served-name", NAME, "--port", "0"]
        command = [sys.executable, "-m", "baton_cli.main", "up", *options, "--prefill", "0", "--decode", "1"]
        with (self._folder / "up.log").open("wb") as log:
            self._process = subprocess.Popen(
                die_with_parent([*command, "--state-dir", str(self._folder)], signal.SIGTERM),
                env={**os.environ, **{name: str(value) for name, value in SETTINGS.items()}},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + READY_LIMIT_S
        while (running := state.read(self._folder)) is None or not running.ready:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SideFailed(f"baton up does not serve:\n{(self._folder / 'up.log').read_text(errors='replace')[-1500:]}")
            time.sleep(0.1)
        self.port = int(running.url.rpartition(":")[2])
        report = asyncio.run(status.collect(running.etcd, up.NAMESPACE))
        self.pids = {instance.instance_id: instance.pid for instance in report.instances if instance.pid}

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
            self._process = None

    def _profile(self) -> str:
        if self._tokens_per_s is None:
            return "instant"
        path = self._folder / "profile.toml"
        path.write_text(f'description = "{self._tokens_per_s} tokens/s"\n[decode_ms]\nconstant = {1000 / self._tokens_per_s:.3f}\n')
        return str(path)


class Theirs:
    """The peer (bench/peer.py)."""

    name = "peer"

    def __init__(self, model: Path, folder: Path, tokens_per_s: int | None) -> None:
        self.host, self.port = "127.0.0.1", free_port()
        self.pids: dict[str, int] = {}
        self._peer = Peer(model, NAME, self.port, folder, PEER_SPEEDS[tokens_per_s] if tokens_per_s else INSTANT)

    def start(self) -> None:
        """Return when it lists the model. Raises: PeerFailed."""
        self._peer.start()
        self.pids = self._peer.pids

    def stop(self) -> None:
        """End both processes."""
        self._peer.stop()
