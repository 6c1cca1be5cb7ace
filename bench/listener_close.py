"""What clients lose when one of several frontends that share a port (SO_REUSEPORT) stops listening: connections per close.

    python bench/listener_close.py [--closes 30] [--out bench/results]      (root: it measures in a network namespace of its own)

The kernel spreads connections over the listeners' queues. Those in the queue of a listener that closes are reset, and so are handshakes
that were under way to it, unless net.ipv4.tcp_migrate_req is 1, which moves them to another listener of the port. Two processes with
the frontend's HTTP server serve; before each close a third one is started. Clients open a connection per request, as fast as they can.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench")]

import uvloop  # noqa: E402
from aiohttp import web  # noqa: E402
from baton_frontend.http_server import HttpServer  # noqa: E402
from machine import machine  # noqa: E402

PORT, NUM_CLIENTS, NUM_LOADS = 8000, 32, 2
REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class _Health:
    """Stands for the frontend's handlers."""

    def routes(self) -> list[web.RouteDef]:
        """One path that answers at once."""

        async def health(_: web.Request) -> web.Response:
            return web.Response(text="ok")

        return [web.get("/health", health)]


async def serve() -> None:
    """A frontend's HTTP server until SIGTERM, and then its drain: no new connections, those that it has are answered."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = HttpServer(_Health())  # type: ignore[arg-type]  # all it asks of its handlers is their routes
    await server.start(f"127.0.0.1:{PORT}", reuse_port=True)
    print("ready", flush=True)
    await stop.wait()
    await server.stop_listening()
    await server.wait_idle()
    await server.close()


async def load() -> None:
    """Clients until SIGTERM; prints the outcomes of all connections as JSON."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    outcomes: Counter[str] = Counter()
    print("ready", flush=True)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(NUM_CLIENTS):
            tasks.create_task(_client(stop, outcomes))
    print(json.dumps(outcomes), flush=True)


async def _client(stop: asyncio.Event, outcomes: Counter[str]) -> None:
    while not stop.is_set():
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            writer.write(REQUEST)
            answer = await reader.read()
            writer.close()
            outcomes["answered" if answer.startswith(b"HTTP/1.1 200") else "ended without an answer"] += 1
        except OSError as error:
            outcomes[type(error).__name__] += 1


class Child:
    """This script in another role."""

    def __init__(self, role: str) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "--role", role], stdout=subprocess.PIPE, text=True)

    def ready(self) -> "Child":
        """Wait for its first line."""
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit("a child did not start; its message is above")
        return self

    def stop(self) -> str:
        """SIGTERM; what it still said."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate()[0]


def measure(closes: int, migrate: int) -> dict[str, object]:
    """One run, in a namespace of its own."""
    Path("/proc/sys/net/ipv4/tcp_migrate_req").write_text(str(migrate))
    children = [Child("serve").ready() for _ in range(2)]
    loads: list[Child] = []
    try:
        loads = [Child("load").ready() for _ in range(NUM_LOADS)]
        began = time.monotonic()
        for _ in range(closes):
            children.append(Child("serve").ready())
            children.pop(0).stop()
        outcomes: Counter[str] = Counter()
        for one in loads:
            outcomes.update(json.loads(one.stop()))
        duration_s = time.monotonic() - began
    finally:
        for child in (*children, *loads):
            with contextlib.suppress(ProcessLookupError):
                child.process.kill()
    lost = sum(outcomes.values()) - outcomes["answered"]
    return {
        "tcp_migrate_req": migrate,
        "closes": closes,
        "connections": sum(outcomes.values()),
        "connections_per_s": round(sum(outcomes.values()) / duration_s),
        "lost": lost,
        "lost_per_close": round(lost / closes, 3),
        "outcomes": dict(outcomes),
    }


def in_namespace(closes: int, migrate: int) -> dict[str, object]:
    """measure() in a new network namespace, so that the machine's own settings stay."""
    command = (
        f"{shutil.which('ip')} link set lo up && exec {sys.executable} {__file__} --role measure --closes {closes} --migrate {migrate}"
    )
    done = subprocess.run(["unshare", "--net", "sh", "-c", command], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def main() -> None:
    """Both settings, results to --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--closes", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--role", choices=["serve", "load", "measure"], default=None, help=argparse.SUPPRESS)
    parser.add_argument("--migrate", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role in ("serve", "load"):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as in services
            runner.run(serve() if options.role == "serve" else load())
        return
    if options.role == "measure":
        print(json.dumps(measure(options.closes, options.migrate)))
        return
    on = machine()
    runs = [in_namespace(options.closes, migrate) for migrate in (0, 1)]
    lines = ["Connections lost when one of two listeners of a shared port closes (bench/listener_close.py)", ""]
    lines += [
        f"tcp_migrate_req={r['tcp_migrate_req']}: {r['lost']} of {r['connections']} connections lost in {r['closes']} closes at "
        f"{r['connections_per_s']}/s, {r['lost_per_close']} per close ({r['outcomes']})"
        for r in runs
    ]
    print("\n".join(lines))
    base = options.out / f"listener-close-{datetime.date.today()}-{os.cpu_count()}cpu"
    base.with_suffix(".json").write_text(json.dumps({"machine": on, "runs": runs}, indent=2) + "\n")
    base.with_suffix(".txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
