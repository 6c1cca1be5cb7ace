"""The frontend owns its requests: whatever fails under one, its client sees a pause and then the very answer of an undisturbed run.

One request with everything that has a state (two choices, a seed, penalties, log probabilities, stop strings that are half held back when
it is struck, usage) against every failure of docs/request.md, on the sim engine and on torch in float32; then the ends that are honest
errors. Workers strike themselves at the token or state that is meant (`told_worker`); their addresses are gates that can be cut.
"""

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from baton_runtime.children import free_port
from clients import Proxy, proxy
from cluster import Cluster, cluster, until
from judge import STARVED_S
from starvation import StarvationWatch
from told_worker import FILE, Order

pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]

TOLD = str(Path(__file__).parent / "told_worker.py")
WORKERS = ("prefill-0", "decode-0", "decode-1")
PROMPT = [10 + i * 7 % 150 for i in range(200)]
STRUCK_AT = 30  # output position
PATIENCE_S = 4.0
# Slow enough that a strike of the client's finds the stream under way, and that a prompt takes several chunks.
PROFILE = """
description = "5 ms per step, prompts in chunks"
[prefill_ms]
per_token = 0.5
[decode_ms]
constant = 5.0
"""
REQUEST: dict[str, object] = {
    "model": "test-model",
    "prompt": PROMPT,
    "n": 2,
    "seed": 7,
    "temperature": 1.0,
    "logprobs": 3,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.3,
    "max_tokens": 120,
    "ignore_eos": True,
    "return_token_ids": True,
}


@dataclass
class Choice:
    """What came of one choice, however it was cut into events."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[dict[str, float]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def take(self, choice: dict) -> None:
        """One event's, or a whole response's, part."""
        assert self.finish_reason is None, "something came after the end"
        self.text += choice.get("text") or ""
        self.token_ids += choice.get("token_ids") or []
        columns = choice.get("logprobs") or {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
        self.tokens += columns["tokens"]
        self.offsets += columns["text_offset"]
        self.logprobs += columns["token_logprobs"]
        self.tops += columns["top_logprobs"]
        self.finish_reason = choice.get("finish_reason")
        self.stop_reason = choice.get("stop_reason")


@dataclass
class Response:
    """What a client got of one call."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict | None = None
    resumed: int = 0
    error: dict | None = None
    progressed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, event: dict) -> None:
        """An event, or a whole response."""
        assert self.error is None, "something came after the error"
        self.error = event.get("error")
        self.usage = event.get("usage") or self.usage
        self.resumed += event.get("baton", {}).get("resumed", 0)
        for choice in event.get("choices", ()):
            self.choices.setdefault(choice["index"], Choice()).take(choice)
        self.progressed.set()

    async def reached(self, position: int) -> None:
        """Wait until some choice has so many tokens."""
        async with asyncio.timeout(60):
            while not any(len(choice.token_ids) >= position for choice in self.choices.values()):
                self.progressed.clear()
                await self.progressed.wait()


def check_same(found: Response, undisturbed: Response) -> None:
    """All of it but for how much of the prompt was cached. float32 sums differ in the last bits between a prefill and a decode step."""
    assert found.error is None, found.error
    assert found.choices.keys() == undisturbed.choices.keys()
    for index, other in undisturbed.choices.items():
        choice = found.choices[index]
        assert choice.token_ids == other.token_ids
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (other.text, other.finish_reason, other.stop_reason)
        assert (choice.tokens, choice.offsets) == (other.tokens, other.offsets)
        assert choice.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert len(choice.tops) == len(other.tops)
        for top, other_top in zip(choice.tops, other.tops, strict=True):
            assert sorted(top.values()) == pytest.approx(sorted(other_top.values()), abs=1e-4)
    assert counted(found) == counted(undisturbed)


def counted(response: Response) -> dict:
    """Usage without what depends on what others asked before."""
    assert response.usage is not None
    return {name: value for name, value in response.usage.items() if name != "prompt_tokens_details"}


