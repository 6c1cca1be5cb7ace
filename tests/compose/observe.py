"""A real Prometheus beside a real cluster: every query of the dashboard and every alert's value must return data.

Needs `prometheus` and `promtool` on PATH (Debian: package prometheus). Instances are named in the configuration instead of found by DNS;
jobs, rules and queries are those of compose/. Workers run the sim engine; one is killed, requests are refused and clients leave, because
some series begin only then. Writes a table with --markdown. Grafana does not run here: what it would draw is asked for, not drawn.
"""

import argparse
import asyncio
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "compose"), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import aiohttp  # noqa: E402
import yaml  # noqa: E402
from baton_cli import certificates, up  # noqa: E402
from baton_runtime.children import free_port  # noqa: E402
from cluster import Cluster, cluster, until  # noqa: E402
from load import Kind, Load, Oracle  # noqa: E402
from queries import ALERTS, COMPOSE, Query, alert_queries, dashboard_queries  # noqa: E402

PROFILE = "polynomial"
MAX_INFLIGHT = 24
SCRAPE_S = 1
WINDOW = "30s"  # for Grafana's $__rate_interval
DATA_LIMIT_S = 60.0
KINDS = [
    Kind("chat", 4, (20, 300), (10, 40)),
    Kind("batch", 1, (20, 300), (10, 40), batch=True),
    Kind("leaves", 2, (20, 300), (100, 200), leaves_after_s=0.5),
]
SERVICES = ("frontend", "router", "prefill", "decode", "kvtransfer")


def say(text: str) -> None:
    """Progress."""
    sys.stderr.write(f"{text}\n")


def check_files() -> None:
    """What needs no server: syntax of configuration and rules, and the alerts' unit tests. Raises: SystemExit with promtool's words."""
    folder = COMPOSE / "prometheus"
    for command in (
        ["check", "config", "--syntax-only", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ):
        done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"promtool {' '.join(command)}:\n{done.stdout}{done.stderr}")
        say(f"promtool {' '.join(command)}: ok")


def configuration(house: Cluster) -> dict:
    """compose's, with the instances' addresses in the place of DNS names."""
    made = yaml.safe_load((COMPOSE / "prometheus/prometheus.yml").read_text())
    made["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    made["rule_files"] = [str(ALERTS)]
    for scrape in made["scrape_configs"]:
        del scrape["dns_sd_configs"]
        names = [name for name in house.children if name.partition("-")[0] == scrape["job_name"]]
        scrape["static_configs"] = [{"targets": [house.instance(name).metrics_address for name in names]}]
    return made


@asynccontextmanager
async def prometheus(folder: Path, house: Cluster) -> AsyncIterator[str]:
    """A running one; its URL."""
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(house)))
    url = f"http://127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(*command, f"--web.listen-address={url[7:]}", stdout=log, stderr=log)
    try:

        async def is_ready() -> bool:
            assert process.returncode is None, (folder / "prometheus.log").read_text()[-2000:]
            try:
                async with house.http.get(f"{url}/-/ready") as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        await until("Prometheus is ready", is_ready, DATA_LIMIT_S)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def events(house: Cluster) -> None:
    """What series begin with: a worker dies, more is asked than may be held, a model is asked for that there is not."""

    async def has_links() -> bool:
        return (await house.metrics("decode-1")).get("baton_handoff_bytes_total", 0.0) > 0

    await until("decode-1 has had KV from a peer, which misses it then", has_links, DATA_LIMIT_S)
    await house.kill("decode-1")
    await house.start("decode-1")
    body = {"model": "test-model", "prompt": [11] * 50, "max_tokens": 20, "ignore_eos": True}

    async def ask(**changed: object) -> int:
        async with house.http.post(f"{house.url}/v1/completions", json={**body, **changed}) as response:
            return response.status

    statuses = await asyncio.gather(*(ask() for _ in range(3 * MAX_INFLIGHT)), ask(model="nobody"))
    assert 429 in statuses, "nothing was refused"


