"""`baton status`: every instance from discovery, what each worker holds, what the books say."""

import asyncio
import sys
from collections.abc import Iterable

import grpc
import msgspec
from baton_contracts.discovery.v1 import instance_pb2 as pb
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as kv_pb
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2_grpc as kv_grpc
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb
from baton_contracts.worker.v1 import worker_service_pb2_grpc as worker_grpc
from baton_runtime.discovery import Discovery
from baton_runtime.rpc import open_channel
from rich.console import Console
from rich.table import Table

from baton_cli.handoff_text import size

ASK_LIMIT_S = 2.0

SERVICE_NAMES = {
    pb.SERVICE_FRONTEND: "frontend",
    pb.SERVICE_ROUTER: "router",
    pb.SERVICE_PREFILL: "prefill",
    pb.SERVICE_DECODE: "decode",
    pb.SERVICE_KVTRANSFER: "kvtransfer",
}


class Blocks(msgspec.Struct):
    """Blocks of a worker by state."""

    total: int
    free: int
    cached: int
    pinned: int
    reserved: int
    used: int


class InstanceReport(msgspec.Struct):
    """One instance; fields a service does not have are null."""

    service: str
    instance_id: str
    incarnation: str
    version: str
    address: str  # host:port of gRPC, of HTTP for the frontend
    pid: int
    metrics: str  # host:port
    draining: bool
    state: str  # "ok", or what is wrong
    model: str | None = None
    transports: list[str] | None = None
    blocks: Blocks | None = None
    running_sequences: int | None = None
    waiting_sequences: int | None = None
    live_handoffs: int | None = None
    stranded_bytes: int | None = None
    mismatch_bytes: int | None = None
    live_handoffs_in_books: int | None = None
    agreed_handoffs: int | None = None
    disagreed_handoffs: int | None = None


class LinkReport(msgspec.Struct):
    """One source a worker pulls from, as that worker tells it."""

    source: str
    sink: str
    transport: str
    reason: str  # why this transport
    gb_per_s: float  # of the latest operations while they ran
    pulled_bytes: int


class Report(msgspec.Struct):
    """Everything `baton status` knows."""

    etcd: str
    instances: list[InstanceReport]
    problems: list[str]
    links: list[LinkReport] = []


async def collect(etcd: str, namespace: str) -> Report:
    """Read discovery, ask every worker and every kvtransfer; each answer is waited for ASK_LIMIT_S at most."""
    discovery = Discovery(etcd, namespace)
    await discovery.start()
    try:
        view = discovery.view(*SERVICE_NAMES)
        if not await view.synced(ASK_LIMIT_S * 2):
            return Report(etcd, [], [f"etcd at {etcd} does not answer"])
        instances = sorted(view.instances.values(), key=lambda i: (i.service, i.instance_id))
    finally:
        await discovery.close()
    links: dict[tuple[str, str], kv_pb.Link] = {}
    reports = list(await asyncio.gather(*(_report(instance, links) for instance in instances)))
    problems = [f"{r.instance_id}: {r.state}" for r in reports if r.state != "ok"]
    missing = set(SERVICE_NAMES.values()) - {r.service for r in reports}
    problems += [f"no {name} is registered" for name in sorted(missing - {"prefill"})]
    return Report(etcd, reports, problems, sorted(map(_link, links.values()), key=lambda link: (link.source, link.sink)))


async def _report(instance: pb.Instance, links: dict[tuple[str, str], kv_pb.Link]) -> InstanceReport:
    """What an instance says of itself; links: what a kvtransfer knows of links is added. Every kvtransfer knows all: each counts once."""
    report = InstanceReport(
        service=SERVICE_NAMES.get(instance.service, "unknown"),
        instance_id=instance.instance_id,
        incarnation=instance.incarnation,
        version=instance.version,
        address=instance.http_address or instance.grpc_address,
        pid=instance.pid,
        metrics=instance.metrics_address,
        draining=instance.draining,
        state="ok",
    )
    if instance.HasField("model"):
        report.model = instance.model.served_name
        report.transports = [offer.name for offer in instance.transports]
    try:
        if instance.service in (pb.SERVICE_PREFILL, pb.SERVICE_DECODE):
            await _ask_worker(instance, report)
        elif instance.service == pb.SERVICE_KVTRANSFER:
            await _ask_books(instance, report, links)
    except grpc.aio.AioRpcError as error:
        report.state = f"does not answer ({error.code().name})"
    return report