@dataclass
class Owned:
    """A cluster whose workers follow orders, behind gates; and the request with its undisturbed answer."""

    house: Cluster
    gates: dict[str, Proxy]
    order: Path
    machine: StarvationWatch
    request: dict[str, object] = field(default_factory=dict)
    undisturbed: Response = field(default_factory=Response)

    async def ask(self, response: Response | None = None, **changes: object) -> Response:
        """The request, streamed."""
        response = response if response is not None else Response()
        body = {**self.request, "stream": True, "stream_options": {"include_usage": True}, **changes}
        async with self.house.http.post(f"{self.house.url}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: [DONE]"):
                    return response
                if line.startswith(b"data: "):
                    response.take(json.loads(line[6:]))
        raise AssertionError("the stream ended without [DONE]")

    async def prepare(self) -> None:
        """Learn the answer; then one stop string late in it, and one that begins where strikes come and is never complete."""
        self.request = dict(REQUEST)
        text = (await self.ask()).choices[0].text
        late, struck = len(text) * 4 // 5, len(text) * STRUCK_AT // int(str(REQUEST["max_tokens"]))
        length = next(n for n in range(8, 200) if text.index(text[late : late + n]) == late)
        self.request["stop"] = [text[late : late + length], text[struck - 20 : struck + 20] + "\u2603"]
        self.undisturbed = await self.ask()
        assert self.undisturbed.choices[0].finish_reason == "stop"
        assert self.undisturbed.choices[0].text == text[:late]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """For what holds only where processes are let run: skips where it did not hold and one was not. No token is judged in here."""
        began = time.monotonic()
        try:
            yield
        except (AssertionError, TimeoutError) as error:
            starved_s = self.machine.worst_s(began)
            if starved_s > STARVED_S:
                pytest.skip(f"a process had no processor for {starved_s:.1f} s of 2 s: {error}")
            raise

    def give(self, service: str, at: str, do: str, position: int = 0, times: int = 1) -> None:
        """Give an order."""
        Order(service, at, do, position, times).write(self.order)

    async def is_followed(self) -> bool:
        """Whether the order was taken away."""
        return not self.order.exists()

    async def metric(self, instance: str, name: str) -> float:
        """One sample."""
        return (await self.house.metrics(instance)).get(name, 0.0)

    def running(self) -> tuple[str, ...]:
        """Workers whose process lives."""
        return tuple(name for name in WORKERS if self.house.children[name].is_running)

    async def mend(self, needed: tuple[str, ...] = WORKERS) -> None:
        """Whoever is needed lives, is awake and can be reached; then wait until all is idle and known to the frontend."""
        self.order.unlink(missing_ok=True)
        for name in WORKERS:
            self.house.signal(name, signal.SIGCONT)
            gate = self.gates[name]
            gate.is_open = True
            if name in needed and not self.house.children[name].is_running:
                await self.revive(name)
        await self.attached(len(self.running()))
        await self.house.settled(without=tuple(set(WORKERS) - set(self.running())), limit_s=20)

    async def revive(self, name: str) -> None:
        """Another life of a worker."""
        await self.house.children[name].start()
        await self.gates[name].listen()  # before anybody is told of it
        await self.house.ready(name)

    async def attached(self, count: int) -> None:
        """Wait until the frontend has a stream to so many workers."""

        async def are() -> bool:
            return await self.metric("frontend-0", "baton_attached_workers") == count

        await until(f"the frontend is attached to {count} workers", are, 20)

    async def dead(self) -> str:
        """Wait until a process has ended; its name."""

        async def one() -> str | None:
            return next(iter(set(WORKERS) - set(self.running())), None)

        return await until("a worker died", one, 30)

    async def close_gates_of_the_dead(self) -> None:
        """Nobody listens at the address of a process that is gone; until cancelled."""
        while True:
            for name in set(WORKERS) - set(self.running()):
                self.gates[name].refuse()
            await asyncio.sleep(0.02)

    def ports_of(self, name: str) -> set[int]:
        """Local ports of the connections a process has."""
        process = self.house.children[name].process
        assert process is not None
        return {connection.laddr.port for connection in psutil.Process(process.pid).net_connections("tcp")}


async def opened(stack: AsyncExitStack, folder: Path, engine: str) -> Owned:
    gates = {name: await stack.enter_async_context(proxy()) for name in WORKERS}
    order = folder / "order.json"
    profile = folder / "profile.toml"
    profile.write_text(PROFILE)

    def change(name: str, command: list[str]) -> list[str]:
        if name not in WORKERS:
            return command
        service, gate = name[:-2], gates[name]
        gate.target = ("127.0.0.1", free_port())
        addresses = {"LISTEN": f"127.0.0.1:{gate.target[1]}", "ADVERTISE": gate.address}
        settings = [f"BATON_{service.upper()}_{key}={value}" for key, value in addresses.items()]
        return ["/usr/bin/env", *settings, sys.executable, TOLD, service]

    environment = {
        FILE: str(order),
        "BATON_FRONTEND_RESUME_PATIENCE_S": str(PATIENCE_S),
        "BATON_PREFILL_MAX_CHUNK_TOKENS": "64",
        "BATON_DECODE_NUM_BLOCKS": "96",
        "BATON_DECODE_DRAIN_GRACE_S": "1",
        "BATON_PREFILL_DRAIN_GRACE_S": "1",
    }
    made = cluster(folder, engine=engine, profile=str(profile), decode=2, environment=environment, change=change)
    house = await stack.enter_async_context(made)
    pids = lambda: [child.process.pid for child in house.children.values() if child.process is not None]  # noqa: E731
    owned = Owned(house, gates, order, stack.enter_context(StarvationWatch(pids)))
    watch = asyncio.ensure_future(owned.close_gates_of_the_dead())
    stack.callback(watch.cancel)
    await owned.prepare()
    return owned


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def owned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Owned]:
    async with AsyncExitStack() as stack:
        yield await opened(stack, tmp_path_factory.mktemp("owned"), request.param)


