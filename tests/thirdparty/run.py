"""Third-party clients against a real Baton: `baton up --engine sim`, each client in its own environment, one table at the end.

Each client's checks are in <client>_checks.py; schemathesis tests every operation of the served OpenAPI document; aiperf is one short run.
Exit status 0: every check held.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import model_folder
from baton_cli import state

HERE = Path(__file__).parent
READY_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0
STEP_LIMIT_S = 1200.0
MODEL = "sim-model"
# What holds between fields (stream_options needs stream) or depends on the model (token ids) is not in the document.
SCHEMATHESIS_SKIPS = "positive_data_acceptance"
AIPERF_REQUESTS, AIPERF_TOKENS = 40, 16


@dataclass
class Row:
    """One line of the table."""

    client: str
    version: str
    check: str
    ok: bool
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class World:
    """Where Baton runs, and the environments of the clients."""

    url: str
    model: Path
    folder: Path
    sdk: Path  # python with openai, langchain-openai, litellm, schemathesis
    aiperf: Path  # python with aiperf

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run one client. It sees none of our sources."""
        facts = {"BATON_URL": self.url, "BATON_MODEL": MODEL, "BATON_LIMIT_TOKENS": str(model_folder.LIMIT_TOKENS)}
        offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "LANGSMITH_TRACING": "false"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | facts | offline
        return subprocess.run(
            [str(part) for part in command], cwd=HERE, env=environment, capture_output=True, text=True, timeout=STEP_LIMIT_S
        )


@contextmanager
def baton(folder: Path, model: Path) -> Iterator[str]:
    """A running Baton on a free port; its URL."""
    command = [sys.executable, "-m", "baton_cli.main", "up", "--engine", "sim", "--profile", "instant", "--port", "0"]
    command += ["--model", str(model), "--served-name", MODEL, "--state-dir", str(folder)]
    with (folder.parent / "up.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + READY_LIMIT_S
            while (found := state.read(folder)) is None or not found.ready:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("baton up did not become ready:\n" + (folder.parent / "up.log").read_text()[-4000:])
                time.sleep(0.1)
            yield found.url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_LIMIT_S)


