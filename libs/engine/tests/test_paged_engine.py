from array import array
from dataclasses import replace

import numpy as np
import pytest
from baton_engine.api import EndReason, Priority, SamplingParams, SequenceKey, Work
from baton_engine.errors import SequenceTooLong, StepFailed
from baton_engine.sim_pattern import expected_block_bytes
from baton_engine.sim_runner import expected_next_token
from baton_engine.virtual import ROOT, VirtualEngine, hashes_of, request_of, tokens_of, virtual_engine
from baton_runtime.errors import InvalidArgument
from baton_runtime.hashing import block_hashes


def expected(bench: VirtualEngine, prompt: array, count: int) -> list[int]:
    """Undisturbed output, from the pure function alone."""
    tokens = array("I", prompt)
    for _ in range(count):
        tokens.append(expected_next_token(bench.runner, tokens))
    return tokens[len(prompt) :].tolist()


def prefill(bench: VirtualEngine, name: str, tokens: array, first_announced_block: int = 0) -> SequenceKey:
    key = SequenceKey(name, 1)
    bench.blocks.acquire(key, hashes_of(tokens), -(-(len(tokens) - 1) // 4))
    bench.engine.add(request_of(name, tokens, work=Work.PREFILL_ONLY, first_announced_block=first_announced_block))
    return key


def hand_over(source: VirtualEngine, sink: VirtualEngine, name: str, tokens: array, **kwargs) -> None:
    """Pull every announced block, commit, and start decoding."""
    key = SequenceKey(name, 1)
    num_blocks = -(-(len(tokens) - 1) // 4)
    first = sink.blocks.reserve(key, hashes_of(tokens), num_blocks)
    table = sink.blocks.table(key)
    for block, block_id in enumerate(source.ready_blocks(name)[first:], first):
        sink.engine.pool.data[table[block]] = source.engine.pool.data[block_id]
    sink.blocks.commit(key, num_blocks, hashes_of(tokens))
    source.blocks.unpin(key)
    sink.engine.add(request_of(name, tokens, work=Work.DECODE_ONLY, **kwargs))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 50])
def test_whole_request_draws_the_expected_tokens_and_frees_its_blocks(length):
    bench = virtual_engine()
    bench.engine.add(request_of("a", tokens_of(length), max_tokens=6))
    bench.run()
    assert bench.tokens("a") == expected(bench, tokens_of(length), 6)
    assert bench.end("a").reason is EndReason.LENGTH
    assert bench.end("a").output_tokens == 6
    assert bench.blocks.counts().used == 0


def test_batch_of_prompts_draws_what_each_draws_alone():
    bench = virtual_engine()
    for number in range(12):
        bench.engine.add(request_of(str(number), tokens_of(3 + 5 * number, number), max_tokens=1 + number))
    bench.run()
    for number in range(12):
        assert bench.tokens(str(number)) == expected(bench, tokens_of(3 + 5 * number, number), 1 + number)


def test_resume_takes_given_tokens_and_goes_on_at_the_next_position():
    bench = virtual_engine()
    prompt = tokens_of(10)
    output = expected(bench, prompt, 6)
    bench.engine.add(request_of("a", prompt + array("I", output[:2]), num_prompt_tokens=10, max_tokens=6))
    bench.run()
    assert bench.tokens("a") == output[2:]
    assert [p for out in bench.outputs for p in out.positions] == [2, 3, 4, 5]
    assert bench.end("a").output_tokens == 4


def test_resume_with_nothing_left_ends_at_once():
    bench = virtual_engine()
    bench.engine.add(request_of("a", tokens_of(10), num_prompt_tokens=6, max_tokens=4))
    bench.run()
    assert (bench.end("a").reason, bench.end("a").output_tokens) == (EndReason.LENGTH, 0)


def test_stop_token_ends_the_sequence_and_is_delivered():
    bench = virtual_engine()
    output = expected(bench, tokens_of(5), 8)
    bench.engine.add(request_of("a", tokens_of(5), max_tokens=8, sampling=SamplingParams(stop_token_ids=frozenset([output[3]]))))
    bench.run()
    assert bench.tokens("a") == output[:4]
    assert (bench.end("a").reason, bench.end("a").stop_token_id) == (EndReason.STOP, output[3])


def test_stop_token_before_min_tokens_is_not_honoured():
    bench = virtual_engine()
    output = expected(bench, tokens_of(5), 4)
    sampling = SamplingParams(stop_token_ids=frozenset(output[:2]), min_tokens=2)
    bench.engine.add(request_of("a", tokens_of(5), max_tokens=4, sampling=sampling))
    bench.run()
    assert bench.tokens("a") == output


def test_prompt_is_computed_in_chunks_on_block_borders():
    bench = virtual_engine()
    bench.engine.add(request_of("a", tokens_of(50), max_tokens=1))
    bench.run()
    assert [output.prefill_tokens for output in bench.outputs] == [16, 16, 16, 2]
    assert bench.outputs[0].started == [SequenceKey("a", 1)]


def test_second_request_hits_the_prefix_including_output_of_the_first():
    bench = virtual_engine()
    bench.engine.add(request_of("a", tokens_of(10), max_tokens=8))
    bench.run()
    longer = tokens_of(10) + array("I", bench.tokens("a"))
    bench.engine.add(request_of("b", longer, max_tokens=1))
    bench.run()
    assert bench.end("b").cached_tokens == 16  # 10 + 7 tokens had their KV computed: four full blocks
    assert bench.tokens("b") == expected(bench, longer, 1)


def test_sequences_of_another_root_share_nothing():
    bench = virtual_engine()
    bench.engine.add(request_of("a", tokens_of(20)))
    bench.run()
    bench.engine.add(replace(request_of("b", tokens_of(20)), cache_root=b"x" * 16))
    bench.run()
    assert bench.end("b").cached_tokens == 0


def test_finer_hash_blocks_give_every_nth_link():
    bench = virtual_engine(hash_block_tokens=2)
    bench.engine.add(request_of("a", tokens_of(12), max_tokens=8))
    bench.run()
    tokens = tokens_of(12) + array("I", bench.tokens("a"))
    assert sorted(bench.blocks.cached_hashes()) == sorted(block_hashes(ROOT, tokens[:-1], 2, 4))


@pytest.mark.parametrize("length", [2, 5, 8, 9, 17, 50])
def test_prefill_announces_every_block_with_the_right_bytes_and_pins_them(length):
    bench = virtual_engine()
    tokens = tokens_of(length)
    key = prefill(bench, "a", tokens)
    bench.run()
    ids = bench.ready_blocks("a")
    assert len(ids) == -(-(length - 1) // 4)
    for index, block_id in enumerate(ids):
        want = expected_block_bytes(bench.runner.layout, tokens[:-1], index)
        assert np.array_equal(bench.engine.pool.data[block_id], want)
    assert bench.end("a").reason is EndReason.PREFILLED
    assert bench.tokens("a") == []
    assert bench.blocks.counts().pinned == bench.blocks.held(key) == len(ids)
    bench.blocks.unpin(key)
    assert bench.blocks.counts().pinned == 0


def test_prefill_announces_chunk_by_chunk_and_the_partial_block_last():
    bench = virtual_engine()
    prefill(bench, "a", tokens_of(40))  # 39 tokens: nine full blocks and one of three tokens
    bench.run()
    assert [len(ready.block_ids) for output in bench.outputs for ready in output.ready] == [4, 4, 2]


def test_prefill_announces_from_the_sinks_first_missing_block():
    bench = virtual_engine()
    prefill(bench, "a", tokens_of(40), first_announced_block=5)
    bench.run()
    ready = [ready for output in bench.outputs for ready in output.ready]
    assert [(entry.first_block, len(entry.block_ids)) for entry in ready] == [(5, 3), (8, 2)]
    assert bench.blocks.counts().pinned == 5


def test_cached_blocks_are_announced_at_once_and_not_computed_again():
    bench = virtual_engine()
    key = prefill(bench, "a", tokens_of(40))
    bench.run()
    bench.blocks.unpin(key)
    prefill(bench, "b", tokens_of(40))
    output = bench.step()
    assert [len(ready.block_ids) for ready in output.ready] == [9, 1]
    assert output.prefill_tokens == 3
    assert bench.end("b").cached_tokens == 36


def test_fully_cached_prefill_ends_without_a_step_of_compute():
    bench = virtual_engine()
    key = prefill(bench, "a", tokens_of(33))
    bench.run()
    bench.blocks.unpin(key)
    prefill(bench, "b", tokens_of(33))
    output = bench.step()
    assert output.kv_tokens == 0
    assert bench.end("b").reason is EndReason.PREFILLED
    assert len(bench.ready_blocks("b")) == 8


def test_prefill_of_one_token_ends_with_nothing_to_hand_over():
    bench = virtual_engine()
    prefill(bench, "a", tokens_of(1))
    bench.run()
    assert bench.end("a").reason is EndReason.PREFILLED


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 9, 17, 41])
def test_handed_over_sequence_draws_the_expected_tokens(length):
    source, sink, tokens = virtual_engine(), virtual_engine(), tokens_of(length)
    sink.blocks.acquire("elsewhere", [], 7)  # other block ids than at the source
    prefill(source, "a", tokens)
    source.run()
    hand_over(source, sink, "a", tokens, max_tokens=9)
    sink.run()
    assert sink.tokens("a") == expected(sink, tokens, 9)
    assert source.blocks.counts().pinned == sink.blocks.counts().reserved == 0
    assert sink.outputs[0].decode_sequences == 1
    assert sink.outputs[0].prefill_tokens == 0