# ---- failures the client does not see

Strike = Callable[[Owned, Response], Awaitable[None]]


async def nothing(owned: Owned, response: Response) -> None:
    """The order is all."""


async def cut_attach(owned: Owned, response: Response) -> None:
    """Reset every connection of the frontend to the decodes in mid-stream."""
    await response.reached(STRUCK_AT)
    frontend = owned.ports_of("frontend-0")
    assert sum(owned.gates[name].cut(frontend) for name in ("decode-0", "decode-1"))


async def close_attach(owned: Owned, response: Response) -> None:
    """Cut the way to the decode that is busiest, for longer than anybody waits."""
    await response.reached(STRUCK_AT)
    instances = [i for i in (await owned.house.report()).instances if i.service == "decode"]
    gate = owned.gates[max(instances, key=lambda i: i.running_sequences).instance_id]
    gate.is_open = False
    assert gate.cut()


async def stop_frontend(owned: Owned, response: Response) -> None:
    """Stand still for longer than the workers tolerate, and come back before they forget."""
    await response.reached(STRUCK_AT)
    owned.house.signal("frontend-0", signal.SIGSTOP)
    await asyncio.sleep(2.6)  # the fault's own length
    owned.house.signal("frontend-0", signal.SIGCONT)


async def close_pair(owned: Owned, response: Response) -> None:
    """The decodes cannot reach prefill; the frontend can."""
    gate = owned.gates["prefill-0"]
    gate.is_open = False
    for name in ("decode-0", "decode-1"):
        gate.cut(owned.ports_of(name))


@dataclass(frozen=True)
class Case:
    """One failure.

    order: given before the request. strike: done while it runs, or before if is_before. is_cold: with a prompt nobody has seen.
    resumed: what the response has to say; None: either. needed: who has to live for it. on_torch: in the normal run, too, not only
    with -m slow.
    """

    name: str
    order: Order | None = None
    strike: Strike = nothing
    is_before: bool = False
    is_cold: bool = False
    resumed: bool | None = True
    needed: tuple[str, ...] = WORKERS
    on_torch: bool = False


def decode_ends(reason: str, name: str = "") -> Case:
    """Decode ends a sequence in mid-stream."""
    return Case(name or f"decode says {reason}", Order("decode", "token", reason, STRUCK_AT))


# In an order that starts few processes again: who was killed is needed again as late as possible.
CASES = [
    Case("attach reset", strike=cut_attach, resumed=False, on_torch=True),
    decode_ends("STALE"),
    decode_ends("UNKNOWN"),
    decode_ends("PREEMPTED"),
    decode_ends("ENGINE_ERROR"),
    decode_ends("SKIP", "decode leaves a token out"),
    Case("decode refuses", Order("decode", "start", "REFUSE"), resumed=False),
    Case("prefill refuses", Order("prefill", "start", "REFUSE"), resumed=False),
    Case("frontend stopped", strike=stop_frontend, resumed=None),
    Case("prefill stopped", Order("prefill", "computed", "SIGSTOP"), is_cold=True),
    Case("decode stopped", Order("decode", "token", "SIGSTOP", STRUCK_AT)),
    Case("attach away for long", strike=close_attach),
    Case("prefill killed", Order("prefill", "computing", "SIGKILL"), is_cold=True, on_torch=True),
    Case("decode killed", Order("decode", "token", "SIGKILL", STRUCK_AT), is_cold=True, needed=WORKERS[1:], on_torch=True),
    Case("decode killed before the first token", Order("decode", "pulling", "SIGKILL"), is_cold=True),
    Case("prefill drains", Order("prefill", "computing", "SIGTERM"), is_cold=True, resumed=None),
    Case("decode drains", Order("decode", "token", "SIGTERM", STRUCK_AT), resumed=None),
    Case("no path between the pair", strike=close_pair, is_before=True),
]


