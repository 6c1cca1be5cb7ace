"""`baton up`: an embedded etcd, the five services, and whoever restarts them."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import click
import psutil
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_runtime import tls
from baton_runtime.discovery import Discovery, View
from baton_runtime.model_folder import ModelFolderError, inspect_model_folder
from rich.console import Console

from baton_cli import certificates, etcd_server, state
from baton_cli.processes import Child, Supervisor, say

STOP_LIMIT_S = 4.0  # Ctrl-C ends everything within 5 s; the rest is for etcd and the terminal
NAMESPACE = "/baton/v1"
_METRICS_LIMIT = aiohttp.ClientTimeout(total=2.0)

SERVICES = {
    "kvtransfer": pb.SERVICE_KVTRANSFER,
    "router": pb.SERVICE_ROUTER,
    "prefill": pb.SERVICE_PREFILL,
    "decode": pb.SERVICE_DECODE,
    "frontend": pb.SERVICE_FRONTEND,
}


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    engine: str
    profile: str
    model: Path
    served_name: str
    counts: dict[str, int]  # service -> processes
    host: str
    port: int
    otlp: str
    sample_ratio: float
    etcd: str  # empty: embedded
    folder: Path
    ready_limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    tls: Path | None = None  # folder of certificates, as `baton certificates` lays it out


def demo_model() -> Path:
    """The demonstration model that comes with this command."""
    return Path(str(files("baton_cli"))) / "demo_model"


def check(options: Options) -> None:
    """Everything that can be found out before a process is started. Raises: click.ClickException that names the fix."""
    if (running := state.read(options.folder)) is not None:
        raise click.ClickException(f"a Baton already runs here (pid {running.pid}, {running.url or 'starting'}); stop it with: baton down")
    try:
        inspect_model_folder(options.model, any_architecture=options.engine == "sglang")
    except ModelFolderError as error:
        raise click.ClickException(f"--{error}") from error
    for service in SERVICES:
        if find_spec(f"baton_{service}") is None:
            raise click.ClickException(f"baton-{service} is not installed; pip install 'baton-cli[all]'")
    if options.port:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.host, options.port))
            except OSError as error:
                raise click.ClickException(
                    f"--port {options.port}: {options.host}:{options.port} cannot be bound ({error.strerror}); choose another with --port"
                ) from error


@contextmanager
def reserved_port(options: Options) -> Iterator[Options]:
    """With several frontends: one port for all of them, free now, that nobody but frontends can take while this lasts.

    A socket that is bound with SO_REUSEPORT and does not listen gets no connections, but keeps the number: a frontend that is started
    again finds it. Linux lets only processes of the same user bind it as well. Yields: options with that port.
    Raises: click.ClickException if it cannot be bound.
    """
    if options.counts["frontend"] == 1:
        yield options
        return
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            holder.bind((options.host, options.port))
        except OSError as error:
            raise click.ClickException(f"--port {options.port}: {options.host} cannot be bound ({error.strerror})") from error
        yield replace(options, port=holder.getsockname()[1])


def environment_of(options: Options, service: str, instance_id: str, etcd: str) -> dict[str, str]:
    """The BATON_* variables of one process."""
    settings = {
        "instance_id": instance_id,
        "etcd": etcd,
        "etcd_namespace": NAMESPACE,
        "otlp_endpoint": options.otlp,
        "trace_sample_ratio": str(options.sample_ratio),
        "drain_grace_s": str(STOP_LIMIT_S / 2),
        "log_format": "json",
    }
    if options.tls is not None:
        mine = certificates.files_in(options.tls, service)
        settings |= {"tls_ca": str(mine.ca), "tls_certificate": str(mine.certificate), "tls_key": str(mine.key)}
    if service in ("prefill", "decode"):
        settings |= {"engine": options.engine, "model": str(options.model), "served_name": options.served_name, "torch_threads": "1"}
        if options.engine == "sim":
            settings["profile"] = options.profile
    if service == "decode" and options.engine == "sglang":  # a server takes either whole requests or those handed over
        settings["can_prefill"] = str(not options.counts["prefill"]).lower()
    if service == "frontend":
        settings["http_listen"] = f"{options.host}:{options.port}"
        settings["http_reuse_port"] = str(options.counts["frontend"] > 1).lower()
    return {f"BATON_{service.upper()}_{name.upper()}": value for name, value in settings.items()} | options.environment


def plan(options: Options, etcd: str) -> list[Child]:
    """The processes to start, in the order in which they are stopped."""
    order = ["frontend", "router", "prefill", "decode", "kvtransfer"]
    children = []
    for service in order:
        for index in range(options.counts[service]):
            name = f"{service}-{index}"
            command = [sys.executable, "-m", f"baton_{service}.main"]
            log = options.folder / "logs" / f"{name}.log"
            children.append(Child(name, command, environment_of(options, service, name, etcd), log))
    return children


async def run(options: Options, console: Console) -> None:
    """Start everything, say so, keep it running until SIGINT or SIGTERM, stop everything.

    Raises: click.ClickException if a process does not come up; nothing is left running then.
    """
    with reserved_port(options) as placed:
        await _run(placed, console)


async def _run(options: Options, console: Console) -> None:
    supervisor = Supervisor()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, supervisor.stopping.set)
    shutil.rmtree(options.folder / "logs", ignore_errors=True)
    if options.tls is not None:
        shutil.rmtree(options.tls, ignore_errors=True)
        certificates.make(options.tls)
        tls.use(certificates.files_in(options.tls, "cli"))
    try:
        etcd = options.etcd or await _start_etcd(options, supervisor, console)
        _write_state(options, etcd, url="", ready=False)
        supervisor.children = plan(options, etcd) + supervisor.children
        url = await _bring_up(options, supervisor, etcd, console)
        if supervisor.stopping.is_set():
            return
        _write_state(options, etcd, url=url, ready=True)
        print_next_steps(console, url, options)
        async with asyncio.TaskGroup() as group:
            for child in supervisor.children:
                group.create_task(supervisor.keep(child), name=f"keep {child.name}")
            await supervisor.stopping.wait()
            console.print("stopping ...", highlight=False)
            await supervisor.stop(STOP_LIMIT_S)  # ends the children, and with them their keepers
    finally:
        await supervisor.stop(STOP_LIMIT_S)
        state.remove(options.folder)
        console.print("stopped", highlight=False)


async def _start_etcd(options: Options, supervisor: Supervisor, console: Console) -> str:
    files = certificates.files_in(options.tls, "etcd") if options.tls is not None else None
    with console.status("starting etcd"):
        child, address = await etcd_server.start(options.folder / "etcd", options.folder / "logs" / "etcd.log", files)
    supervisor.children.append(child)
    console.print(f"  [green]✓[/] etcd        {address}", highlight=False)
    return address


async def _bring_up(options: Options, supervisor: Supervisor, etcd: str, console: Console) -> str:
    """Start the services and wait until each is in discovery. Returns the URL of the HTTP server ("" if told to stop)."""
    waiting = {child.name: child for child in supervisor.children if child.name != "etcd"}
    for child in waiting.values():
        await child.start()
    discovery = Discovery(etcd, NAMESPACE)
    await discovery.start()
    url = ""
    deadline = time.monotonic() + options.ready_limit_s
    try:
        view = discovery.view(*SERVICES.values())
        with console.status("starting") as status:
            while waiting and not supervisor.stopping.is_set():
                status.update(f"starting {', '.join(waiting)}")
                for name, child in list(waiting.items()):
                    if (instance := _find(view, child)) is not None:
                        del waiting[name]
                        url = f"http://{instance.http_address}" if instance.http_address else url
                        console.print(f"  [green]✓[/] {name:<11} {instance.http_address or instance.grpc_address}", highlight=False)
                    elif not child.is_running:
                        raise click.ClickException(
                            f"{name} did not start ({child.exit_text()}); the end of {child.log}:\n{child.last_lines()}"
                        )
                if time.monotonic() > deadline:
                    slow = next(iter(waiting.values()))
                    raise click.ClickException(
                        f"{slow.name} was not ready within {options.ready_limit_s:g} s; the end of {slow.log}:\n{slow.last_lines()}"
                    )
                await asyncio.sleep(0.05)
            status.update("connecting")
            while not supervisor.stopping.is_set() and not await routers_are_open(view, options.counts):
                if time.monotonic() > deadline:
                    raise click.ClickException(f"the routers do not hear the workers; see {options.folder / 'logs'}")
                await asyncio.sleep(0.05)
    finally:
        await discovery.close()
    return url


async def routers_are_open(view: View, counts: dict[str, int]) -> bool:
    """Whether every router hears every worker: only then is a request placed as it will always be."""
    wanted = counts["prefill"] + counts["decode"]
    routers = [i.metrics_address for i in view.instances.values() if i.service == pb.SERVICE_ROUTER]
    return all([await _open_workers(address) >= wanted for address in routers])


async def _open_workers(metrics_address: str) -> float:
    """A router's gauge of workers that may get work; 0 if it does not answer."""
    try:
        async with aiohttp.ClientSession(timeout=_METRICS_LIMIT) as session, session.get(f"http://{metrics_address}/metrics") as response:
            lines = (await response.text()).splitlines()
    except (aiohttp.ClientError, TimeoutError):
        return 0
    return next((float(line.split()[1]) for line in lines if line.startswith("baton_router_open_workers ")), 0)


