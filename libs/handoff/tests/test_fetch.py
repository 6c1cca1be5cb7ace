"""Workers that fetch from each other over real gRPC on loopback: what arrives, what happens when the source dies, hangs or is slow."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from baton_engine.api import EngineRequest
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import EndReason, FetchEnd, FetchHint, FetchOutcome
from baton_handoff.testing import FakeEngine, LoopbackNetwork, TestWorker, introduce
from baton_handoff.testing.worker import TEST_LAYOUT
from baton_runtime.testing import wait_until
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TURN_1 = list(range(7, 7 + 33))  # 32 tokens to hand over: eight full blocks of four
TURN_2 = [*TURN_1, *range(200, 210)]
CONFIG = HandoffConfig(operation_bytes=2 * TEST_LAYOUT.block_bytes, fetch_min_tokens=4)
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BLOCK_BYTES = TEST_LAYOUT.block_bytes


@dataclass
class Three:
    """Two prefill instances and a decode; decode has turn 1 cached, p1 nothing. p1 believes computing to be slow."""

    network: LoopbackNetwork
    p0: TestWorker
    p1: TestWorker
    d: TestWorker
    spans: InMemorySpanExporter

    async def quiet(self) -> None:
        """Nobody holds anything, nothing lives."""
        workers = (self.p0, self.p1, self.d)
        await wait_until(lambda: all(worker.holds_nothing() and not worker.manager.live_handoffs() for worker in workers))
        assert not any(worker.manager.stranded_bytes() for worker in workers)

    def turn_2(self, request_id: str = "r2", hint: FetchHint | None = None) -> None:
        self.p1.prefill(request_id, TURN_2, self.d, fetch_from=hint, traceparent=SAMPLED)
        self.d.decode(request_id, TURN_2, self.p1)


@contextlib.asynccontextmanager
async def make_three(token_s: float = 1.0) -> AsyncIterator[Three]:
    network, provider, spans = LoopbackNetwork(), TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    async with (
        TestWorker(network, "prefill-0", config=CONFIG) as p0,
        TestWorker(network, "prefill-1", config=CONFIG, provider=provider) as p1,
        TestWorker(network, "decode-0", config=CONFIG) as d,
    ):
        for a, b in ((p0, p1), (p0, d), (p1, d)):
            introduce(a, b)
        p0.prefill("r1", TURN_1, d)
        d.decode("r1", TURN_1, p0)
        await wait_until(lambda: "r1" in d.completions and d.holds_nothing() and p0.holds_nothing())
        p1.slow_down(token_s)
        yield Three(network, p0, p1, d, spans)


@pytest.fixture
async def three() -> AsyncIterator[Three]:
    async with make_three() as made:
        yield made


def fills(request: EngineRequest) -> list[list[int]]:
    """What every block of a sequence must hold: zeros behind the last token."""
    num_blocks = -(-request.num_kv_tokens // 4)
    found = [[FakeEngine.fill(request, index)] for index in range(num_blocks)]
    if request.num_kv_tokens % 4:
        found[-1].append(0)
    return found


async def test_prefill_fetches_from_decode_what_it_lacks_and_computes_the_rest(three: Three) -> None:
    three.turn_2()
    await wait_until(lambda: "r2" in three.d.completions and "r2" in three.p1.ends)
    assert three.d.contents == fills(three.d.requests["r2"])
    end = three.p1.ends["r2"]
    assert (end.reason, end.cached_tokens, end.fetched_tokens) == (EndReason.PREFILLED, 32, 32)
    assert three.d.completions["r2"].cached_tokens == 32
    assert three.p1.metric("baton_fetches_total", outcome="fetched") == 1
    assert three.p1.metric("baton_fetched_tokens_total") == 32
    assert three.p1.metric("baton_fetched_bytes_total") == 8 * BLOCK_BYTES
    await three.quiet()


async def test_fetch_has_a_span_under_the_request(three: Three) -> None:
    three.turn_2()
    await wait_until(lambda: "r2" in three.p1.ends)
    (span,) = [span for span in three.spans.get_finished_spans() if span.name == "kv.fetch"]
    assert span.parent is not None
    assert span.attributes is not None
    said = {name.removeprefix("baton."): value for name, value in span.attributes.items()}
    assert (said["wanted_tokens"], said["fetched_tokens"], said["bytes"]) == (32, 32, 8 * BLOCK_BYTES)
    assert (said["fetch.instance_id"], said["outcome"], said["operations"]) == ("decode-0", "fetched", 4)


async def test_prefill_follows_a_hint_that_promises_more_than_decode_has(three: Three) -> None:
    longer = [*TURN_2, *range(300, 330)]
    fill_cache(three.p0, longer)
    three.p1.prefill("r2", longer, three.d, fetch_from=FetchHint(three.p0.ref(), len(longer)))
    three.d.decode("r2", longer, three.p1)
    await wait_until(lambda: "r2" in three.d.completions and "r2" in three.p1.ends)
    assert three.d.contents == fills(three.d.requests["r2"])
    assert three.p1.ends["r2"].fetched_tokens == (len(longer) - 1) // 4 * 4
    await three.quiet()


def fill_cache(worker: TestWorker, tokens: list[int]) -> None:
    """As if the worker had computed these tokens for itself before."""
    worker.fetch("own work", tokens, worker)  # makes a request, and fetches nothing: it is the worker itself
    request = worker.requests.pop("own work")
    assert worker.fetch_ends.pop("own work").outcome is FetchOutcome.NO_SOURCE
    hashes = worker.manager._fetches.hashes(request)
    shared = worker.engine.blocks.acquire("own work", hashes, len(hashes))
    for index, block in enumerate(worker.engine.blocks.table("own work")):
        worker.engine.pool.data[block] = FakeEngine.fill(request, index)
        if index >= shared:
            worker.engine.blocks.publish("own work", index, hashes[index])
    worker.engine.blocks.release("own work")


async def test_any_two_workers_may_fetch_from_each_other(three: Three) -> None:
    three.p1.fetch("whole", TURN_1, three.p0)
    await wait_until(lambda: "whole" in three.p1.fetch_ends)
    assert three.p1.fetch_ends["whole"] == FetchEnd(FetchOutcome.FETCHED, 32, 8 * BLOCK_BYTES)
    three.p1.fetch("again", TURN_1, three.p0)  # nothing is missing: no question is asked
    assert three.p1.fetch_ends["again"] == FetchEnd(FetchOutcome.NO_SOURCE)
    await three.quiet()


async def test_time_is_over_and_prefill_computes() -> None:
    """The source's link lives and its bytes do not come."""
    async with make_three(token_s=0.01) as quick:  # 32 tokens: 0.3 s
        quick.network.hold()
        quick.turn_2()
        await wait_until(lambda: quick.p1.metric("baton_fetches_total", outcome="timeout") == 1)
        quick.network.go()
        await wait_until(lambda: "r2" in quick.d.completions and "r2" in quick.p1.ends)
        assert quick.d.contents == fills(quick.d.requests["r2"])
        assert quick.p1.ends["r2"].fetched_tokens == 0
        await quick.quiet()


