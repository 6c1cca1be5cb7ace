import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from baton_engine.api import EndReason, SequenceEnd, SequenceKey, StepOutput, Work
from baton_engine.driver import DrivenEngine
from baton_engine.errors import EngineFailed, SequenceTooLong
from baton_engine.virtual import VirtualEngine, hashes_of, request_of, tokens_of, virtual_engine
from baton_runtime.errors import InvalidArgument, QueueFull


class Gate:
    """Holds the engine's thread inside a step until told otherwise."""

    def __init__(self, bench: VirtualEngine) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self._run = bench.runner.run
        bench.runner.run = self._gated

    def _gated(self, items):
        self.entered.set()
        assert self.open.wait(10)
        return self._run(items)


class Consumer:
    """Takes outputs until the engine ends."""

    def __init__(self, engine: DrivenEngine) -> None:
        self.engine, self.outputs, self.error = engine, [], None
        self._changed = asyncio.Event()

    async def run(self) -> None:
        try:
            async for output in self.engine.outputs():
                self.outputs.append(output)
                self._changed.set()
        except EngineFailed as error:
            self.error = error
        self._changed.set()

    def ends(self) -> list[SequenceEnd]:
        return [end for output in self.outputs for end in output.ends]

    async def until(self, condition) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await self._changed.wait()
                self._changed.clear()


@asynccontextmanager
async def driven(bench: VirtualEngine, **options) -> AsyncIterator[tuple[DrivenEngine, Consumer]]:
    engine = DrivenEngine(bench.engine, **options)
    consumer = Consumer(engine)
    await engine.open()
    async with asyncio.TaskGroup() as group:
        group.create_task(consumer.run(), name="consumer")
        try:
            yield engine, consumer
        finally:
            await engine.close()
    bench.blocks.check()


def key(name: str) -> SequenceKey:
    return SequenceKey(name, 1)


def tokens(outputs: list[StepOutput], name: str) -> list[int]:
    return [t for out in outputs for k, t in zip(out.keys, out.token_ids, strict=True) if k == key(name)]


async def test_sequences_run_and_end_once():
    alone = virtual_engine()
    alone.engine.add(request_of("3", tokens_of(12, 3), max_tokens=9))
    alone.run()
    async with driven(virtual_engine(256)) as (engine, consumer):
        for number in range(10):
            engine.start(request_of(str(number), tokens_of(12, number), max_tokens=9))
        await consumer.until(lambda: len(consumer.ends()) == 10)
        assert tokens(consumer.outputs, "3") == alone.tokens("3")
    assert consumer.error is None
    assert len(consumer.ends()) == 10


async def test_idle_engine_sleeps_and_wakes_for_new_work():
    bench = virtual_engine()
    async with driven(bench) as (engine, consumer):
        engine.start(request_of("a", tokens_of(5)))
        await consumer.until(lambda: len(consumer.ends()) == 1)
        steps = engine.beat().step
        engine.start(request_of("b", tokens_of(5)))
        await consumer.until(lambda: len(consumer.ends()) == 2)
        assert engine.beat().step - steps <= 4
        assert engine.beat().running_step_age_s == 0.0


async def test_prompt_waiting_for_blocks_runs_when_another_thread_frees_them():
    bench = virtual_engine(num_blocks=8)
    bench.blocks.reserve("handoff", [], 6)
    async with driven(bench) as (engine, consumer):
        engine.start(request_of("a", tokens_of(20)))
        await consumer.until(lambda: engine.stats().waiting_sequences == 1 and engine.beat().step > 0)
        bench.blocks.release("handoff")
        await consumer.until(lambda: bool(consumer.ends()))
        assert consumer.ends()[0].reason is EndReason.LENGTH


async def test_cancel_during_a_step_ends_at_its_end():
    bench = virtual_engine()
    gate = Gate(bench)
    async with driven(bench) as (engine, consumer):
        engine.start(request_of("a", tokens_of(5), max_tokens=1000))
        await asyncio.to_thread(gate.entered.wait, 10)
        engine.cancel(key("a"))
        engine.cancel(key("a"))
        engine.cancel(key("unknown"))
        gate.open.set()
        await consumer.until(lambda: bool(consumer.ends()))
        (end,) = consumer.ends()
        assert (end.reason, end.output_tokens) == (EndReason.CANCELLED, bench.runner.tokens_per_step)
        assert bench.blocks.counts().used == 0