def _find(view: View, child: Child) -> pb.Instance | None:
    """The record of that very process."""
    assert child.process is not None
    for instance in view.instances.values():
        if instance.instance_id == child.name and instance.pid == child.process.pid:
            return instance
    return None


def _write_state(options: Options, etcd: str, url: str, ready: bool) -> None:
    me = psutil.Process(os.getpid())
    state.write(
        options.folder, state.State(me.pid, me.create_time(), etcd, NAMESPACE, url, options.served_name, ready, str(options.tls or ""))
    )


def print_next_steps(console: Console, url: str, options: Options) -> None:
    """What a new user would want to type now."""
    question = "red = 4 7 1 ; blue = 2 2 8 ; red ?" if options.model == demo_model() else "Hello!"
    body = f'{{"model": "{options.served_name}", "messages": [{{"role": "user", "content": "{question}"}}]}}'
    console.print(f"\nBaton serves [bold]{options.served_name}[/] at [bold]{url}/v1[/]. Try:\n", highlight=False)
    console.print(
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{body}'", highlight=False, soft_wrap=True
    )
    baton = sys.argv[0] if sys.argv[0].endswith("/baton") else "baton"  # as the user typed it: the environment may not be on PATH
    console.print(f"  {baton} chat '{question}'\n  {baton} status\n  {baton} down          (or Ctrl-C)\n", highlight=False)
    if options.model == demo_model() and options.engine == "torch":
        console.print(
            "This is a demonstration model: it recalls the facts you write, nothing else. Your own: --model FOLDER", highlight=False
        )
    say(f"logs: {options.folder / 'logs'}")