async def test_source_killed_in_the_middle_fails_no_request(three: Three) -> None:
    fill_cache(three.p0, TURN_2)
    three.network.hold()
    three.turn_2(hint=FetchHint(three.p0.ref(), len(TURN_2)))
    await wait_until(lambda: three.p0.manager._fetches.source.live)
    await three.p0.server.close()
    await wait_until(lambda: three.p1.metric("baton_fetches_total", outcome="fenced") == 1, timeout_s=3)
    three.network.go()
    await wait_until(lambda: "r2" in three.d.completions and "r2" in three.p1.ends)
    assert three.d.contents == fills(three.d.requests["r2"])
    assert (three.p1.ends["r2"].reason, three.p1.ends["r2"].fetched_tokens) == (EndReason.PREFILLED, 0)
    await three.quiet()


async def test_link_broken_in_the_middle_loses_nothing(three: Three) -> None:
    three.network.hold()
    three.turn_2()
    await wait_until(lambda: three.d.manager._fetches.source.live)
    session = three.d.manager.servicer.peers[three.p1.incarnation].session
    assert session is not None
    session.end("reset by the test")
    three.network.go()
    await wait_until(lambda: "r2" in three.d.completions and "r2" in three.p1.ends)
    assert three.d.contents == fills(three.d.requests["r2"])
    assert three.p1.ends["r2"].fetched_tokens == 32
    await three.quiet()