def test_tail_of_a_pulled_partial_block_is_zeroed_before_the_first_step():
    source, sink, tokens = virtual_engine(), virtual_engine(), tokens_of(7)
    sink.engine.pool.data[:] = 0xFF
    prefill(source, "a", tokens)
    source.run()
    source.engine.pool.data[source.ready_blocks("a")[1]].reshape(4, 4, -1)[:, 2:] = 0xFF
    hand_over(source, sink, "a", tokens, max_tokens=1)
    last = sink.blocks.table(SequenceKey("a", 1))[1]
    sink.run()
    slots = sink.engine.pool.data[last].reshape(4, 4, -1)
    assert not slots[:, 3].any()
    assert slots[:, 2].any()


def test_corrupt_handoff_fails_that_sequence_and_no_other():
    source, sink = virtual_engine(), virtual_engine()
    for number, name in enumerate("ab"):
        prefill(source, name, tokens_of(20, number))
    source.run()
    source.engine.pool.data[source.ready_blocks("a")[2], 17] ^= 1
    for number, name in enumerate("ab"):
        hand_over(source, sink, name, tokens_of(20, number))
    sink.run()
    assert (sink.end("a").reason, sink.end("a").message) == (EndReason.ENGINE_ERROR, "kv_corrupt")
    assert sink.tokens("a") == []
    assert sink.tokens("b") == expected(sink, tokens_of(20, 1), 4)
    assert sink.blocks.counts().used == 0


