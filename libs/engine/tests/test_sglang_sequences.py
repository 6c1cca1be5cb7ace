"""What is reported of the sequences an SGLang server has, whatever it says and in whichever order."""

from array import array

import pytest
from baton_engine.api import EndReason, EngineRequest, Priority, SamplingParams, SequenceKey, Work
from baton_engine.blocks import BlockManager
from baton_engine.sglang.http_api import FinishReason, MetaInfo, Piece
from baton_engine.sglang.sequences import ChildSequence, ChildSequences
from baton_runtime.errors import InvalidArgument, QueueFull

BLOCK = 4


def request(
    name: str, work: Work = Work.WHOLE, *, prompt: int = 6, delivered: int = 0, priority: Priority = Priority.INTERACTIVE
) -> EngineRequest:
    return EngineRequest(
        key=SequenceKey(name, 1),
        token_ids=array("I", range(prompt + delivered)),
        num_prompt_tokens=prompt,
        cache_root=bytes(16),
        work=work,
        priority=priority,
        sampling=SamplingParams(max_tokens=100, top_logprobs=1),
    )


def piece(*token_ids: int, finish: FinishReason | None = None, cached: int = 0) -> Piece:
    chosen = [(-0.25, token_id, None) for token_id in token_ids]
    return Piece(list(token_ids), MetaInfo(finish, cached, chosen, [[entry] for entry in chosen]))


class Bench:
    def __init__(self, num_blocks: int = 16, max_running: int = 2, max_waiting: int = 3) -> None:
        self.blocks = BlockManager(num_blocks)
        self.all = ChildSequences(self.blocks, BLOCK, max_running, max_waiting)
        self.now = 0.0

    def whole(self, name: str = "a", **about: object) -> ChildSequence:
        self.all.add_waiting(request(name, **about), name, self.now)  # type: ignore[arg-type]
        (sequence,) = self.all.take_postable(self.now)
        return sequence

    def joined(self, name: str = "a", reserved: int = 2) -> ChildSequence:
        self.blocks.reserve(SequenceKey(name, 1), (), reserved)
        return self.all.join(request(name, Work.DECODE_ONLY), name, self.now)

    def hear(self, sequence: ChildSequence, said: Piece, after_s: float = 0.5) -> None:
        self.now += after_s
        self.all.heard(sequence, said, self.now)

    def committed(self, name: str = "a") -> None:
        key = SequenceKey(name, 1)
        self.blocks.commit(key, len(self.blocks.table(key)), ())


def test_a_whole_sequence_goes_out_as_it_is_drawn_and_ends_once_with_its_blocks_free() -> None:
    bench = Bench()
    sequence = bench.whole(delivered=2)
    assert bench.all.take_output().started == [sequence.key]
    bench.hear(sequence, piece(40, 41, cached=4))
    first = bench.all.take_output()
    assert (first.keys, first.positions, first.token_ids) == ([sequence.key] * 2, [2, 3], [40, 41])
    assert [(p.position, p.logprob, p.top_token_ids) for p in first.logprobs] == [(2, -0.25, [40]), (3, -0.25, [41])]
    assert (first.prefill_tokens, first.duration_s) == (4, 0.5)
    bench.hear(sequence, piece(42, finish=FinishReason("stop", matched=42)))
    last = bench.all.take_output()
    assert (last.positions, last.decode_sequences) == ([4], 1)
    (end,) = last.ends
    assert (end.reason, end.stop_token_id, end.output_tokens, end.cached_tokens) == (EndReason.STOP, 42, 3, 4)
    assert bench.blocks.counts().free == 16
    assert bench.all.stats().running_sequences == 0
    assert bench.all.stats().active_kv_tokens == 0


def test_its_table_grows_with_it_and_a_full_mirror_does_not_stop_the_server() -> None:
    bench = Bench(num_blocks=3)
    sequence = bench.whole()
    assert len(bench.blocks.table(sequence.key)) == 2
    bench.hear(sequence, piece(1, 2, 3))
    assert len(bench.blocks.table(sequence.key)) == 3
    bench.hear(sequence, piece(4, 5, 6, 7, 8))
    assert len(bench.blocks.table(sequence.key)) == 3
    assert len(bench.all.take_output().token_ids) == 8


