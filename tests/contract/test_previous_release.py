"""Services of two releases side by side, as in an upgrade: each kind alone still speaks the contracts of the last release.

What "the last release" means here: previous_release.py.
"""

import asyncio
from pathlib import Path

import grpc
import pytest
from baton_contracts.instance.v1 import instance_service_pb2 as instance_pb2
from baton_contracts.instance.v1 import instance_service_pb2_grpc as instance_rpc
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as kvtransfer_pb2
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_runtime.rpc import open_channel
from clients import stream
from cluster import Cluster, cluster, roomy_model, until
from load import Oracle
from previous_release import Contracts, last_release

LAUNCHER = Path(__file__).parents[1] / "previous_release.py"
OLD = [("prefill", "decode"), ("prefill",), ("decode",), ("frontend",), ("router",), ("kvtransfer",)]
NUM_REQUESTS, NUM_TOKENS = 12, 20


def as_before(*services: str):
    """For `cluster`: these services in the contracts of the last release."""

    def change(name: str, command: list[str]) -> list[str]:
        if name.partition("-")[0] not in services:
            return command
        at = command.index("-m")
        return [*command[:at], str(LAUNCHER), *command[at + 1 :]]

    return change


def test_what_a_release_does_not_know_is_dropped_and_not_served() -> None:
    contracts = Contracts(last_release().read_bytes())
    assert contracts.call("/baton.instance.v1.InstanceService/Drain") is None
    ask, answer = contracts.call("/baton.kvtransfer.v1.KvTransferService/Books")  # type: ignore[misc]
    sent = kvtransfer_pb2.BooksRequest.FromString(ask(kvtransfer_pb2.BooksRequest(sequence=7).SerializeToString()))
    assert sent == kvtransfer_pb2.BooksRequest()
    heard = kvtransfer_pb2.BooksResponse.FromString(answer(kvtransfer_pb2.BooksResponse(booked_sequence=7).SerializeToString()))
    assert heard == kvtransfer_pb2.BooksResponse()
    _, frames = contracts.call("/baton.worker.v1.WorkerService/Attach")  # type: ignore[misc]
    assert frames(b"") == worker_pb2.AttachResponse().SerializeToString()


async def serves_drain(house: Cluster, name: str) -> bool:
    """Whether an instance knows a call that the last release does not; asked with a stale incarnation, so that nothing happens."""
    async with open_channel(house.instance(name).grpc_address) as channel:
        stub = instance_rpc.InstanceServiceStub(channel)
        try:
            async for _ in stub.Drain(instance_pb2.DrainRequest(incarnation="of another life"), timeout=10):
                pass
        except grpc.aio.AioRpcError as error:
            return error.code() is not grpc.StatusCode.UNIMPLEMENTED
    raise AssertionError("drained by a stale incarnation")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("old", OLD, ids="+".join)
async def test_requests_are_exact_and_books_balance_beside_the_last_release(tmp_path: Path, old: tuple[str, ...]) -> None:
    async with cluster(tmp_path, environment={"BATON_DECODE_CAN_PREFILL": "false"}, change=as_before(*old)) as house:
        for service in ("prefill", "decode", "frontend", "router", "kvtransfer"):
            assert await serves_drain(house, f"{service}-0") is (service not in old)
        oracle = Oracle(house.options.profile, house.options.model)
        prompts = [[10 + (start + step) % 40 for step in range(60 + start)] for start in range(NUM_REQUESTS)]
        body = {"model": "test-model", "max_tokens": NUM_TOKENS, "ignore_eos": True}
        answers = await asyncio.gather(*[stream(house.http, house.url, prompt=prompt, **body) for prompt in prompts])
        for prompt, answer in zip(prompts, answers, strict=True):
            assert (answer.error, answer.finish_reason, len(answer.token_ids)) == (None, "length", NUM_TOKENS)
            assert oracle.first_wrong(prompt, answer.token_ids) is None
        await until("every prompt was handed off", lambda: _handed_off(house), 10)
        await house.settled()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("old", ["prefill", "decode"])
async def test_a_fetch_that_one_side_cannot_speak_of_is_given_up_and_the_prompt_is_computed(tmp_path: Path, old: str) -> None:
    """The last release's contracts know no fetch. Prefill has lost its cache, decode has the first turn; the second turn asks for it."""
    profile = tmp_path / "slow.toml"
    profile.write_text('description = "slow"\n[prefill_ms]\nper_token = 0.5\n[decode_ms]\nconstant = 1.0\n')
    environment = {f"BATON_{service}_FETCH_MIN_TOKENS": "32" for service in ("PREFILL", "DECODE")}
    model = roomy_model(tmp_path / "model")
    async with cluster(tmp_path / "run", profile=str(profile), model=model, environment=environment, change=as_before(old)) as house:
        oracle = Oracle(house.options.profile, house.options.model)
        body = {"model": "test-model", "max_tokens": NUM_TOKENS, "ignore_eos": True}
        first = [10 + step % 40 for step in range(500)]
        answer = await stream(house.http, house.url, prompt=first, **body)
        await house.settled()
        await house.kill("prefill-0")
        await house.start("prefill-0")

        async def is_known() -> bool:
            await stream(house.http, house.url, prompt=[10, 11], **body)
            return bool((await house.metrics("prefill-0")).get('baton_handoffs_total{outcome="confirmed",role="source"}'))

        await until("the new prefill is used and introduced", is_known, 10)
        second = [*first, *answer.token_ids, *(20 + step for step in range(20))]
        again = await stream(house.http, house.url, prompt=second, **body)
        assert (again.error, len(again.token_ids)) == (None, NUM_TOKENS)
        assert oracle.first_wrong(second, again.token_ids) is None
        metrics = await house.metrics("prefill-0")
        assert metrics["baton_fetched_tokens_total"] == 0
        assert sum(value for name, value in metrics.items() if name.startswith('baton_fetches_total{outcome="')) == 1
        await house.settled()


async def _handed_off(house: Cluster) -> bool:
    metrics = await house.metrics("decode-0")
    return metrics.get('baton_handoffs_total{outcome="confirmed",role="sink"}', 0.0) >= NUM_REQUESTS