async def test_pause_and_resume():
    bench = virtual_engine()
    async with driven(bench) as (engine, consumer):
        engine.start(request_of("a", tokens_of(5), max_tokens=250))
        engine.pause(key("a"))
        engine.start(request_of("b", tokens_of(5, 1)))
        await consumer.until(lambda: bool(consumer.ends()))
        assert consumer.ends()[0].key == key("b")
        engine.resume(key("a"))
        await consumer.until(lambda: len(consumer.ends()) == 2)


async def test_beat_tells_the_age_and_prediction_of_the_running_step():
    bench = virtual_engine(profile="polynomial")
    gate = Gate(bench)
    async with driven(bench, clock=bench.clock) as (engine, consumer):
        engine.start(request_of("a", tokens_of(9)))
        await asyncio.to_thread(gate.entered.wait, 10)
        bench.clock.sleep(3)
        beat = engine.beat()
        assert beat.running_step_age_s == pytest.approx(3)
        assert beat.predicted_step_s == pytest.approx(0.01664, rel=0.01)
        gate.open.set()
        await consumer.until(lambda: bool(consumer.ends()))


async def test_full_queue_refuses_and_advises():
    bench = virtual_engine()
    gate = Gate(bench)
    async with driven(bench, max_waiting=2) as (engine, consumer):
        engine.start(request_of("a", tokens_of(5)))
        engine.start(request_of("b", tokens_of(5)))
        with pytest.raises(QueueFull) as caught:
            engine.start(request_of("c", tokens_of(5)))
        assert caught.value.retry_after_ms >= 50
        gate.open.set()
        await consumer.until(lambda: len(consumer.ends()) == 2)
        engine.start(request_of("c", tokens_of(5)))
        await consumer.until(lambda: len(consumer.ends()) == 3)


async def test_full_queue_does_not_refuse_sequences_that_own_blocks():
    bench = virtual_engine()
    async with driven(bench, max_waiting=0) as (engine, consumer):
        prompt = tokens_of(9)
        bench.blocks.acquire(key("p"), hashes_of(prompt), 2)
        engine.start(request_of("p", prompt, work=Work.PREFILL_ONLY))
        await consumer.until(lambda: bool(consumer.ends()))
        assert consumer.ends()[0].reason is EndReason.PREFILLED
        bench.blocks.unpin(key("p"))


async def test_bad_starts_are_refused_and_leave_nothing():
    bench = virtual_engine(num_blocks=4)
    gate = Gate(bench)
    async with driven(bench) as (engine, consumer):
        with pytest.raises(SequenceTooLong):
            engine.start(request_of("a", tokens_of(17)))
        engine.start(request_of("a", tokens_of(4)))
        with pytest.raises(InvalidArgument):
            engine.start(request_of("a", tokens_of(4)))
        gate.open.set()
        await consumer.until(lambda: bool(consumer.ends()))
    assert len(consumer.ends()) == 1


async def test_start_without_the_table_it_needs_ends_with_an_engine_error():
    async with driven(virtual_engine()) as (engine, consumer):
        engine.start(request_of("a", tokens_of(9), work=Work.DECODE_ONLY))
        await consumer.until(lambda: bool(consumer.ends()))
        assert consumer.ends()[0].reason is EndReason.ENGINE_ERROR


async def test_close_ends_everything_with_cancelled_once():
    bench = virtual_engine(256)
    gate = Gate(bench)
    async with driven(bench) as (engine, consumer):
        for number in range(20):
            engine.start(request_of(str(number), tokens_of(12, number), max_tokens=1000))
        await asyncio.to_thread(gate.entered.wait, 10)
        engine.start(request_of("late", tokens_of(5)))
        gate.open.set()
        await engine.close()
        await engine.close()
        with pytest.raises(EngineFailed):
            engine.start(request_of("too late", tokens_of(5)))
    assert {end.reason for end in consumer.ends()} == {EndReason.CANCELLED}
    assert len(consumer.ends()) == len({end.key for end in consumer.ends()}) == 21
    assert bench.blocks.counts().used == 0
    assert consumer.error is None