def test_whole_sequences_wait_for_room_and_places_and_the_interactive_ones_go_first() -> None:
    bench = Bench(num_blocks=16, max_running=2)
    first = bench.whole("a")
    bench.whole("b")
    bench.all.add_waiting(request("batch", priority=Priority.BATCH), "batch", 1.0)
    bench.all.add_waiting(request("chat"), "chat", 2.0)
    assert not list(bench.all.take_postable(2.0))
    assert bench.all.stats().waiting_sequences == 2
    bench.hear(first, piece(1, finish=FinishReason("length")))
    assert [s.rid for s in bench.all.take_postable(3.0)] == ["chat"]


def test_a_full_queue_refuses_and_what_waits_and_is_cancelled_ends_at_once() -> None:
    bench = Bench(max_running=1, max_waiting=1)
    bench.whole("a")
    bench.all.add_waiting(request("b"), "b", 0.0)
    with pytest.raises(QueueFull):
        bench.all.add_waiting(request("c"), "c", 0.0)
    assert bench.all.cancel(SequenceKey("b", 1)) is None
    assert [(e.key.request_id, e.reason) for e in bench.all.take_output().ends] == [("b", EndReason.CANCELLED)]
    bench.all.add_waiting(request("c"), "c", 0.0)


def test_an_abort_is_a_cancellation_if_we_asked_for_it_and_an_error_if_not_whatever_its_text() -> None:
    bench = Bench()
    ours, theirs, broken = bench.whole("a"), bench.whole("b"), None
    assert bench.all.cancel(ours.key) is ours
    assert bench.all.cancel(ours.key) is None  # once is enough
    bench.hear(ours, piece(finish=FinishReason("abort", message="Decode transfer failed")))
    bench.hear(theirs, piece(1, finish=FinishReason("abort", message="Decode transfer failed")))
    broken = bench.whole("c")
    bench.all.failed(broken, "connection reset")
    bench.all.failed(broken, "again")
    ends = {end.key.request_id: (end.reason, end.message) for end in bench.all.take_output().ends}
    assert ends == {
        "a": (EndReason.CANCELLED, ""),
        "b": (EndReason.ENGINE_ERROR, "Decode transfer failed"),
        "c": (EndReason.ENGINE_ERROR, "connection reset"),
    }


def test_a_paused_sequence_keeps_back_what_it_draws_also_its_end() -> None:
    bench = Bench()
    sequence = bench.whole()
    bench.all.take_output()
    bench.all.pause(sequence.key)
    bench.hear(sequence, piece(1))
    bench.hear(sequence, piece(2, finish=FinishReason("length")))
    assert not bench.all.take_output().token_ids
    bench.all.resume(sequence.key)
    output = bench.all.take_output()
    assert (output.token_ids, output.positions, len(output.logprobs)) == ([1, 2], [0, 1], 2)
    assert [end.reason for end in output.ends] == [EndReason.LENGTH]


def test_a_paused_sequence_that_is_over_and_cancelled_ends_though_the_server_has_nothing_to_abort() -> None:
    bench = Bench()
    sequence = bench.whole()
    bench.all.pause(sequence.key)
    bench.hear(sequence, piece(1, finish=FinishReason("length")))
    assert bench.all.cancel(sequence.key) is None
    assert len(bench.all.take_output().ends) == 1


def test_a_prefill_pins_all_its_blocks_when_the_other_side_has_them_and_says_nothing_of_the_token() -> None:
    bench = Bench()
    key = SequenceKey("a", 1)
    bench.blocks.acquire(key, (), 2)
    sequence = bench.all.add_prefill(request("a", Work.PREFILL_ONLY), "a", 0.0)
    bench.hear(sequence, piece(9, finish=FinishReason("length"), cached=2))
    output = bench.all.take_output()
    assert not output.token_ids
    assert [(r.first_block, len(r.block_ids), r.cached_tokens) for r in output.ready] == [(0, 2, 2)]
    assert [end.reason for end in output.ends] == [EndReason.PREFILLED]
    assert (bench.blocks.counts().pinned, bench.blocks.has_table(key)) == (2, False)


