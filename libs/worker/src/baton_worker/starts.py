"""From a Start of the contract to a request of the engine: every range checked, every refusal naming its field."""

import math
from array import array
from collections.abc import Collection
from dataclasses import dataclass

import grpc
import numpy as np
from baton_contracts.discovery.v1.instance_pb2 import Capability
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import EngineInfo, EngineRequest, Priority, SamplingParams, SequenceKey, Work
from baton_engine.errors import SequenceTooLong
from baton_handoff.ids import FetchHint, PeerRef
from baton_runtime.errors import BatonError, InvalidArgument
from baton_runtime.hashing import HASH_BYTES

MAX_REQUEST_ID_BYTES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIASES = 4096

_WORK = {"whole": Work.WHOLE, "prefill_for": Work.PREFILL_ONLY, "decode_from": Work.DECODE_ONLY}
_CAPABILITY = {
    Work.WHOLE: Capability.CAPABILITY_WHOLE,
    Work.PREFILL_ONLY: Capability.CAPABILITY_PREFILL_FOR,
    Work.DECODE_ONLY: Capability.CAPABILITY_DECODE_FROM,
}


class UnsupportedWork(BatonError):
    """This instance was not set up for that kind of work: place the request elsewhere."""

    reason = "UNSUPPORTED_WORK"
    status = grpc.StatusCode.FAILED_PRECONDITION
    retryable = True

    def __init__(self, work: Work) -> None:
        super().__init__(f"this instance does not take {work.value} work", work=work.value)


@dataclass(frozen=True, slots=True)
class StartLimits:
    """What this worker can run. pool_tokens: KV tokens the whole pool holds."""

    info: EngineInfo
    pool_tokens: int
    capabilities: Collection["Capability"]


@dataclass(frozen=True, slots=True)
class CheckedStart:
    """A Start that may run here. peer: the other side of the handoff; None with WHOLE. fetch_from: None with DECODE_ONLY."""

    request: EngineRequest
    peer: PeerRef | None
    traceparent: str
    deadline_s: float | None  # time left; None: no deadline
    fetch_from: FetchHint | None = None


def check_start(start: pb.Start, limits: StartLimits) -> CheckedStart:
    """Translate a Start.

    Raises: InvalidArgument (SequenceTooLong) naming the field of Start; UnsupportedWork.
    """
    _require(0 < len(start.request_id) <= MAX_REQUEST_ID_BYTES, "request_id", "must have 1 to %d characters", MAX_REQUEST_ID_BYTES)
    _require(start.attempt >= 1, "attempt", "must be at least 1")
    _require(start.priority in (pb.PRIORITY_INTERACTIVE, pb.PRIORITY_BATCH), "priority", "%d is not a class", start.priority)
    _require(len(start.cache_root) == HASH_BYTES, "cache_root", "has %d bytes instead of %d", len(start.cache_root), HASH_BYTES)
    work, peer = _work(start, limits)
    token_ids = _token_ids(start, limits, work)
    num_delivered = len(token_ids) - start.num_prompt_tokens
    # Our own engines sample nothing where they prefill, so nothing of it is looked at there; others draw the first token there.
    is_sampled = work is not Work.PREFILL_ONLY or limits.info.handoff == "native"
    request = EngineRequest(
        key=SequenceKey(start.request_id, start.attempt),
        token_ids=token_ids,
        num_prompt_tokens=start.num_prompt_tokens,
        cache_root=start.cache_root,
        work=work,
        priority=Priority(start.priority),
        sampling=check_sampling(start.sampling, limits.info.vocab_size, num_delivered) if is_sampled else SamplingParams(),
    )
    deadline_s = start.deadline_ms / 1000 if start.deadline_ms else None
    return CheckedStart(request, peer, start.traceparent, deadline_s, _fetch_hint(start, work))


