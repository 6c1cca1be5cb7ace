"""compose/ run for real, as root, on a container engine of its own: build, start, ask, scale, kill, cut off, pause, stop.

The workers run the sim engine, whose tokens are a pure function of what came before, so every token of every answer is checked, whatever
happens meanwhile. Progress on stderr, a summary on stdout, exit status 0 if every check held. Nothing is left behind but build/compose (a
cache) and the Debian packages it installs. What it shows and what it cannot: docs/compose.md.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "compose"), str(ROOT / "tests" / "faults"), str(ROOT / "tests")]

import aiohttp  # noqa: E402
from baton_cli import certificates, up  # noqa: E402
from box import SERVICES, call, enter, prepare, say, start_engine  # noqa: E402
from load import Kind, Load, Oracle  # noqa: E402
from stack import MODEL, PROFILE, URL, Container, Stack, until  # noqa: E402
from strangers import ask, secure, welcomed  # noqa: E402

RUN_LIMIT_S = 1200.0
STOP_LIMIT_S = 5.0
LEASE_S = 12.0  # after which etcd, were it there, would drop an instance: 10, and some
KINDS = [Kind("chat", 3, (20, 200), (10, 60)), Kind("long", 1, (400, 1200), (40, 120)), Kind("batch", 1, (20, 400), (10, 60), batch=True)]
USER = "10001:10001"
EXTRAS = {"sim": "", "torch": "[torch]"}  # of the workers, by engine


@dataclass
class Check:
    """One line of the summary."""

    name: str
    ok: bool
    seconds: float
    detail: str = ""


class Run:
    """The checks, in their order; each leaves a whole deployment behind."""

    def __init__(self, stack: Stack, oracle: Oracle, http: aiohttp.ClientSession) -> None:
        self.stack = stack
        self._oracle = oracle
        self._http = http
        self._seed = 0

    def checks(self, engine: str) -> Iterator[tuple[str, Callable[[], Awaitable[str]]]]:
        """Name and function, which returns a detail for the summary and raises AssertionError."""
        yield "files are accepted", self.are_accepted
        yield "build", self.build
        yield "up --wait", self.start
        yield "nothing but what it must: user, root, capabilities, ports, limits", self.is_hardened
        if engine == "torch":
            yield "the demo model recalls, which it can only with the KV of its prompt", self.recalls
            yield f"stop within {STOP_LIMIT_S:g} s, nobody killed", self.stops
            return
        yield "answers through the published port are right", self.answers
        yield "Prometheus finds every instance", self.is_scraped
        yield "scale prefill=3 decode=2 and back under load", self.scales
        for service in ("prefill", "decode", "router", "kvtransfer", "etcd", "frontend"):
            yield f"kill -9 of {service}", lambda service=service: self.dies(service)
        yield "etcd, router and kvtransfer gone for longer than a lease", self.has_no_control_plane
        for service in ("prefill", "decode"):
            yield f"{service} cut off its network", lambda service=service: self.is_cut_off(service)
        for service in ("prefill", "decode"):
            yield f"{service} paused", lambda service=service: self.is_paused(service)
        yield "no KV is stranded, the books agree", self.is_balanced
        yield "compose.tls.yaml: mutual TLS, strangers refused on every port", self.trusts_its_own
        yield "compose.shm.yaml: KV by shared memory between containers", self.shares_memory
        yield f"stop within {STOP_LIMIT_S:g} s, nobody killed", self.stops

    @asynccontextmanager
    async def load(self, *, lossless: bool = True) -> AsyncIterator[Load]:
        """Clients ask during the block. No token is ever wrong; no request fails, unless its own connection may."""
        self._seed += 1
        load = Load(self._http, URL, MODEL, self._oracle, self._seed)
        async with load.running(KINDS):
            await until("the first answers", lambda: _is_true(len(load.tally.outcomes) >= len(KINDS)))
            yield load
        bad = [f"{outcome.kind} {outcome.how} {outcome.detail}" for outcome in load.tally.outcomes if outcome.how != "ok"]
        assert not load.tally.corrupt, load.tally.corrupt[:3]
        assert not (bad and lossless), f"{len(bad)} of {len(load.tally.outcomes)} requests: {bad[:3]}"

    async def are_accepted(self) -> str:
        """Compose's own loader takes every set of files that the docs name."""
        for added in ([], ["compose.tls.yaml"], ["compose.shm.yaml"], ["compose.gpu.yaml"], ["compose.shm.yaml", "compose.gpu.yaml"]):
            files, self.stack.files = self.stack.files, ["compose.yaml", *added]
            await self.stack.compose("--profile", "observability", "config", "-q")
            self.stack.files = files
        return ""

    async def build(self) -> str:
        """All images from the one file; what must be light is."""
        await self.stack.compose("build", "-q", "etcd", "prometheus", *SERVICES)
        sizes = {service: int(await self.stack.docker("image", "inspect", "-f", "{{.Size}}", f"baton-{service}")) for service in SERVICES}
        heavy = ("torch", "numpy", "baton_engine", "baton_worker", "pip")
        code = f"import importlib.util as u; print([m for m in {heavy} if u.find_spec(m)])"
        for service in ("frontend", "router", "kvtransfer"):
            found = await self.stack.docker("run", "--rm", "--network=none", "--entrypoint=python", f"baton-{service}", "-c", code)
            assert found.strip() == "[]", f"{service} has {found}"
        return ", ".join(f"{service} {size >> 20} MiB" for service, size in sizes.items())

    async def start(self) -> str:
        """One of each, as users get it."""
        await self.stack.up()
        await until("all workers are taken in", self.stack.complete)
        return f"{len(await self.stack.containers())} containers"

    async def is_hardened(self) -> str:
        """What compose.yaml promises, read back from the engine and from within."""
        published = []
        for container in await self.stack.containers():
            host, config, name = container.facts["HostConfig"], container.facts["Config"], container.service
            assert config["User"] == USER, f"{name} runs as {config['User']!r}"
            assert host["ReadonlyRootfs"], f"{name} can write to its root"
            assert host["CapDrop"] == ["ALL"], f"{name} has capabilities"
            assert not host["CapAdd"], f"{name} has capabilities"
            assert "no-new-privileges:true" in host["SecurityOpt"], f"{name} may gain privileges"
            assert host["Memory"], f"{name} has no memory limit"
            assert host["NanoCpus"], f"{name} has no processor limit"
            assert host["PidsLimit"], f"{name} has no limit of processes"
            written = f"{name}: " + await asyncio.to_thread(_status, "docker", "exec", container.id, "touch", "/opt/x")
            assert "Read-only file system" in written, written
            for port, bindings in (host["PortBindings"] or {}).items():
                published += [(name, port, binding["HostIp"]) for binding in bindings]
        expected = [("frontend", "8000/tcp", "127.0.0.1"), ("prometheus", "9090/tcp", "127.0.0.1")]
        assert sorted(published) == expected, published
        return "published: frontend and Prometheus, on loopback"

    async def answers(self) -> str:
        """Real answers, which came by way of both workers."""
        async with self.load() as load:
            await until("50 answers", lambda: _is_true(len(load.tally.outcomes) >= 50))
        decode = (await self.stack.containers("decode"))[0]
        moved = await self.stack.metric(decode, "baton_handoff_bytes_total")
        assert moved > 0, "nothing was handed over from prefill to decode"
        return f"{len(load.tally.outcomes)} answers, {moved / 1e6:.1f} MB of KV handed over"

    async def recalls(self) -> str:
        """As in the README."""
        body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": "red = 4 7 1 ; blue = 2 2 8 ; red ?"}]}
        async with self._http.post(f"{URL}/v1/chat/completions", json=body) as response:
            answer = await response.json()
        text = answer["choices"][0]["message"]["content"]
        assert text.strip() == "4 7 1", answer
        moved = await self.stack.metric((await self.stack.containers("decode"))[0], "baton_handoff_bytes_total")
        assert moved > 0, "nothing was handed over from prefill to decode"
        return f"{text.strip()!r}, {moved:.0f} bytes of KV handed over"

    async def is_scraped(self) -> str:
        """Every container of every service is a target, and up."""
        containers = await self.stack.containers(*SERVICES)
        wanted = sorted(container.service for container in containers)

        async def is_complete() -> bool:
            rows = await self.stack.query("up == 1")
            return sorted(row["metric"]["job"] for row in rows) == wanted

        await until(f"targets {wanted}", is_complete)
        return f"{len(wanted)} targets"

    async def scales(self) -> str:
        """Replicas join and leave while clients ask; those that leave drain."""
        async with self.load() as load:
            await self.stack.up(prefill=3, decode=2)
            await until("five workers are taken in", self.stack.complete)
            grown = len(load.tally.outcomes)
            await self.is_scraped()
            new = await self.stack.containers("prefill", "decode")
            worked = [await self.stack.metric(container, "baton_engine_steps_total") for container in new]
            await self.stack.up(prefill=1, decode=1)
            await until("two workers are left", self.stack.complete)
        assert all(worked), f"a worker got no work: {worked}"
        left = await self.stack.containers("prefill", "decode")
        assert len(left) == 2, left
        await self.stack.up(prefill=2, decode=2)  # what follows needs somebody to take over
        await until("four workers are taken in", self.stack.complete)
        return f"{len(load.tally.outcomes)} answers, {grown} of them before all were there; none failed"

    async def dies(self, service: str) -> str:
        """The process of a container is killed from outside: the engine starts it again."""
        victim = (await self.stack.containers(service))[0]
        async with self.load(lossless=service != "frontend") as load:
            os.kill(victim.pid, signal.SIGKILL)
            await self._is_back(victim)
            await until("all workers are taken in", self.stack.complete)
        return _told(load)

    async def has_no_control_plane(self) -> str:
        """Killed, not restarted: who runs goes on, and new requests are served whole on decode. Then all three come back, etcd empty."""
        async with self.load() as load:
            await self.stack.compose("kill", "etcd", "router", "kvtransfer")
            gone_at, asked = time.monotonic(), len(load.tally.outcomes)
            await until("a lease is over", lambda: _is_true(time.monotonic() - gone_at > LEASE_S))
            await until("answers without them", lambda: _is_true(len(load.tally.outcomes) > asked + 50))
            meanwhile = len(load.tally.outcomes) - asked
            await self.stack.up(prefill=2, decode=2)
            await until("four workers are taken in", self.stack.complete)
        return f"{_told(load)}, {meanwhile} of them meanwhile"

    async def _is_back(self, victim: Container) -> None:
        """Wait until a killed container is well, in a new life."""

        async def is_well() -> bool:
            now = await self.stack.again(victim)
            return now.is_healthy and now.pid != victim.pid

        await until(f"{victim.service} is healthy again", is_well)

    async def _losses(self) -> float:
        """Workers that the frontend has given up."""
        (frontend,) = await self.stack.containers("frontend")
        return await self.stack.metric(frontend, "baton_worker_losses_total")

    async def _is_given_up(self, service: str, losses: float) -> None:
        """Wait until there is one more, for which a frontend takes 2 s."""

        async def is_so() -> bool:
            return await self._losses() > losses

        await until(f"{service} is given up", is_so)

    async def is_cut_off(self, service: str) -> str:
        """A worker loses its network until its peers give it up, and gets it back."""
        victim, losses = (await self.stack.containers(service))[0], await self._losses()
        async with self.load() as load:
            await self.stack.docker("network", "disconnect", "-f", "baton_inner", victim.id)
            await self._is_given_up(service, losses)
            await self.stack.docker("network", "connect", "--alias", service, "baton_inner", victim.id)
            await until(f"{service} is taken in again", self.stack.complete)
        return _told(load)

    async def is_paused(self, service: str) -> str:
        """A worker stands still until its peers give it up, and wakes."""
        victim, losses = (await self.stack.containers(service))[0], await self._losses()
        async with self.load() as load:
            await self.stack.docker("pause", victim.id)
            await self._is_given_up(service, losses)
            await self.stack.docker("unpause", victim.id)
            await until(f"{service} is taken in again", self.stack.complete)
        return _told(load)

    async def is_balanced(self) -> str:
        """Both counts that prove it are 0, at every instance and in Prometheus."""
        for name in ("baton_kv_stranded_bytes", "baton_kv_pinned_bytes", "baton_kv_reserved_bytes", "baton_ledger_mismatch_bytes"):

            async def is_zero(name: str = name) -> bool:
                rows = await self.stack.query(f"sum({name})")
                return bool(rows) and float(rows[0]["value"][1]) == 0.0

            await until(f"{name} is 0", is_zero, 30.0)
        return "stranded, pinned, reserved, mismatch: 0 bytes"

    async def trusts_its_own(self) -> str:
        """The same deployment with certificates: it serves, and answers nobody without one of its CA. It stays so for what follows."""
        ours, foreign = self.stack.certificates, self.stack.certificates.with_name("foreign")
        certificates.make(ours, hosts=(*certificates.LOOPBACK, "etcd"))
        certificates.make(foreign)
        call("chown", "-R", USER, str(ours))
        self.stack.files.append("compose.tls.yaml")
        await self.stack.up("--force-recreate", prefill=2, decode=2)
        await until("four workers are taken in", self.stack.complete)
        async with self.load() as load:
            await until("50 answers", lambda: _is_true(len(load.tally.outcomes) >= 50))
        containers = await self.stack.containers("etcd", *SERVICES)
        for container in containers:
            is_etcd = container.service == "etcd"
            address = f"{container.address}:{2379 if is_etcd else 7000}"
            await ask(secure(address, ours, "cli", believed=ours), is_etcd=is_etcd)
            assert (answered := await welcomed(address, ours, foreign, is_etcd=is_etcd)) == [], f"{container.service}: {answered}"
        return f"{_told(load)}; {len(containers)} ports refuse whoever has no certificate of the CA"

    async def shares_memory(self) -> str:
        """Workers with one /dev/shm between them, one of which is killed and sweeps up what it had left."""
        self.stack.files.append("compose.shm.yaml")
        await self.stack.up("--no-deps", prefill=2, decode=2)
        await until("four workers are taken in", self.stack.complete)
        victim = (await self.stack.containers("decode"))[0]
        async with self.load() as load:
            os.kill(victim.pid, signal.SIGKILL)
            await self._is_back(victim)
            await until("four workers are taken in again", self.stack.complete)
            enough = len(load.tally.outcomes) + 20
            await until("more answers", lambda: _is_true(len(load.tally.outcomes) >= enough))
        pulls = [
            [
                await self.stack.metric(worker, "baton_handoff_pull_gigabytes_per_second_count", transport=transport)
                for transport in ("shm", "tcp")
            ]
            for worker in await self.stack.containers("decode")
        ]
        assert all(shm and not tcp for shm, tcp in pulls), f"pulls of the decode instances by shm and tcp: {pulls}"
        segments = (await self.stack.docker("exec", victim.id, "ls", "/dev/shm")).split()
        assert len(segments) == 4, f"segments of four workers: {segments}"
        return f"{_told(load)}; {sum(shm for shm, _ in pulls):.0f} pulls, all by shared memory"

    async def stops(self) -> str:
        """SIGTERM ends every process by its own doing."""
        began = time.monotonic()
        await self.stack.compose("stop")
        took = time.monotonic() - began
        codes = {container.service: container.facts["State"]["ExitCode"] for container in await self.stack.containers()}
        killed = [service for service, code in codes.items() if code == 137]
        assert not killed, f"killed at the end of their grace: {killed}"
        assert all(codes[service] == 0 for service in SERVICES), codes
        assert took < STOP_LIMIT_S, f"stop took {took:.1f} s"
        return f"{took:.1f} s"