def test_a_prefill_that_was_aborted_pins_nothing() -> None:
    bench = Bench()
    bench.blocks.acquire(SequenceKey("a", 1), (), 2)
    sequence = bench.all.add_prefill(request("a", Work.PREFILL_ONLY), "a", 0.0)
    bench.all.cancel(sequence.key)
    bench.hear(sequence, piece(finish=FinishReason("abort", message="x")))
    output = bench.all.take_output()
    assert not output.ready
    assert [end.reason for end in output.ends] == [EndReason.CANCELLED]
    assert bench.blocks.counts().free == 16


def test_what_a_joined_sequence_draws_goes_out_when_it_is_taken_over_and_not_before() -> None:
    bench = Bench()
    sequence = bench.joined()
    bench.hear(sequence, piece(1))
    bench.hear(sequence, piece(2))
    assert not bench.all.has_output
    bench.committed()
    bench.all.take_over(sequence.request)
    output = bench.all.take_output()
    assert (output.started, output.token_ids, output.positions) == ([sequence.key], [1, 2], [0, 1])
    bench.hear(sequence, piece(3, finish=FinishReason("length")))
    assert [end.reason for end in bench.all.take_output().ends] == [EndReason.LENGTH]
    assert (bench.blocks.counts().free, bench.all.stats().active_kv_tokens) == (16, 0)


def test_a_joined_sequence_that_was_over_before_it_is_taken_over_is_reported_whole() -> None:
    bench = Bench()
    sequence = bench.joined()
    bench.hear(sequence, piece(1, finish=FinishReason("length")))
    bench.committed()
    bench.all.take_over(sequence.request)
    output = bench.all.take_output()
    assert (output.token_ids, [end.reason for end in output.ends]) == ([1], [EndReason.LENGTH])
    assert bench.all.stats().active_kv_tokens == 0


def test_a_joined_sequence_whose_kv_never_came_has_failed_and_its_table_is_still_the_handoffs() -> None:
    bench = Bench()
    sequence = bench.joined()
    bench.all.failed(sequence, "transfer failed")
    assert sequence.failure == "transfer failed"
    assert not bench.all.has_output
    bench.all.drop(sequence)
    assert bench.blocks.counts().reserved == 2
    with pytest.raises(InvalidArgument):
        bench.all.take_over(sequence.request)


def test_a_joined_sequence_is_an_orphan_once_the_handoff_has_given_up_its_table() -> None:
    bench = Bench()
    sequence = bench.joined()
    assert not bench.all.orphans()
    bench.hear(sequence, piece(1))
    assert not bench.all.orphans()
    bench.blocks.release(sequence.key)
    assert bench.all.orphans() == [sequence]


def test_when_the_server_dies_everything_ends_and_blocks_of_handoffs_stay_theirs() -> None:
    bench = Bench(max_running=1)
    bench.whole("a")
    bench.all.add_waiting(request("b"), "b", 0.0)
    joined = bench.joined("c")
    bench.all.end_all(EndReason.ENGINE_ERROR, "died")
    ends = bench.all.take_output().ends
    assert sorted((end.key.request_id, end.reason, end.message) for end in ends) == [
        ("a", EndReason.ENGINE_ERROR, "died"),
        ("b", EndReason.ENGINE_ERROR, "died"),
    ]
    assert (joined.failure, joined.is_over, bench.all.live) == ("died", True, [])
    assert bench.blocks.counts().used == 0
    assert bench.blocks.counts().reserved == 2


def test_the_same_attempt_cannot_be_in_the_engine_twice() -> None:
    bench = Bench()
    bench.whole("a")
    with pytest.raises(InvalidArgument):
        bench.all.add_waiting(request("a"), "x", 0.0)


def test_what_is_explained_are_whole_pages_of_what_the_server_has() -> None:
    bench = Bench(max_running=1)
    sequence = bench.whole("a")
    bench.all.add_waiting(request("b"), "b", 0.0)
    assert bench.all.explained_tokens() == 3 * BLOCK  # 6 tokens, and a page to be filled
    bench.hear(sequence, piece(1, 2, 3))
    assert bench.all.explained_tokens() == 4 * BLOCK
