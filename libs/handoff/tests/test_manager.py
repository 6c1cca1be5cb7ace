"""Two workers over real gRPC on loopback: bytes arrive, links break and come back, peers are fenced, cancels in every phase."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from baton_contracts.kvtransfer.v1.kvtransfer_service_pb2 import Introduction
from baton_handoff.config import HandoffConfig, Times
from baton_handoff.ids import EndReason, FailureCause, PeerRef
from baton_handoff.manager import zero_tail
from baton_handoff.testing import FakeEngine, LoopbackNetwork, TestWorker, introduce
from baton_handoff.testing.worker import TEST_LAYOUT
from baton_runtime.lifecycle import new_incarnation
from baton_runtime.testing import wait_until

TOKENS = list(range(7, 7 + 19))  # 18 to hand over: four full blocks and one of two tokens
CONFIG = HandoffConfig(operation_bytes=2 * TEST_LAYOUT.block_bytes)


@dataclass
class Pair:
    network: LoopbackNetwork
    p: TestWorker
    d: TestWorker

    def place(self, request_id: str = "r", tokens: list[int] = TOKENS, attempt: int = 1) -> None:
        self.p.prefill(request_id, tokens, self.d, attempt)
        self.d.decode(request_id, tokens, self.p, attempt)

    async def quiet(self) -> None:
        """Nobody holds anything, nothing lives."""
        await wait_until(lambda: self.p.holds_nothing() and self.d.holds_nothing())
        await wait_until(lambda: not self.p.manager.live_handoffs() and not self.d.manager.live_handoffs())
        assert self.p.manager.stranded_bytes() == self.d.manager.stranded_bytes() == 0


@contextlib.asynccontextmanager
async def make_pair(config: HandoffConfig = CONFIG, **options: int) -> AsyncIterator[Pair]:
    network = LoopbackNetwork()
    async with (
        TestWorker(network, "prefill-0", config=config, **options) as p,
        TestWorker(network, "decode-0", config=config, **options) as d,
    ):
        introduce(p, d)
        yield Pair(network, p, d)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with make_pair() as made:
        yield made


def expected(worker: TestWorker, request_id: str = "r") -> list[list[int]]:
    """Contents of every block: the fill everywhere, and zeros behind the last token."""
    request = worker.requests[request_id]
    num_blocks = -(-request.num_kv_tokens // 4)
    fills = [[FakeEngine.fill(request, index)] for index in range(num_blocks)]
    if request.num_kv_tokens % 4:
        fills[-1].append(0)
    return fills


async def test_blocks_arrive_with_their_contents_and_the_tail_is_zero(pair: Pair) -> None:
    pair.place()
    await wait_until(lambda: "r" in pair.d.completions)
    assert pair.d.contents == expected(pair.d)
    await wait_until(lambda: "r" in pair.p.ends)
    assert pair.p.ends["r"].reason is EndReason.PREFILLED
    assert pair.p.ends["r"].num_bytes == pair.d.completions["r"].handoff_bytes == 5 * TEST_LAYOUT.block_bytes
    await pair.quiet()


async def test_metrics_count_bytes_and_outcomes(pair: Pair) -> None:
    pair.place()
    await wait_until(lambda: "r" in pair.p.ends and "r" in pair.d.completions)
    assert pair.d.metric("baton_handoff_bytes_total") == 5 * TEST_LAYOUT.block_bytes
    assert pair.d.metric("baton_handoffs_total", outcome="confirmed", role="sink") == 1
    assert pair.p.metric("baton_handoffs_total", outcome="confirmed", role="source") == 1
    assert pair.d.metric("baton_handoff_exposed_seconds_count") == 1
    assert pair.d.metric("baton_kv_stranded_bytes") == 0


async def test_handoffs_are_counted_by_state(pair: Pair) -> None:
    pair.network.hold()
    pair.place()
    await wait_until(lambda: pair.network.num_pulls)
    assert pair.d.metric("baton_handoffs_by_state", side="sink", state="pulling") == 1
    assert pair.p.metric("baton_handoffs_by_state", side="source", state="computed") == 1
    pair.p.manager.cancel("r", 1, "CLIENT_GONE")
    await wait_until(lambda: pair.d.metric("baton_handoffs_by_state", side="sink", state="draining") == 1)
    assert pair.p.metric("baton_handoffs_by_state", side="source", state="computed") == 0
    pair.network.go()
    await wait_until(lambda: pair.d.metric("baton_handoffs_by_state", side="sink", state="draining") == 0)


async def test_pull_that_nobody_wants_does_not_keep_blocks_for_long(pair: Pair) -> None:
    """The peer lives and its bytes trickle: no fence ends it, and its transport's own limit is far away."""
    pair.network.hold()
    pair.place()
    await wait_until(lambda: pair.network.num_pulls)
    pair.d.manager.cancel("r", 1, "CLIENT_GONE")
    await wait_until(lambda: pair.d.metric("baton_handoffs_by_state", side="sink", state="draining") == 1)
    await wait_until(pair.d.holds_nothing, timeout_s=2.0)
    await pair.quiet()