# `make test` has no time for all: the others, and torch with most of them, are `make test-slow`.
QUICK = {"attach reset", "decode says STALE", "decode says PREEMPTED", "decode says ENGINE_ERROR", "decode refuses", "prefill stopped"} | {
    "prefill killed",
    "decode killed",
    "decode drains",
}


def on(engine: str) -> Callable[[Callable], Callable]:
    """Mark a test to run all cases on an engine. Only the engine has the module's scope, so that one cluster serves all of them."""

    def mark(test: Callable) -> Callable:
        cases = []
        for case in CASES:
            is_quick = case.name in QUICK and (engine == "sim" or case.on_torch)
            cases.append(pytest.param(case, marks=[] if is_quick else [pytest.mark.slow], id=case.name))
        engines = pytest.mark.parametrize("owned", [engine], indirect=True, scope="module")
        return engines(pytest.mark.parametrize("case", cases)(test))

    return mark


@on("sim")
async def test_the_client_gets_the_answer_of_an_undisturbed_run(owned: Owned, case: Case) -> None:
    await check_undisturbed(owned, case)


@on("torch")
async def test_the_client_gets_the_answer_of_an_undisturbed_run_on_torch(owned: Owned, case: Case) -> None:
    await check_undisturbed(owned, case)


async def check_undisturbed(owned: Owned, case: Case) -> None:
    with owned.timed():
        await owned.mend(case.needed)
    if case.order is not None:
        case.order.write(owned.order)
    prompt = [60 + CASES.index(case), *PROMPT[1:]] if case.is_cold else PROMPT
    response = Response()
    if case.is_before:
        await case.strike(owned, response)
    async with asyncio.TaskGroup() as group:
        group.create_task(owned.ask(response, prompt=prompt))
        if not case.is_before:
            await case.strike(owned, response)
    assert not owned.order.exists(), "the order was not followed"
    if case.order is not None and case.order.do == "SIGTERM":
        await owned.dead()  # it ends by itself, and nobody should count on it until then
    with owned.timed():
        assert response.error is None
        await owned.mend(owned.running())
        undisturbed = await owned.ask(prompt=prompt) if case.is_cold else owned.undisturbed
    check_same(response, undisturbed)
    with owned.timed():
        if case.is_cold:
            assert response.usage is not None
            assert response.usage["prompt_tokens_details"] == {"cached_tokens": 0}, "what the request computed itself does not count"
        if case.resumed is not None:
            assert (response.resumed > 0) == case.resumed


ON_BOTH = pytest.mark.parametrize("owned", ["sim", pytest.param("torch", marks=pytest.mark.slow)], indirect=True, scope="module")
HOG_TOKENS = 1400  # of 1,536 in the pool of a decode: beside it there is no room for the request


@ON_BOTH
async def test_a_request_that_decode_has_no_room_for_waits_and_is_not_tried_elsewhere(owned: Owned) -> None:
    """Not now: prefill offers it again until others have left."""
    await owned.mend()

    async def offers() -> list[float]:
        return [await owned.metric(name, 'baton_handoff_messages_total{kind="begin"}') for name in WORKERS[1:]]

    async def are_paired() -> bool:
        """After a case in which prefill had no path, routers leave that pair out for 10 s, and the decode would wait by itself."""
        before = await offers()
        await asyncio.gather(*(owned.ask(**alone(prompt=[30 + index, *PROMPT[1:40]], max_tokens=1)) for index in range(2)))
        return all(now > earlier for now, earlier in zip(await offers(), before, strict=True))

    await until("prefill is paired with both", are_paired, 30)
    hogs = []
    for index in range(2):
        owned.give("decode", "token", "HOLD", 50 * index)  # which the first one never reaches
        hogs.append(asyncio.ensure_future(owned.ask(**alone(prompt=[20 + index, *PROMPT * 7][:HOG_TOKENS], max_tokens=100))))
        await until("a hog stays", owned.is_followed, 30)
    assert [await owned.metric(name, "baton_live_sequences") for name in WORKERS[1:]] == [1, 1]
    before = sum(await offers())
    response = Response()
    asked = asyncio.ensure_future(owned.ask(response))

    async def offered_again() -> bool:
        return sum(await offers()) >= before + 6

    await until("it was offered again and again", offered_again, 20)
    assert not response.choices
    for hog in hogs:
        hog.cancel()
    await asyncio.wait(hogs)
    await asked
    check_same(response, owned.undisturbed)
    with owned.timed():
        assert response.resumed == 0
        await owned.mend()


@ON_BOTH
async def test_an_answer_that_is_not_streamed_says_that_it_was_resumed(owned: Owned) -> None:
    await owned.mend()
    owned.give("decode", "token", "PREEMPTED", STRUCK_AT)
    response = Response()
    response.take(await owned.house.complete(**owned.request))
    check_same(response, owned.undisturbed)
    assert response.resumed


