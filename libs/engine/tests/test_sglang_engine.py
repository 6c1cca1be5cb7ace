"""The engine over a process that speaks as an SGLang server does (`baton_engine.sglang.testing`). The real one: tests/sglang."""

import asyncio
import os
import sys
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from baton_engine.api import EndReason, EngineRequest, NativeHandoff, SamplingParams, SequenceEnd, SequenceKey, StepOutput, Work
from baton_engine.errors import EngineFailed, ReceiveFailed
from baton_engine.sglang import engine as engine_module
from baton_engine.sglang.child import SglangSettings
from baton_engine.sglang.engine import SglangEngine
from baton_engine.sglang.http_api import Load
from baton_engine.sglang.sequences import ChildSequences
from baton_runtime.errors import ConfigError, InvalidArgument
from baton_runtime.hashing import block_hashes
from baton_runtime.model_folder import ModelFolder

FAKE = f"{sys.executable} -m baton_engine.sglang.testing"
ROOT = bytes(range(16))
ADDRESS = "127.0.0.1:9"


def folder() -> ModelFolder:
    nowhere = Path("/model")
    return ModelFolder(nowhere, "AnyForCausalLM", 2, 1, 8, "bfloat16", 4096, 512, frozenset([2]), "f" * 16, 1, (), nowhere, None)


def settings(mode: str = "null", args: str = "", **about: Any) -> SglangSettings:
    return SglangSettings(model=Path("/model"), mode=mode, command=FAKE, args=args, hash_block_tokens=16, start_s=30.0, **about)