async def _ask_worker(instance: pb.Instance, report: InstanceReport) -> None:
    async with open_channel(instance.grpc_address) as channel:
        answer = await worker_grpc.WorkerServiceStub(channel).GetStatus(worker_pb.GetStatusRequest(), timeout=ASK_LIMIT_S)
    counts = answer.load.blocks
    report.blocks = Blocks(counts.total, counts.free, counts.cached, counts.pinned, counts.reserved, counts.used)
    report.running_sequences = answer.load.running_sequences
    report.waiting_sequences = answer.load.waiting_sequences
    report.live_handoffs = answer.live_handoffs
    report.stranded_bytes = answer.stranded_bytes
    if answer.incarnation != instance.incarnation:
        report.state = "another process answers at its address"
    elif answer.integrity_error:
        report.state = f"integrity: {answer.integrity_error}"
    elif answer.stranded_bytes:
        report.state = f"{answer.stranded_bytes} stranded bytes"


async def _ask_books(instance: pb.Instance, report: InstanceReport, links: dict[tuple[str, str], kv_pb.Link]) -> None:
    async with open_channel(instance.grpc_address, "kvtransfer") as channel:
        answer = await kv_grpc.KvTransferServiceStub(channel).GetBooks(kv_pb.GetBooksRequest(), timeout=ASK_LIMIT_S)
    report.mismatch_bytes = answer.mismatch_bytes
    report.live_handoffs_in_books = answer.live_handoffs
    report.agreed_handoffs = answer.agreed_handoffs
    report.disagreed_handoffs = answer.disagreed_handoffs
    for link in answer.links:
        pair = (link.sink_incarnation, link.report.source_incarnation)
        if pair not in links or links[pair].report.pulled_bytes < link.report.pulled_bytes:
            links[pair] = link
    if answer.mismatch_bytes:
        report.state = f"books differ by {answer.mismatch_bytes} bytes"
    elif answer.disagreed_handoffs:
        report.state = f"the two sides of {answer.disagreed_handoffs} handoffs disagree"


def _link(link: kv_pb.Link) -> LinkReport:
    told = link.report
    return LinkReport(
        source=link.source_instance_id,
        sink=link.sink_instance_id,
        transport=told.transport,
        reason=told.reason,
        gb_per_s=round(told.bytes_per_s / 1e9, 3),
        pulled_bytes=told.pulled_bytes,
    )


def to_json(report: Report) -> str:
    """The report for machines."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def to_text(report: Report) -> str:
    """The report for people."""
    table = Table(box=None, header_style="bold")
    for column in ("service", "instance", "version", "address", "pid", "metrics", "holds", "state"):
        table.add_column(column, overflow="fold")
    for r in report.instances:
        state = "draining" if r.draining and r.state == "ok" else r.state
        row = (r.service, r.instance_id, r.version, r.address, str(r.pid), r.metrics, " ".join(_holdings(r)))
        table.add_row(*row, f"[green]{state}[/]" if state == "ok" else f"[red]{state}[/]")
    console = Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width; 80 would fold every row
    with console.capture() as capture:
        console.print(table)
        if report.links:
            console.print(_links_table(report.links))
        for problem in report.problems:
            console.print(f"[red]![/] {problem}", highlight=False)
    return capture.get().rstrip()


def _links_table(links: list[LinkReport]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("link", "transport", "GB/s", "bytes", "why"):
        table.add_column(column, overflow="fold", justify="right" if column in ("GB/s", "bytes") else "left")
    for link in links:
        speed = f"{link.gb_per_s:.2f}" if link.gb_per_s else "-"
        table.add_row(f"{link.source} > {link.sink}", link.transport, speed, size(link.pulled_bytes), link.reason)
    return table


def _holdings(report: InstanceReport) -> Iterable[str]:
    if report.blocks is not None:
        b = report.blocks
        yield f"{b.used + b.pinned + b.reserved}/{b.total} blocks, {b.cached} cached;"
        yield f"{report.running_sequences} running, {report.waiting_sequences} waiting, {report.live_handoffs} handoffs"
        yield f"({', '.join(report.transports or ())})"
    if report.mismatch_bytes is not None:
        yield f"{report.live_handoffs_in_books} live, {report.agreed_handoffs} agreed, {report.mismatch_bytes} bytes apart"
