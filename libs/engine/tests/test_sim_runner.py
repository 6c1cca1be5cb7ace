import json
from array import array
from itertools import pairwise

import numpy as np
import pytest
from baton_engine.api import EndReason, SamplingParams, SequenceKey
from baton_engine.errors import ProfileError, StepFailed
from baton_engine.pool import KvPool
from baton_engine.runner import ChunkItem, StepLoad
from baton_engine.scheduler import SchedulerLimits
from baton_engine.sim_pattern import expected_block_bytes, states
from baton_engine.sim_profile import load_profile
from baton_engine.sim_runner import SimRunner, expected_next_token
from baton_engine.virtual import VirtualClock, request_of, tokens_of, virtual_engine

KEY = SequenceKey("a", 1)


def bound_runner(
    profile: str = "instant", clock: VirtualClock | None = None, model_path=None, *, block_tokens: int = 4, num_shards: int = 1
) -> tuple[SimRunner, KvPool]:
    clock = clock or VirtualClock()
    runner = SimRunner(load_profile(profile), block_tokens, model_path, num_shards=num_shards, sleep=clock.sleep, clock=clock)
    pool = KvPool(np.zeros((32, runner.layout.block_bytes), dtype=np.uint8), runner.layout)
    runner.bind(pool)
    return runner, pool


def item(tokens: array, start: int, end: int, table: list[int], key: SequenceKey = KEY) -> ChunkItem:
    return ChunkItem(key, tokens, start, end, table, end == len(tokens), SamplingParams(), len(tokens))


def test_bytes_are_those_of_the_pure_function_however_the_prompt_is_cut():
    runner, pool = bound_runner()
    tokens, table = tokens_of(14), [9, 3, 20, 7]
    for start, end in [(0, 1), (1, 6), (6, 13), (13, 14)]:
        runner.run([item(tokens, start, end, table)])
    for index, block in enumerate(table):
        assert np.array_equal(pool.data[block], expected_block_bytes(runner.layout, tokens, index))


def test_batch_writes_only_its_own_slots():
    runner, pool = bound_runner()
    pool.data[:] = 0xEE
    runner.run([item(tokens_of(6, 1), 0, 6, [1, 2], SequenceKey("a", 1)), item(tokens_of(5, 2), 0, 5, [5, 4], SequenceKey("b", 1))])
    untouched = [block for block in range(32) if (pool.data[block] == 0xEE).all()]
    assert set(range(32)) - set(untouched) == {1, 2, 4, 5}
    assert (pool.data[2].reshape(4, 4, -1)[:, 2:] == 0xEE).all()


def test_planes_slots_and_sequences_hold_different_bytes():
    runner, _ = bound_runner()
    rows = [expected_block_bytes(runner.layout, tokens_of(4, seed), 0).reshape(16, -1) for seed in (1, 2)]
    assert len({row.tobytes() for block in rows for row in block}) == 32


def test_state_depends_on_every_token_and_its_position():
    tokens = tokens_of(8)
    swapped = array("I", tokens)
    swapped[0], swapped[1] = swapped[1], swapped[0]
    assert states(tokens)[-1] != states(swapped)[-1]


def test_drawn_token_depends_on_the_sequence_alone():
    runner, _ = bound_runner()
    tokens = tokens_of(9)
    alone = runner.run([item(tokens, 0, 9, [0, 1, 2])])[0]
    batch = runner.run([item(tokens_of(3, 5), 0, 3, [5], SequenceKey("b", 1)), item(tokens, 0, 9, [8, 9, 10], SequenceKey("c", 1))])
    assert alone.token_ids[0] == batch[1].token_ids[0] == expected_next_token(runner, tokens)


def test_foreign_bytes_are_noticed_and_nothing_is_written():
    runner, pool = bound_runner()
    tokens = tokens_of(9)
    for index in range(2):
        pool.data[index] = expected_block_bytes(runner.layout, tokens, index)
    pool.data[1, 40] ^= 1
    with pytest.raises(StepFailed, match="kv_corrupt") as caught:
        runner.run([item(tokens, 8, 9, [0, 1, 2])])
    assert caught.value.keys == {KEY}
    assert not pool.data[2].any()