async def test_dead_engine_ends_everything_and_says_so():
    bench = virtual_engine(256)
    gate = Gate(bench)

    def die(items):
        raise RuntimeError("device lost")

    async with driven(bench) as (engine, consumer):
        gate._run = die
        for number in range(20):
            engine.start(request_of(str(number), tokens_of(12, number)))
        await asyncio.to_thread(gate.entered.wait, 10)
        engine.start(request_of("late", tokens_of(5)))
        gate.open.set()
        await consumer.until(lambda: consumer.error is not None)
        with pytest.raises(EngineFailed):
            engine.start(request_of("too late", tokens_of(5)))
    assert {end.reason for end in consumer.ends()} == {EndReason.ENGINE_ERROR}
    assert len(consumer.ends()) == len({end.key for end in consumer.ends()}) == 21
    assert bench.blocks.counts().used == 0
    assert isinstance(consumer.error.__cause__, RuntimeError)


async def test_close_reports_the_ends_even_if_the_thread_hangs():
    bench = virtual_engine()
    gate = Gate(bench)
    async with driven(bench, close_timeout_s=0.05) as (engine, consumer):
        engine.start(request_of("a", tokens_of(5)))
        await asyncio.to_thread(gate.entered.wait, 10)
        await engine.close()
    assert [end.reason for end in consumer.ends()] == [EndReason.CANCELLED]
    assert bench.blocks.counts().used > 0  # the hung step may still write there
    gate.open.set()
    await asyncio.to_thread(engine._thread.join, 10)
    assert [end.reason for end in consumer.ends()] == [EndReason.CANCELLED]


async def test_close_before_open_is_harmless():
    engine = DrivenEngine(virtual_engine().engine)
    await engine.close()
    assert [output async for output in engine.outputs()] == []


async def test_thread_waits_for_a_consumer_that_does_not_take_outputs():
    bench = virtual_engine()
    engine = DrivenEngine(bench.engine, max_pending_outputs=4)
    await engine.open()
    engine.start(request_of("a", tokens_of(5), max_tokens=50))
    async with asyncio.timeout(10):
        while engine.beat().step < 5:
            await asyncio.sleep(0)
    assert len(engine._outputs) == 4
    consumer = Consumer(engine)
    async with asyncio.TaskGroup() as group:
        group.create_task(consumer.run(), name="consumer")
        await consumer.until(lambda: bool(consumer.ends()))
        await engine.close()
    assert len(tokens(consumer.outputs, "a")) == 50


async def test_cancelled_consumer_loses_no_output():
    """Cancelled between an output's arrival and its turn: what it was told of is there for the next one."""
    bench = virtual_engine()
    engine = DrivenEngine(bench.engine)
    await engine.open()
    first = Consumer(engine)
    task = asyncio.ensure_future(first.run())
    gate = Gate(bench)
    engine.start(request_of("a", tokens_of(5), max_tokens=200))
    assert await asyncio.to_thread(gate.entered.wait, 10)
    gate.open.set()
    while not engine._outputs:  # the loop stands still: the consumer cannot take it
        time.sleep(0.001)  # noqa: ASYNC251
    task.cancel()
    await asyncio.wait([task])
    second = Consumer(engine)
    async with asyncio.TaskGroup() as group:
        group.create_task(second.run(), name="consumer")
        await second.until(lambda: bool(second.ends()))
        await engine.close()
    assert first.outputs == []
    assert len(tokens(second.outputs, "a")) == 200


@pytest.mark.parametrize("seed", range(3))
async def test_storm_of_commands_ends_every_sequence_once(seed):
    """Real threads: starts, cancels, pauses and resumes as fast as the loop can give them, in a pool that is too small."""
    chance = random.Random(seed)
    bench = virtual_engine(num_blocks=48)
    started = []
    async with driven(bench, max_waiting=30) as (engine, consumer):
        for number in range(400):
            try:
                engine.start(request_of(str(number), tokens_of(1 + number % 40, number % 5), max_tokens=1 + number % 17))
                started.append(key(str(number)))
            except QueueFull:
                await asyncio.sleep(0)
            action = chance.choice([engine.cancel, engine.pause, engine.resume, None])
            if action is not None and started:
                action(chance.choice(started))
            if chance.random() < 0.1:
                await asyncio.sleep(0)
        for sequence in started:
            engine.resume(sequence)
        await consumer.until(lambda: len(consumer.ends()) == len(started))
        assert {end.key for end in consumer.ends()} == set(started)
        assert engine.stats().running_sequences == engine.stats().waiting_sequences == 0
        counts = bench.blocks.counts()
        assert counts.used == counts.reserved == counts.pinned == 0
