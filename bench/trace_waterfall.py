"""Draws one real trace as a waterfall: what Jaeger shows of it, for docs/trace-waterfall.md.

    python bench/trace_waterfall.py [--prompt-tokens 3000] [--chunk-tokens 512] [--tokens 12] [--out docs/trace-waterfall.svg]

Five services as processes (sim engine, profile `polynomial`) send their spans over OTLP to a receiver in this process; one request with a
sampled `traceparent` is asked. Bars lie where the spans' own times say: all processes share this machine's clock. The lowest row is the
latency budget, which is made of durations only.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from clients import stream  # noqa: E402
from cluster import cluster, roomy_model, until  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from otlp import OtlpReceiver, Span  # noqa: E402

mpl.rcParams.update({"svg.hashsalt": "baton", "svg.fonttype": "none", "font.size": 8})
TRACE_ID, CLIENT_SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ALL = {
    *("POST /v1/completions", "text_completion test-model", "router.select", "prefill.queue", "prefill.execute"),
    *("kv.begin", "kv.pull", "kv.confirm", "books.handoff", "decode.queue", "decode.generate"),
}
COLOURS = {
    "baton-frontend": "#4c72b0",
    "baton-router": "#8172b3",
    "baton-prefill": "#dd8452",
    "baton-decode": "#55a868",
    "baton-kvtransfer": "#937860",
}
PHASES = {
    "prepare": "#b0b0b0",
    "route": "#8172b3",
    "queue": "#cccccc",
    "prefill": "#dd8452",
    "pull": "#c44e52",
    "first_step": "#55a868",
    "stream": "#4c72b0",
}


async def record(prompt_tokens: int, chunk_tokens: int, tokens: int) -> list[Span]:
    """The spans of one request, complete: parents before children, then by time."""
    with tempfile.TemporaryDirectory(prefix="baton-trace-") as name, OtlpReceiver() as receiver:
        folder = Path(name)
        environment = {"BATON_PREFILL_MAX_CHUNK_TOKENS": str(chunk_tokens), "BATON_DECODE_CAN_PREFILL": "false"}
        made = cluster(
            folder / "run", otlp=receiver.address, profile="polynomial", model=roomy_model(folder / "model"), environment=environment
        )
        async with made as house:
            body = {"model": "test-model", "max_tokens": tokens, "ignore_eos": True}
            # The first handoff of a pair pays for its introduction: not what is to be shown.
            await stream(house.http, house.url, prompt=list(range(10, 60)), **body)
            house.http.headers["traceparent"] = f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01"
            await stream(house.http, house.url, prompt=[10 + number % 50 for number in range(prompt_tokens)], **body)

            async def complete() -> list[Span] | None:
                spans = receiver.trace(TRACE_ID)
                return spans if {span.name for span in spans} >= ALL else None

            return ordered(await until("the spans of every phase", complete, 15))


def ordered(spans: list[Span]) -> list[Span]:
    """Depth first: a child lies below its parent."""
    children: dict[str, list[Span]] = {}
    known = {span.span_id for span in spans}
    for span in sorted(spans, key=lambda span: span.start_s):
        children.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)

    def below(parent: str) -> list[Span]:
        return [found for span in children.get(parent, []) for found in (span, *below(span.span_id))]

    return below("")


def depth(span: Span, by_id: dict[str, Span]) -> int:
    """0 for the outermost span of ours."""
    return 1 + depth(by_id[span.parent_id], by_id) if span.parent_id in by_id else 0


def note(span: Span) -> str:
    """What an operator would look for in it."""
    a = span.attributes
    said = f"{(span.end_s - span.start_s) * 1e3:,.1f} ms"
    if "baton.chunks" in a:
        said += f", {a['baton.chunks']} chunks"
    if "baton.bytes" in a:
        said += f", {int(a['baton.bytes']) / 2**20:,.1f} MiB by {a.get('baton.transport', '?')}"
    return said


def draw(spans: list[Span], title: str, out: Path) -> None:
    """One bar per span with its events as strokes; the latency budget below."""
    by_id = {span.span_id: span for span in spans}
    began = min(span.start_s for span in spans)
    whole_ms = (max(span.end_s for span in spans) - began) * 1e3
    figure, axes = plt.subplots(figsize=(11, 0.26 * (len(spans) + 3)))
    for row, span in enumerate(spans):
        start_ms, length_ms = (span.start_s - began) * 1e3, (span.end_s - span.start_s) * 1e3
        axes.barh(row, max(length_ms, whole_ms / 800), left=start_ms, height=0.7, color=COLOURS.get(span.service, "grey"))
        is_late = start_ms + length_ms > whole_ms * 0.8
        for _, at_s in span.events:
            axes.plot([(at_s - began) * 1e3] * 2, [row - 0.35, row + 0.35], color="black", linewidth=0.8)
        axes.annotate(
            note(span),
            (start_ms + length_ms, row),
            xytext=(-3 if is_late else 3, 0),
            textcoords="offset points",
            ha="right" if is_late else "left",
            va="center",
            fontsize=7,
            color="white" if is_late else "black",
        )
    budget = next(span.attributes for span in spans if "baton.budget.stream_ms" in span.attributes)
    prepare_ms = next(
        (float(span.attributes["baton.budget.prepare_ms"]) for span in spans if "baton.budget.prepare_ms" in span.attributes), 0.0
    )
    at = 0.0
    for phase, colour in PHASES.items():
        length_ms = prepare_ms if phase == "prepare" else float(budget.get(f"baton.budget.{phase}_ms", 0.0))
        axes.barh(len(spans) + 0.5, length_ms, left=at, height=0.8, color=colour)
        if length_ms > whole_ms * 0.06:
            axes.text(
                at + length_ms / 2, len(spans) + 0.5, f"{phase} {length_ms:,.1f}", ha="center", va="center", fontsize=6.5, color="white"
            )
        at += length_ms
    labels = ["  " * depth(span, by_id) + f"{span.service.removeprefix('baton-')}: {span.name}" for span in spans]
    axes.set_yticks([*range(len(spans)), len(spans) + 0.5], [*labels, "latency budget"])
    for label in axes.get_yticklabels():
        label.set_horizontalalignment("left")
    axes.tick_params(axis="y", pad=215, length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, whole_ms * 1.02)
    axes.set_xlabel("ms since the head of the call was read")
    axes.set_title(title, loc="left", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=3000)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=12, help="of the answer")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "trace-waterfall.svg")
    given = parser.parse_args()
    found = asyncio.run(record(given.prompt_tokens, given.chunk_tokens, given.tokens))
    draw(found, f"A prompt of {given.prompt_tokens:,} tokens in chunks of {given.chunk_tokens}, {given.tokens} tokens of answer", given.out)
    for one in found:
        print(f"{one.service:<18} {one.name:<32} {note(one)}")
    print(given.out)
