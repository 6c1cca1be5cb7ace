"""A whole Baton of real processes for the cross-service tests, on free ports, over a real etcd."""

import asyncio
import json
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import aiohttp
from baton_cli import status, up
from baton_cli.certificates import files_in
from baton_cli.processes import Child
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_runtime import tls
from baton_runtime.discovery import Discovery, View
from baton_runtime.testing import EtcdProcess
from baton_runtime.tls import TlsFiles
from hosts import Hosts
from prometheus_client.parser import text_string_to_metric_families

READY_LIMIT_S = 60.0
SETTLE_LIMIT_S = 5.0  # law 2
ROOMY_TOKENS = 65536

T = TypeVar("T")


async def until(what: str, check: Callable[[], Awaitable[T | None]], limit_s: float) -> T:
    """Wait until check returns something true. Raises: AssertionError naming what was waited for."""
    deadline = time.monotonic() + limit_s
    while True:
        if result := await check():
            return result
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.02)


@dataclass
class Cluster:
    """Five services and etcd; nothing restarts a process that dies, tests do that themselves."""

    etcd: EtcdProcess
    options: up.Options
    view: View
    http: aiohttp.ClientSession
    children: dict[str, Child] = field(default_factory=dict)
    url: str = ""
    hosts: Hosts | None = None  # where they run, if not all on this machine's own network

    def instance(self, name: str) -> pb.Instance:
        """The last known record of an instance, e.g. "prefill-0"."""
        return next(i for i in self.view.instances.values() if i.instance_id == name)

    def signal(self, name: str, signum: signal.Signals) -> None:
        """Send a signal to a process of ours."""
        self.children[name].send(signum)

    async def start(self, name: str) -> None:
        """Start (or start again) one process and wait until discovery has that very life of it."""
        child = self.children[name]
        await child.start()
        await self.ready(name)

    async def ready(self, name: str) -> pb.Instance:
        """Wait until a started process is in discovery."""
        child = self.children[name]

        async def registered() -> pb.Instance | None:
            assert child.is_running, f"{name} ended ({child.exit_text()}):\n{child.last_lines(40)}"
            assert child.process is not None
            return next((i for i in self.view.instances.values() if i.instance_id == name and i.pid == child.process.pid), None)

        return await until(f"{name} ready", registered, READY_LIMIT_S)

    async def kill(self, name: str) -> None:
        """SIGKILL and wait for the end."""
        self.signal(name, signal.SIGKILL)
        process = self.children[name].process
        assert process is not None
        await process.wait()

    async def metrics(self, name: str) -> Mapping[str, float]:
        """Samples of an instance: "name" or 'name{label="value"}' -> value; and the sum over labels under the bare name."""
        async with self.http.get(f"http://{self.instance(name).metrics_address}/metrics") as response:
            text = await response.text()
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                values[f"{sample.name}{{{labels}}}"] = sample.value
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    async def serves_model(self) -> bool:
        """Whether the frontend lists the model: it hears of the workers by itself, perhaps later than we do."""
        async with self.http.get(f"{self.url}/v1/models") as response:
            return response.status == 200 and bool((await response.json())["data"])

    async def complete(self, **body: object) -> dict:
        """POST /v1/completions, not streamed. Raises AssertionError unless 200."""
        async with self.http.post(f"{self.url}/v1/completions", json={"model": self.options.served_name, **body}) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return answer

    async def report(self) -> status.Report:
        """What `baton status` says."""
        return await status.collect(self.options.etcd, up.NAMESPACE)

    async def settled(self, *, without: tuple[str, ...] = (), limit_s: float = SETTLE_LIMIT_S) -> None:
        """Wait until every live worker is idle and sound and the books agree. `without`: instances that are dead or stopped."""
        last = ""

        async def idle() -> bool:
            nonlocal last
            report = await self.report()
            last = unsettled(report, without)
            return not last

        try:
            await until("settled", idle, limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {last}") from None


def unsettled(report: status.Report, without: tuple[str, ...]) -> str:
    """What keeps a cluster from being idle and sound; empty if nothing does."""
    found = []
    for instance in report.instances:
        if instance.instance_id in without:
            continue
        if instance.state != "ok":
            found.append(f"{instance.instance_id}: {instance.state}")
        if (blocks := instance.blocks) is not None and blocks.pinned + blocks.reserved + blocks.used:
            found.append(f"{instance.instance_id}: {blocks}")
        if instance.live_handoffs or instance.live_handoffs_in_books or instance.running_sequences or instance.waiting_sequences:
            found.append(f"{instance.instance_id}: {instance}")
    return "; ".join(found)


def roomy_model(folder: Path) -> Path:
    """A copy of the demo model's folder with a longer context; the sim engine takes sizes and the tokenizer from it, not the weights."""
    shutil.copytree(up.demo_model(), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": ROOMY_TOKENS}))
    return folder


async def _etcd(hosts: Hosts | None, files: TlsFiles | None) -> EtcdProcess:
    if hosts is None:
        return EtcdProcess(tls=files)
    await hosts.add("etcd")
    return EtcdProcess(host=hosts.address("etcd"), prefix=hosts.command("etcd", []))


async def _place(child: Child, hosts: Hosts) -> None:
    """On a host of its own."""
    await hosts.add(child.name)
    child.command = hosts.command(child.name, child.command)
    inside, outside, service = hosts.address(child.name), hosts.outside(child.name), child.name.partition("-")[0]
    settings = {"METRICS_LISTEN": f"{outside}:0"}
    if service == "frontend":
        settings["HTTP_LISTEN"] = f"{outside}:8000"  # the same in every life
    settings["LISTEN"] = f"{inside}:0"
    if service in ("prefill", "decode"):
        settings["TRANSFER_LISTEN"] = f"{inside}:0"
    child.environment = {**child.environment, **{f"BATON_{service.upper()}_{name}": value for name, value in settings.items()}}


@asynccontextmanager
async def cluster(
    folder: Path,
    *,
    engine: str = "sim",
    profile: str = "instant",
    model: Path | None = None,
    prefill: int = 1,
    decode: int = 1,
    frontend: int = 1,
    router: int = 1,
    kvtransfer: int = 1,
    otlp: str = "",
    environment: Mapping[str, str] | None = None,
    hosts: Hosts | None = None,
    change: Callable[[str, list[str]], list[str]] = lambda name, command: command,
    certificates: Path | None = None,
) -> AsyncIterator[Cluster]:
    """A running Baton; every process ends with the block, and its last lines are shown if it did not come up.

    hosts: put every process, etcd too, on a host of its own that has its name; clients and metrics go by the outside network.
    change: another command line for a process, from its name and the one it would have.
    certificates: what `baton certificates` made; everything, and this process as long as the block lasts, speaks TLS with them.
    """
    stack = ExitStack()
    if certificates is not None:
        stack.callback(tls.use, None)
        tls.use(files_in(certificates, "cli"))
    async with await _etcd(hosts, files_in(certificates, "etcd") if certificates is not None else None) as etcd:
        asked = up.Options(
            engine=engine,
            profile=profile,
            model=model or up.demo_model(),
            served_name="test-model",
            counts={"frontend": frontend, "router": router, "prefill": prefill, "decode": decode, "kvtransfer": kvtransfer},
            host="127.0.0.1",
            port=0,
            otlp=otlp,
            sample_ratio=1.0 if otlp else 0.0,
            etcd=etcd.endpoint,
            folder=folder,
            ready_limit_s=READY_LIMIT_S,
            environment=dict(environment or {}),
            tls=certificates,
        )
        options = stack.enter_context(up.reserved_port(asked))
        discovery = Discovery(etcd.endpoint, up.NAMESPACE)
        await discovery.start()
        children = up.plan(options, etcd.endpoint)
        for child in children:
            child.command = change(child.name, child.command)
            if hosts is not None:
                await _place(child, hosts)
        try:
            async with aiohttp.ClientSession() as http:
                made = Cluster(etcd, options, discovery.view(*up.SERVICES.values()), http, {c.name: c for c in children}, hosts=hosts)
                for child in children:
                    await child.start()
                for child in children:
                    await made.ready(child.name)
                await until("the routers hear all workers", lambda: up.routers_are_open(made.view, options.counts), READY_LIMIT_S)
                made.url = f"http://{made.instance('frontend-0').http_address}"
                await until("the frontend serves the model", made.serves_model, READY_LIMIT_S)
                yield made
        finally:
            await discovery.close()
            for child in children:
                child.send(signal.SIGKILL)
                if child.process is not None:
                    await child.process.wait()
            stack.close()
