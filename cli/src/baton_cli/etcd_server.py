"""The embedded etcd of `baton up`: a real one, for development. Production brings its own (--etcd)."""

import asyncio
import shutil
from pathlib import Path

import click
from baton_runtime.children import EtcdMissing, etcd_command, free_port
from baton_runtime.tls import TlsFiles

from baton_cli.processes import Child

START_LIMIT_S = 15.0


async def start(data: Path, log: Path, tls: TlsFiles | None) -> tuple[Child, str]:
    """Start etcd on a free loopback port and wait until it listens. Returns the child and its address host:port.

    The port stays the same when it is restarted: everybody looks for it there.
    """
    shutil.rmtree(data, ignore_errors=True)  # records live under leases: an older run's data has no value
    port = free_port()
    try:
        child = Child("etcd", etcd_command(data, port, tls=tls), {}, log)
    except EtcdMissing as error:
        raise click.ClickException(f"{error}; or name yours with --etcd HOST:PORT") from error
    await child.start()
    try:
        async with asyncio.timeout(START_LIMIT_S):
            while not await _listens(port):
                if not child.is_running:
                    raise click.ClickException(f"etcd did not start ({child.exit_text()}):\n{child.last_lines()}")
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise click.ClickException(f"etcd did not answer within {START_LIMIT_S:g} s; log: {log}") from None
    return child, f"127.0.0.1:{port}"


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