def test_cancel_ends_waiting_running_and_prefilling_sequences_at_the_next_step():
    bench = virtual_engine(256)
    for number in range(10):
        bench.engine.add(request_of(str(number), tokens_of(20, number), max_tokens=50))
    prefill(bench, "p", tokens_of(60, 99))
    bench.step()
    for number in range(10):
        bench.engine.cancel(SequenceKey(str(number), 1))
    bench.engine.cancel(SequenceKey("p", 1))
    bench.engine.cancel(SequenceKey("unknown", 1))
    output = bench.step()
    assert {end.reason for end in output.ends} == {EndReason.CANCELLED}
    assert len(output.ends) == 11
    assert bench.blocks.counts().used == 0
    assert not bench.engine.has_work()


def test_cancelled_prefill_keeps_the_pins_of_announced_blocks_until_the_handoff_unpins():
    bench = virtual_engine()
    key = prefill(bench, "a", tokens_of(60))
    bench.step()
    bench.engine.cancel(key)
    bench.run()
    assert bench.blocks.counts().pinned == 4
    bench.blocks.unpin(key)
    assert bench.blocks.counts().pinned == 0


def test_paused_sequence_keeps_blocks_and_place_and_goes_on_after_resume():
    bench = virtual_engine()
    for name, seed in (("a", 1), ("b", 2)):
        bench.engine.add(request_of(name, tokens_of(9, seed), max_tokens=10))
    bench.step()
    bench.engine.pause(SequenceKey("a", 1))
    bench.run()
    assert len(bench.tokens("a")) < 10
    assert len(bench.tokens("b")) == 10
    assert not bench.engine.has_work()
    assert bench.blocks.counts().used > 0
    bench.engine.resume(SequenceKey("a", 1))
    bench.run()
    assert bench.tokens("a") == expected(bench, tokens_of(9, 1), 10)