async def test_path_that_fails_leaves_prefill_to_compute(three: Three) -> None:
    three.network.is_broken = True
    three.p1.fetch("whole", TURN_1, three.p0)
    await wait_until(lambda: "whole" in three.p1.fetch_ends)
    assert three.p1.fetch_ends["whole"] == FetchEnd(FetchOutcome.PULL_FAILED)
    await three.quiet()


async def test_source_that_failed_is_left_alone_for_a_while(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every request would wait in turn for a source that cannot be reached."""
    three.network.is_broken = True
    three.p1.fetch("first", TURN_1, three.p0)
    await wait_until(lambda: "first" in three.p1.fetch_ends)
    three.network.is_broken = False
    three.p1.fetch("second", TURN_1, three.p0)
    assert three.p1.fetch_ends["second"] == FetchEnd(FetchOutcome.NO_SOURCE)
    monkeypatch.setattr("baton_handoff.fetches.BARRED_S", 0.0)
    three.network.is_broken = True
    three.p1.fetch("other", TURN_1, three.d)
    await wait_until(lambda: "other" in three.p1.fetch_ends)
    three.network.is_broken = False
    three.p1.fetch("again", TURN_1, three.d)
    await wait_until(lambda: "again" in three.p1.fetch_ends)
    assert three.p1.fetch_ends["again"].outcome is FetchOutcome.FETCHED


async def test_cancel_while_fetching_frees_both_sides(three: Three) -> None:
    three.network.hold()
    three.turn_2()
    await wait_until(lambda: three.d.manager._fetches.source.live)
    three.p1.manager.cancel("r2", 1, "CLIENT_GONE")
    three.d.manager.cancel("r2", 1, "CLIENT_GONE")
    assert three.p1.ends["r2"].reason is EndReason.CANCELLED
    three.network.go()
    await three.quiet()


async def test_closing_while_fetching_leaves_nothing_running() -> None:
    async with make_three() as three:
        three.network.hold()
        three.turn_2()
        await wait_until(lambda: three.d.manager._fetches.source.live)
        await three.p1.manager.close()
        assert three.p1.manager.safe_to_stop() or three.p1.holds_nothing()
        await wait_until(three.d.holds_nothing)


async def test_fetch_is_worth_it_only_if_sooner_than_computing(three: Three) -> None:
    three.d.fetch("small", [1, 2, 3, 4, 5], three.p0)  # too few tokens
    assert three.d.fetch_ends["small"].outcome is FetchOutcome.NO_SOURCE
    fill_cache(three.p0, [9, *range(400, 440)])
    three.d.fetch("fast", [9, *range(400, 440)], three.p0)  # computing is not known to be slow here
    assert three.d.fetch_ends["fast"].outcome is FetchOutcome.NO_SOURCE


async def test_worker_that_is_not_introduced_is_not_fetched_from(three: Three) -> None:
    async with TestWorker(three.network, "prefill-2", config=CONFIG) as stranger:
        stranger.slow_down()
        stranger.fetch("r", TURN_1, three.p0)
        assert stranger.fetch_ends["r"].outcome is FetchOutcome.NO_SOURCE


async def test_draining_source_gives_nothing(three: Three) -> None:
    three.p0.manager.set_draining()
    three.p1.fetch("r", TURN_1, three.p0)
    await wait_until(lambda: "r" in three.p1.fetch_ends)
    assert three.p1.fetch_ends["r"].outcome is FetchOutcome.NOT_FOUND
    await wait_until(three.p0.manager.safe_to_stop)
