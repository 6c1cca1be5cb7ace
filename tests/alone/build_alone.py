"""Build every service alone, from its declared dependencies, and run its tests in that environment.

A service that imports what it does not declare, or declares bounds that its own libraries do not meet, fails here and
nowhere else: in the development environment everything is installed.

usage: build_alone.py [MEMBER ...]     e.g. services/router; default: all five services
"""

import argparse
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARIES = ["proto", "libs/runtime", "libs/engine", "libs/handoff", "libs/worker"]
SERVICES = ["services/frontend", "services/router", "services/prefill", "services/decode", "services/kvtransfer"]
AT_ONCE = 2  # pip waits for the disk and the network, and each service has tests that wait
# of the tests, not of the service
TEST_TOOLS = ["pytest", "pytest-asyncio", "pytest-timeout", "hypothesis", "openai", "openapi-spec-validator"]


def run(*command: str | Path) -> None:
    """Run a command in the repository root; its output is shown only if it fails."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout[-8000:] + done.stderr[-8000:])
        sys.exit(f"failed: {' '.join(map(str, command))}")


def build(member: str, wheels: Path, folder: Path) -> str:
    """Install one service into an environment of its own and test it there. Returns what to say. Exits with its output if it fails."""
    start = time.monotonic()
    home = folder / member.replace("/", "-")
    venv.create(home, with_pip=True)
    name = f"baton-{Path(member).name}"
    run(
        *[home / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"],
        *["-c", "constraints.txt", "--find-links", wheels, name, *TEST_TOOLS],
    )
    run(home / "bin/python", "-m", "pip", "check")
    run(home / "bin/python", "-m", "pytest", "-q", "-c", "pyproject.toml", f"{member}/tests")
    return f"{name}: built and tested alone in {time.monotonic() - start:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("members", nargs="*", default=SERVICES)
    members = parser.parse_args().members
    with tempfile.TemporaryDirectory(prefix="baton-alone-") as tmp:
        wheels = Path(tmp) / "wheels"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, *(f"./{m}" for m in [*LIBRARIES, *members]))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for said in pool.map(lambda member: build(member, wheels, Path(tmp)), members):
                print(said, flush=True)  # noqa: T201 - a command's output


if __name__ == "__main__":
    main()
