"""What a handoff shows: every documented metric with a sane value, every span with its figures, and no label of a peer that is gone."""

import re
from pathlib import Path

import pytest
from clients import stream
from cluster import Cluster, cluster, until
from otlp import OtlpReceiver, Span

pytestmark = pytest.mark.timeout(90)
TRACE_ID, CLIENT_SPAN_ID = "0af7651916cd43dd8448eb211c80319d", "b7ad6b716920333a"
HANDOFFS, TOKENS = 3, 640
PAGE = Path(__file__).parents[2] / "docs" / "handoff-metrics.md"
HANDOFF_METRICS = re.compile(r"^# TYPE (baton_(?:handoff|kv|fetch|books)\w*) \w+$", re.MULTILINE)


async def metric_names(house: Cluster, name: str) -> set[str]:
    """Names of what a worker tells of handoffs, as documented: without the endings of histograms and creation times."""
    async with house.http.get(f"http://{house.instance(name).metrics_address}/metrics") as response:
        names = HANDOFF_METRICS.findall(await response.text())
    return {found for found in names if not found.endswith("_created")}


async def test_metrics_are_documented_and_tell_what_happened(tmp_path: Path) -> None:
    async with cluster(tmp_path) as house:
        for number in range(HANDOFFS):
            await house.complete(prompt=[10 + number, *range(20, 20 + TOKENS // 4)] * 4, max_tokens=2)
        await house.settled()
        page = PAGE.read_text()
        for worker in ("prefill-0", "decode-0"):
            missing = {name for name in await metric_names(house, worker) if name not in page}
            assert not missing
        sink, source = await house.metrics("decode-0"), await house.metrics("prefill-0")
        for side, role in ((sink, "sink"), (source, "source")):
            assert side[f'baton_handoffs_total{{outcome="confirmed",role="{role}"}}'] == HANDOFFS
            for gauge in ("stranded", "pinned", "reserved", "quarantined", "in_flight"):
                assert side[f"baton_kv_{gauge}_bytes"] == 0
            for gauge in ("data_loss_total", "s_in_flight", "s_queued", "s_read", "s_held_back"):
                assert side[f"baton_handoff{gauge if gauge[:2] == 's_' else '_' + gauge}"] == 0
        layout = house.instance("decode-0").layout
        num_blocks = HANDOFFS * -(-4 * (TOKENS // 4 + 1) // layout.block_tokens)
        assert sink["baton_handoff_bytes_total"] == num_blocks * layout.block_bytes
        assert sink["baton_handoff_exposed_seconds_count"] == HANDOFFS
        assert 0 < sink["baton_handoff_exposed_seconds_sum"] < HANDOFFS
        link = 'baton_handoff_link_gigabytes_per_second{peer="prefill-0",transport="shm"}'
        assert 0.001 < sink[link] < 1000
        assert sink['baton_handoff_pull_gigabytes_per_second_count{transport="shm"}'] >= HANDOFFS
        assert sink['baton_handoff_messages_total{kind="announce"}'] >= HANDOFFS
        assert source['baton_handoff_messages_total{kind="confirm"}'] >= HANDOFFS
        assert sink["baton_handoff_pull_retries_total"] == 0

        await house.kill("prefill-0")

        async def label_is_gone() -> bool:
            return link not in await house.metrics("decode-0")

        await until("the dead peer's label is gone", label_is_gone, 5)


async def test_spans_say_how_the_bytes_came_and_what_was_exposed(tmp_path: Path) -> None:
    with OtlpReceiver() as receiver:
        async with cluster(tmp_path, otlp=receiver.address) as house:
            house.http.headers["traceparent"] = f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01"
            prompt = list(range(10, 10 + 150)) * 4
            await stream(house.http, house.url, model="test-model", prompt=prompt, max_tokens=4)
            layout = house.instance("decode-0").layout

            async def complete() -> dict[str, Span] | None:
                spans = {span.name: span for span in receiver.trace(TRACE_ID)}
                return spans if {"kv.begin", "kv.pull", "kv.confirm", "text_completion test-model"} <= spans.keys() else None

            spans = await until("all spans of the handoff", complete, 15)
    request = spans["text_completion test-model"]
    begin, pull, confirm = spans["kv.begin"], spans["kv.pull"], spans["kv.confirm"]
    assert {span.parent_id for span in (begin, pull, confirm)} == {request.span_id}
    assert (begin.service, pull.service, confirm.service) == ("baton-prefill", "baton-decode", "baton-decode")
    for span in (begin, pull, confirm):
        assert span.attributes["baton.outcome"] == "confirmed"
        assert span.attributes["baton.request_id"] == request.attributes["baton.request_id"]
        assert "error.type" not in span.attributes
    num_blocks = -(-(len(prompt) - 1) // layout.block_tokens)
    assert begin.attributes["baton.first_block"] == 0
    assert pull.attributes["baton.bytes"] == num_blocks * layout.block_bytes
    assert float(str(pull.attributes["baton.gigabytes_per_second"])) > 0
    assert 1 <= int(str(pull.attributes["baton.operations"])) <= int(str(pull.attributes["baton.copies"])) <= num_blocks
    assert pull.attributes["baton.retries"] == 0
    assert pull.attributes["baton.transport"] == "shm"
    assert "token" in str(pull.attributes["baton.transport_reason"])
    assert 0 < float(str(confirm.attributes["baton.exposed_ms"])) < 5000
    assert 0 < float(str(confirm.attributes["baton.round_trip_ms"])) < 5000
    assert 0 < int(str(confirm.attributes["baton.last_chunk_bytes"])) <= num_blocks * layout.block_bytes
