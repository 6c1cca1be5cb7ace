"""Draws what bench/stream_beside_peer.py measured, ours beside the peer's: one picture from the newest results.

python bench/plot_stream.py [--results bench/results] [--out FILE.svg]
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
Row = dict[str, Any]
SIDES = {"baton": "tab:blue", "peer": "tab:orange"}


def _bars(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float | None], title: str) -> None:
    names = list(dict.fromkeys(row["case"] for row in rows))
    for index, (side, colour) in enumerate(SIDES.items()):
        found = {row["case"]: value(row) for row in rows if row["side"] == side}
        bars = axes.bar([place + (index - 0.5) * 0.4 for place in range(len(names))], [found.get(name) or 0 for name in names], 0.38)
        for bar in bars:
            bar.set_color(colour)
        axes.bar_label(bars, [_short(found[name]) if found.get(name) else "" for name in names], fontsize=6)
    axes.set_xticks(range(len(names)), names, fontsize=6, rotation=20)
    axes.set_title(title)


def _short(value: float | None) -> str:
    return f"{value:,.0f}" if value is not None and value >= 100 else f"{value:.3g}"


def draw(record: Row, out: Path) -> None:
    """Four panels: rates, CPU, requests without streaming, gaps."""
    rows = record["results"]
    streams = [row for row in rows if row["case"].startswith("stream-")]
    paced = [row for row in rows if row["case"].startswith("paced-")]
    short = [row for row in rows if row["case"].startswith("short-")]
    figure, grid = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    _bars(grid[0, 0], streams, lambda row: row["tokens_per_s"], "instant engine: tokens/s by connections")
    _bars(grid[0, 1], [*streams, *paced], lambda row: row["frontend_cpu_us_per_token"], "frontend CPU per token, us")
    _bars(grid[1, 0], short, lambda row: row["requests_per_s"], "one token, not streamed: requests/s by connections")
    _bars(grid[1, 1], paced, lambda row: row["gap_ms"].get("p99"), "1,024 streams at so many tokens/s: p99 gap, ms")
    for side, colour in SIDES.items():
        grid[0, 0].bar([0], [0], color=colour, label=side)
    grid[0, 0].legend(frameon=False)
    figure.suptitle(f"the frontend beside the peer's, {record['machine']['num_cpus']} CPUs, {record['date']}")
    figure.savefig(out, metadata={"Date": None})


def main() -> int:
    """Exit code 1 if there is nothing to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--out", type=Path, help="an .svg file; else stream-beside-peer.svg beside the results")
    options = parser.parse_args()
    files = sorted(options.results.glob("stream-beside-peer-2*.json"))
    if not files:
        print(f"{options.results}: no results of stream_beside_peer.py; run `make bench-stream` first", file=sys.stderr)
        return 1
    out = options.out or options.results / "stream-beside-peer.svg"
    draw(json.loads(files[-1].read_text()), out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