class Bench:
    """An open engine, and everything it has reported."""

    def __init__(self, engine: SglangEngine) -> None:
        self.engine = engine
        self.tokens: dict[SequenceKey, list[int]] = {}
        self.ends: dict[SequenceKey, SequenceEnd] = {}
        self.outputs: list[StepOutput] = []
        self.failure: EngineFailed | None = None
        self.changed = asyncio.Condition()

    async def follow(self) -> None:
        try:
            async for output in self.engine.outputs():
                self.outputs.append(output)
                for key, position, token_id in zip(output.keys, output.positions, output.token_ids, strict=True):
                    drawn = self.tokens.setdefault(key, [])
                    assert position == len(drawn)
                    drawn.append(token_id)
                for end in output.ends:
                    assert end.key not in self.ends
                    self.ends[end.key] = end
                async with self.changed:
                    self.changed.notify_all()
        except EngineFailed as error:
            self.failure = error
        async with self.changed:
            self.changed.notify_all()

    async def until(self, check: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(check)

    async def ended(self, key: SequenceKey) -> SequenceEnd:
        await self.until(lambda: key in self.ends)
        return self.ends[key]

    async def loads(self) -> list[Load]:
        client = self.engine.child.client()
        await client.open()
        try:
            return await client.loads()
        finally:
            await client.close()

    async def tell(self, path: str, **body: object) -> Any:
        """Make the server misbehave, or ask what it has seen."""
        client = self.engine.child.client()
        headers = {"Authorization": f"Bearer {client.api_key}"}
        async with aiohttp.ClientSession(headers=headers) as http:
            method = "POST" if body or path.endswith("hang") else "GET"
            async with http.request(method, f"{client.base_url}/fake/{path}", json=body or None) as response:
                assert response.status == 200
                return await response.json() if method == "GET" else None


@asynccontextmanager
async def running(mode: str = "null", args: str = "", **about: Any) -> AsyncIterator[Bench]:
    engine = SglangEngine(settings(mode, args, **about), folder())
    try:
        await engine.open()
        bench = Bench(engine)
        follower = asyncio.create_task(bench.follow())
        yield bench
        await engine.close()
        await follower
    finally:
        await engine.close()


def request(name: str, work: Work = Work.WHOLE, *, max_tokens: int = 5, prompt: int = 20, **sampling: Any) -> EngineRequest:
    return EngineRequest(
        key=SequenceKey(name, 1),
        token_ids=array("I", range(10, 10 + prompt)),
        num_prompt_tokens=prompt,
        cache_root=ROOT,
        work=work,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        native=NativeHandoff(ADDRESS, 77) if work is not Work.WHOLE else None,
    )


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    while not await check():  # pytest's own limit ends it
        await asyncio.sleep(0.01)


async def test_whole_sequences_are_answered_token_by_token_and_the_server_ends_with_the_engine() -> None:
    async with running() as bench:
        info = bench.engine.info
        assert (info.handoff, info.max_model_tokens, info.vocab_size) == ("native", 4096, 512)
        assert (bench.engine.pool.num_blocks, bench.engine.blocks.counts().total) == (256, 256)
        assert bench.engine.pool.block_bytes == 2 * 2 * 16 * 8 * 4  # the server says float32
        one, two = request("a"), request("b", max_tokens=3, top_logprobs=2)
        bench.engine.start(one)
        bench.engine.start(two)
        assert (await bench.ended(one.key)).reason is EndReason.LENGTH
        await bench.ended(two.key)
        assert bench.tokens == {one.key: [30, 31, 32, 33, 34], two.key: [30, 31, 32]}
        logprobs = [entry for output in bench.outputs for entry in output.logprobs]
        assert [(e.key, e.position, list(e.top_token_ids)) for e in logprobs] == [(two.key, p, [30 + p, 31 + p]) for p in range(3)]
        (process,) = psutil.Process().children()
    assert not process.is_running()


async def test_the_body_says_what_was_asked_for_and_nothing_it_would_take_for_granted() -> None:
    async with running(loads_tokenizer=True) as bench:
        asked = request("a", max_tokens=9, temperature=0.5, top_k=3, stop_token_ids=frozenset([31]), logit_bias={7: -100.0}, min_tokens=1)
        bench.engine.start(asked)
        end = await bench.ended(asked.key)
        assert (end.reason, end.stop_token_id, bench.tokens[asked.key]) == (EndReason.STOP, 31, [30, 31])
        (body,) = await bench.tell("seen")
        assert body.pop("rid").endswith("-a:1")
        sampling = {"temperature": 0.5, "max_new_tokens": 9, "ignore_eos": False, "top_k": 3, "stop_token_ids": [31], "min_new_tokens": 1}
        assert body == {
            "input_ids": list(range(10, 30)),
            "stream": True,
            "cache_salt": ROOT.hex(),
            "sampling_params": sampling | {"logit_bias": {"7": -100.0}},
        }


async def test_a_cancelled_sequence_is_aborted_at_the_server_and_the_others_go_on() -> None:
    async with running() as bench:
        long, other = request("a", max_tokens=100_000), request("b", max_tokens=100_000)
        bench.engine.start(long)
        bench.engine.start(other)
        await bench.until(lambda: bool(bench.tokens.get(long.key)) and bool(bench.tokens.get(other.key)))
        bench.engine.cancel(long.key)
        assert (await bench.ended(long.key)).reason is EndReason.CANCELLED
        drawn = len(bench.tokens[other.key])
        await bench.until(lambda: len(bench.tokens[other.key]) > drawn)
    assert bench.ends[other.key].reason is EndReason.CANCELLED  # the engine was closed


async def test_a_sequence_cancelled_before_the_server_has_heard_of_it_ends_too() -> None:
    async with running() as bench:
        asked = request("a", max_tokens=100_000)
        bench.engine.start(asked)
        bench.engine.cancel(asked.key)
        assert (await bench.ended(asked.key)).reason is EndReason.CANCELLED
        assert bench.engine.blocks.counts().free == 256


async def test_an_error_of_the_server_ends_one_sequence_and_only_that() -> None:
    async with running() as bench:
        asked, other = request("a", max_tokens=100_000), request("b", max_tokens=100_000)
        bench.engine.start(asked)
        bench.engine.start(other)
        await bench.until(lambda: len(bench.tokens) == 2)
        rid = next(body["rid"] for body in await bench.tell("seen") if body["rid"].endswith("-a:1"))
        await bench.tell("fail", rid=rid)
        assert (await bench.ended(asked.key)).reason is EndReason.ENGINE_ERROR
        assert other.key not in bench.ends


async def test_what_the_server_cannot_do_is_refused_with_the_setting_that_helps() -> None:
    async with running() as bench:
        with pytest.raises(InvalidArgument, match=r"min_tokens.*sglang_tokenizer"):
            bench.engine.start(request("a", min_tokens=2))
        with pytest.raises(InvalidArgument, match="token_ids"):
            bench.engine.start(request("a", prompt=1020))


async def test_a_prefill_is_ready_when_the_other_side_has_it() -> None:
    async with running("prefill") as bench:
        asked = request("a", Work.PREFILL_ONLY)
        bench.engine.blocks.acquire(asked.key, (), 2)
        bench.engine.start(asked)
        await until(lambda: _has_seen(bench, 1))
        (body,) = await bench.tell("seen")
        assert (body["bootstrap_host"], body["bootstrap_port"], body["bootstrap_room"]) == ("127.0.0.1", 9, 77)
        assert not any(output.ready for output in bench.outputs)
        await bench.tell("meet", room=77)
        assert (await bench.ended(asked.key)).reason is EndReason.PREFILLED
        assert bench.engine.blocks.counts().pinned == 2
        assert bench.engine.bootstrap_port > 0


async def test_a_decode_receives_and_its_tokens_go_out_once_it_is_taken_over() -> None:
    async with running("decode") as bench:
        asked = request("a", Work.DECODE_ONLY)
        bench.engine.blocks.reserve(asked.key, (), 2)
        receiving = asyncio.create_task(bench.engine.receive(asked))
        await until(lambda: _has_seen(bench, 1))
        assert not receiving.done()
        await bench.tell("meet", room=77)
        await receiving
        assert asked.key not in bench.tokens
        bench.engine.blocks.commit(asked.key, 2, ())
        bench.engine.start(asked)
        assert (await bench.ended(asked.key)).reason is EndReason.LENGTH
        assert bench.tokens[asked.key] == [30, 31, 32, 33, 34]
        assert bench.engine.bootstrap_port == 0


async def test_receiving_that_is_cancelled_returns_when_the_server_has_ended_it() -> None:
    async with running("decode") as bench:
        asked = request("a", Work.DECODE_ONLY)
        bench.engine.blocks.reserve(asked.key, (), 2)
        receiving = asyncio.create_task(bench.engine.receive(asked))
        await until(lambda: _has_seen(bench, 1))
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        (load,) = await bench.loads()
        assert load.num_running_reqs == 0
        assert bench.engine.stats().running_sequences == 0
        assert asked.key not in bench.ends  # it never was the engine's


async def test_a_transfer_that_fails_is_told_to_whoever_receives() -> None:
    async with running("decode") as bench:
        asked = request("a", Work.DECODE_ONLY)
        bench.engine.blocks.reserve(asked.key, (), 2)
        receiving = asyncio.create_task(bench.engine.receive(asked))
        await until(lambda: _has_seen(bench, 1))
        await bench.tell("fail", rid=(await bench.tell("seen"))[0]["rid"])
        with pytest.raises(ReceiveFailed, match="transfer failed"):
            await receiving
        with pytest.raises(InvalidArgument):
            bench.engine.start(asked)


async def test_what_nobody_takes_over_is_aborted_at_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LOADS_S", 0.05)
    async with running("decode", "--meet-at-once") as bench:
        asked = request("a", Work.DECODE_ONLY, max_tokens=100_000)
        bench.engine.blocks.reserve(asked.key, (), 2)
        await bench.engine.receive(asked)
        bench.engine.blocks.release(asked.key)  # the source died before its last confirm

        async def is_gone() -> bool:
            (load,) = await bench.loads()
            return load.num_running_reqs == 0

        await until(is_gone)
        assert asked.key not in bench.tokens


async def test_when_the_server_dies_every_sequence_ends_and_the_engine_says_so() -> None:
    async with running() as bench:
        asked = request("a", max_tokens=100_000)
        bench.engine.start(asked)
        await bench.until(lambda: asked.key in bench.tokens)
        (process,) = psutil.Process().children()
        process.kill()
        assert (await bench.ended(asked.key)).reason is EndReason.ENGINE_ERROR
        await bench.until(lambda: bench.failure is not None)
        with pytest.raises(EngineFailed):
            bench.engine.start(request("b"))


async def test_a_fault_of_ours_in_taking_in_an_answer_ends_the_engine_and_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("no such table")

    async with running() as bench:
        asked, other = request("a"), request("b", max_tokens=100_000)
        monkeypatch.setattr(ChildSequences, "heard", fails)
        bench.engine.start(other)
        bench.engine.start(asked)
        assert (await bench.ended(asked.key)).reason is EndReason.ENGINE_ERROR
        assert (await bench.ended(other.key)).reason is EndReason.ENGINE_ERROR
        await bench.until(lambda: bench.failure is not None)
        assert "KeyError" in str(bench.failure and bench.failure.__cause__)


async def test_a_server_that_answers_nothing_any_more_shows_in_the_beat_and_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEALTH_S": 0.05, "HEALTH_TIMEOUT_S": 0.1, "SIGN_S": 0.3, "HANG_S": 1.0}.items():
        monkeypatch.setattr(engine_module, name, value)
    async with running() as bench:
        assert bench.engine.beat().running_step_age_s == 0.0
        await bench.tell("hang")

        async def is_suspect() -> bool:
            return bench.engine.beat().running_step_age_s > 0.3

        await until(is_suspect)
        await bench.until(lambda: bench.failure is not None)
        assert "has not answered" in str(bench.failure and bench.failure.__cause__)


async def test_kv_that_nothing_explains_is_stranded_and_then_the_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LOADS_S", 0.02)
    monkeypatch.setattr(engine_module, "STRANDED_S", 0.2)
    async with running(pinned_s=1.0) as bench:
        await bench.tell("leak", tokens=48)

        async def is_stranded() -> bool:
            return bench.engine.unexplained_bytes() == 3 * bench.engine.pool.block_bytes

        await until(is_stranded)
        await bench.until(lambda: bench.failure is not None)
        assert "48 tokens" in str(bench.failure and bench.failure.__cause__)


async def test_the_servers_prefix_cache_is_told_in_our_hashes() -> None:
    async with running() as bench:
        asked = request("a", prompt=40)
        bench.engine.start(asked)
        await bench.ended(asked.key)
        want = block_hashes(ROOT, asked.token_ids, 16, 16)

        async def is_told() -> bool:
            return list(bench.engine.cache.drain_with_hashes()[1]) == want

        await until(is_told)


async def test_a_server_that_does_not_start_is_reported_with_its_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineFailed, match="ended with 3"):
        async with running(args="--exit-at-start 3"):
            pass
    assert "sglang_did_not_start" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("about", "field"),
    [
        ({"command": "no-such-program-here"}, "sglang_command"),
        ({"command": "'"}, "sglang_command"),
        ({"args": "--port 1"}, "sglang_args"),
        ({"page_size": 24}, "block_tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(about: dict[str, Any], field: str) -> None:
    made = SglangSettings(**{"model": Path("/model"), "mode": "null", "command": "python3", "hash_block_tokens": 16, **about})
    with pytest.raises(ConfigError) as refusal:
        SglangEngine(made, folder())
    assert refusal.value.field == field


async def test_the_servers_process_dies_with_ours() -> None:
    script = """
import asyncio, sys
from test_sglang_engine import *
async def main():
    engine = SglangEngine(settings(), folder())
    await engine.open()
    print("pid", psutil.Process().children()[0].pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ours = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, env=environment)
    assert ours.stdout is not None
    while not (line := await ours.stdout.readline()).startswith(b"pid "):  # its log goes there too
        assert line
    server = psutil.Process(int(line.split()[1]))
    ours.kill()
    await ours.wait()

    async def is_gone() -> bool:
        return not server.is_running() or server.status() == psutil.STATUS_ZOMBIE

    await until(is_gone)


async def _has_seen(bench: Bench, count: int) -> bool:
    return len(await bench.tell("seen")) == count