async def test_second_request_pulls_only_what_is_not_cached(pair: Pair) -> None:
    pair.place("a")
    await wait_until(lambda: "a" in pair.d.completions and pair.d.holds_nothing())
    pair.place("b", [*TOKENS[:-2], 999, 998])
    await wait_until(lambda: "b" in pair.d.completions)
    assert pair.d.completions["b"].handoff_bytes == TEST_LAYOUT.block_bytes
    assert pair.d.completions["b"].cached_tokens == 16
    await pair.quiet()


async def test_fifty_requests_with_room_for_two_all_arrive() -> None:
    async with make_pair(num_blocks=10) as pair:
        for index in range(50):
            pair.place(f"r{index}", [index, *TOKENS[1:]])
        await wait_until(lambda: len(pair.d.completions) == 50, timeout_s=15)
        await pair.quiet()


async def test_begin_that_overtakes_the_start_is_offered_again(pair: Pair) -> None:
    pair.d.decode("warm", TOKENS, pair.p)  # the link is open
    pair.p.prefill("r", [1, *TOKENS], pair.d)
    await asyncio.sleep(0)
    await wait_until(lambda: pair.p.manager.queued() == 1)
    pair.d.decode("r", [1, *TOKENS], pair.p)
    await wait_until(lambda: "r" in pair.d.completions)
    pair.d.manager.cancel("warm", 1, "CLIENT_GONE")
    await pair.quiet()


async def test_broken_link_is_opened_again_and_nothing_is_lost(pair: Pair) -> None:
    pair.network.hold()
    pair.place()
    await wait_until(lambda: pair.network.num_pulls)
    break_link(pair)
    pair.network.go()
    await wait_until(lambda: "r" in pair.d.completions)
    assert pair.d.contents == expected(pair.d)
    await wait_until(lambda: "r" in pair.p.ends)
    assert pair.p.ends["r"].reason is EndReason.PREFILLED
    await pair.quiet()


def break_link(pair: Pair) -> None:
    """The source ends the stream as a reset would; the sink opens it again."""
    session = pair.p.manager.servicer.peers[pair.d.incarnation].session
    assert session is not None
    session.end("reset by the test")


async def test_links_broken_again_and_again_lose_nothing(pair: Pair) -> None:
    for index in range(20):
        pair.place(f"r{index}", [index, *TOKENS[1:]])
    for _ in range(5):
        await wait_until(lambda: getattr(pair.p.manager.servicer.peers.get(pair.d.incarnation), "session", None) is not None)
        break_link(pair)
        await asyncio.sleep(0)
    await wait_until(lambda: len(pair.d.completions) + len(pair.d.ends) == 20, timeout_s=10)
    assert len(pair.d.completions) == 20, pair.d.ends
    await pair.quiet()