def test_paused_sequence_can_be_cancelled():
    bench = virtual_engine()
    bench.engine.add(request_of("a", tokens_of(9)))
    bench.engine.pause(SequenceKey("a", 1))
    assert not bench.engine.has_work()
    bench.engine.cancel(SequenceKey("a", 1))
    bench.run()
    assert bench.end("a").reason is EndReason.CANCELLED


def test_sequence_paused_while_waiting_runs_after_resume():
    bench = virtual_engine()
    bench.engine.add(request_of("a", tokens_of(9)))
    bench.engine.pause(SequenceKey("a", 1))
    bench.run()
    bench.engine.resume(SequenceKey("a", 1))
    bench.engine.resume(SequenceKey("a", 1))
    bench.run()
    assert bench.tokens("a") == expected(bench, tokens_of(9), 4)


def test_without_room_to_grow_the_youngest_batch_sequence_goes_first():
    bench = virtual_engine(num_blocks=12)
    bench.engine.add(request_of("batch-old", tokens_of(8, 1), max_tokens=20, priority=Priority.BATCH))
    bench.engine.add(request_of("batch-young", tokens_of(8, 2), max_tokens=20, priority=Priority.BATCH))
    bench.engine.add(request_of("interactive", tokens_of(8, 3), max_tokens=20))
    bench.run()
    assert bench.end("batch-young").reason is EndReason.PREEMPTED
    assert bench.end("interactive").reason is EndReason.LENGTH
    assert bench.tokens("interactive") == expected(bench, tokens_of(8, 3), 20)


def test_preempted_sequence_resumes_elsewhere_with_the_same_tokens():
    bench, elsewhere = virtual_engine(num_blocks=10), virtual_engine()
    for name, seed in (("a", 1), ("b", 2)):
        bench.engine.add(request_of(name, tokens_of(10, seed), max_tokens=20))
    bench.run()
    assert bench.end("b").reason is EndReason.PREEMPTED
    given = tokens_of(10, 2) + array("I", bench.tokens("b"))
    elsewhere.engine.add(request_of("b", given, num_prompt_tokens=10, max_tokens=20, attempt=2))
    elsewhere.run()
    assert bench.tokens("b") + elsewhere.tokens("b") == expected(bench, tokens_of(10, 2), 20)


def test_sequence_that_fills_the_whole_pool_ends_by_length():
    bench = virtual_engine(num_blocks=4)
    bench.engine.add(request_of("a", tokens_of(10), max_tokens=100))
    bench.run()
    assert bench.end("a").reason is EndReason.LENGTH
    assert bench.end("a").output_tokens == 4 * 4 + 1 - 10


def test_prompt_that_does_not_fit_now_waits_without_spinning_and_runs_when_blocks_are_free():
    bench = virtual_engine(num_blocks=8)
    bench.blocks.reserve("handoff", [], 6)
    bench.engine.add(request_of("a", tokens_of(20)))
    bench.step()
    assert not bench.engine.has_work()
    assert bench.engine.stats().waiting_sequences == 1
    bench.blocks.release("handoff")
    assert bench.engine.has_work()
    bench.run()
    assert bench.tokens("a") == expected(bench, tokens_of(20), 4)


def test_cancelling_what_blocks_the_queue_lets_the_next_in():
    bench = virtual_engine(num_blocks=8)
    bench.blocks.reserve("handoff", [], 5)
    bench.engine.add(request_of("large", tokens_of(20)))
    bench.step()
    bench.engine.add(request_of("small", tokens_of(5, 1)))
    bench.run()
    bench.engine.cancel(SequenceKey("large", 1))
    bench.run()
    assert bench.end("small").reason is EndReason.LENGTH


