"""The gRPC edge: queries in, answers out, in natural batches."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import grpc
from baton_contracts.router.v1 import router_service_pb2 as pb
from baton_contracts.router.v1 import router_service_pb2_grpc as pb_grpc
from baton_runtime import semconv
from baton_runtime.streams import Outbox
from baton_runtime.telemetry import Telemetry, context_from, is_sampled
from opentelemetry.trace import Span

from baton_router.fleet import Fleet
from baton_router.metrics import RouterMetrics
from baton_router.placement import Placer

MAX_UNSENT_ANSWERS = 65_536  # a frontend that asks and does not read loses its stream
BATCH_ANSWERS = 512


class RouterServicer(pb_grpc.RouterServiceServicer):
    """Answers every query once; never waits for anything to do so."""

    def __init__(self, placer: Placer, fleet: Fleet, telemetry: Telemetry, metrics: RouterMetrics) -> None:
        self._placer = placer
        self._fleet = fleet
        self._telemetry = telemetry
        self._metrics = metrics
        self._placement_ids = itertools.count(1)

    async def Route(
        self, requests: AsyncIterator[pb.RouteRequest], context: grpc.aio.ServicerContext[pb.RouteRequest, pb.RouteResponse]
    ) -> None:
        """Serve one frontend until it leaves."""
        outbox: Outbox[pb.Answer] = Outbox(MAX_UNSENT_ANSWERS)
        placements: dict[int, int] = {}  # query_id -> placement id, of this stream
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(outbox, context), name="route writer")
                async for request in requests:
                    self._handle(request, outbox, placements)
                outbox.close()
        finally:
            for placement_id in placements.values():
                self._placer.ended(placement_id)

    async def _write(self, outbox: Outbox[pb.Answer], context: grpc.aio.ServicerContext[pb.RouteRequest, pb.RouteResponse]) -> None:
        while answers := await outbox.get_batch(BATCH_ANSWERS):
            try:
                await context.write(pb.RouteResponse(answers=answers))
            except grpc.aio.InternalError:
                return  # the frontend left in the middle of the write

    def _handle(self, request: pb.RouteRequest, outbox: Outbox[pb.Answer], placements: dict[int, int]) -> None:
        now = time.monotonic()
        self._fleet.fence(request.fenced_incarnations, now)
        for path in request.paths_down:
            self._fleet.bar(path.prefill_incarnation, path.decode_incarnation, now)
        for query_id in (*request.withdrawn_query_ids, *request.ended_query_ids):
            if (placement_id := placements.pop(query_id, None)) is not None:
                self._placer.ended(placement_id)
        for query in request.queries:
            outbox.put(self._answer(query, placements, now))

    def _answer(self, query: pb.Query, placements: dict[int, int], now: float) -> pb.Answer:
        placement_id = next(self._placement_ids)
        started = time.perf_counter()
        if is_sampled(query.traceparent):
            with self._telemetry.tracer.start_as_current_span(semconv.SPAN_ROUTER_SELECT, context_from(query.traceparent)) as span:
                answer = self._placer.place(query, placement_id, now)
                _describe(span, query, answer)
        else:  # a third of the time of a placement
            answer = self._placer.place(query, placement_id, now)
        if answer.HasField("placement"):
            placements[query.query_id] = placement_id
        self._metrics.answered(answer, time.perf_counter() - started)
        return answer


def _describe(span: Span, query: pb.Query, answer: pb.Answer) -> None:
    span.set_attribute(semconv.BATON_REQUEST_ID, query.request_id)
    span.set_attribute(semconv.BATON_ATTEMPT, query.attempt)
    span.set_attribute(semconv.BATON_PROMPT_TOKENS, query.num_tokens)
    if answer.HasField("refusal"):
        span.set_attribute(semconv.ERROR_TYPE, answer.refusal.reason)
        return
    placement = answer.placement
    span.set_attribute(semconv.BATON_DECODE_INSTANCE_ID, placement.decode.instance_id)
    span.set_attribute(semconv.BATON_PREFILL_INSTANCE_ID, placement.prefill.instance_id)
    span.set_attribute(semconv.BATON_CACHED_TOKENS, max(placement.decode.cached_tokens, placement.prefill.cached_tokens))
    span.set_attribute(semconv.BATON_PREDICTED_QUEUE_US, placement.predicted_queue_us)
    span.set_attribute(semconv.BATON_PREDICTED_PREFILL_US, placement.predicted_prefill_us)
    span.set_attribute(semconv.BATON_PREDICTED_TRANSFER_US, placement.predicted_transfer_us)
    span.set_attribute(semconv.BATON_PREDICTED_FETCH_US, placement.predicted_fetch_us)
    span.set_attribute(semconv.BATON_FETCH_INSTANCE_ID, placement.fetch_from.instance_id)