@pytest.mark.parametrize("num_shards", [2, 4])
def test_a_sharded_block_is_the_same_values_with_the_heads_in_front(num_shards: int):
    whole, _ = bound_runner()
    sharded, pool = bound_runner(num_shards=num_shards)
    tokens = tokens_of(8)
    sharded.run([item(tokens, 0, 8, [3, 1])])
    for index, block in enumerate([3, 1]):
        values = expected_block_bytes(whole.layout, tokens, index).view(np.uint32).reshape(2, 2, 4, num_shards, 4 // num_shards, 2)
        assert np.array_equal(pool.data[block].view(np.uint32).reshape(sharded.layout.shape), values.transpose(3, 0, 1, 2, 4, 5))


def test_a_longer_block_holds_the_same_values_of_more_tokens():
    tokens = tokens_of(8)
    short, long = (bound_runner(block_tokens=size)[0].layout for size in (4, 8))
    parts = [expected_block_bytes(short, tokens, index).reshape(4, 4, -1) for index in range(2)]
    assert np.array_equal(expected_block_bytes(long, tokens, 0).reshape(4, 8, -1), np.concatenate(parts, axis=1))


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_heads_in_each_others_place_are_noticed(num_shards: int):
    runner, pool = bound_runner(num_shards=num_shards)
    tokens = tokens_of(5)
    pool.data[0] = expected_block_bytes(runner.layout, tokens, 0)
    heads = pool.data[0].reshape(-1, 4 // num_shards, 8) if num_shards < 4 else pool.data[0].reshape(4, -1).transpose(1, 0)
    heads[:] = np.flip(heads, axis=1).copy()
    with pytest.raises(StepFailed, match="kv_corrupt"):
        runner.run([item(tokens, 4, 5, [0, 1])])


def test_kv_of_a_later_sequence_under_the_same_tokens_is_right():
    runner, pool = bound_runner()
    tokens = tokens_of(9)
    for index in range(2):
        pool.data[index + 10] = expected_block_bytes(runner.layout, tokens, index)
    assert runner.run([item(tokens, 8, 9, [10, 11, 2])])[0].token_ids[0] == expected_next_token(runner, tokens)


def test_step_takes_the_predicted_time():
    clock = VirtualClock()
    runner, _ = bound_runner("polynomial", clock)
    before = clock.now
    runner.run([item(tokens_of(64), 0, 64, list(range(16)))])
    assert clock.now - before == pytest.approx(runner.predict_s(StepLoad(prefill_tokens=64))) == pytest.approx(0.01748, abs=1e-5)


def test_prediction_never_falls_as_a_step_grows():
    runner, _ = bound_runner("polynomial")
    for grow in ("prefill_tokens", "decode_sequences", "decode_kv_tokens"):
        times = [runner.predict_s(StepLoad(decode_sequences=1)._replace(**{grow: n})) for n in range(1, 2000, 7)]
        assert times == sorted(times)


def write_folder(path, *, vocab_size=10, eos=1):
    (path / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "max_position_embeddings": 50, "eos_token_id": eos}))
    vocab = {f"t{number}": number for number in range(8)}
    added = [{"id": 0, "content": "<s>", "special": True}, {"id": 7, "content": "word", "special": False}]
    (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": added}))


def test_folder_gives_sizes_and_the_tokens_that_may_be_drawn(tmp_path):
    write_folder(tmp_path)
    runner, _ = bound_runner(model_path=tmp_path)
    assert (runner.info.vocab_size, runner.info.max_model_tokens, runner.info.eos_token_ids) == (10, 50, frozenset([1]))
    drawn = {expected_next_token(runner, array("I", [number])) for number in range(200)}
    assert drawn == {2, 3, 4, 5, 6, 7}


def test_generation_config_adds_ends_of_sequence(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    runner, _ = bound_runner(model_path=tmp_path)
    assert runner.info.eos_token_ids == {1, 5}


def test_fingerprint_tells_folders_apart_and_is_stable(tmp_path):
    write_folder(tmp_path)
    first = bound_runner(model_path=tmp_path)[0].info.fingerprint
    assert bound_runner(model_path=tmp_path)[0].info.fingerprint == first
    write_folder(tmp_path, vocab_size=9)
    assert bound_runner(model_path=tmp_path)[0].info.fingerprint != first


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_unusable_folder_names_the_file(tmp_path, name, content):
    write_folder(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ProfileError, match=name):
        bound_runner(model_path=tmp_path)


def test_several_tokens_of_one_step_are_those_of_as_many_steps():
    """16 tokens at a time, and at the end fewer: the same tokens and the same bytes as one by one."""
    results = []
    for profile in ("instant", "polynomial"):  # 16 tokens a step, and 1
        bench = virtual_engine(64, profile, limits=SchedulerLimits(block_tokens=16))
        for name, prompt, max_tokens in (("a", 5, 30), ("b", 16, 9), ("c", 31, 1)):
            bench.engine.add(request_of(name, tokens_of(prompt, prompt), max_tokens=max_tokens))
        bench.run()
        prompt = [*tokens_of(5, 5), *bench.tokens("a")]
        bench.engine.add(request_of("later", array("I", prompt), max_tokens=20))  # verifies the bytes of all that is cached
        bench.run()
        assert bench.end("later").cached_tokens == 32
        results.append(([bench.tokens(name) for name in ("a", "b", "c", "later")], len(bench.outputs)))
    assert results[0][0] == results[1][0]
    assert [len(tokens) for tokens in results[0][0]] == [30, 9, 1, 20]
    assert results[0][1] * 4 < results[1][1]


def test_a_stop_token_in_the_middle_of_a_step_is_the_last_token():
    bench = virtual_engine(64, "instant", limits=SchedulerLimits(block_tokens=16))
    bench.engine.add(request_of("a", tokens_of(5), max_tokens=30))
    bench.run()
    tokens = bench.tokens("a")
    stop = next(token for index, token in enumerate(tokens) if index % 16 == 3 and token not in tokens[:index])
    bench.engine.add(request_of("b", tokens_of(5), max_tokens=30, sampling=SamplingParams(stop_token_ids=frozenset({stop}))))
    bench.run()
    assert bench.tokens("b") == tokens[: tokens.index(stop) + 1]
    assert (bench.end("b").reason, bench.end("b").stop_token_id) == (EndReason.STOP, stop)
    assert bench.end("b").output_tokens == tokens.index(stop) + 1


def test_nobody_is_preempted_for_tokens_that_can_come_later():
    """Two sequences that just fit: a step of 16 tokens each would need more blocks than there are."""
    bench = virtual_engine(4, "instant", limits=SchedulerLimits(block_tokens=16))
    for name in ("a", "b"):
        bench.engine.add(request_of(name, tokens_of(20, len(name)), max_tokens=12))
    bench.run()
    assert [bench.end(name).reason for name in ("a", "b")] == [EndReason.LENGTH, EndReason.LENGTH]
    assert [len(bench.tokens(name)) for name in ("a", "b")] == [12, 12]


def test_planning_does_not_lengthen_steps_that_follow_each_other():
    bench = virtual_engine(64, "polynomial", limits=SchedulerLimits(block_tokens=16))
    bench.engine.add(request_of("a", tokens_of(5), max_tokens=12))
    ends = []
    while bench.engine.has_work():
        bench.step()
        ends.append(bench.clock())
        bench.clock.sleep(0.002)  # what planning and bookkeeping take
    gaps = [after - before for before, after in pairwise(ends[2:])]
    assert max(gaps) < 0.007  # decode steps of 5.74 to 6.8 ms; with 2 ms more between them none would be that short


class LateClock(VirtualClock):
    """Sleeps longer than it is told to."""

    late_s = 0.0

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds + self.late_s)


@pytest.mark.parametrize(("late_s", "num_steps_lost"), [(0.001, 0), (0.02, 1)])
def test_a_late_wake_up_lengthens_no_step_and_a_very_late_one_is_not_made_up_for(late_s: float, num_steps_lost: int):
    clock, tokens = LateClock(), tokens_of(20)
    runner, _ = bound_runner("polynomial", clock)
    ends = []
    for end in range(1, 11):
        clock.late_s = late_s if num_steps_lost == 0 or end == 5 else 0.0
        runner.run([item(tokens[:end], end - 1, end, [9, 3, 20, 7, 5])])
        ends.append(clock())
    undisturbed_s = sum(runner.predict_s(StepLoad.of([(end - 1, end)])) for end in range(2, 11))
    assert ends[-1] - ends[0] == pytest.approx(undisturbed_s + num_steps_lost * late_s)
