"""What the figures of bench/stream_beside_peer.py are held against, and the table people read."""

from collections.abc import Callable, Iterator
from typing import Any

Record = dict[str, Any]
Row = dict[str, Any]

PACED = {20: (12.0, None), 40: (12.0, 0.5), 75: (None, 0.85)}  # most us of CPU per token, and share of the peer's
GAP_BEYOND_STEP_MS = 10.0
SHORT_US = {16: 250.0, 128: 200.0}


def verdicts(record: Record) -> list[Row]:
    """Each target with the figure, whether it is met, and the peer's figure; those whose cases were not run are left out."""
    return [*_streams(record), *_paced(record), *_short(record), *_prompts(record)]


def _verdict(name: str, value: float, limit: float, *, at_least: bool = False) -> Row:
    is_met = value >= limit if at_least else value <= limit
    return {"target": name, "value": round(value, 3), "limit": limit, "at_least": at_least, "is_met": is_met}


def _row(record: Record, case: str, side: str) -> Row | None:
    return next((row for row in record["results"] if row["case"] == case and row["side"] == side), None)


def _ratio(record: Record, case: str, value: Callable[[Row], float]) -> float | None:
    """Ours to the peer's."""
    ours, theirs = _row(record, case, "baton"), _row(record, case, "peer")
    return value(ours) / value(theirs) if ours and theirs and value(theirs) else None


def _cpu(row: Row) -> float:
    return float(row["frontend_cpu_us_per_token"])


def _streams(record: Record) -> Iterator[Row]:
    for connections in (32, 256, 1024):
        case = f"stream-{connections}"
        if (ours := _row(record, case, "baton")) is None:
            continue
        yield _verdict(f"{case}: frontend CPU us/token", _cpu(ours), 4.0)
        if (ratio := _ratio(record, case, lambda row: float(row["tokens_per_s"]))) is not None:
            yield _verdict(f"{case}: tokens/s to the peer's", ratio, 3.0, at_least=True)
        if (ratio := _ratio(record, case, _cpu)) is not None:
            yield _verdict(f"{case}: CPU/token to the peer's", ratio, 0.35)


def _paced(record: Record) -> Iterator[Row]:
    for rate, (most_us, most_ratio) in PACED.items():
        case = f"paced-{rate}"
        if (ours := _row(record, case, "baton")) is None:
            continue
        yield _verdict(f"{case}: tokens per event", ours["tokens_per_event"], 1.02)
        yield _verdict(f"{case}: p99 gap ms (step + {GAP_BEYOND_STEP_MS:g})", ours["gap_ms"]["p99"], 1000 / rate + GAP_BEYOND_STEP_MS)
        if most_us is not None:
            yield _verdict(f"{case}: frontend CPU us/token", _cpu(ours), most_us)
        if most_ratio is not None and (ratio := _ratio(record, case, _cpu)) is not None:
            yield _verdict(f"{case}: CPU/token to the peer's", ratio, most_ratio)
        if (features := _row(record, f"{case}-features", "baton")) is not None:
            yield _verdict(f"{case}-features: CPU/token to plain", _cpu(features) / max(_cpu(ours), 1e-9), 2.0)


def _short(record: Record) -> Iterator[Row]:
    for connections, most_us in SHORT_US.items():
        case = f"short-{connections}"
        if (ours := _row(record, case, "baton")) is None:
            continue
        yield _verdict(f"{case}: frontend CPU us/request", ours["frontend_cpu_us_per_request"], most_us)
        if (ratio := _ratio(record, case, lambda row: float(row["requests_per_s"]))) is not None:
            yield _verdict(f"{case}: requests/s to the peer's", ratio, 1.5, at_least=True)
        if (ratio := _ratio(record, case, lambda row: float(row["whole_answer_ms"]["p99"]))) is not None:
            yield _verdict(f"{case}: p99 to the peer's", ratio, 1.0)


def _prompts(record: Record) -> Iterator[Row]:
    if cost := record["prompts"]:
        yield _verdict(f"chat of {cost['chat_tokens']:,} known tokens: tokenized, p50 us", cost["known_chat_us"]["p50"], 300.0)
        yield _verdict("8k prompts: loop stands still, max ms beyond idle", _beyond_idle(cost), 1.0)


def _beyond_idle(cost: Row) -> float:
    """An idle loop stands still too, for as long as the machine's scheduler makes it."""
    return max(0.0, float(cost["loop_gap_ms"]["max"] - cost["loop_gap_idle_ms"]["max"]))


def table(record: Record) -> str:
    """For people."""
    lines = [
        f"{'case':<18} {'side':<6} {'tokens/s':>9} {'req/s':>7} {'front us/tok':>12} {'us/req':>7} {'tok/event':>9} "
        f"{'first p50/p99 ms':>18} {'gap p50/p99 ms':>16} {'whole p50/p99 ms':>18} {'client us/tok':>13} {'busy':>5} {'wrong':>5}"
    ]
    lines += [_line(row) for row in record["results"]]
    for row in record["results"]:
        others = {name: cpu for name, cpu in row["cpu_us_per_token"].items() if not name.startswith("frontend") and name != "client"}
        lines.append(
            f"{row['case']:<18} {row['side']:<6} other CPU us/token: "
            + ", ".join(f"{name} {cpu:.2f}" for name, cpu in others.items())
            + (f"; {row['steady_tokens_per_s']:,.0f} tokens/s while all are open" if row["steady_tokens_per_s"] else "")
            + (f"; GET /health {_pair(row['health_ms'])} max {row['health_ms']['max']:.1f} ms" if row.get("health_ms") else "")
            + (f", without load {_pair(row['health_idle_ms'])} max {row['health_idle_ms']['max']:.1f} ms" if row.get("health_ms") else "")
        )
    for name, values in record["prompts"].items():
        lines.append(
            f"{name:<20} {values if not isinstance(values, dict) else ', '.join(f'{key} {value:g}' for key, value in values.items())}"
        )
    lines.append("")
    for found in record["targets"]:
        sign = ">=" if found["at_least"] else "<="
        lines.append(f"{'met   ' if found['is_met'] else 'MISSED'} {found['target']:<58} {found['value']:>9g} {sign} {found['limit']:g}")
    facts = record["machine"]
    lines.append(
        f"{facts['cpu']}, {facts['num_cpus']} CPUs shared by all processes, load average before {facts['load_average_before']:.1f}, "
        f"peer: {record['peer'] or 'not measured'}, {record['date']}"
    )
    return "\n".join(lines)


def _pair(values: dict[str, float]) -> str:
    return f"{values['p50']:.1f}/{values['p99']:.1f}" if values else "-"


def _line(row: Row) -> str:
    ended = sum(count for name, count in row["requests"].items() if name != "started")
    return (
        f"{row['case']:<18} {row['side']:<6} {row['tokens_per_s']:>9,.0f} {row['requests_per_s']:>7,.0f} {_cpu(row):>12.2f} "
        f"{row['frontend_cpu_us_per_request']:>7.0f} {row['tokens_per_event'] or 0:>9.2f} {_pair(row['first_text_ms']):>18} "
        f"{_pair(row['gap_ms']):>16} {_pair(row['whole_answer_ms']):>18} {row['cpu_us_per_token']['client']:>13.2f} "
        f"{row['machine_busy']:>5.0%} {ended - row['requests'].get('complete', 0):>5}"
    )