async def test_source_gone_fences_it_and_keeps_what_was_confirmed() -> None:
    network = LoopbackNetwork()
    async with TestWorker(network, "decode-0", config=CONFIG) as d, TestWorker(network, "prefill-0", config=CONFIG) as p:
        introduce(p, d)
        pair = Pair(network, p, d)
        pair.place("first")
        await wait_until(lambda: "first" in d.completions and d.holds_nothing())
        p.engine.is_paused = True
        pair.place("r", [1, 2, 3, *TOKENS])
        await wait_until(lambda: d.engine.blocks.counts().reserved > 0)
        await p.server.close()
        await wait_until(lambda: "r" in d.ends, timeout_s=3)
        end = d.ends["r"]
        assert (end.reason, end.cause, end.peer_incarnation) == (EndReason.HANDOFF_FAILED, FailureCause.PEER_FENCED, p.incarnation)
        await wait_until(d.holds_nothing)
        p.engine.go_on()
        await wait_until(p.holds_nothing)
        assert p.ends["r"].cause is FailureCause.PEER_FENCED


async def test_silent_source_is_fenced_after_two_seconds(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.network.hold()
    pair.place()
    await wait_until(lambda: pair.network.num_pulls)
    servicer = pair.p.manager.servicer
    session = servicer.peers[pair.d.incarnation].session
    assert session is not None

    async def silence(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("baton_handoff.link.MessageQueue.write_all", silence)
    monkeypatch.setattr(session.queue, "write_all", silence)
    session.queue.put = lambda message: None  # type: ignore[method-assign]
    client = pair.d.manager._peers.clients[pair.p.incarnation]
    assert client.watch is not None
    client.watch.heard = lambda beat, now: None  # type: ignore[method-assign]
    await wait_until(lambda: "r" in pair.d.ends, timeout_s=4)
    assert pair.d.ends["r"].cause is FailureCause.PEER_FENCED
    await pair.quiet()


async def test_peer_whose_step_is_stuck_is_fenced(pair: Pair) -> None:
    pair.network.hold()
    pair.place()
    await wait_until(lambda: pair.network.num_pulls)
    pair.p.engine.beat_age_s = 2.5
    await wait_until(lambda: "r" in pair.d.ends)
    assert pair.d.ends["r"].cause is FailureCause.PEER_FENCED
    await pair.quiet()


async def test_other_incarnation_of_the_source_is_fenced_at_once(pair: Pair) -> None:
    stale = PeerRef("prefill-0", new_incarnation(), pair.p.record.grpc_address)
    old = type(pair.p.record)()
    old.CopyFrom(pair.p.record)
    old.incarnation = stale.incarnation
    from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as kv_pb

    pair.d.manager.introductions.add(kv_pb.Introduction(peer=old, pair_secret=b"s" * 16))
    pair.d.decode("r", TOKENS, stale)
    await wait_until(lambda: "r" in pair.d.ends, timeout_s=1)
    assert pair.d.ends["r"].cause is FailureCause.PEER_FENCED


async def test_source_that_cannot_be_reached_is_path_down() -> None:
    times = Times(first_link_s=0.3)
    async with make_pair(HandoffConfig(times=times)) as pair:
        unreachable = PeerRef("prefill-0", pair.p.incarnation, "127.0.0.1:9")
        pair.d.decode("r", TOKENS, unreachable)
        await wait_until(lambda: "r" in pair.d.ends)
        assert pair.d.ends["r"].cause is FailureCause.PATH_DOWN


async def test_pair_never_introduced_is_refused_at_once_without_kvtransfer() -> None:
    network = LoopbackNetwork()
    async with TestWorker(network, "p") as p, TestWorker(network, "d") as d:
        d.decode("r", TOKENS, p)
        assert d.ends["r"].cause is FailureCause.NO_INTRODUCTION


async def test_refused_introduction_names_the_difference() -> None:
    network = LoopbackNetwork()
    async with TestWorker(network, "p", fingerprint="a" * 16) as p, TestWorker(network, "d") as d:
        introduce(p, d)
        d.decode("r", TOKENS, p)
        error = d.ends["r"].error
        assert error is not None
        assert "fingerprint" in error.message
        assert "a" * 16 in error.message
        assert "f" * 16 in error.message


async def test_layouts_that_cannot_be_matched_end_both_starts_before_anything_runs_naming_both() -> None:
    network = LoopbackNetwork()
    async with TestWorker(network, "p", layout=replace(TEST_LAYOUT, num_layers=3)) as p, TestWorker(network, "d") as d:
        introduce(p, d)
        for worker, start in ((p, lambda: p.prefill("r", TOKENS, d)), (d, lambda: d.decode("r", TOKENS, p))):
            start()
            end = worker.ends["r"]
            assert (end.reason, end.cause) == (EndReason.HANDOFF_FAILED, FailureCause.NO_INTRODUCTION)
            assert end.error is not None
            assert "layers=2" in end.error.message
            assert "layers=3" in end.error.message
        assert not p.outputs
        assert not p.manager.live_handoffs()


async def test_refusal_that_comes_after_the_starts_ends_them_before_anything_runs() -> None:
    network = LoopbackNetwork()
    async with TestWorker(network, "p", layout=replace(TEST_LAYOUT, num_layers=3)) as p, TestWorker(network, "d") as d:
        d.manager.introductions.add(Introduction(peer=p.record, pair_secret=b"s"))
        p.prefill("r", TOKENS, d)
        introduce(p, d)
        assert p.ends["r"].cause is FailureCause.NO_INTRODUCTION
        assert not p.outputs


@pytest.mark.parametrize("num_tokens", [9, 20, 33])
@pytest.mark.parametrize(("p_tokens", "d_tokens"), [(4, 8), (8, 4)])
async def test_both_sides_count_the_same_bytes_whatever_their_blocks(p_tokens: int, d_tokens: int, num_tokens: int) -> None:
    network = LoopbackNetwork()
    layouts = [replace(TEST_LAYOUT, block_tokens=size) for size in (p_tokens, d_tokens)]
    async with (
        TestWorker(network, "p", layout=layouts[0], hash_block_tokens=4) as p,
        TestWorker(network, "d", layout=layouts[1], hash_block_tokens=4) as d,
    ):
        introduce(p, d)
        pair = Pair(network, p, d)
        pair.place(tokens=list(range(50, 50 + num_tokens)))
        await wait_until(lambda: "r" in d.completions and "r" in p.ends)
        num_bytes = -(-(num_tokens - 1) // p_tokens) * layouts[0].block_bytes
        assert (p.ends["r"].num_bytes, d.completions["r"].handoff_bytes) == (num_bytes, num_bytes)
        assert d.metric("baton_handoff_bytes_total") == num_bytes
        fills = [FakeEngine.fill(d.requests["r"], index) for index in range(-(-(num_tokens - 1) // p_tokens))]
        if p_tokens < d_tokens:  # a block here holds several of the source's, and zeros behind the last token
            found = [value for block in d.contents for value in block if value]
            assert sorted(found) == sorted(fills)
        else:
            assert [block[0] for block in d.contents] == [fills[index * d_tokens // p_tokens] for index in range(len(d.contents))]
        await pair.quiet()


def test_the_tail_of_every_shard_and_plane_is_zeroed() -> None:
    layout = replace(TEST_LAYOUT, num_kv_heads=4, num_shards=2)
    block = np.full(layout.block_bytes, 7, np.uint8)
    zero_tail(block, layout, 3)
    slots = block.reshape(2, layout.num_layers, 2, 4, -1)
    assert (slots[..., :3, :] == 7).all()
    assert (slots[..., 3:, :] == 0).all()


async def test_wrong_secret_is_no_introduction() -> None:
    times = Times(first_link_s=0.3)
    network = LoopbackNetwork()
    async with TestWorker(network, "p") as p, TestWorker(network, "d", config=HandoffConfig(times=times)) as d:
        introduce(p, d)
        d.manager.introductions.get(p.incarnation).secrets[:] = [b"wrong" * 3 + b"!"]  # type: ignore[union-attr]
        d.decode("r", TOKENS, p)
        await wait_until(lambda: "r" in d.ends)
        assert d.ends["r"].cause is FailureCause.NO_INTRODUCTION


async def test_introduction_that_comes_late_at_the_source_is_waited_for(pair: Pair) -> None:
    known = pair.p.manager.introductions.get(pair.d.incarnation)
    assert known is not None
    secrets, known.secrets = known.secrets, []
    pair.place()
    await wait_until(lambda: pair.d.manager._peers.clients[pair.p.incarnation].was_refused)
    known.secrets = secrets
    await wait_until(lambda: "r" in pair.d.completions)
    await pair.quiet()


async def test_attempt_cancelled_before_its_start_is_stale(pair: Pair) -> None:
    pair.p.manager.cancel("r", 1, "CLIENT_GONE")
    pair.d.manager.cancel("r", 1, "CLIENT_GONE")
    pair.place()
    assert pair.p.ends["r"].reason is EndReason.STALE
    assert pair.d.ends["r"].reason is EndReason.STALE


PHASES: dict[str, Callable[[Pair], bool]] = {
    "ticket": lambda pair: pair.d.manager._peers.clients[pair.p.incarnation].watch is not None,
    "reserved": lambda pair: pair.d.engine.blocks.counts().reserved > 0,
    "pulling": lambda pair: pair.network.num_pulls > 0,
    "confirmed in part": lambda pair: pair.d.metric("baton_handoff_bytes_total") > 0,
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("by", ["sink", "source", "both"])
async def test_cancel_frees_both_sides(pair: Pair, phase: str, by: str) -> None:
    if phase == "reserved":
        pair.p.engine.is_paused = True
    if phase == "pulling":
        pair.network.hold()
    pair.place()
    await wait_until(lambda: PHASES[phase](pair))
    for worker in {"sink": [pair.d], "source": [pair.p], "both": [pair.p, pair.d]}[by]:
        worker.manager.cancel("r", 1, "CLIENT_GONE")
    await wait_until(lambda: not pair.p.manager.live_handoffs() and not pair.d.manager.live_handoffs())
    pair.network.go()
    pair.p.engine.go_on()
    await pair.quiet()
    ended = [worker for worker in (pair.p, pair.d) if "r" in worker.ends or "r" in worker.completions]
    assert ended == [pair.p, pair.d]


async def test_blocks_of_a_running_pull_are_kept_until_it_returns(pair: Pair) -> None:
    pair.network.hold()
    pair.place()
    await wait_until(lambda: pair.network.num_pulls)
    pair.d.manager.cancel("r", 1, "CLIENT_GONE")
    assert pair.d.ends["r"].reason is EndReason.CANCELLED
    assert pair.d.engine.blocks.counts().reserved > 0
    await wait_until(pair.p.holds_nothing)
    pair.network.go()
    await pair.quiet()


async def test_failed_pull_is_path_down(pair: Pair) -> None:
    pair.network.is_broken = True
    pair.place()
    await wait_until(lambda: "r" in pair.d.ends)
    assert pair.d.ends["r"].cause is FailureCause.PATH_DOWN
    await wait_until(lambda: "r" in pair.p.ends)
    assert pair.p.ends["r"].cause is FailureCause.PEER_CANCELLED
    pair.network.is_broken = False
    pair.place(attempt=2)
    await wait_until(lambda: "r" in pair.d.completions)
    await pair.quiet()


async def test_engine_error_ends_both_sides(pair: Pair) -> None:
    pair.p.engine.is_paused = True
    pair.place()
    await wait_until(lambda: pair.d.engine.blocks.counts().reserved > 0)
    pair.p.engine.fail(pair.p.requests["r"].key)
    pair.p.engine.go_on()
    await wait_until(lambda: "r" in pair.p.ends and "r" in pair.d.ends)
    assert pair.p.ends["r"].reason is EndReason.ENGINE_ERROR
    assert pair.d.ends["r"].cause is FailureCause.PEER_CANCELLED
    await pair.quiet()


async def test_loop_that_stood_still_fences_everybody_before_it_listens(pair: Pair) -> None:
    pair.network.hold()
    pair.place()
    await wait_until(lambda: pair.network.num_pulls)
    pair.d.manager._last_tick -= 10
    pair.d.manager.notice()
    assert pair.d.ends["r"].cause is FailureCause.PEER_FENCED
    assert pair.network.num_pulls == 1
    await pair.quiet()


async def test_draining_worker_is_safe_to_stop_when_all_is_over(pair: Pair) -> None:
    pair.network.hold()
    pair.place()
    await wait_until(lambda: pair.network.num_pulls)
    pair.p.manager.set_draining()
    assert not pair.p.manager.safe_to_stop()
    pair.network.go()
    await wait_until(lambda: "r" in pair.d.completions)
    await wait_until(pair.p.manager.safe_to_stop)
    pair.p.prefill("late", TOKENS, pair.d)
    assert pair.p.ends["late"].reason is EndReason.REFUSED


async def test_unused_link_is_closed_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Times(link_idle_s=0.2)
    async with make_pair(HandoffConfig(times=times)) as pair:
        pair.place("a")
        await wait_until(lambda: "a" in pair.d.completions)
        await wait_until(lambda: not pair.p.manager.servicer.peers)
        assert pair.p.metric("baton_handoff_fences_total", role="source", reason="stream_broken") == 0
        pair.place("b", [5, *TOKENS])
        await wait_until(lambda: "b" in pair.d.completions)
        await pair.quiet()


async def test_stranded_bytes_see_what_the_books_forgot(pair: Pair) -> None:
    """The audit asks the block manager, not the state machines."""
    pair.d.engine.blocks.reserve("leaked", [], 3)
    await wait_until(lambda: pair.d.manager.stranded_bytes() == 3 * TEST_LAYOUT.block_bytes, timeout_s=3)
    assert pair.d.metric("baton_kv_stranded_bytes") == 3 * TEST_LAYOUT.block_bytes
    pair.d.engine.blocks.release("leaked")
    assert pair.d.manager.stranded_bytes() == 0


async def test_close_while_pulling_releases_everything() -> None:
    network = LoopbackNetwork()
    async with TestWorker(network, "p", config=CONFIG) as p, TestWorker(network, "d", config=CONFIG) as d:
        introduce(p, d)
        Pair(network, p, d).place()
        network.hold()
        await wait_until(lambda: network.num_pulls)
        await d.manager.close()
        assert d.holds_nothing()
        assert d.ends["r"].cause is FailureCause.PEER_FENCED
        await wait_until(p.holds_nothing)


async def test_start_the_own_engine_would_refuse_ends_invalid_at_once() -> None:
    async with make_pair(num_blocks=5) as pair:
        pair.d.decode("long", range(21), pair.p)  # its KV would fit, the token drawn would not
        assert pair.d.ends["long"].reason is EndReason.INVALID
        too_large = [1, 2, 3, pair.p.engine.info.vocab_size]
        pair.p.prefill("strange", too_large, pair.d)
        pair.d.decode("strange", too_large, pair.p)
        assert pair.p.ends["strange"].reason is EndReason.INVALID
        assert pair.d.ends["strange"].reason is EndReason.INVALID
        assert not pair.p.manager.live_handoffs()
        assert not pair.d.manager.live_handoffs()


async def test_closing_worker_fences_with_that_reason() -> None:
    async with make_pair() as pair:
        pair.place()
        await wait_until(lambda: "r" in pair.d.completions)
    assert pair.d.metric("baton_handoff_fences_total", role="sink", reason="closing") == 1
    assert pair.d.metric("baton_handoff_fences_total", role="sink", reason="loop_stall") == 0
