"""The options of `baton bench stream`."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click

from baton_cli import state
from baton_cli import status as status_command
from baton_cli import up as up_command
from baton_cli.bench import report as reports
from baton_cli.bench.figures import Figures
from baton_cli.bench.stream import Options, Run, Server

_OWN_FIELDS = {"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "stream", "stream_options", "n"}


def _body(_: click.Context, __: click.Parameter, value: str) -> dict[str, Any]:
    try:
        body = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}") from error
    if not isinstance(body, dict):
        raise click.BadParameter('not an object, such as {"ignore_eos": true}')
    if own := _OWN_FIELDS & body.keys():
        raise click.BadParameter(f"{', '.join(sorted(own))}: there is an option for it")
    return body


def _pids(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    pids = {}
    for value in values:
        name, _sign, pid = value.rpartition("=")
        if not pid.isdigit():
            raise click.BadParameter(f"{value!r}: write NAME=PID or PID")
        pids[name or pid] = int(pid)
    return pids


def _pids_of(etcd: str) -> dict[str, int]:
    """All instances of the Baton that runs here."""
    report = asyncio.run(status_command.collect(etcd, up_command.NAMESPACE))
    return {instance.instance_id: instance.pid for instance in report.instances if instance.pid}


def _urls(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not value.startswith("http://"):
            raise click.BadParameter(f"{value!r}: write http://HOST:PORT (TLS is not spoken)")
    return values


@click.group()
def bench() -> None:
    """Load for any OpenAI-compatible server, with every answer checked."""


@bench.command()
@click.option(
    "--url", "urls", multiple=True, callback=_urls, help="Server, e.g. http://127.0.0.1:8000; several addresses of it are used in turn."
)
@click.option(
    "--source",
    "sources",
    multiple=True,
    help="Address of ours to connect from, e.g. 127.0.0.2; several are used in turn, and each has its own ports.",
)
@click.option("--model", default="", help="Model name. Default: the first one served.")
@click.option("--endpoint", type=click.Choice(["chat", "completions"]), default="chat", show_default=True)
@click.option("-c", "--connections", type=click.IntRange(1), default=64, show_default=True, help="Requests under way at a time.")
@click.option(
    "-d",
    "--duration",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Seconds in which requests are started; 0: no limit.",
)
@click.option("-n", "--requests", type=click.IntRange(0), default=0, show_default=True, help="Requests in all; 0: no limit.")
@click.option(
    "--open-rate", type=click.FloatRange(0), default=0.0, show_default=True, help="Connections opened per second; 0: all at once."
)
@click.option(
    "--processes", type=click.IntRange(0), default=0, show_default=True, help="Client processes; 0: as few as can hold the connections."
)
@click.option("--prompt-words", type=click.IntRange(1), default=64, show_default=True)
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True, help="Different prompts.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--stream/--no-stream", "is_stream", default=True, show_default=True)
@click.option(
    "--check",
    type=click.Choice(["auto", "text", "length"]),
    default="auto",
    show_default=True,
    help="text: each answer equals the one without streaming; length: one end, so many tokens; auto: text, if answers repeat.",
)
@click.option("--body", default='{"ignore_eos": true}', show_default=True, callback=_body, help="JSON object added to each request.")
@click.option("--api-key", default="", help="Sent as a bearer token, unencrypted.")
@click.option(
    "--answer-limit", type=click.FloatRange(1), default=120.0, show_default=True, help="Seconds after which a request counts as hung."
)
@click.option("--pid", "pids", multiple=True, callback=_pids, help="NAME=PID of a server's process: its CPU and memory are reported.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the prompts.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    default=None,
    help="Draw first texts and gaps, e.g. stream.svg.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Of the Baton that runs here. Default: ~/.local/state/baton",
)
def stream(
    urls: tuple[str, ...],
    duration: float,
    open_rate: float,
    answer_limit: float,
    as_json: bool,
    plot: Path | None,
    pids: dict[str, int],
    state_dir: Path | None,
    **given: Any,
) -> None:
    """Keep many streams open, check every answer, report times, tokens and the server's CPU.

    Without --url: the Baton that runs here, with the CPU of all its processes.
    Exit code 1 unless every request was answered wholly and rightly, or refused with 429 and Retry-After.
    """
    if not urls:
        running = state.require((state_dir or state.default_folder()).resolve())
        urls, pids = (running.url,), pids or _pids_of(running.etcd)
    if not duration and not given["requests"]:
        raise click.UsageError("give --duration or --requests, else it never ends")
    options = Options(urls=urls, duration_s=duration, open_per_s=open_rate, answer_limit_s=answer_limit, pids=pids, **given)
    if plot is not None:
        reports.check_plot(plot)
    is_live = sys.stderr.isatty()
    if is_live and options.check != "length":
        click.echo(f"asking for the answers to compare with: {options.prompts} prompts of {options.max_tokens} tokens", err=True)
    prompts, check = Server.of(options)

    def tell(seconds: float, figures: Figures) -> None:
        if is_live:
            click.echo("\r" + reports.progress(seconds, figures), nl=False, err=True)

    report = Run(options, prompts, tell).run(check)
    if is_live:
        click.echo("", err=True)
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else reports.text(report))
    if plot is not None:
        reports.plot(report, plot)
    if not report.is_clean:
        sys.exit(1)
