"""A report of `baton bench stream` for people: a table, and a picture."""

import importlib.util
from pathlib import Path
from typing import Any

from click import ClickException

from baton_cli.bench.figures import Durations, Figures
from baton_cli.bench.stream import Report

_BAR = 40


def progress(seconds: float, figures: Figures) -> str:
    """One line while it runs."""
    wrong = figures.ended - figures.complete - figures.refused_s.count
    return (
        f"{seconds:6.1f} s  {figures.started - figures.ended:6d} open  {figures.complete:8d} complete  "
        f"{figures.refused_s.count:6d} refused  {wrong:4d} wrong  {figures.tokens / max(seconds, 1e-9):10,.0f} tokens/s"
    )


def text(report: Report) -> str:
    """Figures, a histogram, and what went wrong."""
    found = report.as_json()
    kind = "streams" if report.options.is_stream else "requests"
    lines = [
        f"{found['requests_per_s']:,} {kind}/s, {found['tokens_per_s']:,.0f} tokens/s over {found['load_s']:.1f} s with "
        f"{found['connections']:,} connections ({found['most_open']:,} open at most), {found['processes']} client processes",
        "ends: " + (", ".join(f"{count:,} {end}" for end, count in report.figures.ends.most_common()) or "none"),
        f"checked: {report.check}",
    ]
    if found["tokens_per_event"]:
        share = f"{found['events_in_one_read']:.1%} of the events came in one read with the one before"
        lines.append(f"tokens per event: {found['tokens_per_event']}; {share}")
    lines.append("")
    lines.append(f"{'ms':<16}{'p50':>10}{'p90':>10}{'p99':>10}{'p99.9':>10}{'max':>10}{'count':>12}")
    rows = (("first text", "first_text_ms"), ("gap", "gap_ms"), ("whole answer", "whole_answer_ms"), ("refusal (429)", "refused_ms"))
    for name, key in rows:
        if quantiles := found[key]:
            cells = "".join(f"{quantiles[share]:>10.2f}" for share in ("p50", "p90", "p99", "p99.9", "max"))
            lines.append(f"{name:<16}{cells}{quantiles['count']:>12,}")
    for server in found["servers"]:
        lines += ["", _server(server)]
    for name, durations in (("first text", report.figures.first_s), ("gap", report.figures.gap_s)):
        if durations.count:
            lines += ["", f"{name}, ms", *_histogram(durations)]
    if report.figures.without_usage and report.options.is_stream:
        lines.append(f"{report.figures.without_usage:,} answers did not say how many tokens they have: counted as --max-tokens")
    if report.figures.reconnects:
        lines.append(
            f"{report.figures.reconnects:,} requests were sent again: their kept connection ended before the first byte of the answer"
        )
    if report.figures.problems:
        lines += ["", "problems:", *(f"  {problem}" for problem in report.figures.problems)]
    return "\n".join(lines)


def _server(server: dict[str, Any]) -> str:
    per = [
        f"{server[key]:g} us of CPU per {what}"
        for key, what in (("cpu_us_per_token", "token"), ("cpu_us_per_request", "request"))
        if server[key]
    ]
    memory = f"{server['rss_mib_before']:g} -> {server['rss_mib_most']:g} MiB ({server['kib_per_stream'] or 0:g} KiB per open stream)"
    return f"{server['name']}: {server['cpu_share']:.0%} of a processor, {', '.join(per)}; {memory}"


def _histogram(durations: Durations) -> list[str]:
    """By factors of two."""
    rows: dict[int, int] = {}
    for seconds, count in durations.steps():
        bucket = max(0, int(seconds * 1e3).bit_length())  # 0: below 1 ms
        rows[bucket] = rows.get(bucket, 0) + count
    most = max(rows.values())
    lines = []
    for bucket in range(min(rows), max(rows) + 1):
        count = rows.get(bucket, 0)
        label = "< 1" if bucket == 0 else f"{1 << (bucket - 1)} - {1 << bucket}"
        lines.append(f"{label:>15} {'#' * round(_BAR * count / most):<{_BAR}} {count:,}")
    return lines


def check_plot(path: Path) -> None:
    """Whether a plot can be drawn there. Raises: ClickException."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ClickException(f"--plot {path}: must end in .svg, .png or .pdf")
    if not path.resolve().parent.is_dir():
        raise ClickException(f"--plot {path}: there is no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise ClickException("--plot needs matplotlib: pip install 'baton-cli[plot]'")


def plot(report: Report, path: Path) -> None:
    """Shares of first texts and gaps that took no longer than so many ms. Call `check_plot` before the load."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, name, durations in ((axes[0], "first text", report.figures.first_s), (axes[1], "gap between events", report.figures.gap_s)):
        at, share, total = [], [], 0
        for seconds, count in durations.steps():
            total += count
            at.append(seconds * 1e3)
            share.append(total / durations.count)
        if at:
            axis.step(at, share, where="post")
            axis.set_xscale("log")
        for quantile in (0.5, 0.99):
            axis.axhline(quantile, color="grey", linewidth=0.5, linestyle="--")
        axis.set_ylim(0, 1.01)
        axis.set_title(f"{name} ({durations.count:,})")
        axis.set_xlabel("ms")
        axis.grid(visible=True, which="both", linewidth=0.2)
    axes[0].set_ylabel("share of all")
    figure.suptitle(f"{report.options.connections:,} connections, {report.figures.tokens / report.load_s:,.0f} tokens/s", fontsize=10)
    figure.savefig(path)