# ---- what only waits for a worker, and what ends as an error


def alone(**changes: object) -> dict[str, object]:
    """One long choice."""
    return {"n": 1, "stop": None, "logprobs": None, "max_tokens": 2000, **changes}


async def check_begun_right(owned: Owned, response: Response) -> None:
    """What a client got before the error is how an undisturbed answer begins."""
    found = response.choices[0].token_ids
    again = await owned.ask(**alone(max_tokens=len(found)))
    assert found == again.choices[0].token_ids


@ON_BOTH
async def test_a_request_under_which_two_workers_died_is_not_tried_a_third_time(owned: Owned) -> None:
    await owned.mend()
    response = Response()
    owned.give("decode", "token", "SIGKILL", STRUCK_AT)
    asked = asyncio.ensure_future(owned.ask(response, **alone()))
    first = await owned.dead()

    async def goes_on() -> bool:
        return bool(response.choices) and len(response.choices[0].token_ids) > STRUCK_AT + 1

    await until("another worker goes on with it", goes_on, 10)  # before the dead one is back: it could be the one
    await owned.revive(first)
    with owned.timed():
        await owned.attached(len(WORKERS))
        assert not asked.done()
    owned.give("decode", "token", "SIGKILL", times=2)
    await asked
    assert owned.order.exists(), "a third worker was given it, and is dead too"
    assert owned.house.children[first].is_running
    assert response.error is not None
    assert response.error["code"] == "engine_crash"
    assert "2 workers failed while they ran this request" in response.error["message"]
    await owned.mend()
    await check_begun_right(owned, response)


@ON_BOTH
async def test_an_answer_that_workers_fail_on_is_a_500_which_clients_do_not_repeat(owned: Owned) -> None:
    await owned.mend()
    owned.give("decode", "token", "ENGINE_ERROR", times=3)
    async with owned.house.http.post(f"{owned.house.url}/v1/completions", json={**owned.request, **alone()}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (500, "engine_crash")
        assert answer.headers["X-Should-Retry"] == "false"
    assert owned.order.exists(), "two workers were enough"
    await owned.mend()


@ON_BOTH
async def test_attempts_are_limited_and_the_error_says_why_the_last_one_failed(owned: Owned) -> None:
    await owned.mend()
    owned.give("decode", "token", "PREEMPTED", STRUCK_AT, times=9)
    response = await owned.ask(**alone())
    assert response.error is not None
    assert response.error["message"] == "gave up after 8 attempts, the last failed with preempted"
    assert json.loads(owned.order.read_text())["times"] == 1
    await owned.mend()
    await check_begun_right(owned, response)


@ON_BOTH
async def test_the_deadline_ends_a_stream_with_an_error_and_frees_everything(owned: Owned) -> None:
    await owned.mend()
    response = await owned.ask(**alone(baton={"deadline_s": 1.0}))
    assert response.error is not None
    assert response.error["code"] == "deadline_exceeded"
    await owned.mend()
    await check_begun_right(owned, response)


@ON_BOTH
async def test_without_a_worker_a_stream_waits_for_one_to_come_back_and_then_ends_honestly(owned: Owned) -> None:
    """One decode is stopped, the other dies under two clients, one of which leaves while there is nobody to go on."""
    await owned.mend()
    owned.house.signal("decode-1", signal.SIGSTOP)
    await owned.attached(2)
    owned.give("decode", "token", "SIGKILL", STRUCK_AT)
    stays, leaves = Response(), Response()
    staying = asyncio.ensure_future(owned.ask(stays))
    leaving = asyncio.ensure_future(owned.ask(leaves, **alone()))
    assert await owned.dead() == "decode-0"
    leaving.cancel()
    await asyncio.wait([leaving])

    async def one_left() -> bool:
        return await owned.metric("frontend-0", "baton_inflight_requests") == 2  # the two choices of who stays

    await until("the request of who left is over", one_left, 2)
    owned.house.signal("decode-1", signal.SIGCONT)
    await staying
    check_same(stays, owned.undisturbed)
    assert stays.resumed
    response = Response()
    asked = asyncio.ensure_future(owned.ask(response, **alone()))
    await response.reached(STRUCK_AT)
    owned.house.signal("decode-1", signal.SIGSTOP)
    began = time.monotonic()
    await asked
    assert response.error is not None
    assert response.error["code"] == "unavailable"
    assert time.monotonic() - began > PATIENCE_S
    await owned.mend()
    await check_begun_right(owned, response)