async def _is_true(value: bool) -> bool:
    return value


def _status(*command: str) -> str:
    try:
        return call(*command)
    except RuntimeError as error:
        return str(error)


def _told(load: Load) -> str:
    return ", ".join(f"{count} {how}" for how, count in load.tally.count().items() if count)


async def run(folder: Path, engine: str, only: str) -> list[Check]:
    """Inside the namespaces: every check, up to the first without which the others make no sense."""
    model = up.demo_model()
    made: list[Check] = []
    async with aiohttp.ClientSession() as http:
        stack = Stack(folder, model, http, engine, EXTRAS[engine])
        for name, check in Run(stack, Oracle(PROFILE, model), http).checks(engine):
            if only and only not in name and name not in ("build", "up --wait"):
                continue
            say(f"{name} ...")
            began = time.monotonic()
            try:
                made.append(Check(name, True, 0.0, await check()))
            except Exception as error:
                told = "; ".join(str(inner) for inner in error.exceptions) if isinstance(error, ExceptionGroup) else str(error)
                made.append(Check(name, False, 0.0, f"{type(error).__name__}: {told}"))
                say(traceback.format_exc()[-3000:])
                say(await stack.logs())
            made[-1].seconds = round(time.monotonic() - began, 1)
            say(f"    {'ok' if made[-1].ok else 'FAILED'}, {made[-1].seconds:g} s; {made[-1].detail}")
            if not made[-1].ok and name in ("build", "up --wait"):
                break
    return made


