"""Law 6: one trace over all five services, no parent missing."""

from pathlib import Path

import pytest
from clients import stream
from cluster import cluster, until
from otlp import OtlpReceiver, Span

SERVICES = {"baton-frontend", "baton-router", "baton-prefill", "baton-decode", "baton-kvtransfer"}
PHASES = {"router.select", "prefill.queue", "prefill.execute", "kv.begin", "kv.pull", "kv.confirm", "decode.queue", "decode.generate"}
OF_THE_CALL = {"POST /v1/completions", "text_completion test-model"}  # end last, and come in a later batch
TRACE_ID, CLIENT_SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.timeout(60)
async def test_one_trace_id_over_all_five_services_and_every_parent_present(tmp_path: Path) -> None:
    with OtlpReceiver() as receiver:
        async with cluster(tmp_path, otlp=receiver.address) as house:
            house.http.headers["traceparent"] = f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01"
            await stream(house.http, house.url, model="test-model", prompt=list(range(10, 60)), max_tokens=4)

            async def complete() -> list[Span] | None:
                spans = receiver.trace(TRACE_ID)
                return spans if {s.service for s in spans} >= SERVICES and {s.name for s in spans} >= PHASES | OF_THE_CALL else None

            try:
                spans = await until("a span of every service and phase", complete, 15)
            except AssertionError:
                raise AssertionError(sorted((s.service, s.name) for s in receiver.trace(TRACE_ID))) from None
    known = {span.span_id for span in spans} | {CLIENT_SPAN_ID}
    assert [span for span in spans if span.parent_id not in known] == []
    request = next(span for span in spans if span.name == "text_completion test-model")
    phases = [request.attributes[f"baton.budget.{name}_ms"] for name in ("route", "prefill", "pull", "first_step", "stream")]
    assert all(value >= 0 for value in phases), phases
    assert sum(phases) > 0
    pull = next(span for span in spans if span.name == "kv.pull")
    assert int(pull.attributes["baton.bytes"]) > 0
    assert pull.attributes["baton.transport"] == "shm"
