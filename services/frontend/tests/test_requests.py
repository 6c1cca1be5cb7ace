"""Admission, and what is told of a request: spans, metrics, the log line."""

from array import array
from collections.abc import AsyncIterator

import pytest
from baton_contracts.router.v1 import router_service_pb2 as router_pb2
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb2
from baton_frontend.admission import AdmissionLimits
from baton_frontend.generation import Generation
from baton_frontend.request import RequestLimits
from baton_frontend.requests import ManagerSettings
from baton_frontend.testing_bench import Bench, RecordingSink, running_bench
from baton_frontend.testing_workers import FakeRouter, FakeWorker, expected_output, placed_on
from baton_runtime.errors import Draining, InvalidArgument, NotFound, QueueFull
from baton_runtime.telemetry import configure_telemetry
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

PROMPT = array("I", [1, 2, 3])


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    limits = RequestLimits(new_patience_s=0.3, resume_patience_s=5.0)
    settings = ManagerSettings(resumes_per_tick=2, limits=limits)
    async with running_bench(settings, limits=AdmissionLimits(max_inflight=4, max_inflight_tokens=1000)) as bench:
        yield bench


@pytest.fixture
async def worker(bench: Bench) -> AsyncIterator[FakeWorker]:
    worker = await FakeWorker("decode-0", "d0").open()
    await bench.ready(worker)
    yield worker
    await worker.close()


async def test_request_ids_start_with_the_incarnation_and_rise(bench: Bench, worker: FakeWorker) -> None:
    ids = [bench.submit()[1].request_id for _ in range(3)]
    assert ids == [f"{'f' * 16}-{n}" for n in (1, 2, 3)]


async def test_too_many_at_a_time_are_refused_at_once(bench: Bench, worker: FakeWorker) -> None:
    submitted = [bench.submit() for _ in range(4)]
    with pytest.raises(QueueFull) as refused:
        bench.submit()
    assert refused.value.retry_after_ms > 0
    assert "4 of at most 4 requests (frontend.max_inflight)" in str(refused.value)
    await submitted[0][0].end()
    bench.submit()


async def test_too_many_tokens_at_a_time_are_refused_at_once(bench: Bench, worker: FakeWorker) -> None:
    first, _ = bench.submit(max_tokens=597)
    with pytest.raises(QueueFull, match=r"600 of at most 1000 tokens \(frontend\.max_inflight_tokens\), and 403 more"):
        bench.submit(max_tokens=400)
    assert bench.submit(max_tokens=397)
    await first.end()
    assert bench.submit(max_tokens=400)


async def test_what_never_fits_is_wrong_and_not_told_to_come_again(bench: Bench, worker: FakeWorker) -> None:
    with pytest.raises(InvalidArgument, match="Lower max_tokens"):
        bench.submit(max_tokens=998)


async def test_everything_taken_at_admission_is_given_back_at_the_end(bench: Bench, worker: FakeWorker) -> None:
    (ended, _), (_, cancelled) = bench.submit(), bench.submit(max_tokens=500)
    cancelled.cancel()
    await ended.end()
    await bench.manager.wait_idle()
    assert (bench.manager.admission.num_requests, bench.manager.admission.num_tokens) == (0, 0)


async def test_unknown_model_is_refused_at_once(bench: Bench, worker: FakeWorker) -> None:
    with pytest.raises(NotFound):
        bench.manager.submit(Generation(model="other", prompt_token_ids=PROMPT, max_tokens=1), RecordingSink(), None)


async def test_draining_refuses_new_and_finishes_old(bench: Bench, worker: FakeWorker) -> None:
    sink, _ = bench.submit()
    bench.manager.set_draining()
    with pytest.raises(Draining):
        bench.submit()
    await bench.manager.wait_idle()
    assert sink.ends[0].reason == "length"


async def test_sink_is_not_called_from_inside_submit(bench: Bench) -> None:
    worker = await FakeWorker("decode-0", "d0").open()
    await bench.ready(worker)
    await worker.close()
    sink, _ = bench.submit()
    assert not sink.ends


async def test_models_are_those_of_decode_instances(bench: Bench, worker: FakeWorker) -> None:
    prefill = await FakeWorker("prefill-0", "p0", service=3).open()
    prefill.model.served_name = "only-prefill"
    await bench.ready(worker, prefill)
    (model,) = bench.manager.models()
    assert (model.served_name, model.hash_block_tokens, model.max_model_tokens) == ("m", 16, 4096)
    await prefill.close()


async def test_sink_that_raises_ends_only_its_own_request(bench: Bench, worker: FakeWorker) -> None:
    bad, _ = bench.submit()
    good, _ = bench.submit()

    def fail() -> None:
        raise RuntimeError("the handler is closed")

    bad.on_token = fail
    await good.end()
    assert good.tokens == expected_output(PROMPT, 8)
    assert (await bad.end()).reason == "failed"


async def test_engine_error_twice_is_an_engine_crash(bench: Bench, worker: FakeWorker) -> None:
    worker.refuse_with = worker_pb2.FINISH_REASON_ENGINE_ERROR
    sink, _ = bench.submit()
    error = (await sink.end()).error
    assert error is not None
    assert error.reason == "ENGINE_CRASH"
    assert len(worker.starts) == 2


async def test_invalid_start_is_not_repeated(bench: Bench, worker: FakeWorker) -> None:
    worker.refuse_with = worker_pb2.FINISH_REASON_INVALID
    sink, _ = bench.submit()
    assert (await sink.end()).reason == "failed"
    assert len(worker.starts) == 1


