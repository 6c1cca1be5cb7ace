import math
from array import array
from dataclasses import replace

import pytest
from baton_contracts.discovery.v1.instance_pb2 import Capability
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import EngineInfo, Priority, Work
from baton_handoff.ids import PeerRef
from baton_runtime.errors import InvalidArgument
from baton_worker.starts import CheckedStart, StartLimits, UnsupportedWork, check_start
from baton_worker.testing import start_message

INFO = EngineInfo(max_model_tokens=64, vocab_size=1000, eos_token_ids=frozenset(), fingerprint="f")
EVERYTHING = (Capability.CAPABILITY_WHOLE, Capability.CAPABILITY_PREFILL_FOR, Capability.CAPABILITY_DECODE_FROM)
LIMITS = StartLimits(INFO, pool_tokens=4096, capabilities=EVERYTHING)


def good() -> pb.Start:
    return start_message(1, "f-1", prompt=4, delivered=2, max_tokens=8)


def check(start: pb.Start, limits: StartLimits = LIMITS) -> CheckedStart:
    return check_start(start, limits)


def test_good_start_becomes_an_engine_request_with_zero_values_resolved() -> None:
    start = good()
    start.deadline_ms = 1500
    start.traceparent = "00-1"
    checked = check(start)
    request = checked.request
    assert (request.key, list(request.token_ids), request.num_prompt_tokens) == (("f-1", 1), [1, 2, 3, 4, 0, 100], 4)
    assert (request.work, request.priority, checked.peer) == (Work.WHOLE, Priority.INTERACTIVE, None)
    assert (request.sampling.top_p, request.sampling.repetition_penalty, request.sampling.top_logprobs) == (1.0, 1.0, None)
    assert (checked.deadline_s, checked.traceparent) == (1.5, "00-1")


def test_logprobs_of_zero_are_not_no_logprobs() -> None:
    start = good()
    start.sampling.top_logprobs = 0
    assert check(start).request.sampling.top_logprobs == 0


def test_peer_is_who_the_start_names() -> None:
    start = good()
    start.decode_from.MergeFrom(pb.DecodeFrom(prefill_instance_id="p", prefill_incarnation="pi", prefill_address="h:1"))
    assert check(start).peer == PeerRef("p", "pi", "h:1")
    start.prefill_for.MergeFrom(pb.PrefillFor(decode_instance_id="d", decode_incarnation="di"))
    checked = check(start)
    assert (checked.request.work, checked.peer.incarnation) == (Work.PREFILL_ONLY, "di")


def test_prefill_does_not_look_at_sampling() -> None:
    start = good()
    start.prefill_for.decode_incarnation = "di"
    start.sampling.temperature = 9.0
    assert check(start).request.work is Work.PREFILL_ONLY


def test_prefill_on_an_engine_that_draws_there_looks_at_sampling() -> None:
    start = good()
    start.prefill_for.decode_incarnation = "di"
    start.sampling.temperature = 0.5
    limits = replace(LIMITS, info=replace(INFO, handoff="native"))
    assert check(start, limits).request.sampling.temperature == 0.5
    start.sampling.temperature = 9.0
    with pytest.raises(InvalidArgument, match=r"sampling\.temperature"):
        check(start, limits)


def set_field(name: str, value: object) -> "tuple[str, pb.Start]":
    start = good()
    target: object = start
    *path, last = name.split(".")
    for part in path:
        target = getattr(target, part)
    if isinstance(value, dict):
        getattr(target, last).update(value)
    elif isinstance(value, list):
        getattr(target, last).extend(value)
    else:
        setattr(target, last, value)
    return name, start


def tokens(*ids: int) -> bytes:
    return array("I", ids).tobytes()


@pytest.mark.parametrize(
    ("field", "start"),
    [
        set_field("request_id", ""),
        set_field("request_id", "x" * 129),
        set_field("attempt", 0),
        set_field("priority", pb.PRIORITY_UNSPECIFIED),
        set_field("cache_root", b"short"),
        set_field("token_ids", b""),
        set_field("token_ids", b"12345"),
        set_field("token_ids", tokens(1, 2, 3, 1000)),
        set_field("token_ids", tokens(*range(64))),
        set_field("num_prompt_tokens", 0),
        set_field("num_prompt_tokens", 7),
        set_field("sampling.max_tokens", 2),
        set_field("sampling.min_tokens", 9),
        set_field("sampling.temperature", 2.1),
        set_field("sampling.temperature", math.nan),
        set_field("sampling.top_p", -0.1),
        set_field("sampling.min_p", 1.5),
        set_field("sampling.frequency_penalty", -2.5),
        set_field("sampling.presence_penalty", math.inf),
        set_field("sampling.repetition_penalty", -1.0),
        set_field("sampling.repetition_penalty", math.inf),
        set_field("sampling.top_logprobs", 21),
        set_field("sampling.stop_token_ids", [1000]),
        set_field("sampling.logit_bias", {5: math.nan}),
        set_field("sampling.logit_bias", {1000: 1.0}),
        set_field("prefill_for.decode_instance_id", "d"),
        set_field("decode_from.prefill_address", "h:1"),
    ],
)
def test_refusal_names_the_field(field: str, start: pb.Start) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        check(start)
    assert refusal.value.field.startswith(field.split(".")[0])
    if field.startswith("sampling"):
        assert refusal.value.field == field


def test_hint_is_kept_for_those_who_compute_and_must_name_a_life() -> None:
    start = good()
    start.fetch_from.CopyFrom(pb.FetchFrom(instance_id="decode-1", incarnation="d2", address="h:2", num_tokens=32))
    hint = check(start).fetch_from
    assert hint is not None
    assert (hint.peer, hint.num_tokens) == (PeerRef("decode-1", "d2", "h:2"), 32)
    start.fetch_from.incarnation = ""
    with pytest.raises(InvalidArgument, match=r"fetch_from\.incarnation"):
        check(start)


def test_start_without_work_is_refused() -> None:
    start = good()
    start.ClearField("whole")
    with pytest.raises(InvalidArgument, match="work"):
        check(start)


def test_work_this_instance_does_not_do_is_refused_not_invalid() -> None:
    with pytest.raises(UnsupportedWork):
        check(good(), StartLimits(INFO, 4096, [Capability.CAPABILITY_PREFILL_FOR]))


def test_one_token_cannot_be_handed_over() -> None:
    start = start_message(1, "f-1", prompt=1)
    assert check(start).request.num_kv_tokens == 0
    start.prefill_for.decode_incarnation = "di"
    with pytest.raises(InvalidArgument, match="nothing to hand over"):
        check(start)


def test_sequence_longer_than_the_pool_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at most 4"):
        check(good(), StartLimits(INFO, 4, EVERYTHING))
