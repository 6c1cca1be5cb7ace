"""A container engine of one's own, in namespaces of its own: processes, mounts, interfaces and ports all end with the block.

What is fetched (Debian packages, a base system, wheels) is fetched before, outside; nothing inside needs a network.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build/compose"  # kept between runs: the base system, Debian's packages
PACKAGES = {"dockerd": "docker.io", "iptables": "iptables", "mmdebstrap": "mmdebstrap", "prometheus": "prometheus"}  # command -> package
# Not in bookworm, or too old there. Taken out of their packages, not installed.
TRIXIE = ("docker-compose", "etcd-server", "etcd-client")
BASE_IMAGE = "baton-ci-base"
ENGINE_LIMIT_S = 60.0
SERVICES = ("frontend", "router", "prefill", "decode", "kvtransfer")
MEMBERS = ("proto", "libs/runtime", "libs/engine", "libs/handoff", "libs/worker", *(f"services/{service}" for service in SERVICES))


def say(text: str) -> None:
    """Progress, for whoever waits."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def call(*command: str | Path, limit_s: float = 900.0, **options: object) -> str:
    """Run a command; its stdout. Raises: RuntimeError with its last lines if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=limit_s, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} exited {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def prepare(folder: Path, extras: str) -> None:
    """Everything that needs a network: into folder (docker/ cli plugin, ci/ binaries, context/ what images are built from) and CACHE.

    extras: of the workers, e.g. "[torch]".
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
    if missing:
        say(f"installing {' '.join(missing)}")
        call("apt-get", "update", "-qq")
        call(
            "apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        )
    _take_apart(folder)
    if not (CACHE / "base.tar").exists():
        say("making the base system")
        call(
            *["mmdebstrap", "--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io"],
            *["--include=python3,python3-venv,ca-certificates", "bookworm", folder / "base.tar"],
        )
        (folder / "base.tar").rename(CACHE / "base.tar")
    _lay_out(folder / "context", extras)


def _take_apart(folder: Path) -> None:
    """The compose plugin and etcd out of trixie's packages."""
    packages = CACHE / "trixie"
    if not all(any(packages.glob(f"{name}_*.deb")) for name in TRIXIE):
        say(f"fetching {' '.join(TRIXIE)}")
        lists, sources = folder / "lists", folder / "sources"
        for made in (lists / "partial", sources, packages):
            made.mkdir(parents=True, exist_ok=True)
        uris = next(line for line in Path("/etc/apt/sources.list.d/debian.sources").read_text().splitlines() if line.startswith("URIs:"))
        (sources / "trixie.list").write_text(
            f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {uris.split()[1]} trixie main\n"
        )
        where = {"Dir::State::Lists": lists, "Dir::Etc::SourceList": "/dev/null", "Dir::Etc::SourceParts": sources}
        options = [f"-o{name}={value}" for name, value in {**where, "Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": ""}.items()]
        call("apt-get", *options, "update", "-qq")
        call("apt-get", *options, "-qq", "download", *(f"{name}/trixie" for name in TRIXIE), cwd=packages)
    for name in TRIXIE:
        call("dpkg-deb", "-x", next(packages.glob(f"{name}_*.deb")), folder / "trixie")
    plugins, binaries = folder / "docker/cli-plugins", folder / "ci"
    plugins.mkdir(parents=True)
    binaries.mkdir()
    shutil.copy(folder / "trixie/usr/libexec/docker/cli-plugins/docker-compose", plugins)
    for binary in (folder / "trixie/usr/bin/etcd", folder / "trixie/usr/bin/etcdctl", *map(shutil.which, ("prometheus", "promtool"))):
        shutil.copy(str(binary), binaries)
    shutil.copy(ROOT / "compose/ci/Dockerfile", binaries)


def _lay_out(context: Path, extras: str) -> None:
    """Sources, and the wheels of everything that is not ours."""
    context.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "tests", ".*_cache", "secrets")
    for name in ("proto", "libs", "services", "compose"):
        shutil.copytree(ROOT / name, context / name, ignore=ignored)
    for name in ("constraints.txt", ".dockerignore"):
        shutil.copy(ROOT / name, context)
    (context / "compose/secrets").mkdir()
    (context / "compose/secrets/grafana_admin_password").write_text("not used: Grafana is not started\n")
    say("building wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    members = [f"./{member}{extras}" if member in ("services/prefill", "services/decode") else f"./{member}" for member in MEMBERS]
    call(*pip, "wheel", "-w", context / "wheels", "-c", "constraints.txt", "hatchling", *members, cwd=ROOT)
    for wheel in (context / "wheels").glob("baton_*.whl"):
        wheel.unlink()  # images build our own from their sources, as users' do


def enter(folder: Path, command: Sequence[str], limit_s: float) -> int:
    """Run a command as the first process of new namespaces; whatever it left is gone when this returns. Returns: its exit status."""
    # Should this process be killed, the first one inside is as well, and with it all others.
    inside = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", *command]
    try:
        return subprocess.run(inside, timeout=limit_s).returncode
    finally:
        _remove_groups(folder.name)


def _remove_groups(name: str) -> None:
    """The control groups of containers that ended with their engine."""
    groups = [group for parent in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")) for group in parent.glob(name)]
    for group in groups:
        for below in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
            _remove_group(below)
        _remove_group(group)


def _remove_group(group: Path) -> None:
    deadline = time.monotonic() + 10.0
    while True:  # its last processes may still be on their way out
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def start_engine(folder: Path) -> None:
    """Inside: dockerd, and the base image. Sets what docker commands need in the environment."""
    call("ip", "link", "set", "lo", "up")
    os.environ.update(DOCKER_HOST=f"unix://{folder}/docker.sock", DOCKER_CONFIG=str(folder / "docker"))
    engine = [
        *["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid"],
        *["-H", os.environ["DOCKER_HOST"], "--cgroup-parent", f"/{folder.name}"],
        *["--iptables=false", "--ip6tables=false", "--ip-masq=false", "--bridge=none"],
    ]
    with (folder / "dockerd.log").open("w") as log:
        process = subprocess.Popen([str(part) for part in engine], stdout=log, stderr=log)
    deadline = time.monotonic() + ENGINE_LIMIT_S
    while subprocess.run(["docker", "info"], capture_output=True).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"dockerd did not start:\n{(folder / 'dockerd.log').read_text()[-3000:]}")
        time.sleep(0.2)
    say("importing the base system")
    path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    call("docker", "import", "-c", path, "-c", 'CMD ["python3"]', CACHE / "base.tar", BASE_IMAGE)
