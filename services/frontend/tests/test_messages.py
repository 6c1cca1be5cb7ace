"""What the frontend says to workers about fetching: the hint goes to whoever computes the prompt, and to nobody else."""

from array import array

import pytest
from baton_contracts.router.v1 import router_service_pb2 as router_pb2
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_frontend.generation import Generation
from baton_frontend.messages import placement_of, start_message
from baton_frontend.placement import Placement, Role


def placement(*, prefill: bool, fetch: bool = True) -> Placement:
    answer = router_pb2.Placement(decode=router_pb2.Target(instance_id="d0", incarnation="d1", address="h:1"))
    if prefill:
        answer.prefill.CopyFrom(router_pb2.Target(instance_id="p0", incarnation="p1", address="h:2"))
    if fetch:
        answer.fetch_from.CopyFrom(router_pb2.Target(instance_id="x0", incarnation="x1", address="h:3", cached_tokens=64))
        answer.predicted_fetch_us = 7
    return placement_of(answer)


def start(role: Role, where: Placement) -> worker_pb2.Start:
    generation = Generation(model="m", operation="chat", prompt_token_ids=array("I", [1, 2, 3]), max_tokens=4)
    return start_message(role, where, "r", 1, generation, array("I"), worker_pb2.Sampling(), bytes(16), 0, "")


@pytest.mark.parametrize(
    ("role", "prefill", "is_told"),
    [(Role.DECODE, False, True), (Role.PREFILL, True, True), (Role.DECODE, True, False)],
    ids=["decode alone", "prefill of a pair", "decode of a pair"],
)
def test_hint_goes_to_whoever_computes_the_prompt(role: Role, prefill: bool, is_told: bool) -> None:
    message = start(role, placement(prefill=prefill))
    assert message.HasField("fetch_from") == is_told
    if is_told:
        hint = worker_pb2.FetchFrom(instance_id="x0", incarnation="x1", address="h:3", num_tokens=64)
        assert message.fetch_from == hint


def test_pair_that_becomes_decode_alone_keeps_the_hint() -> None:
    assert start(Role.DECODE, placement(prefill=True).whole()).fetch_from.instance_id == "x0"


def test_placement_without_a_hint_gives_a_start_without_one() -> None:
    assert not start(Role.DECODE, placement(prefill=False, fetch=False)).HasField("fetch_from")
