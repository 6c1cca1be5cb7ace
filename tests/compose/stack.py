"""The compose project under test: its commands, its containers, their metrics."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from box import SERVICES, call
from prometheus_client.parser import text_string_to_metric_families

MODEL = "test-model"
PROFILE = "polynomial"
URL, PROMETHEUS = "http://127.0.0.1:8000", "http://127.0.0.1:9090"  # in a network namespace of our own
EVERYTHING = ("etcd", *SERVICES, "prometheus")  # not Jaeger and Grafana: their images cannot be pulled
READY_LIMIT_S = 120.0


async def until(what: str, check: Callable[[], Awaitable[object]], limit_s: float = READY_LIMIT_S) -> None:
    """Wait until check says so. Raises: AssertionError naming what was waited for."""
    deadline = time.monotonic() + limit_s
    while not await check():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.1)


@dataclass(frozen=True)
class Container:
    """One container as `docker inspect` shows it."""

    service: str
    facts: dict

    @property
    def id(self) -> str:
        """Of the engine."""
        return str(self.facts["Id"])

    @property
    def pid(self) -> int:
        """Of its first process, as seen from here; 0: it does not run."""
        return int(self.facts["State"]["Pid"])

    @property
    def is_healthy(self) -> bool:
        """It runs, and its health check says so."""
        state = self.facts["State"]
        return state["Status"] == "running" and state.get("Health", {}).get("Status") == "healthy"

    @property
    def address(self) -> str:
        """On the inner network; empty: cut off."""
        return str(self.facts["NetworkSettings"]["Networks"].get("baton_inner", {}).get("IPAddress", ""))


class Stack:
    """docker compose on the files of a context folder."""

    def __init__(self, folder: Path, model: Path, http: aiohttp.ClientSession, engine: str, extras: str) -> None:
        self.http = http
        self.files = ["compose.yaml", "compose.ci.yaml"]
        self.certificates = folder / "tls"
        self._folder = folder / "context/compose"
        self._environment = {
            **os.environ,
            "BATON_ENGINE": engine,
            "BATON_PROFILE": PROFILE,
            "BATON_SERVED_NAME": MODEL,
            "BATON_MODEL": str(model),
            "WORKER_EXTRAS": extras,
            "CI_BINARIES": str(folder / "ci"),
            "BATON_CERTIFICATES": str(folder / "tls"),
        }

    async def compose(self, *arguments: str) -> str:
        """docker compose ARGUMENTS; its stdout."""
        files = [part for name in self.files for part in ("-f", str(self._folder / name))]
        command = ["docker", "compose", "--ansi", "never", "--progress", "quiet", *files, *arguments]
        return await asyncio.to_thread(call, *command, env=self._environment)

    async def docker(self, *arguments: str) -> str:
        """docker ARGUMENTS; its stdout."""
        return await asyncio.to_thread(call, "docker", *arguments)

    async def up(self, *options: str, **scale: int) -> None:
        """Everything, or so many of some services; returns when all are healthy."""
        wanted = [f"--scale={service}={count}" for service, count in scale.items()]
        await self.compose("up", "-d", "--no-build", "--wait", *(options or ("--no-recreate",)), *wanted, *EVERYTHING)

    async def containers(self, *services: str) -> list[Container]:
        """Those that exist, of some services (none named: of all)."""
        ids = (await self.compose("ps", "-a", "-q", *services)).split()
        found = json.loads(await self.docker("inspect", *ids)) if ids else []
        return [Container(facts["Config"]["Labels"]["com.docker.compose.service"], facts) for facts in found]

    async def again(self, container: Container) -> Container:
        """The same container, as it is now."""
        return Container(container.service, json.loads(await self.docker("inspect", container.id))[0])

    async def metric(self, container: Container, name: str, **labels: str) -> float:
        """Sum over one of its metrics, of the series with these labels. Raises: aiohttp.ClientError if it does not answer."""
        async with self.http.get(f"http://{container.address}:9100/metrics", timeout=aiohttp.ClientTimeout(total=5)) as response:
            text = await response.text()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())

    async def query(self, expression: str) -> list[dict]:
        """What Prometheus answers."""
        async with self.http.get(f"{PROMETHEUS}/api/v1/query", params={"query": expression}) as response:
            answer = await response.json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    async def complete(self) -> bool:
        """Whether frontend and router have every worker that there is, and the frontend the model."""
        workers = await self.containers("prefill", "decode")
        try:
            for service, name in (("frontend", "baton_attached_workers"), ("router", "baton_router_open_workers")):
                for container in await self.containers(service):
                    if await self.metric(container, name) != len(workers):
                        return False
            async with self.http.get(f"{URL}/v1/models") as response:
                return response.status == 200 and bool((await response.json())["data"])
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def logs(self, services: Sequence[str] = ()) -> str:
        """Last lines of containers, for a failure's report."""
        return await self.compose("logs", "--no-color", "--tail", "15", *services)
