"""Draws what the handoff's benchmarks measured: one picture from the newest results of each.

    python bench/plot_handoff.py [--results bench/results] [--out FILE.svg]

Four panels: speed of the transports against what each is compared with, the time a handoff keeps a request waiting, what one
kvtransfer keeps books for, and memory of every process in the soak. A panel whose results are missing is left out.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

mpl.rcParams.update({"svg.hashsalt": "baton", "font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
MIN_LIFE_S = 600  # as in tests/load/soak_watch.py: lives that are judged
Record = dict[str, Any]


class NothingToDraw(Exception):
    """The results are of another form, or too short for this panel."""


def speed(axes: Axes, record: Record) -> None:
    """Ratio of each transport to its baseline, by block size, and what was aimed at."""
    rows = [row for row in record["results"] if row["order"] == "scattered" and row.get("target")]
    if not rows:
        raise NothingToDraw
    names = list(dict.fromkeys(row["case"] for row in rows))
    sizes = sorted({row["block_kib"] for row in rows})
    width = 0.8 / len(sizes)
    for index, size in enumerate(sizes):
        found = {row["case"]: row for row in rows if row["block_kib"] == size}
        at = [place + (index - (len(sizes) - 1) / 2) * width for place in range(len(names))]
        axes.bar(at, [found[name]["ratio_to_baseline"] for name in names], width * 0.9, label=f"{size} KiB")
        for place, name in zip(at, names, strict=True):
            axes.hlines(found[name]["target"], place - width / 2, place + width / 2, colors="black", linewidth=1)
    baselines = {row["case"]: row["baseline"] for row in rows}
    axes.set_xticks(range(len(names)), [f"{name}\nto {_short(baselines[name])}" for name in names])
    axes.set_title(f"{record['num_blocks']:,} scattered blocks: ratio to its baseline (line: target), {record['date']}")
    axes.legend(frameon=False, ncols=len(sizes))


def latency(axes: Axes, record: Record) -> None:
    """p50 and p99 of the two times a handoff is judged by."""
    labels, values = [], []
    for result in record["results"]:
        for case in result["cases"]:
            if case["case"] == "one block":
                labels.append(f"{result['transport']}: announce\nto confirm, one block")
                values.append(case["announce_to_confirm_ms"])
            elif case["case"] == "one by one":
                labels.append(f"{result['transport']}: exposed\nminus link")
                values.append(case["exposed_minus_link_ms"])
    places = range(len(labels))
    axes.bar([place - 0.2 for place in places], [p50 for p50, _ in values], 0.38, label="p50")
    axes.bar([place + 0.2 for place in places], [p99 for _, p99 in values], 0.38, label="p99")
    axes.axhline(3.0, color="black", linewidth=1, linestyle="--", label="target of p99 of exposed minus link")
    axes.set_xticks(places, labels, fontsize=6)
    axes.set_ylabel("ms")
    axes.set_title(f"how long a handoff keeps a request waiting, {record['date']}")
    axes.legend(frameon=False)


def books(axes: Axes, record: Record) -> None:
    """Latency over rate."""
    rates = record["rates"]
    axes.plot([rate["handoffs_per_s"] for rate in rates], [rate["p50_ms"] for rate in rates], "o-", label="p50")
    axes.plot([rate["handoffs_per_s"] for rate in rates], [rate["p99_ms"] for rate in rates], "o-", label="p99")
    axes.axhline(20.0, color="black", linewidth=1, linestyle="--", label="limit of p99 at 5,000/s")
    axes.axvline(5000.0, color="black", linewidth=1, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"handoffs per second, {record['in_flight']} in flight, one kvtransfer on one core")
    axes.set_ylabel("event to echo, ms")
    axes.set_title("books")
    axes.legend(frameon=False)


def memory(axes: Axes, record: Record) -> None:
    """Resident memory of the processes that lived for long."""
    lives = [life for life in record["memory"] if life["lived_s"] >= MIN_LIFE_S]
    if not lives:
        raise NothingToDraw
    for life in lives:
        times, sizes, _ = zip(*life["course"], strict=True)
        axes.plot(times, sizes, label=f"{life['name']} ({life['growth']:+.1%})", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("s")
    axes.set_ylabel("resident MiB")
    axes.set_title(f"soak: {record['handoffs']:,} handoffs, {sum(record['faults'].values())} faults")
    axes.legend(frameon=False, ncols=2, fontsize=6)


PANELS: dict[str, Callable[[Axes, Record], None]] = {
    "handoff-transports": speed,
    "handoff-latency": latency,
    "books-throughput": books,
    "soak": memory,
}


def newest(folder: Path, kind: str) -> Record | None:
    """The newest results of that kind that can be drawn; names carry the date."""
    for file in sorted(folder.glob(f"{kind}-2*.json"), reverse=True):
        record = json.loads(file.read_text())
        try:
            PANELS[kind](plt.figure().add_subplot(), record)
        except NothingToDraw:
            continue
        finally:
            plt.close()
        return record
    return None


def draw(records: Sequence[tuple[str, Record]], out: Path) -> None:
    """One picture."""
    figure, grid = plt.subplots(len(records), 1, figsize=(8.5, 2.9 * len(records)), squeeze=False, layout="constrained")
    for axes, (kind, record) in zip(grid[:, 0], records, strict=True):
        PANELS[kind](axes, record)
    figure.savefig(out, metadata={"Date": None})


def _short(baseline: str) -> str:
    return "nixl by hand" if baseline.endswith("by hand") else f"{baseline}, paged" if baseline == "memcpy" else baseline


def main() -> int:
    """Exit code 1 if there is nothing to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--out", type=Path, help="an .svg file; else handoff.svg beside the results")
    options = parser.parse_args()
    records = [(kind, record) for kind in PANELS if (record := newest(options.results, kind)) is not None]
    if not records:
        print(f"{options.results}: no results of {', '.join(PANELS)}; run `make bench-handoff` first", file=sys.stderr)
        return 1
    out = options.out or options.results / "handoff.svg"
    draw(records, out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
