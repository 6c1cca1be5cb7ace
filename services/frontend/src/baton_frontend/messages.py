"""What the frontend says to routers and workers about a request, as protobuf. Pure functions."""

from array import array

from baton_contracts.router.v1 import router_service_pb2 as router_pb2
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2

from baton_frontend.generation import Generation
from baton_frontend.placement import Ask, Placement, Role, Target


def sampling_of(generation: Generation, seed: int) -> worker_pb2.Sampling:
    """The same for all attempts of a request, so that a resume draws what the first attempt would have drawn."""
    return worker_pb2.Sampling(
        seed=seed,
        choice=generation.choice,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        max_tokens=generation.max_tokens,
        min_tokens=generation.min_tokens,
        ignore_eos=generation.ignore_eos,
        stop_token_ids=generation.stop_token_ids,
        top_logprobs=generation.top_logprobs,
        frequency_penalty=generation.frequency_penalty,
        presence_penalty=generation.presence_penalty,
        repetition_penalty=generation.repetition_penalty,
        logit_bias=generation.logit_bias,
    )


def priority_of(generation: Generation) -> worker_pb2.Priority:
    """Class of a request."""
    return worker_pb2.PRIORITY_INTERACTIVE if generation.interactive else worker_pb2.PRIORITY_BATCH


def remaining_ms(deadline: float, now: float) -> int:
    """Time left for a message field, at least 1."""
    return max(1, round((deadline - now) * 1000))


def start_message(
    role: Role,
    placement: Placement,
    request_id: str,
    attempt: int,
    generation: Generation,
    output: "array[int]",
    sampling: worker_pb2.Sampling,
    cache_root: bytes,
    deadline_ms: int,
    traceparent: str,
) -> worker_pb2.Start:
    """Start for one side of an attempt; the slot is set by the stream it goes to."""
    start = worker_pb2.Start(
        request_id=request_id,
        attempt=attempt,
        traceparent=traceparent,
        deadline_ms=deadline_ms,
        priority=priority_of(generation),
        token_ids=generation.prompt_token_ids.tobytes() + output.tobytes(),
        num_prompt_tokens=len(generation.prompt_token_ids),
        cache_root=cache_root,
        sampling=sampling,
    )
    prefill, source = placement.prefill, placement.fetch_from
    if source is not None and (prefill is None or role is Role.PREFILL):
        start.fetch_from.instance_id, start.fetch_from.incarnation = source.instance_id, source.incarnation
        start.fetch_from.address, start.fetch_from.num_tokens = source.address, source.cached_tokens
    if prefill is None:
        start.whole.SetInParent()
    elif role is Role.PREFILL:
        start.prefill_for.decode_instance_id = placement.decode.instance_id
        start.prefill_for.decode_incarnation = placement.decode.incarnation
    else:
        start.decode_from.prefill_instance_id = prefill.instance_id
        start.decode_from.prefill_incarnation = prefill.incarnation
        start.decode_from.prefill_address = prefill.address
    return start


def query_message(
    query_id: int,
    ask: Ask,
    request_id: str,
    generation: Generation,
    num_output_tokens: int,
    block_hashes: bytes,
    deadline_ms: int,
    traceparent: str,
) -> router_pb2.Query:
    """The question where to run an attempt."""
    return router_pb2.Query(
        query_id=query_id,
        request_id=request_id,
        attempt=ask.attempt,
        model=generation.model,
        priority=priority_of(generation),
        num_tokens=len(generation.prompt_token_ids) + num_output_tokens,
        block_hashes=block_hashes,
        max_new_tokens=generation.max_tokens - num_output_tokens,
        excluded_incarnations=ask.excluded,
        deadline_ms=deadline_ms,
        traceparent=traceparent,
    )


def placement_of(answer: router_pb2.Placement) -> Placement:
    """The router's answer in our form."""
    return Placement(
        decode=_target(answer.decode),
        prefill=_target(answer.prefill) if answer.HasField("prefill") else None,
        predicted_queue_us=answer.predicted_queue_us,
        predicted_prefill_us=answer.predicted_prefill_us,
        predicted_transfer_us=answer.predicted_transfer_us,
        fetch_from=_target(answer.fetch_from) if answer.HasField("fetch_from") else None,
        predicted_fetch_us=answer.predicted_fetch_us,
    )


def _target(target: router_pb2.Target) -> Target:
    return Target(target.instance_id, target.incarnation, target.address, target.cached_tokens)