def check_sampling(sampling: pb.Sampling, vocab_size: int, num_delivered: int) -> SamplingParams:
    """Translate Sampling, zero values resolved. num_delivered: output tokens given at the start.

    Raises: InvalidArgument naming the field.
    """
    _require(sampling.max_tokens > num_delivered, "sampling.max_tokens", "%d with %d delivered already", sampling.max_tokens, num_delivered)
    _require(sampling.min_tokens <= sampling.max_tokens, "sampling.min_tokens", "%d is above max_tokens", sampling.min_tokens)
    _in_range("sampling.temperature", sampling.temperature, 0.0, 2.0)
    _in_range("sampling.top_p", sampling.top_p, 0.0, 1.0)
    _in_range("sampling.min_p", sampling.min_p, 0.0, 1.0)
    _in_range("sampling.frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _in_range("sampling.presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _require(
        math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty >= 0.0,
        "sampling.repetition_penalty",
        "%s is not a positive number",
        sampling.repetition_penalty,
    )
    _require(sampling.top_logprobs <= MAX_TOP_LOGPROBS, "sampling.top_logprobs", "%d is above %d", sampling.top_logprobs, MAX_TOP_LOGPROBS)
    stop_token_ids, logit_bias = frozenset(sampling.stop_token_ids), dict(sampling.logit_bias)
    _require(len(sampling.stop_token_ids) <= MAX_STOP_TOKENS, "sampling.stop_token_ids", "more than %d", MAX_STOP_TOKENS)
    _check_ids("sampling.stop_token_ids", stop_token_ids, vocab_size)
    _require(len(logit_bias) <= MAX_LOGIT_BIASES, "sampling.logit_bias", "more than %d", MAX_LOGIT_BIASES)
    _check_ids("sampling.logit_bias", logit_bias, vocab_size)
    _require(all(map(math.isfinite, logit_bias.values())), "sampling.logit_bias", "values must be finite")
    return SamplingParams(
        seed=sampling.seed,
        choice=sampling.choice,
        temperature=sampling.temperature,
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=stop_token_ids,
        top_logprobs=sampling.top_logprobs if sampling.HasField("top_logprobs") else None,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        logit_bias=logit_bias,
    )


def _work(start: pb.Start, limits: StartLimits) -> tuple[Work, PeerRef | None]:
    field = start.WhichOneof("work")
    if field is None:
        raise InvalidArgument("work", "is missing")
    work = _WORK[field]
    if _CAPABILITY[work] not in limits.capabilities:
        raise UnsupportedWork(work)
    if work is Work.WHOLE:
        return work, None
    if work is Work.PREFILL_ONLY:
        decode = start.prefill_for
        _require(bool(decode.decode_incarnation), "prefill_for.decode_incarnation", "is missing")
        return work, PeerRef(decode.decode_instance_id, decode.decode_incarnation)
    prefill = start.decode_from
    _require(bool(prefill.prefill_incarnation), "decode_from.prefill_incarnation", "is missing")
    _require(bool(prefill.prefill_address), "decode_from.prefill_address", "is missing")
    return work, PeerRef(prefill.prefill_instance_id, prefill.prefill_incarnation, prefill.prefill_address)


def _fetch_hint(start: pb.Start, work: Work) -> FetchHint | None:
    if not start.HasField("fetch_from") or work is Work.DECODE_ONLY:
        return None
    source = start.fetch_from
    _require(bool(source.incarnation), "fetch_from.incarnation", "is missing")
    return FetchHint(PeerRef(source.instance_id, source.incarnation, source.address), source.num_tokens)


def _token_ids(start: pb.Start, limits: StartLimits, work: Work) -> "array[int]":
    size = len(start.token_ids)
    _require(size > 0 and size % 4 == 0, "token_ids", "%d bytes are not a column of at least one u32", size)
    num_tokens = size // 4
    _require(1 <= start.num_prompt_tokens <= num_tokens, "num_prompt_tokens", "%d of %d tokens", start.num_prompt_tokens, num_tokens)
    _require(work is Work.WHOLE or num_tokens >= 2, "token_ids", "one token leaves nothing to hand over")
    longest = min(limits.info.max_model_tokens - 1, limits.pool_tokens)
    if num_tokens > longest:
        raise SequenceTooLong(num_tokens, longest)
    column = np.frombuffer(start.token_ids, dtype="<u4")
    largest = int(np.maximum.reduce(column))
    _require(largest < limits.info.vocab_size, "token_ids", "%d is not below the vocabulary's %d", largest, limits.info.vocab_size)
    token_ids = array("I")
    token_ids.frombytes(column.astype(np.uint32, copy=False).tobytes())
    return token_ids


def _check_ids(field: str, ids: Collection[int], vocab_size: int) -> None:
    largest = max(ids, default=0)
    _require(largest < vocab_size, field, "%d is not below the vocabulary's %d", largest, vocab_size)


def _in_range(field: str, value: float, least: float, most: float) -> None:
    _require(least <= value <= most, field, "%g is not in [%g, %g]", value, least, most)  # false for NaN


def _require(condition: bool, field: str, message: str, *values: object) -> None:
    """message: %-format for values, so that nothing is formatted while all is well."""
    if not condition:
        raise InvalidArgument(field, message % values if values else message)
