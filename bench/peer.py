"""The peer that bench/stream_beside_peer.py measures beside ours: NVIDIA Dynamo's frontend with its own mock engine.

    python bench/peer.py                   # install it (a minute or two, 1 GB)
    python bench/peer.py --port 8009       # and serve until Ctrl-C, to try it by hand

It is installed from the package index into $BATON_PEER (default: build/peer), in an environment of its own, in the versions of
peer-requirements.txt. Its frontend routes by KV cache (`--router-mode kv`) in its own process; mock engine and frontend speak TCP, as it
does by default.
"""

import argparse
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

from baton_runtime.children import die_with_parent

REQUIREMENTS = Path(__file__).with_name("peer-requirements.txt")
PACKAGE = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("ai-dynamo=="))
READY_LIMIT_S = 120.0
# All on this machine. It still logs a line per request, as ours does.
ENVIRONMENT = {"DYN_LOG": "error", "HF_HUB_OFFLINE": "1"} | {
    f"DYN_{name}_HOST": "127.0.0.1" for name in ("TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE", "HTTP_RPC")
}
MAX_SEQUENCES, MAX_CHUNK_TOKENS, NUM_BLOCKS = 8192, 8192, 65536  # of its engine and ours: per step, and of KV
INSTANT = 1000.0  # times faster than the accelerator that the mock engine models


class PeerFailed(Exception):
    """It could not be installed or started; the text says why."""


def folder() -> Path:
    """Where it is installed."""
    return Path(os.environ.get("BATON_PEER") or Path(__file__).parent.parent / "build" / "peer").resolve()


def install() -> Path:
    """Install it unless it is there. Returns its Python. Raises: PeerFailed."""
    python = folder() / "venv" / "bin" / "python"
    stamp = folder() / "requirements.txt"
    if stamp.is_file() and stamp.read_text() == REQUIREMENTS.read_text():
        return python
    print(f"installing the peer into {folder()} (a minute or two)", file=sys.stderr)
    venv.create(folder() / "venv", with_pip=True, clear=True)
    command = [python, "-m", "pip", "-q", "install", "--disable-pip-version-check", "--no-deps", "-r", REQUIREMENTS]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise PeerFailed(f"pip cannot install {REQUIREMENTS.name}: {found.stderr[-1500:]}")
    shutil.copy(REQUIREMENTS, stamp)
    return python


class Peer:
    """One frontend and one mock engine."""

    def __init__(self, model: Path, name: str, port: int, logs: Path, decode_speed: float = INSTANT) -> None:
        """decode_speed: of its decode steps, in units of the modelled accelerator's; prefill always takes no time worth naming."""
        self.port = port
        self._logs = logs
        self._discovery = logs / "peer-discovery"
        common = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
        python = [str(install()), "-m"]
        engine = ["--model-path", str(model), "--model-name", name, "--max-num-seqs", str(MAX_SEQUENCES)]
        sizes = ["--num-gpu-blocks-override", str(NUM_BLOCKS), "--max-num-batched-tokens", str(MAX_CHUNK_TOKENS)]
        speed = ["--speedup-ratio", str(INSTANT), "--decode-speedup-ratio", f"{decode_speed / INSTANT:g}"]
        http_options = ["--http-host", "127.0.0.1", "--http-port", str(port), "--router-mode", "kv"]
        self._commands = {
            "mocker": [*python, "dynamo.mocker", *engine, *sizes, *speed, *common],
            "frontend": [*python, "dynamo.frontend", *http_options, *common],
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def pids(self) -> dict[str, int]:
        """Of its processes."""
        return {name: process.pid for name, process in self._processes.items()}

    def start(self) -> None:
        """Return when it serves the model. Raises: PeerFailed; nothing is left running then."""
        shutil.rmtree(self._discovery, ignore_errors=True)
        self._discovery.mkdir(parents=True)
        environment = {**os.environ, **ENVIRONMENT, "DYN_FILE_KV": str(self._discovery)}
        environment.pop("PYTHONPATH", None)
        for name, command in self._commands.items():
            with (self._logs / f"peer-{name}.log").open("wb") as log:
                self._processes[name] = subprocess.Popen(
                    die_with_parent(command, signal.SIGTERM), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        deadline = time.monotonic() + READY_LIMIT_S
        while not self._serves():
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                self.stop()
                name = ended[0] if ended else "frontend"
                log = (self._logs / f"peer-{name}.log").read_text(errors="replace")
                raise PeerFailed(f"the peer's {name} {'ended' if ended else 'is not ready'}:\n{log[-1500:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End both. Idempotent."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = {}

    def _serves(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2.0)
        try:
            connection.request("GET", "/v1/models")
            response = connection.getresponse()
            return response.status == 200 and bool(json.loads(response.read())["data"])
        except (OSError, ValueError, LookupError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def main() -> None:
    """Install; with --port: serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, help="serve there until Ctrl-C")
    parser.add_argument("--decode-speed", type=float, default=INSTANT, help="1: as fast as the accelerator it models")
    options = parser.parse_args()
    print(install())
    if options.port is None:
        return
    from stream_model import NAME, make_model

    logs = folder() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    peer = Peer(make_model(folder().parent / "bench-model"), NAME, options.port, logs, options.decode_speed)
    peer.start()
    print(f"http://127.0.0.1:{options.port}, processes {peer.pids}")
    try:
        signal.pause()
    except KeyboardInterrupt:
        peer.stop()


if __name__ == "__main__":
    main()
