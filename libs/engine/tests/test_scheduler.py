from dataclasses import replace

import pytest
from baton_engine.api import EndReason, Priority, SequenceKey
from baton_engine.blocks import CacheFull, Turn
from baton_engine.scheduler import SchedulerLimits
from baton_engine.sim_profile import DecodeTime, SimProfile
from baton_engine.virtual import SMALL, VirtualEngine, request_of, tokens_of, virtual_engine
from hypothesis import given, settings
from hypothesis import strategies as st

BIG = SchedulerLimits(block_tokens=16, max_batch_sequences=64, max_chunk_tokens=8192)


def order_of_first_tokens(bench: VirtualEngine) -> list[str]:
    names: dict[str, None] = {}
    for output in bench.outputs:
        names.update(dict.fromkeys(key.request_id for key in output.keys))
    return list(names)


def test_steps_are_predicted_and_sized_below_the_limit():
    """8192 tokens would take 169 ms and two such chunks more than 250 ms: the polynomial allows about 10,000 tokens."""
    bench = virtual_engine(4096, "polynomial", limits=replace(BIG, max_chunk_tokens=32768))
    bench.engine.add(request_of("a", tokens_of(30000), max_tokens=1))
    sizes = []
    while bench.engine.has_work():
        assert bench.engine.plan() <= 0.25
        output = bench.engine.step()
        sizes.append(output.prefill_tokens)
        assert output.duration_s <= 0.2501
    assert max(sizes) > 9000
    assert sum(sizes) == 30000


def test_chunk_limit_holds_over_all_sequences_of_a_step():
    bench = virtual_engine(256, "instant", limits=replace(BIG, max_chunk_tokens=100))
    for number in range(5):
        bench.engine.add(request_of(str(number), tokens_of(90, number)))
    while bench.engine.has_work():
        assert bench.step().prefill_tokens <= 100


def test_decoding_sequences_go_along_with_every_chunk():
    bench = virtual_engine(1024, "polynomial", limits=BIG)
    bench.engine.add(request_of("a", tokens_of(20), max_tokens=100))
    bench.step()
    bench.engine.add(request_of("long", tokens_of(14000, 1), max_tokens=1))
    outputs = [bench.step() for _ in range(2)]
    assert all(output.prefill_tokens > 0 and output.decode_sequences == 1 for output in outputs)


def test_mixed_step_limit_bounds_the_gap_between_tokens():
    bench = virtual_engine(1024, "polynomial", limits=replace(BIG, max_mixed_step_s=0.05))
    bench.engine.add(request_of("a", tokens_of(20), max_tokens=50))
    bench.step()
    bench.engine.add(request_of("long", tokens_of(10000, 1), max_tokens=1))
    for _ in range(5):
        assert bench.step().duration_s <= 0.0501


def test_short_prompt_overtakes_a_long_one_at_the_next_chunk():
    bench = virtual_engine(8192, "polynomial", limits=BIG)
    bench.engine.add(request_of("long", tokens_of(60000), max_tokens=1))
    bench.step()
    bench.engine.add(request_of("short", tokens_of(100, 1), max_tokens=1))
    bench.step()
    assert bench.end("short").reason is EndReason.LENGTH
    assert bench.tokens("long") == []


def test_short_prompt_overtakes_a_long_one_that_is_nearly_done():
    bench = virtual_engine(8192, "polynomial", limits=BIG)
    bench.engine.add(request_of("long", tokens_of(60000), max_tokens=1))
    while bench.engine.stats().waiting_prefill_tokens > 20000 or not bench.outputs:
        bench.step()
    bench.engine.add(request_of("short", tokens_of(100, 1), max_tokens=1))
    bench.step()
    assert order_of_first_tokens(bench) == ["short"]


@pytest.mark.parametrize("priority", list(Priority))
def test_step_that_ends_a_short_prompt_is_not_filled_up_with_a_piece_of_a_long_one(priority):
    """The first token of the short one would come as much later as the piece takes."""
    bench = virtual_engine(8192, "polynomial", limits=BIG)
    bench.engine.add(request_of("long", tokens_of(60000), max_tokens=1, priority=priority))
    bench.step()
    for name in ("short", "other"):
        bench.engine.add(request_of(name, tokens_of(100, 1 + len(name)), max_tokens=1))
    output = bench.step()
    assert output.prefill_tokens == 200
    assert {end.key.request_id for end in output.ends} == {"short", "other"}
    assert bench.step().prefill_tokens > 1000


