"""One result out of what a run on a GPU wrote: a JSON file without paths and logs, and a table of it for people.

python bench/gpu/table.py DIR RESULT.json --date YYYY-MM-DD      # DIR: some of check.json, figures.json, serve.json; writes RESULT.txt too
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

_CARD = ("card", "card_gib", "cuda", "torch", "transformers", "cpu", "num_cpus", "kernel", "python", "model")


def merge(folder: Path, date: str) -> dict[str, Any]:
    """Of all files: what was measured on, how each part ended, results, failures (their last line)."""
    whole: dict[str, Any] = {"date": date, "about": {}, "parts": {}, "results": {}, "failures": {}}
    if (folder / "check.json").is_file():
        whole["parts"] = {name: _ended(part) for name, part in json.loads((folder / "check.json").read_text()).items()}
    for name in ("figures.json", "serve.json"):
        if (folder / name).is_file():
            part = json.loads((folder / name).read_text())
            whole["about"] |= {key: part["about"][key] for key in _CARD if key in part["about"]}
            for key, value in part["results"].items():
                if isinstance(value, dict):  # a string is a path
                    whole["results"][key] = whole["results"].get(key, {}) | value
            whole["failures"] |= {key: text.strip().splitlines()[-1] for key, text in part["failures"].items()}
    return whole


def _ended(part: dict[str, Any]) -> dict[str, Any]:
    """How a part ended, and pytest's own last line where it was pytest."""
    told = re.findall(r"^(?:\d+ (?:passed|failed)|no tests ran|ERROR: ).*", part.get("tail", ""), re.MULTILINE)
    return {key: part[key] for key in ("result", "seconds", "why") if key in part} | ({"pytest": told[-1]} if told else {})


def table(whole: dict[str, Any]) -> str:
    """Everything in it, copies side by side."""
    about, results = whole["about"], whole["results"]
    lines = [
        f"{whole['date']}  {about['card']}, {about['card_gib']} GiB, CUDA {about['cuda']}, torch {about['torch']}, transformers "
        f"{about['transformers']}",
        f"{about['num_cpus']} x {about['cpu']}, kernel {about['kernel']}, Python {about['python']}",
        "model: " + ", ".join(f"{key} {value}" for key, value in about["model"].items()) + ", random, bf16",
        "",
    ]
    for name, part in whole["parts"].items():
        lines.append(f"{part['result']} {name}: " + ", ".join(_flat({key: one for key, one in part.items() if key != "result"})))
    if whole["parts"]:
        lines.append("")
    copies = {name.split()[2]: value for name, value in results.items() if name.startswith("copies of ")}
    if copies:
        lines += ["Copies of KV blocks, GB/s (share of one plain copy of the same bytes), by KiB of a block", ""]
        lines.append(f"{'':<34}" + "".join(f"{kib:>15}" for kib in copies))
        for case in next(iter(copies.values()))["gb_per_s"]:
            cells = []
            for value in copies.values():
                share = value["ratio_to_plain"].get(case)
                cells.append(f"{value['gb_per_s'][case]:>8.2f} " + (f"({share:.2f})" if share is not None else " " * 6))
            lines.append(f"{case:<34}" + "".join(cells).rstrip())
        lines.append("")
    for name, value in results.items():
        if not name.startswith("copies of "):
            lines.append(name)
            lines += [f"    {line}" for line in _flat(value)]
    lines += [f"FAILED {name}: {text}" for name, text in whole["failures"].items()]
    return "\n".join(lines) + "\n"


def _flat(value: dict[str, Any]) -> list[str]:
    plain = [f"{key} {_short(one)}" for key, one in value.items() if not isinstance(one, dict)]
    nested = [f"{key}: " + ", ".join(_flat(one)) for key, one in value.items() if isinstance(one, dict)]
    return ([", ".join(plain)] if plain else []) + nested


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--date", required=True)
    options = parser.parse_args()
    whole = merge(options.folder, options.date)
    options.result.write_text(json.dumps(whole, separators=(",", ":")) + "\n")
    options.result.with_suffix(".txt").write_text(table(whole))


if __name__ == "__main__":
    main()