def test_admission_keeps_blocks_free_for_growth():
    bench = virtual_engine(num_blocks=20)
    bench.engine.add(request_of("a", tokens_of(40, 1), max_tokens=100))
    bench.step()
    bench.engine.add(request_of("b", tokens_of(40, 2), max_tokens=1))
    bench.step()
    assert bench.engine.stats().waiting_sequences == 1  # ten blocks are left, one of them for growth


def test_model_length_ends_a_sequence():
    bench = virtual_engine()
    bench.engine.info = type(bench.engine.info)(20, 32000, frozenset(), "x")
    bench.engine.add(request_of("a", tokens_of(15), max_tokens=100))
    bench.run()
    assert (bench.end("a").reason, bench.end("a").output_tokens) == (EndReason.LENGTH, 5)


@pytest.mark.parametrize("work", list(Work))
def test_sequence_that_can_never_fit_is_refused(work):
    bench = virtual_engine(num_blocks=4)
    with pytest.raises(SequenceTooLong):
        bench.engine.add(request_of("a", tokens_of(18), work=work))
    assert not bench.engine.has_work()


def test_bad_requests_are_refused():
    bench = virtual_engine()
    with pytest.raises(InvalidArgument, match="vocabulary"):
        bench.engine.add(request_of("a", array("I", [5, 32000])))
    with pytest.raises(InvalidArgument, match="num_prompt_tokens"):
        bench.engine.add(request_of("a", array("I")))
    with pytest.raises(InvalidArgument, match="table"):
        bench.engine.add(request_of("a", tokens_of(9), work=Work.DECODE_ONLY))
    bench.blocks.reserve(SequenceKey("a", 1), [], 2)
    with pytest.raises(InvalidArgument, match="committed"):
        bench.engine.add(request_of("a", tokens_of(9), work=Work.DECODE_ONLY))
    assert bench.blocks.has_table(SequenceKey("a", 1))


def test_unattributed_step_failure_is_raised():
    bench = virtual_engine()
    bench.engine.add(request_of("a", tokens_of(9)))

    def fail(items):
        raise StepFailed([SequenceKey("nobody", 1)], "broken")

    bench.runner.run = fail
    bench.engine.plan()
    with pytest.raises(StepFailed):
        bench.engine.step()


def test_damaged_kv_is_never_a_prefix_hit_again():
    """The blocks of a sequence that failed on its KV must be computed anew by whoever comes next, whatever its work."""
    source, sink = virtual_engine(), virtual_engine()
    tokens = tokens_of(17)
    prefill(source, "a", tokens)
    source.run()
    source.engine.pool.data[source.ready_blocks("a")[1]] ^= 1
    hand_over(source, sink, "a", tokens)
    sink.run()
    assert sink.end("a").reason is EndReason.ENGINE_ERROR
    assert sink.blocks.match_prefix(hashes_of(tokens)) == 0
    sink.engine.add(request_of("b", tokens, max_tokens=3))
    sink.run()
    assert sink.tokens("b") == expected(sink, tokens, 3)
    assert sink.end("b").cached_tokens == 0
    sink.blocks.check()


def test_ended_sequences_leave_nothing_behind():
    bench = virtual_engine()
    for number in range(5):
        bench.engine.add(request_of(str(number), tokens_of(20, number)))
    bench.run()
    assert bench.runner._known == {}
    stats = bench.engine.stats()
    assert (stats.running_sequences, stats.waiting_sequences, stats.waiting_prefill_tokens, stats.active_kv_tokens) == (0, 0, 0, 0)


def test_logprobs_come_with_the_tokens_when_asked_for():
    bench = virtual_engine()
    bench.engine.add(request_of("a", tokens_of(5), max_tokens=2, sampling=SamplingParams(top_logprobs=3)))
    bench.run()
    rows = [row for output in bench.outputs for row in output.logprobs]
    assert [row.position for row in rows] == [0, 1]
    assert [row.top_token_ids[0] for row in rows] == bench.tokens("a")
    assert all(len(row.top_token_ids) == len(set(row.top_token_ids)) == len(row.top_logprobs) == 3 for row in rows)