def test_interactive_goes_before_batch():
    bench = virtual_engine(1024, "polynomial", limits=BIG)
    bench.engine.add(request_of("batch", tokens_of(8000), max_tokens=1, priority=Priority.BATCH))
    bench.engine.add(request_of("interactive", tokens_of(8000, 1), max_tokens=1))
    bench.run()
    assert order_of_first_tokens(bench) == ["interactive", "batch"]


def test_batch_is_not_starved_by_a_stream_of_interactive_prompts():
    bench = virtual_engine(4096, "polynomial", limits=BIG)
    bench.engine.add(request_of("batch", tokens_of(8000), max_tokens=1, priority=Priority.BATCH))
    started_at = bench.clock.now
    for number in range(400):
        if "batch" in order_of_first_tokens(bench):
            break
        bench.engine.add(request_of(str(number), tokens_of(8191, number + 1), max_tokens=1))
        bench.step()
    assert bench.end("batch").reason is EndReason.LENGTH
    assert 10 < bench.clock.now - started_at < 13


def test_long_prompt_is_not_starved_by_a_stream_of_short_ones():
    bench = virtual_engine(8192, "polynomial", limits=BIG)
    bench.engine.add(request_of("long", tokens_of(60000), max_tokens=1))
    for number in range(200):
        if "long" in order_of_first_tokens(bench):
            break
        bench.engine.add(request_of(str(number), tokens_of(8000, number + 1), max_tokens=1))
        bench.step()
    assert bench.end("long").reason is EndReason.LENGTH
    assert len(bench.outputs) < 30


def test_batch_size_is_bounded():
    bench = virtual_engine(256)
    for number in range(20):
        bench.engine.add(request_of(str(number), tokens_of(3, number), max_tokens=5))
    while bench.engine.has_work():
        assert len(set(bench.step().keys)) <= 8
    assert len({end.key for output in bench.outputs for end in output.ends}) == 20


def test_more_resumed_sequences_than_fit_take_turns():
    bench = virtual_engine(256)
    names = [str(number) for number in range(16)]
    for half in (names[:8], names[8:]):
        for name in half:
            bench.engine.add(request_of(name, tokens_of(2, int(name)), max_tokens=50))
        bench.step()
        for name in half:
            bench.engine.pause(SequenceKey(name, 1))
    for name in names:
        bench.engine.resume(SequenceKey(name, 1))
    for _ in range(4):
        assert len(set(bench.step().keys)) == 8
    assert {len(bench.tokens(name)) for name in names} == {3 * bench.runner.tokens_per_step}


def test_full_batch_of_decoding_sequences_does_not_starve_a_prompt():
    """The decode step alone is over the limit; the prompt still gets a block's worth per step."""
    bench = virtual_engine(64, "polynomial", limits=replace(SMALL, max_step_s=0.001, max_mixed_step_s=0.001))
    bench.engine.add(request_of("a", tokens_of(4), max_tokens=50))
    bench.step()
    bench.engine.add(request_of("b", tokens_of(12, 1), max_tokens=1))
    for _ in range(3):
        bench.step()
    assert bench.end("b").reason is EndReason.LENGTH


def test_prompts_that_add_no_time_all_come_along_with_decode_steps_over_the_limit():
    """One sequence decodes in steps of 0.5 s, twice the limit: the prompts must not wait for each other."""
    slow_decode = SimProfile(decode_ms=DecodeTime(constant=500.0))
    bench = virtual_engine(64, slow_decode, limits=BIG)
    bench.engine.add(request_of("a", tokens_of(4), max_tokens=50))
    bench.step()
    names = [str(number) for number in range(20)]
    for number, name in enumerate(names):
        bench.engine.add(request_of(name, tokens_of(20, number + 1), max_tokens=3))
    output = bench.step()
    assert {key.request_id for key in output.keys} == {"a", *names}
    assert output.duration_s == pytest.approx(0.5)


def ticket(bench: VirtualEngine, name: str, num_blocks: int, rank: float) -> bool:
    """What a sink asks for, beside the engine."""
    try:
        bench.blocks.reserve(name, [], num_blocks, turn=Turn(rank, bench.clock.now))
    except CacheFull:
        return False
    return True


def test_large_prompt_is_not_starved_by_tickets_that_fit_beside_what_runs():
    """Every 100 ms a ticket of 4 blocks comes and one ends: without a line the 20 blocks of the prompt were never free at once."""
    bench = virtual_engine(24, "instant")
    held = [f"t{number}" for number in range(5)]
    assert all(ticket(bench, name, 4, bench.clock.now) for name in held)
    bench.engine.add(request_of("large", tokens_of(76), max_tokens=1))
    began = bench.clock.now
    for number in range(5, 100):
        if bench.engine.has_work():
            bench.step()
        if bench.blocks.has_table(SequenceKey("large", 1)):
            break
        bench.clock.sleep(0.1)
        if held:
            bench.blocks.release(held.pop(0))
        if ticket(bench, f"t{number}", 4, bench.clock.now):
            held.append(f"t{number}")
    assert bench.clock.now - began < 1.0 + 0.7  # patience, then one life of all that ran
    bench.run()
    assert bench.end("large").reason is EndReason.LENGTH