async def ask(house: Cluster, url: str, query: Query) -> tuple[int, float | None]:
    """Series with a finite value, and one of them. Raises: AssertionError if Prometheus refuses the query."""
    expression = query.expression.replace("$__rate_interval", WINDOW)
    async with house.http.post(f"{url}/api/v1/query", data={"query": expression}) as response:
        answer = await response.json()
    assert answer["status"] == "success", f"{query.name}: {answer.get('error')}: {expression}"
    values = [float(row["value"][1]) for row in answer["data"]["result"]]
    finite = [value for value in values if math.isfinite(value)]
    return len(finite), max(finite, default=None)


async def rows_of(folder: Path) -> list[tuple[Query, int, float | None]]:
    """Every query with the number of its series; those without data last as asked until DATA_LIMIT_S."""
    environment = {"BATON_FRONTEND_MAX_INFLIGHT": str(MAX_INFLIGHT)}
    queries = [*dashboard_queries(), *alert_queries()]
    counts = {"prefill": 2, "decode": 2}
    certificates.make(folder / "tls")  # some series are there with TLS only
    async with (
        cluster(folder / "baton", profile=PROFILE, environment=environment, certificates=folder / "tls", **counts) as house,
        prometheus(folder, house) as url,
    ):
        say("a cluster of two prefill and two decode instances, and Prometheus, run")
        load = Load(house.http, house.url, "test-model", Oracle(PROFILE, up.demo_model()), seed=1)
        found: dict[Query, tuple[int, float | None]] = {}

        async def have_data() -> bool:
            for query in queries:
                if not found.get(query, (0, None))[0]:
                    found[query] = await ask(house, url, query)
            return all(count for count, _ in found.values())

        async with load.running(KINDS):
            await events(house)
            deadline = time.monotonic() + DATA_LIMIT_S
            while not await have_data() and time.monotonic() < deadline:
                await asyncio.sleep(SCRAPE_S)
        assert not load.tally.corrupt, load.tally.corrupt
        async with house.http.get(f"{url}/api/v1/rules") as response:
            groups = (await response.json())["data"]["groups"]
        sick = [rule["name"] for group in groups for rule in group["rules"] if rule["health"] != "ok"]
        assert not sick, f"rules that Prometheus cannot evaluate: {sick}"
        return [(query, *found[query]) for query in queries]


def table(rows: list[tuple[Query, int, float | None]], took_s: float) -> str:
    """docs/dashboard-queries.md."""
    version = subprocess.run(["prometheus", "--version"], capture_output=True, text=True).stdout.split(" (")[0].replace(", version", "")
    lines = [
        "# Every query of the dashboard and of the alerts, as answered",
        "",
        f"Written by `make test-observability` ({time.strftime('%Y-%m-%d')}, {version}, {took_s:.0f} s): a real Prometheus scrapes a",
        "cluster of real processes with two prefill and two decode instances on the sim engine, under load, while one worker is killed,",
        f"requests are refused and clients leave. `$__rate_interval` is {WINDOW}. *Series*: those with a finite value; *value*: the",
        "largest; for an alert, the value it compares. A short run on a busy machine: the values show that there is data, not how fast",
        "Baton is. Grafana was not run.",
        "",
        "| of | series | value | query |",
        "|---|---|---|---|",
    ]
    for query, count, value in rows:
        shown = "none" if value is None else f"{value:.4g}"
        lines.append(f"| {query.name} ({query.kind}) | {count} | {shown} | `{query.expression.replace('|', chr(92) + '|')}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the summary for machines")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the answers as a table")
    arguments = parser.parse_args()
    for command in ("prometheus", "promtool"):
        if shutil.which(command) is None:
            sys.exit(f"{command} is not on PATH: apt-get install prometheus")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.monotonic()
    check_files()
    with tempfile.TemporaryDirectory(prefix="baton-observe-") as folder:
        rows = asyncio.run(rows_of(Path(folder)))
    took = time.monotonic() - began
    empty = [query for query, count, _ in rows if not count]
    if arguments.markdown:
        arguments.markdown.write_text(table(rows, took))
    for query in empty:
        say(f"no data: {query.name}: {query.expression}")
    summary = {
        "queries": len(rows),
        "with_data": len(rows) - len(empty),
        "seconds": round(took, 1),
        "empty": [query.name for query in empty],
    }
    print(json.dumps(summary) if arguments.json else f"{len(rows) - len(empty)} of {len(rows)} queries returned data, {took:.0f} s")
    sys.exit(1 if empty else 0)


if __name__ == "__main__":
    main()
