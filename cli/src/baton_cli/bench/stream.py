"""`baton bench stream`: several client processes, one report.

Before the load every prompt is asked twice without streaming. If both answers are equal, the server's answers are a function of the
prompt, and every answer of the load must be that text, character by character; else only its length and its one end are checked.
"""

import asyncio
import json
import multiprocessing
import random
import resource
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
from click import ClickException

from baton_cli.bench.client import Client, Load, Prompt
from baton_cli.bench.figures import Figures

FDS_IN_RESERVE = 200
REFERENCES_AT_ONCE = 32
READY_LIMIT_S = 30.0
_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "ke", "li", "mo", "nu", "pa", "re", "si", "to", "vu", "za")


@dataclass(frozen=True)
class Options:
    """What was asked for. urls: of one server, used in turn; sources: addresses of ours to connect from, in turn; processes 0: as many as
    open files ask for, at least one.

    check: "text", "length", or "auto": text if the server's answers are a function of the prompt.
    """

    urls: Sequence[str]
    model: str = ""
    endpoint: str = "chat"
    connections: int = 64
    duration_s: float = 10.0
    requests: int = 0
    open_per_s: float = 0.0
    processes: int = 0
    prompt_words: int = 64
    prompts: int = 16
    max_tokens: int = 128
    is_stream: bool = True
    check: str = "auto"
    body: dict[str, Any] = field(default_factory=dict)
    api_key: str = ""
    answer_limit_s: float = 120.0
    pids: dict[str, int] = field(default_factory=dict)
    seed: int = 1
    sources: Sequence[str] = ()


@dataclass
class Watched:
    """A process of the server. CPU seconds while the load ran; resident bytes before and at most."""

    name: str
    cpu_s: float = 0.0
    rss_before: int = 0
    rss_most: int = 0


@dataclass
class Report:
    """What came of it. check: how answers were checked, and why. began_at: first request, in seconds since the epoch; load_s: from there
    to the last end."""

    options: Options
    check: str
    processes: int
    began_at: float
    load_s: float
    figures: Figures
    watched: list[Watched]

    @property
    def is_clean(self) -> bool:
        """Every request was answered wholly and rightly; refusals are answers too, if they say when to come back."""
        figures = self.figures
        refused = figures.refused_s.count
        return figures.ended == figures.started == figures.complete + refused and not figures.without_retry_after and figures.complete > 0

    def as_json(self) -> dict[str, Any]:
        """For machines; seconds of the histograms as milliseconds."""
        figures, options = self.figures, self.options
        return {
            "urls": list(options.urls),
            "endpoint": options.endpoint,
            "is_stream": options.is_stream,
            "connections": options.connections,
            "open_per_s": options.open_per_s,
            "max_tokens": options.max_tokens,
            "prompt_words": options.prompt_words,
            "body": options.body,
            "processes": self.processes,
            "check": self.check,
            "began_at": round(self.began_at, 3),
            "load_s": round(self.load_s, 3),
            "requests": {"started": figures.started, **dict(figures.ends)},
            "requests_per_s": round(figures.complete / self.load_s, 1),
            "tokens": figures.tokens,
            "tokens_per_s": round(figures.tokens / self.load_s, 1),
            "tokens_per_event": round(figures.tokens / figures.events, 3) if figures.events else None,
            "events_in_one_read": round(figures.same_read / figures.events, 3) if figures.events else None,
            "most_open": figures.most_open,
            "first_text_ms": _quantiles(figures.first_s),
            "gap_ms": _quantiles(figures.gap_s),
            "whole_answer_ms": _quantiles(figures.total_s),
            "refused_ms": _quantiles(figures.refused_s),
            "answers_without_usage": figures.without_usage,
            "reconnects": figures.reconnects,
            "refused_without_retry_after": figures.without_retry_after,
            "client_cpu_s": round(figures.cpu_s, 2),
            "servers": [self._server(watched) for watched in self.watched],
            "problems": figures.problems,
            "is_clean": self.is_clean,
        }

    def _server(self, watched: Watched) -> dict[str, Any]:
        grown = watched.rss_most - watched.rss_before
        return {
            "name": watched.name,
            "cpu_s": round(watched.cpu_s, 2),
            "cpu_share": round(watched.cpu_s / self.load_s, 3),
            "cpu_us_per_token": round(watched.cpu_s / self.figures.tokens * 1e6, 2) if self.figures.tokens else None,
            "cpu_us_per_request": round(watched.cpu_s / self.figures.complete * 1e6, 1) if self.figures.complete else None,
            "rss_mib_before": round(watched.rss_before / 2**20, 1),
            "rss_mib_most": round(watched.rss_most / 2**20, 1),
            "kib_per_stream": round(grown / 1024 / self.figures.most_open, 2) if self.figures.most_open else None,
        }