def test_prompt_behind_a_ticket_waits_for_it_and_goes_on_when_it_is_gone():
    bench = virtual_engine(8)
    ticket(bench, "runs", 4, 0.0)
    for _ in range(2):
        assert not ticket(bench, "first", 6, 1.0)
        bench.clock.sleep(1.1)
    assert not ticket(bench, "first", 6, 1.0)
    bench.engine.add(request_of("small", tokens_of(4), max_tokens=1))
    bench.step()
    assert not bench.engine.has_work()
    bench.blocks.expire_waiting(bench.clock.now + 1.1)  # it is offered no more
    bench.run()
    assert bench.end("small").reason is EndReason.LENGTH


def test_paused_prompt_keeps_nobody_from_blocks():
    bench = virtual_engine(8)
    ticket(bench, "runs", 4, 0.0)
    bench.engine.add(request_of("large", tokens_of(24), max_tokens=1))
    bench.step()
    bench.clock.sleep(1.1)
    assert not ticket(bench, "small", 1, bench.clock.now)
    bench.engine.pause(SequenceKey("large", 1))
    assert ticket(bench, "small", 1, bench.clock.now)


def test_prompt_whose_room_is_kept_is_asked_before_one_of_a_smaller_rank(tmp_path):
    """A later short prompt is first by rank; asked first it would wait for room beside the long one, and hold that up as well."""
    (tmp_path / "slow.toml").write_text("[prefill_ms]\nper_token = 100.0\n[decode_ms]\nconstant = 1.0\n")
    bench = virtual_engine(16, str(tmp_path / "slow.toml"))
    ticket(bench, "runs", 4, 0.0)
    bench.engine.add(request_of("large", tokens_of(64), max_tokens=1))
    bench.step()
    bench.clock.sleep(1.1)
    bench.engine.add(request_of("short", tokens_of(1, 1), max_tokens=1))
    bench.step()
    assert not bench.blocks.has_table(SequenceKey("short", 1))
    bench.blocks.release("runs")
    bench.step()
    assert bench.blocks.has_table(SequenceKey("large", 1))
    bench.run()
    assert bench.end("short").reason is EndReason.LENGTH


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 12), st.booleans(), st.integers(0, 3), st.booleans()), min_size=1, max_size=14),
    st.integers(7, 20),
    st.randoms(use_true_random=False),
)
def test_everything_ends_exactly_once_whatever_comes(requests, num_blocks, random):
    """Random prompts (some equal), classes, cancels and pauses in a pool that is too small for them."""
    bench, reference = virtual_engine(num_blocks), {}
    for number, (length, max_tokens, is_batch, seed, is_cancelled) in enumerate(requests):
        name = str(number)
        priority = Priority.BATCH if is_batch else Priority.INTERACTIVE
        request = request_of(name, tokens_of(length, seed), max_tokens=max_tokens, priority=priority)
        bench.engine.add(request)
        reference[name] = request
        for _ in range(random.randint(0, 2)):
            bench.step()
        if is_cancelled:
            bench.engine.cancel(SequenceKey(str(random.randint(0, number)), 1))
        bench.engine.pause(SequenceKey(str(random.randint(0, number)), 1))
    for name in reference:
        bench.engine.resume(SequenceKey(name, 1))
    bench.run()
    for name, request in reference.items():
        end = bench.end(name)
        alone = virtual_engine()
        alone.engine.add(request)
        alone.run()
        assert bench.tokens(name) == alone.tokens(name)[: len(bench.tokens(name))]
        if end.reason is EndReason.LENGTH:
            fits = 4 * num_blocks + 1 - len(request.token_ids)  # one that fills the whole pool ends by LENGTH as well
            assert end.output_tokens == len(bench.tokens(name)) == min(request.sampling.max_tokens, fits)
    counts = bench.blocks.counts()
    assert counts.used == counts.pinned == counts.reserved == 0


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_tiny_pools_still_end_everything(num_blocks):
    bench = virtual_engine(num_blocks)
    for number in range(4):
        bench.engine.add(request_of(str(number), tokens_of(4, number), max_tokens=100))
    bench.run()
    assert len([end for output in bench.outputs for end in output.ends]) == 4
