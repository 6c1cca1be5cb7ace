"""The `baton` command."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import psutil
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as kv_pb
from baton_runtime import tls
from baton_runtime.errors import ConfigError
from baton_runtime.log import configure_logging
from rich.console import Console

from baton_cli import certificates as certificates_command
from baton_cli import chat as chat_command
from baton_cli import drain as drain_command
from baton_cli import handoffs as handoffs_command
from baton_cli import state
from baton_cli import status as status_command
from baton_cli import up as up_command
from baton_cli.bench.command import bench

_COUNT = click.IntRange(1, 64)
_folder = click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Where this Baton is written down (logs, etcd data). Default: ~/.local/state/baton",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="baton-cli")
def main() -> None:
    """Serve language models with prefill and decode in separate processes, and lose nothing on the way."""
    configure_logging("cli", "cli", "", level="error", fmt="console")  # the libraries' events are not for this terminal
    try:
        tls.use(tls.files_of("cli", *(os.environ.get(f"BATON_CLI_TLS_{name}", "") for name in ("CA", "CERTIFICATE", "KEY"))))
    except ConfigError as error:
        raise click.ClickException(error.message) from error


@main.command()
@click.option(
    "--engine",
    type=click.Choice(["torch", "sim", "sglang"]),
    default="torch",
    show_default=True,
    help="Real model, a timed simulation of one, or SGLang servers (set BATON_PREFILL_SGLANG_ARGS and BATON_DECODE_SGLANG_ARGS).",
)
@click.option("--profile", default="instant", show_default=True, help="Timing of --engine sim: instant, polynomial, or a file.")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=None,
    help="Hugging Face folder (torch: Llama, Qwen2, Qwen3). Default: the demo model.",
)
@click.option("--served-name", default=None, help="Model name clients use. Default: the folder's name.")
@click.option("--prefill", type=click.IntRange(0, 64), default=1, show_default=True, help="Prefill processes; 0: decode does everything.")
@click.option("--decode", type=_COUNT, default=1, show_default=True, help="Decode processes.")
@click.option(
    "--frontend", "--frontends", type=_COUNT, default=1, show_default=True, help="Frontend processes; all share the port (SO_REUSEPORT)."
)
@click.option("--router", type=_COUNT, default=1, show_default=True, help="Router processes.")
@click.option("--kvtransfer", type=_COUNT, default=1, show_default=True, help="Kvtransfer processes.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address the HTTP server binds.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port of the HTTP server; 0: any free one.")
@click.option("--etcd", default="", help="Endpoints of your own etcd, HOST:PORT[,HOST:PORT]. Default: an embedded one.")
@click.option("--tls", "is_tls", is_flag=True, help="Mutual TLS between all processes and etcd, with certificates made on the spot.")
@click.option("--otlp", default="", help="OTLP gRPC endpoint for traces, e.g. 127.0.0.1:4317 (Jaeger).")
@click.option(
    "--trace-ratio", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Share of requests traced when --otlp is given."
)
@click.option("--detach", is_flag=True, help="Return when everything is ready; stop with: baton down")
@click.option(
    "--ready-timeout", type=click.FloatRange(1), default=120.0, show_default=True, help="Seconds to wait for a process to be ready."
)
@_folder
def up(
    engine: str,
    profile: str,
    model: Path | None,
    served_name: str | None,
    prefill: int,
    decode: int,
    frontend: int,
    router: int,
    kvtransfer: int,
    host: str,
    port: int,
    etcd: str,
    is_tls: bool,
    otlp: str,
    trace_ratio: float,
    detach: bool,
    ready_timeout: float,
    state_dir: Path | None,
) -> None:
    """Start etcd and the five services, watch over them, stop them on Ctrl-C."""
    if is_tls and etcd:
        raise click.ClickException("--tls makes certificates that your etcd does not know; leave --etcd out, or see docs/security.md")
    state_folder = (state_dir or state.default_folder()).resolve()
    folder = (model or up_command.demo_model()).resolve()
    options = up_command.Options(
        engine=engine,
        profile=str(Path(profile).resolve()) if Path(profile).is_file() else profile,
        model=folder,
        served_name=served_name or ("demo-recall" if model is None else folder.name),
        counts={"frontend": frontend, "router": router, "prefill": prefill, "decode": decode, "kvtransfer": kvtransfer},
        host=host,
        port=port,
        otlp=otlp,
        sample_ratio=trace_ratio if otlp else 0.0,
        etcd=etcd,
        folder=state_folder,
        tls=state_folder / "tls" if is_tls else None,
        ready_limit_s=ready_timeout,
    )
    up_command.check(options)
    if detach:
        _detach(options)
    else:
        asyncio.run(up_command.run(options, Console(stderr=True)))


def _etcd_here(state_dir: Path | None) -> str:
    """The etcd of the Baton that runs here, with whose certificates we speak from now on."""
    running = state.require((state_dir or state.default_folder()).resolve())
    if running.tls:
        tls.use(certificates_command.files_in(Path(running.tls), "cli"))
    return running.etcd


def _detach(options: up_command.Options) -> None:
    """Run the same command in a session of its own, and wait until it is ready or has ended."""
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "supervisor.log"
    command = [sys.executable, "-m", "baton_cli.main", *(argument for argument in sys.argv[1:] if argument != "--detach")]
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    while child.poll() is None:
        running = state.read(options.folder)
        if running is not None and running.ready and running.pid == child.pid:
            up_command.print_next_steps(Console(stderr=True), running.url, options)
            return
        time.sleep(0.1)
    raise click.ClickException(f"Baton did not start:\n{log.read_text(errors='replace')}")


@main.command()
@_folder
def down(state_dir: Path | None) -> None:
    """Stop the Baton that runs here."""
    folder = (state_dir or state.default_folder()).resolve()
    running = state.require(folder)
    os.kill(running.pid, signal.SIGTERM)
    try:
        psutil.Process(running.pid).wait(timeout=2 * up_command.STOP_LIMIT_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        raise click.ClickException(f"the supervisor (pid {running.pid}) is still stopping; look into {folder}") from None
    click.echo("stopped", err=True)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--etcd", default="", help="Look there instead of at the Baton that runs here.")
@_folder
def status(as_json: bool, etcd: str, state_dir: Path | None) -> None:
    """Show every instance, what it holds and what the books say."""
    etcd = etcd or _etcd_here(state_dir)
    report = asyncio.run(status_command.collect(etcd, up_command.NAMESPACE))
    click.echo(status_command.to_json(report) if as_json else status_command.to_text(report))
    if report.problems:
        sys.exit(1)


@main.command()
@click.option("--watch/--once", "is_watch", default=None, help="Follow the handoffs, or show them once. Default: follow on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one document, with --watch one object per line.")
@click.option("--instance", default="", help="Only handoffs from or to this instance, e.g. decode-0.")
@click.option("--request", "request_id", default="", help="Only handoffs of this request.")
@click.option("--etcd", default="", help="Look there instead of at the Baton that runs here.")
@_folder
def handoffs(is_watch: bool | None, as_json: bool, instance: str, request_id: str, etcd: str, state_dir: Path | None) -> None:
    """Show every live handoff: pair, state, bytes, GB/s, age, transport and why."""
    etcd = etcd or _etcd_here(state_dir)
    if is_watch is None:
        is_watch = sys.stdout.isatty() and not as_json
    request = kv_pb.WatchHandoffsRequest(instance_id=instance, request_id=request_id)
    try:
        asyncio.run(handoffs_command.run(etcd, up_command.NAMESPACE, request, is_watch=is_watch, is_json=as_json))
    except KeyboardInterrupt:
        if not is_watch:
            raise


@main.command()
@click.argument("instance")
@click.option("--wait", is_flag=True, help="Return when it holds nothing any more. Default: when the drain has begun.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0), default=None, help="Seconds to wait at most; the drain goes on after that."
)
@click.option(
    "--grace", "grace_s", type=click.FloatRange(0, 3600), default=None, help="Seconds running work may take. Default: its drain_grace_s."
)
@click.option("--force", is_flag=True, help="Also if requests fail without it.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one object per line.")
@click.option("--etcd", default="", help="Look there instead of at the Baton that runs here.")
@_folder
def drain(
    instance: str,
    wait: bool,
    timeout_s: float | None,
    grace_s: float | None,
    force: bool,
    as_json: bool,
    etcd: str,
    state_dir: Path | None,
) -> None:
    """Let INSTANCE (its id, or the beginning of it) finish its work and end, as SIGTERM does.

    \b
    Exit codes: 0 drained (without --wait: begun), 1 not begun, 3 cut off with work left,
    4 it died meanwhile, 5 not over within --timeout.
    """
    etcd = etcd or _etcd_here(state_dir)
    command = drain_command.run(
        etcd, up_command.NAMESPACE, instance, wait=wait, timeout_s=timeout_s, grace_s=grace_s, force=force, as_json=as_json
    )
    sys.exit(asyncio.run(command))


@main.command()
@click.argument("message", required=False)
@click.option("--url", default="", help="Server, e.g. http://127.0.0.1:8000. Default: the Baton that runs here.")
@click.option("--model", default="", help="Model name. Default: the first one served.")
@click.option("--max-tokens", type=click.IntRange(1), default=None, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@_folder
def chat(message: str | None, url: str, model: str, max_tokens: int | None, temperature: float, state_dir: Path | None) -> None:
    """Talk to the model: one MESSAGE, or a conversation (end with Ctrl-D)."""
    if not url:
        url = state.require((state_dir or state.default_folder()).resolve()).url
    asyncio.run(chat_command.run(url.rstrip("/"), model, message, max_tokens, temperature))


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--ca", type=click.Path(path_type=Path, file_okay=False), default=None, help="Folder of a CA (ca.pem, key.pem) to use. Default: DIR/ca"
)
@click.option("--services", default=",".join(certificates_command.NAMES), show_default=True, help="Whose certificates.")
@click.option(
    "--hosts",
    default="",
    help="Where they are dialed, besides loopback (needed for etcd): a.example,10.0.0.5. --renew keeps those there are.",
)
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long the certificates are good for.")
@click.option("--renew", "step", flag_value="renew", default=None, help="New certificates and keys for the services that are there.")
@click.option("--new-ca", "step", flag_value="new-ca", help="Make a new CA, believed beside the old one. Then --renew.")
@click.option("--drop-old-ca", "step", flag_value="drop-old-ca", help="Believe the newest CA alone.")
def certificates(folder: Path, ca: Path | None, services: str, hosts: str, days: int, step: str | None) -> None:
    """Make a CA and a certificate for each service in DIR, or renew them (docs/security.md). Overwrites nothing unless told to renew."""
    names = [name.strip() for name in services.split(",") if name.strip()]
    if strangers := set(names) - set(certificates_command.NAMES):
        raise click.ClickException(f"--services: {', '.join(sorted(strangers))} not among {', '.join(certificates_command.NAMES)}")
    if ca is not None and step in ("new-ca", "drop-old-ca"):
        raise click.ClickException(f"--{step} is for the CA in DIR/ca")
    named = [host.strip() for host in hosts.split(",") if host.strip()]
    reached_at = [*certificates_command.LOOPBACK, *named]
    if step == "new-ca":
        certificates_command.new_ca(folder, names)
    elif step == "drop-old-ca":
        certificates_command.drop_old_ca(folder, names)
    elif step == "renew":
        certificates_command.renew(folder, ca, names, reached_at if named else (), days)
    else:
        certificates_command.make(folder, ca, names, reached_at, days)
    click.echo(f"{folder}: {', '.join(names)}", err=True)


main.add_command(bench)

if __name__ == "__main__":
    main()