def version(python: Path, package: str) -> str:
    """As installed."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def sdk(world: World, package: str, script: str) -> Iterator[Row]:
    """The checks of one script."""
    name = version(world.sdk, package)
    done = world.run(world.sdk, script)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    for line in lines:
        yield Row(package, name, line["check"], line["ok"], line["seconds"], line["error"])
    if not lines or (done.returncode != 0) != any(not line["ok"] for line in lines):
        yield Row(package, name, "the script runs to its end", False, 0.0, (done.stderr or done.stdout)[-400:])


def schemathesis(world: World) -> Iterator[Row]:
    """Every operation of the served document: examples at the borders, random bodies, right and wrong ones."""
    report = world.folder / "schemathesis.json"
    done = world.run(
        *[world.sdk.parent / "schemathesis", "run", f"{world.url}/openapi.json", "--no-color", "--max-examples", "50"],
        *["--generation-deterministic", "--request-timeout", "60", "--exclude-checks", SCHEMATHESIS_SKIPS],
        *["--report-json-path", report],
    )
    name = version(world.sdk, "schemathesis")
    if not report.exists():
        yield Row("schemathesis", name, "runs to its end", False, 0.0, (done.stderr or done.stdout)[-400:])
        return
    told = json.loads(report.read_text())
    sys.stderr.write(done.stdout if told["exit_code"] else "")
    accepted = sum(phase["accepted"] for rates in told["valid_rates"].values() for phase in rates.values())
    cases, operations = told["test_cases"], told["operations"]
    detail = f"{operations['tested']} operations, {cases['generated']} cases, {accepted} of them accepted; {told['stop_reason']}"
    failures = "; ".join(f"{failure['title']}: {', '.join(failure['operations'])}" for failure in told["failures"])
    is_whole = told["complete"] and operations["tested"] == operations["total"] and accepted > 0 and not told["errors"]
    seconds = round(told["running_time"], 1)
    check = "no 5xx, no undocumented status, type or answer; wrong bodies refused"
    yield Row("schemathesis", name, check, told["exit_code"] == 0 and not failures and is_whole, seconds, failures or detail)


def aiperf(world: World) -> Iterator[Row]:
    """One short run with streaming; its own report must show every request answered in full."""
    out = world.folder / "aiperf"
    start = time.monotonic()
    done = world.run(
        *[world.aiperf.parent / "aiperf", "profile", "-m", MODEL, "--url", world.url, "--endpoint-type", "chat", "--streaming"],
        *["--tokenizer", world.model, "--concurrency", "4", "--request-count", str(AIPERF_REQUESTS)],
        *["--synthetic-input-tokens-mean", "64", "--output-tokens-mean", str(AIPERF_TOKENS), "--use-server-token-count"],
        *["--artifact-dir", out, "--ui", "none"],
    )
    name = version(world.aiperf, "aiperf")
    seconds = round(time.monotonic() - start, 1)
    found = sorted(out.rglob("profile_export_aiperf.json"))
    if done.returncode or not found:
        yield Row("aiperf", name, "runs to its end", False, seconds, (done.stderr or done.stdout)[-400:])
        return
    told = json.loads(found[0].read_text())
    requests, errors = told["request_count"]["avg"], told.get("error_request_count") or {"avg": 0}
    tokens, first = told["output_sequence_length"]["avg"], told["time_to_first_token"]["avg"]
    detail = f"{requests:g} requests, {errors['avg']:g} errors, {tokens:g} output tokens each, mean time to first token {first:.1f} ms"
    ok = requests == AIPERF_REQUESTS and not errors["avg"] and not told.get("error_summary")
    yield Row("aiperf", name, f"{AIPERF_REQUESTS} streams, none fails", ok, seconds, detail)


def own_books(world: World) -> Iterator[Row]:
    """What Baton itself says of all the runs: nothing answered with 500, no handler with a bug."""
    log = (world.folder / "state" / "logs" / "frontend-0.log").read_text()
    bugs = re.findall(r".*http_handler_failed.*", log)
    yield Row("baton", version(Path(sys.executable), "baton-frontend"), "no handler failed", not bugs, 0.0, "".join(bugs[:1])[:400])


def table(rows: list[Row]) -> str:
    """For people."""
    width = max(len(row.check) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.client:<16} {row.version:<9} {'ok' if row.ok else 'FAILED':<6} {row.check:<{width}} {row.seconds:6.1f} s")
        if row.detail:
            lines.append(" " * 34 + row.detail)
    failed = sum(not row.ok for row in rows)
    return "\n".join([*lines, "", f"{len(rows)} checks, {failed} failed"]) + "\n"


STEPS: dict[str, Callable[[World], Iterator[Row]]] = {
    "openai": lambda world: sdk(world, "openai", "openai_checks.py"),
    "langchain-openai": lambda world: sdk(world, "langchain-openai", "langchain_checks.py"),
    "litellm": lambda world: sdk(world, "litellm", "litellm_checks.py"),
    "aiperf": aiperf,
    "schemathesis": schemathesis,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sdk", type=Path, required=True, help="python of the environment with openai, langchain-openai, litellm, schemathesis"
    )
    parser.add_argument("--aiperf", type=Path, required=True, help="python of the environment with aiperf")
    parser.add_argument("--results", type=Path, help="write RESULTS.txt and RESULTS.json")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="clients to run")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="baton-clients-") as temporary:
        folder = Path(temporary)
        model = model_folder.write(folder / "model")
        with baton(folder / "state", model) as url:
            world = World(url, model, folder, options.sdk.absolute(), options.aiperf.absolute())
            for step in [*(STEPS[name] for name in options.only), own_books]:
                for row in step(world):
                    rows.append(row)
                    print(table([row]).splitlines()[0], file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    if options.results is not None:
        facts = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version(), "num_cpus": os.cpu_count()}
        content = {**facts, "engine": "sim, profile instant", "rows": [asdict(row) for row in rows]}
        options.results.with_suffix(".txt").write_text(text)
        options.results.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(any(not row.ok for row in rows))


if __name__ == "__main__":
    main()
