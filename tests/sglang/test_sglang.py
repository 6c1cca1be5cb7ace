"""A real SGLang server as Baton's engine, and a pair of them that hand over to each other: exact, cancelled, killed, and held on to."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import cluster as cluster_module
import psutil
import pytest
import pytest_asyncio
from cluster import Cluster, cluster, until
from cpu import PYTHON, settings

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.skipif(not PYTHON, reason="needs an environment with SGLang: make test-sglang"),
]

Reference = Callable[[list[int], int], list[int]]
START_LIMIT_S = 240.0
PROMPT = [3 + i % 200 for i in range(70)]


def prompt(number: int) -> list[int]:
    return [3 + (i * (number + 3)) % 220 for i in range(40 + 7 * number)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory, model: Path) -> AsyncIterator[Cluster]:
    """One prefill and one decode."""
    cluster_module.READY_LIMIT_S = START_LIMIT_S
    environment = settings(is_pair=True)
    async with cluster(tmp_path_factory.mktemp("pair"), engine="sglang", model=model, environment=environment) as made:
        yield made


async def answer(made: Cluster, token_ids: list[int], count: int, **about: object) -> list[int]:
    got = await made.complete(prompt=token_ids, max_tokens=count, temperature=0, ignore_eos=True, return_token_ids=True, **about)
    found: list[int] = got["choices"][0]["token_ids"]
    return found


async def stream(made: Cluster, token_ids: list[int], count: int, got: list[int]) -> None:
    """Ask, and collect the tokens as they come. Raises: aiohttp.ClientError, AssertionError if it breaks off."""
    body = {"model": "test-model", "prompt": token_ids, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
    async with made.http.post(f"{made.url}/v1/completions", json=body | {"return_token_ids": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                got += event["choices"][0].get("token_ids") or []


def server(made: Cluster, name: str) -> psutil.Process:
    """The SGLang server of a worker."""
    (process,) = psutil.Process(made.instance(name).pid).children()
    return process


def schedulers(made: Cluster, name: str) -> list[psutil.Process]:
    """Its processes that compute."""
    return [child for child in server(made, name).children(recursive=True) if "sched" in " ".join(child.cmdline())]


async def metric(made: Cluster, instance: str, name: str) -> float:
    return (await made.metrics(instance))[name]


async def come_back(made: Cluster, name: str) -> None:
    """The worker whose server died has ended itself; start it again, as a supervisor does."""
    process = made.children[name].process
    assert process is not None
    async with asyncio.timeout(60):
        assert await process.wait() == 1
    await made.start(name)
    await until("the routers hear all workers", lambda: cluster_module.up.routers_are_open(made.view, made.options.counts), START_LIMIT_S)
    await until("the frontend serves the model", made.serves_model, START_LIMIT_S)


async def is_exact(made: Cluster, reference: Reference) -> None:
    """It answers, exactly, and nothing is left over."""

    async def answers() -> list[int] | None:
        found = await _outcome(answer(made, PROMPT, 12))  # the frontend may not have heard of a new life yet
        return found if isinstance(found, list) else None

    assert await until("an answer", answers, 30.0) == reference(PROMPT, 12)
    await made.settled(limit_s=30.0)


async def test_servers_of_their_own_answer_whole_requests_exactly_and_one_goes_on_where_another_died(
    tmp_path: Path, model: Path, reference: Reference
) -> None:
    cluster_module.READY_LIMIT_S = START_LIMIT_S
    async with cluster(tmp_path, engine="sglang", model=model, prefill=0, decode=2, environment=settings(is_pair=False)) as made:
        wanted = reference(PROMPT, 12)
        assert await answer(made, PROMPT, 12) == wanted
        several = await asyncio.gather(*(answer(made, prompt(n), 10) for n in range(6)))
        assert several == [reference(prompt(n), 10) for n in range(6)]
        two = await made.complete(prompt=PROMPT, max_tokens=8, temperature=1.0, n=2, ignore_eos=True, return_token_ids=True)
        assert [len(choice["token_ids"]) for choice in two["choices"]] == [8, 8]
        stopped = await made.complete(prompt=PROMPT, max_tokens=12, temperature=0, stop_token_ids=[wanted[4]], return_token_ids=True)
        assert stopped["choices"][0]["token_ids"] == wanted[: wanted.index(wanted[4]) + 1]
        assert stopped["choices"][0]["finish_reason"] == "stop"
        logprobs = await made.complete(prompt=PROMPT, max_tokens=4, temperature=0, ignore_eos=True, logprobs=3)
        found = logprobs["choices"][0]["logprobs"]
        assert all(max(top.values()) == chosen for top, chosen in zip(found["top_logprobs"], found["token_logprobs"], strict=True))
        got: list[int] = []
        asking = asyncio.create_task(stream(made, PROMPT, 900, got))
        await until("some tokens", lambda: _true(len(got) > 5), 30.0)
        asking.cancel()
        await made.settled()
        got.clear()
        asking = asyncio.create_task(stream(made, PROMPT, 300, got))
        await until("some tokens", lambda: _true(len(got) > 20), 30.0)
        running = [name for name in ("decode-0", "decode-1") if await metric(made, name, "baton_running_sequences")]
        assert len(running) == 1
        server(made, running[0]).kill()
        await asking
        assert got == reference(PROMPT, 300)
        await come_back(made, running[0])
        await is_exact(made, reference)


async def test_a_pair_hands_over_and_answers_exactly_and_the_books_agree(pair: Cluster, reference: Reference) -> None:
    assert await answer(pair, PROMPT, 12) == reference(PROMPT, 12)
    several = await asyncio.gather(*(answer(pair, prompt(n), 10) for n in range(6)))
    assert several == [reference(prompt(n), 10) for n in range(6)]
    assert await answer(pair, PROMPT, 1) == reference(PROMPT, 1)
    logprobs = await pair.complete(prompt=PROMPT, max_tokens=3, temperature=0.7, ignore_eos=True, logprobs=2)
    assert len(logprobs["choices"][0]["logprobs"]["token_logprobs"]) == 3
    await pair.settled()
    report = await pair.report()
    (books,) = [instance for instance in report.instances if instance.service == "kvtransfer"]
    assert (books.agreed_handoffs, books.disagreed_handoffs, books.mismatch_bytes) == (9, 0, 0)
    assert await metric(pair, "decode-0", "baton_handoff_bytes_total") > 0


async def test_a_sampled_first_token_is_sampled_where_it_is_drawn(pair: Cluster) -> None:
    """Prefill draws the first token: greedy there would give one and the same."""
    firsts = await asyncio.gather(
        *(pair.complete(prompt=PROMPT, max_tokens=1, temperature=1.9, ignore_eos=True, return_token_ids=True) for _ in range(8))
    )
    assert len({got["choices"][0]["token_ids"][0] for got in firsts}) > 1


@pytest.mark.parametrize("halted", ["prefill-0", "decode-0"])
async def test_a_request_given_up_while_the_servers_wait_for_each_other_leaves_nothing(
    pair: Cluster, reference: Reference, halted: str
) -> None:
    for process in schedulers(pair, halted):
        process.suspend()
    try:
        asking = asyncio.create_task(answer(pair, prompt(5), 10))

        async def is_reserved() -> bool:
            return await metric(pair, "decode-0", "baton_kv_reserved_bytes") > 0

        await until("decode has reserved", is_reserved, 10.0)
        asking.cancel()

        async def has_given_up() -> bool:
            """Decode has let go, or has told its server, which cannot act on it, and keeps the blocks until it has."""
            metrics = await pair.metrics("decode-0")
            return metrics["baton_kv_quarantined_bytes"] == metrics["baton_kv_reserved_bytes"]

        await until("decode has heard of it", has_given_up, 10.0)
    finally:
        for process in schedulers(pair, halted):
            process.resume()
    await pair.settled(limit_s=20.0)
    await is_exact(pair, reference)


async def test_a_request_given_up_while_it_decodes_leaves_nothing(pair: Cluster, reference: Reference) -> None:
    got: list[int] = []
    asking = asyncio.create_task(stream(pair, PROMPT, 900, got))
    await until("some tokens", lambda: _true(len(got) > 5), 30.0)
    asking.cancel()
    await pair.settled(limit_s=20.0)
    await is_exact(pair, reference)


async def test_prefill_dies_while_the_servers_wait_for_each_other(pair: Cluster, reference: Reference) -> None:
    for process in schedulers(pair, "decode-0"):
        process.suspend()
    try:
        asking = asyncio.create_task(_outcome(answer(pair, prompt(6), 10)))

        async def is_reserved() -> bool:
            return await metric(pair, "decode-0", "baton_kv_reserved_bytes") > 0

        await until("decode has reserved", is_reserved, 10.0)
        server(pair, "prefill-0").kill()
    finally:
        for process in schedulers(pair, "decode-0"):
            process.resume()
    outcome = await asking
    assert outcome is None or outcome == reference(prompt(6), 10)
    await come_back(pair, "prefill-0")
    await is_exact(pair, reference)


async def test_decode_dies_while_it_answers_and_what_was_said_was_right(pair: Cluster, reference: Reference) -> None:
    got: list[int] = []
    asking = asyncio.create_task(_outcome(stream(pair, PROMPT, 900, got)))
    await until("some tokens", lambda: _true(len(got) > 5), 30.0)
    server(pair, "decode-0").send_signal(signal.SIGKILL)
    await asking
    assert got == reference(PROMPT, len(got))
    await come_back(pair, "decode-0")
    await is_exact(pair, reference)


async def test_kv_that_no_request_of_ours_explains_is_stranded_and_after_half_a_minute_the_server_is_restarted(
    pair: Cluster, reference: Reference
) -> None:
    before = pair.instance("decode-0").incarnation
    command = server(pair, "decode-0").cmdline()
    port, key = (command[command.index(flag) + 1] for flag in ("--port", "--api-key"))
    host, _, bootstrap = json.loads(pair.instance("prefill-0").transports[0].parameters)["address"].rpartition(":")
    stranger = {"input_ids": PROMPT, "rid": "nobody's", "sampling_params": {"max_new_tokens": 4}}
    stranger |= {"bootstrap_host": host, "bootstrap_port": int(bootstrap), "bootstrap_room": 4711}
    headers = {"Authorization": f"Bearer {key}"}
    asking = asyncio.create_task(_outcome(_post(pair.http, f"http://127.0.0.1:{port}/generate", stranger, headers)))

    async def is_stranded() -> bool:
        report = await pair.report()
        (decode,) = [instance for instance in report.instances if instance.instance_id == "decode-0"]
        return bool(decode.stranded_bytes)

    await until("the books say so", is_stranded, 20.0)
    assert await metric(pair, "decode-0", "baton_kv_stranded_bytes") > 0
    await come_back(pair, "decode-0")
    await asking
    assert pair.instance("decode-0").incarnation != before
    assert await metric(pair, "decode-0", "baton_kv_stranded_bytes") == 0
    await is_exact(pair, reference)


async def _post(http: aiohttp.ClientSession, url: str, body: dict[str, object], headers: dict[str, str]) -> str:
    async with http.post(url, json=body, headers=headers) as response:
        return await response.text()


async def _outcome(work: "asyncio._CoroutineLike[object]") -> object:
    """What comes of it; None if it fails, as it may where something was killed."""
    try:
        return await work
    except (AssertionError, aiohttp.ClientError):
        return None


async def _true(value: bool) -> bool:
    return value