def _quantiles(durations: Any) -> dict[str, float]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    found = {name: round(durations.quantile(share) * 1e3, 3) for name, share in shares.items()}
    return {**found, "max": round(durations.largest_s * 1e3, 3), "count": durations.count} if durations.count else {}


# What is asked.


def bodies(options: Options, model: str) -> list[dict[str, Any]]:
    """The requests, without "stream": a function of the seed."""
    source = random.Random(options.seed)
    made = []
    for _ in range(options.prompts):
        text = " ".join("".join(source.choices(_SYLLABLES, k=2)) for _ in range(options.prompt_words))
        prompt = {"messages": [{"role": "user", "content": text}]} if options.endpoint == "chat" else {"prompt": text}
        made.append({"model": model, **prompt, "max_tokens": options.max_tokens, "temperature": 0, **options.body})
    return made


def path_of(endpoint: str) -> str:
    """Below the server's address."""
    return "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"


class Server:
    """The server before the load: its model, and its answers to compare with."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._url = options.urls[0].rstrip("/")
        self._headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}

    @classmethod
    def of(cls, options: Options) -> tuple[list[Prompt], str]:
        """See `prepare`."""
        return asyncio.run(cls(options).prepare())

    async def prepare(self) -> tuple[list[Prompt], str]:
        """Prompts with what their answers must be, and how answers are checked. Raises: ClickException."""
        timeout = aiohttp.ClientTimeout(total=self._options.answer_limit_s)
        try:
            async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as http:
                requests = bodies(self._options, self._options.model or await self._first_model(http))
                texts, check = await self._references(http, requests)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ClickException(f"{self._url} cannot be asked: {error or type(error).__name__}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ClickException(f"{self._url} does not answer as OpenAI's API does: {type(error).__name__}: {error}") from error
        # Else a stream does not say how many tokens it has.
        stream = {"stream": True, "stream_options": {"include_usage": True}} if self._options.is_stream else {}
        made = [
            Prompt(json.dumps({**body, **stream}).encode(), text, self._options.max_tokens)
            for body, text in zip(requests, texts, strict=True)
        ]
        return made, check

    async def _first_model(self, http: aiohttp.ClientSession) -> str:
        async with http.get(f"{self._url}/v1/models") as response:
            if response.status != 200:
                raise ClickException(f"{self._url}/v1/models answers {response.status}; name the model with --model")
            models = (await response.json()).get("data") or []
        if not models:
            raise ClickException(f"{self._url} serves no model yet")
        return str(models[0]["id"])

    async def _references(self, http: aiohttp.ClientSession, requests: list[dict[str, Any]]) -> tuple[list[str | None], str]:
        free = asyncio.Semaphore(REFERENCES_AT_ONCE)

        async def ask(body: dict[str, Any]) -> str:
            async with free:
                return await self._text(http, body)

        await ask({**requests[0], "max_tokens": 1})  # says at once what is wrong with the request
        if self._options.check == "length":
            return [None] * len(requests), "length, as asked for"
        answers = await asyncio.gather(*map(ask, 2 * requests))  # both rounds at once: at two tokens a second an answer takes a minute
        first, second = answers[: len(requests)], answers[len(requests) :]
        if first == second and all(first):
            return list(first), "text: equal to the answer without streaming"
        why = "the server gives two answers to the same prompt" if first != second else "the server answers with no text"
        if self._options.check == "text":
            raise ClickException(f"{why}; use --check length, or a seed: --body '{{\"seed\": 1}}'")
        return [None] * len(requests), f"length: {why}"

    async def _text(self, http: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        async with http.post(f"{self._url}{path_of(self._options.endpoint)}", json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise ClickException(f"{self._url} refuses the request with {response.status}: {text[:400]}")
            choice = json.loads(text)["choices"][0]
        return str((choice.get("message") or {}).get("content") or choice.get("text") or "")


# The load.


def num_processes(options: Options) -> int:
    """As many as asked for; else as few as can hold the connections; never more than there are requests. Raises: ClickException."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - FDS_IN_RESERVE
    needed = -(-options.connections // max(1, limit))
    if 0 < options.processes < needed:
        raise ClickException(
            f"--processes {options.processes}: a process may open {limit} connections here, {needed} are needed for {options.connections}"
        )
    return min(options.processes or needed, options.connections, options.requests or options.connections)


def loads(options: Options, prompts: Sequence[Prompt], count: int) -> list[Load]:
    """What each process does: a share of everything."""
    host_headers = f"Host: {urlsplit(options.urls[0]).netloc}\r\nContent-Type: application/json\r\nAccept: text/event-stream\r\n"
    if options.api_key:
        host_headers += f"Authorization: Bearer {options.api_key}\r\n"
    addresses = [_resolved(url) for url in options.urls]
    prefix = urlsplit(options.urls[0]).path.rstrip("/")
    return [
        Load(
            addresses=addresses,
            path=prefix + path_of(options.endpoint),
            headers=host_headers,
            prompts=prompts,
            connections=_share(options.connections, index, count),
            open_per_s=options.open_per_s / count,
            requests=_share(options.requests, index, count) if options.requests else None,
            duration_s=options.duration_s if options.duration_s else float("inf"),
            answer_limit_s=options.answer_limit_s,
            seed=options.seed * 1000 + index,
            sources=options.sources,
        )
        for index in range(count)
    ]


def _resolved(url: str) -> tuple[int, Any]:
    """Once, and not by each connection. Raises: ClickException."""
    parts = urlsplit(url)
    try:
        family, _, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:
        raise ClickException(f"--url {url}: {error}") from error
    return family, address


def _share(number: int, index: int, count: int) -> int:
    return number // count + (index < number % count)


def _work(load: Load, pipe: Connection) -> None:
    """In a process of its own: ready, go, figures as they grow, the last ones."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pipe.send(None)
    pipe.recv()
    client = Client(load)
    client.run(pipe.send, pipe.poll)
    pipe.send("over")


class Run:
    """One run of the load over several processes."""

    def __init__(self, options: Options, prompts: Sequence[Prompt], tell: Any) -> None:
        """tell: called with seconds and the figures so far about twice a second."""
        self._options = options
        self._loads = loads(options, prompts, num_processes(options))
        self._tell = tell
        self._latest: list[Figures] = [Figures() for _ in self._loads]
        self._is_interrupted = False

    def run(self, check: str) -> Report:
        """Start, wait, add up. Ctrl-C starts nothing more and waits for the answers that are under way."""
        context = multiprocessing.get_context("spawn")
        pipes, processes = [], []
        for load in self._loads:
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(load, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            for pipe in pipes:
                if not pipe.poll(READY_LIMIT_S):
                    raise ClickException(f"a client process is not ready within {READY_LIMIT_S:g} s")
                self._received(pipe)
            watch = Watch(self._options.pids)
            began, began_at = time.monotonic(), time.time()
            for pipe in pipes:
                pipe.send("go")
            before = signal.signal(signal.SIGINT, self._on_interrupt)
            try:
                self._follow(pipes, began, watch)
            finally:
                signal.signal(signal.SIGINT, before)
            load_s = time.monotonic() - began
            return Report(self._options, check, len(pipes), began_at, load_s, self._total(), watch.ended())
        finally:
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join(1.0)
                if process.is_alive():
                    process.kill()

    def _follow(self, pipes: list[Connection], began: float, watch: "Watch") -> None:
        running = dict(enumerate(pipes))
        told_at = 0.0
        while running:
            if self._is_interrupted:
                self._is_interrupted = False
                for pipe in running.values():
                    try:
                        pipe.send("stop")
                    except OSError:
                        pass  # it is over; its last words are still to be read
            ready = wait(list(running.values()), timeout=0.5)
            for index, pipe in list(running.items()):
                if pipe in ready and self._heard(index, pipe):
                    del running[index]
            watch.sample()
            if time.monotonic() - told_at > 0.5:
                told_at = time.monotonic()
                self._tell(told_at - began, self._total())

    def _on_interrupt(self, *_: object) -> None:
        self._is_interrupted = True

    def _heard(self, index: int, pipe: Connection) -> bool:
        """Returns: whether this process is over."""
        message = self._received(pipe)
        if isinstance(message, Figures):
            self._latest[index] = message
        return bool(message == "over")

    @staticmethod
    def _received(pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            raise ClickException("a client process has died; its last words are above") from None

    def _total(self) -> Figures:
        total = Figures()
        for figures in self._latest:
            total.merge(figures)
        return total


class Watch:
    """CPU and memory of the server's processes, while they live."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._processes: dict[str, psutil.Process] = {}
        self._watched: dict[str, Watched] = {}
        self._cpu_before: dict[str, float] = {}
        for name, pid in pids.items():
            try:
                process = psutil.Process(pid)
                self._cpu_before[name] = _cpu_s(process)
                rss = process.memory_info().rss
            except psutil.NoSuchProcess:
                raise ClickException(f"--pid {name}={pid}: there is no such process") from None
            self._processes[name], self._watched[name] = process, Watched(name, rss_before=rss, rss_most=rss)

    def sample(self) -> None:
        """Look again."""
        for name, process in self._processes.items():
            watched = self._watched[name]
            try:
                watched.cpu_s = _cpu_s(process) - self._cpu_before[name]
                watched.rss_most = max(watched.rss_most, process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue  # it ended; what it had used until then counts

    def ended(self) -> list[Watched]:
        """After the load."""
        self.sample()
        return list(self._watched.values())


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