def inside(folder: Path, engine: str, only: str) -> int:
    """First process of the namespaces."""
    start_engine(folder)
    checks = asyncio.run(run(folder, engine, only))
    (folder / "checks.json").write_text(json.dumps([asdict(check) for check in checks]))
    return 0 if all(check.ok for check in checks) else 1


def main() -> None:
    """Outside: fetch, enter, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the summary for machines")
    parser.add_argument("--only", default="", metavar="TEXT", help="beside build and start, only checks whose name contains it")
    parser.add_argument("--engine", choices=EXTRAS, default="sim", help="torch: a shorter run, with images of 1 GB and the demo model")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        sys.exit(inside(arguments.inside, arguments.engine, arguments.only))
    if os.geteuid() != 0:
        sys.exit("runs a container engine: must be root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through everybody who cleans up
    began = time.monotonic()
    # Not in TMPDIR: the engine's sockets have paths of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="baton-compose-", dir="/tmp") as name:
        folder = Path(name)
        prepare(folder, EXTRAS[arguments.engine])
        say(f"prepared in {time.monotonic() - began:.0f} s")
        inner = [sys.executable, __file__, "--inside", name, f"--engine={arguments.engine}", f"--only={arguments.only}"]
        status = enter(folder, inner, RUN_LIMIT_S)
        report = folder / "checks.json"
        checks = [Check(**row) for row in json.loads(report.read_text())] if report.exists() else []
    took = round(time.monotonic() - began, 1)
    if arguments.json:
        print(json.dumps({"ok": status == 0, "seconds": took, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        for check in checks:
            print(f"{'ok' if check.ok else 'FAILED':7}{check.seconds:7.1f} s  {check.name}: {check.detail}")
        held = sum(check.ok for check in checks)
        print(f"{held} of {len(checks)} checks held, {took:.0f} s")
    sys.exit(status)


if __name__ == "__main__":
    main()
