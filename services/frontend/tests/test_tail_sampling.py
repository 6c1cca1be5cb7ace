"""Traces that head sampling left out: which are exported after all, and that their spans fit what was said before."""

from array import array
from collections.abc import AsyncIterator

import pytest
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_frontend.generation import Generation, GenerationEnd
from baton_frontend.request import RequestLimits
from baton_frontend.requests import ManagerSettings
from baton_frontend.tail_sampling import TailLimits, TailSampling
from baton_frontend.testing_bench import Bench, RecordingSink, running_bench
from baton_frontend.testing_workers import FakeWorker
from baton_runtime.errors import BatonError, InvalidArgument, QueueFull, Unavailable
from baton_runtime.telemetry import Telemetry, configure_telemetry, context_from
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


class Tail:
    def __init__(self, limits: TailLimits) -> None:
        self.exporter = InMemorySpanExporter()
        self.telemetry: Telemetry = configure_telemetry("frontend", "0", "frontend-0", "f" * 16, sample_ratio=0.0, exporter=self.exporter)
        assert self.telemetry.late is not None
        self.decided: list[str] = []
        self.now = 0.0
        self.sampling = TailSampling(self.telemetry.late, limits, lambda: self.now, self.decided.append)

    def start(self, traceparent: str = "") -> trace.Span:
        return self.telemetry.tracer.start_span("POST /v1/completions", context_from(traceparent), trace.SpanKind.SERVER)

    async def exported(self) -> dict[str, ReadableSpan]:
        await self.telemetry.close()
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.mark.parametrize(
    ("end", "ttft_s", "tpot_s", "duration_s", "why"),
    [
        (GenerationEnd("stop"), 0.9, 0.09, 100.0, ""),
        (GenerationEnd("stop"), 1.1, 0.01, 2.0, "slow"),
        (GenerationEnd("stop"), 0.1, 0.11, 2.0, "slow"),
        (GenerationEnd("cancelled"), None, None, 1.1, "slow"),
        (GenerationEnd("cancelled"), None, None, 0.9, ""),
        (GenerationEnd("stop", resumed=1), 0.1, 0.01, 2.0, "resumed"),
        (GenerationEnd("failed", Unavailable("gone")), None, None, 0.1, "error"),
        (GenerationEnd("failed", QueueFull(1, 1)), None, None, 0.1, ""),
        (GenerationEnd("failed", InvalidArgument("prompt", "too long")), None, None, 0.1, ""),
    ],
)
def test_errors_of_ours_resumes_and_slow_requests_matter(
    end: GenerationEnd, ttft_s: float | None, tpot_s: float | None, duration_s: float, why: str
) -> None:
    tail = Tail(TailLimits(slow_ttft_s=1.0, slow_tpot_s=0.1))
    assert tail.sampling.why(end, ttft_s, tpot_s, duration_s) == why


def test_an_outage_keeps_so_many_traces_a_second_and_counts_the_rest() -> None:
    tail = Tail(TailLimits(max_traces_per_s=2))
    first = tail.start()
    assert [tail.sampling.keep(span, "error") for span in (first, first, tail.start(), tail.start())] == [True, True, True, False]
    tail.now = 1.5
    assert tail.sampling.keep(tail.start(), "slow")
    assert tail.decided == ["error", "error", "dropped", "slow"]


def test_a_call_goes_with_its_generations_or_alone_if_it_failed_before() -> None:
    tail = Tail(TailLimits())
    kept, well, broken = tail.start(), tail.start(), tail.start()
    assert tail.sampling.keep(kept, "slow")
    assert [tail.sampling.call_over(kept, 200), tail.sampling.call_over(kept, 200)] == [True, False]
    assert [tail.sampling.call_over(well, 429), tail.sampling.call_over(broken, 503)] == [False, True]


def test_traces_whose_call_was_over_before_do_not_pile_up() -> None:
    tail = Tail(TailLimits(max_traces_per_s=1_000_000))
    assert all(tail.sampling.keep(tail.start(), "slow") for _ in range(3000))
    assert len(tail.sampling._kept) <= 1024


@pytest.fixture
def tail() -> Tail:
    return Tail(TailLimits(slow_ttft_s=3600.0, slow_tpot_s=3600.0))


@pytest.fixture
async def bench(tail: Tail) -> AsyncIterator[Bench]:
    settings = ManagerSettings(limits=RequestLimits(max_attempts=1, new_patience_s=0.2))
    async with running_bench(settings, tracer=tail.telemetry.tracer, tail=tail.sampling) as bench:
        yield bench


async def run(
    bench: Bench, tail: Tail, refuse_with: "worker_pb2.FinishReason | None"
) -> tuple[trace.Span, worker_pb2.Start, BatonError | None]:
    worker = await FakeWorker("decode-0", "d0").open()
    await bench.ready(worker)
    worker.refuse_with = refuse_with
    call, sink = tail.start(UNSAMPLED), RecordingSink()
    generation = Generation(model="m", prompt_token_ids=array("I", [1, 2, 3]), max_tokens=3)
    bench.manager.submit(generation, sink, trace.set_span_in_context(call))
    end = await sink.end()
    await worker.close()
    return call, worker.starts[0], end.error


async def test_a_failed_request_is_exported_under_the_ids_it_was_known_by(bench: Bench, tail: Tail) -> None:
    call, start, error = await run(bench, tail, worker_pb2.FINISH_REASON_HANDOFF_FAILED)
    span = (await tail.exported())["chat m"]
    _, trace_id, span_id, flags = start.traceparent.split("-")
    assert (f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}", flags) == (trace_id, span_id, "00")
    assert trace_id == UNSAMPLED.split("-")[1]
    assert span.parent is not None
    assert span.parent.span_id == call.get_span_context().span_id
    assert span.attributes is not None
    assert (span.attributes["error.type"], span.attributes["baton.sampled_because"]) == ("ATTEMPTS_EXHAUSTED", "error")
    assert span.status.description == str(error)
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time < span.end_time
    assert span.resource.attributes["service.instance.id"] == "frontend-0"


async def test_a_request_that_ends_well_leaves_nothing(bench: Bench, tail: Tail) -> None:
    await run(bench, tail, None)
    assert await tail.exported() == {}