async def test_missing_logprobs_are_a_fault_of_the_worker(bench: Bench, worker: FakeWorker) -> None:
    sink, _ = bench.submit(top_logprobs=1)
    assert (await sink.end()).reason == "failed"
    assert sink.tokens == []


async def test_resumes_are_paced_and_lose_nothing() -> None:
    async with running_bench(ManagerSettings(resumes_per_tick=2)) as bench:
        worker = await FakeWorker("decode-0", "d0").open()
        await bench.ready(worker)
        worker.keeps_sequences = False
        submitted = [bench.submit(max_tokens=40)[0] for _ in range(12)]
        await submitted[-1].until(lambda: len(submitted[-1].tokens) > 3)
        worker.break_streams()
        for sink in submitted:
            assert (await sink.end()).resumed == 1
            assert sink.tokens == expected_output(PROMPT, 40)
        await worker.close()


async def test_timer_that_fires_early_still_wakes_a_waiting_request() -> None:
    """As uvloop's do, by up to a millisecond."""
    async with running_bench(timer_share=0.9) as bench:
        worker = await FakeWorker("decode-0", "d0").open()
        await bench.ready(worker)
        worker.refuse_with = worker_pb2.FINISH_REASON_REFUSED
        sink, _ = bench.submit()
        await worker.until(lambda: len(worker.starts) >= 3)
        worker.refuse_with = None
        assert (await sink.end()).reason == "length"
        await worker.close()


async def test_end_is_one_log_line_and_the_metrics(bench: Bench, worker: FakeWorker) -> None:
    with capture_logs() as logs:
        sink, handle = bench.submit(max_tokens=5)
        await sink.end()
    (line,) = [entry for entry in logs if entry["event"] == "request_finished"]
    assert line["request_id"] == handle.request_id
    assert (line["outcome"], line["output_tokens"], line["attempts"], line["decode"]) == ("length", 5, 1, "decode-0")
    assert 0 < line["ttft_ms"] <= line["duration_ms"]
    assert line["tpot_ms"] > 0
    assert line["exposed_handoff_ms"] == 0
    phases = [line[name] for name in ("route_ms", "queue_ms", "prefill_ms", "stream_ms")]
    assert sum(phases) == pytest.approx(line["duration_ms"], abs=0.01)
    assert (line["pull_ms"], line["first_step_ms"]) == (None, None)
    assert bench.registry.get_sample_value("baton_requests_total", {"outcome": "length"}) == 1
    of_class = {"model": "m", "class": "interactive"}
    assert bench.registry.get_sample_value("baton_output_tokens_total", of_class) == 5
    assert bench.registry.get_sample_value("baton_gen_ai_server_time_to_first_token_seconds_count", of_class) == 1
    assert bench.registry.get_sample_value("baton_inter_token_seconds_count", of_class) == 4
    assert bench.registry.get_sample_value("baton_tokens_per_event_sum", of_class) == 5
    assert bench.registry.get_sample_value("baton_inflight_requests") == 0
    assert bench.registry.get_sample_value("baton_fallback_placements_total") == 1


async def test_trace_crosses_the_router_and_the_workers() -> None:
    exporter = InMemorySpanExporter()
    telemetry = configure_telemetry("frontend", "0", "frontend-0", "f" * 16, sample_ratio=1.0, exporter=exporter)
    async with running_bench(tracer=telemetry.tracer) as bench:
        decode = await FakeWorker("decode-0", "d0").open()
        router = await FakeRouter("router-0", lambda query: placed_on(query.query_id, decode)).open()
        await bench.ready(decode, router)
        parent = telemetry.tracer.start_span("POST /v1/chat/completions")
        sink = RecordingSink()
        generation = Generation(model="m", prompt_token_ids=PROMPT, max_tokens=3)
        bench.manager.submit(generation, sink, trace.set_span_in_context(parent))
        await sink.end()
        parent.end()
        await telemetry.close()
        spans = {span.name: span for span in exporter.get_finished_spans()}
        _check_trace(spans, router.queries[0], decode.starts[0])
        await decode.close()
        await router.close()


def _check_trace(spans: dict[str, ReadableSpan], query: router_pb2.Query, start: worker_pb2.Start) -> None:
    server, chat, select = spans["POST /v1/chat/completions"], spans["chat m"], spans["router.select"]
    assert chat.parent is not None
    assert select.parent is not None
    assert chat.parent.span_id == server.context.span_id
    assert select.parent.span_id == chat.context.span_id
    assert query.traceparent.split("-")[2] == f"{select.context.span_id:016x}"
    assert start.traceparent.split("-")[2] == f"{chat.context.span_id:016x}"
    assert [event.name for event in chat.events] == ["first_token"]
    assert chat.attributes is not None
    assert chat.attributes["gen_ai.usage.output_tokens"] == 3
    assert chat.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert chat.attributes["baton.decode.instance_id"] == "decode-0"


async def test_tokens_that_came_together_are_one_event_without_gaps(bench: Bench, worker: FakeWorker) -> None:
    worker.merge_every = 4
    sink, _ = bench.submit(max_tokens=9, interactive=False)
    await sink.end()
    of_class = {"model": "m", "class": "batch"}
    value = bench.registry.get_sample_value
    assert value("baton_tokens_per_event_sum", of_class) == 9
    assert value("baton_inter_token_seconds_count", of_class) == 8
    num_events = value("baton_tokens_per_event_count", of_class)
    assert num_events is not None
    assert num_events < 9
    at_once = value("baton_inter_token_seconds_bucket", {**of_class, "le": "0.0001"})
    assert at_once is not None
    assert at_once >= 9 - num_events
