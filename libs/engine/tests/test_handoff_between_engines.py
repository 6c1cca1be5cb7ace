"""Two sim engines and the plainest possible handoff between them, in arbitrary order with cancels: the sim itself notices any
block that was given away, overwritten or mixed up while somebody still needed it."""

from array import array

from baton_engine.api import EndReason, SequenceKey, Work
from baton_engine.errors import CacheFull
from baton_engine.virtual import VirtualEngine, hashes_of, request_of, tokens_of, virtual_engine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

NUMBERS = st.integers(0, 40)


class Handoff:
    """Sink reserves, source computes, blocks are pulled and confirmed one announcement at a time."""

    def __init__(self, key: SequenceKey, tokens: array, first: int) -> None:
        self.key, self.tokens, self.first = key, tokens, first
        self.num_blocks = -(-(len(tokens) - 1) // 4)
        self.announced: list[int] = []
        self.confirmed = first


class TwoEngines(RuleBasedStateMachine):
    @initialize(source_blocks=st.integers(10, 24), sink_blocks=st.integers(10, 24))
    def start(self, source_blocks: int, sink_blocks: int) -> None:
        self.source, self.sink = virtual_engine(source_blocks), virtual_engine(sink_blocks)
        self.handoffs: dict[SequenceKey, Handoff] = {}
        self.prompts: dict[str, tuple[array, int]] = {}
        self.expected_ends: dict[str, set[EndReason]] = {}

    def new(self, seed: int, length: int, max_tokens: int) -> tuple[str, array]:
        name = str(len(self.prompts))
        self.prompts[name] = (tokens_of(length, seed), max_tokens)
        return name, tokens_of(length, seed)

    @rule(seed=st.integers(0, 3), length=st.integers(2, 30), max_tokens=st.integers(1, 10))
    def hand_over(self, seed: int, length: int, max_tokens: int) -> None:
        name, tokens = self.new(seed, length, max_tokens)
        key, num_blocks = SequenceKey(name, 1), -(-(length - 1) // 4)
        try:
            first = self.sink.blocks.reserve(key, hashes_of(tokens), num_blocks, keep_free=self.sink.blocks.growth_headroom)
        except CacheFull:
            del self.prompts[name]
            return
        handoff = Handoff(key, tokens, first)
        try:
            self.source.blocks.acquire(key, hashes_of(tokens), num_blocks)
        except CacheFull:
            self.sink.blocks.release(key)
            del self.prompts[name]
            return
        self.source.engine.add(request_of(name, tokens, work=Work.PREFILL_ONLY, first_announced_block=first))
        self.handoffs[key] = handoff

    @rule(seed=st.integers(0, 3), length=st.integers(1, 30), max_tokens=st.integers(1, 10), at_sink=st.booleans())
    def whole(self, seed: int, length: int, max_tokens: int, at_sink: bool) -> None:
        name, tokens = self.new(seed, length, max_tokens)
        (self.sink if at_sink else self.source).engine.add(request_of(name, tokens, max_tokens=max_tokens))

    @rule(times=st.integers(1, 4))
    def step_source(self, times: int) -> None:
        for _ in range(times):
            if self.source.engine.has_work():
                for ready in self.source.step().ready:
                    if ready.key in self.handoffs:
                        self.handoffs[ready.key].announced += ready.block_ids
                    else:
                        self.source.blocks.unpin(ready.key)

    @rule(times=st.integers(1, 4))
    def step_sink(self, times: int) -> None:
        for _ in range(times):
            if self.sink.engine.has_work():
                self.sink.step()

    @rule(number=NUMBERS, count=st.integers(1, 5))
    def pull_and_confirm(self, number: int, count: int) -> None:
        if not self.handoffs:
            return
        handoff = list(self.handoffs.values())[number % len(self.handoffs)]
        end = min(handoff.confirmed + count, handoff.first + len(handoff.announced))
        table = self.sink.blocks.table(handoff.key)
        for block in range(handoff.confirmed, end):
            self.sink.engine.pool.data[table[block]] = self.source.engine.pool.data[handoff.announced[block - handoff.first]]
        self.sink.blocks.commit(handoff.key, end, hashes_of(handoff.tokens))
        self.source.blocks.unpin(handoff.key, end)
        handoff.confirmed = end
        if end == handoff.num_blocks:
            del self.handoffs[handoff.key]
            tokens, max_tokens = self.prompts[handoff.key.request_id]
            self.sink.engine.add(request_of(handoff.key.request_id, tokens, work=Work.DECODE_ONLY, max_tokens=max_tokens))

    @rule(number=NUMBERS)
    def cancel(self, number: int) -> None:
        if not self.prompts:
            return
        key = SequenceKey(list(self.prompts)[number % len(self.prompts)], 1)
        if self.handoffs.pop(key, None) is not None:
            self.sink.blocks.release(key)
            self.source.blocks.unpin(key)
        self.source.engine.cancel(key)
        self.sink.engine.cancel(key)

    @rule(number=NUMBERS, resume=st.booleans())
    def pause(self, number: int, resume: bool) -> None:
        if self.prompts:
            key = SequenceKey(list(self.prompts)[number % len(self.prompts)], 1)
            (self.sink.engine.resume if resume else self.sink.engine.pause)(key)

    def teardown(self) -> None:
        """Let everything come to its end: then nothing is held, and what was drawn is what it had to be."""
        if not hasattr(self, "prompts"):
            return
        for name in self.prompts:
            self.sink.engine.resume(SequenceKey(name, 1))
        for _ in range(200):
            self.step_source(1)
            self.step_sink(1)
            self.pull_and_confirm(0, 5)
        assert not self.handoffs
        for bench in (self.source, self.sink):
            self.check_ends(bench)
            assert not bench.engine.has_work()
            counts = bench.blocks.counts()
            assert counts.used == counts.pinned == counts.reserved == 0

    def check_ends(self, bench: VirtualEngine) -> None:
        ends = [end for output in bench.outputs for end in output.ends]
        assert len(ends) == len({end.key for end in ends})
        assert not [end for end in ends if end.reason is EndReason.ENGINE_ERROR]
        for name, (tokens, max_tokens) in self.prompts.items():
            drawn = bench.tokens(name)
            if drawn:
                alone = virtual_engine()
                alone.engine.add(request_of(name, tokens, max_tokens=max_tokens))
                alone.run()
                assert drawn == alone.tokens(name)[: len(drawn)]


TwoEngines.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestTwoEngines = TwoEngines.TestCase
