"""A whole Baton on one GPU, prefill and decode as processes of their own: time to the first token, and the rate of handoffs.

    python bench/gpu/serve.py --out DIR [--device cuda] [--small] [--transports shm,tcp]

A random model of 1.2 billion parameters in bf16 (its vocabulary is the tokenizer's). Every prompt is new, so nothing is a prefix hit.
Time to first token: from the request to its first event, one request at a time. Handoffs: many requests of one token at a time; bytes
and the rate of pulls are what decode's own metrics say.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "faults")]

from clients import Answer, received, stream  # noqa: E402
from cluster import Cluster, cluster  # noqa: E402
from common import LARGE, SMALL, Findings, device_facts, make_model, median  # noqa: E402

VOCABULARY = range(10, 250)


async def first_token_s(house: Cluster, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first and to the last of 8 tokens."""
    answer, started = Answer(), time.perf_counter()
    body = {"model": "test-model", "prompt": prompt, "max_tokens": 8, "min_tokens": 8, "ignore_eos": True, "temperature": 0}
    task = asyncio.create_task(stream(house.http, house.url, answer, **body))
    await received(answer, 1, limit_s=60.0)
    first = time.perf_counter() - started
    await task
    return first, time.perf_counter() - started


def pulls(samples: dict[str, float], transport: str) -> dict[str, float]:
    """What decode's metrics say of pulled bytes."""
    name = "baton_handoff_pull_gigabytes_per_second"
    count, total = (samples.get(f'{name}_{part}{{transport="{transport}"}}', 0.0) for part in ("count", "sum"))
    handoffs = sum(v for k, v in samples.items() if k.startswith("baton_handoffs_total{") and 'outcome="confirmed"' in k)
    return {"bytes": samples.get("baton_handoff_bytes_total", 0.0), "handoffs": handoffs, "pulls": count, "pull_rate_sum": total}


async def measure(findings: Findings, transport: str, model: Path, folder: Path, environment: dict[str, str], lengths: list[int]) -> None:
    """One Baton over one transport."""
    source = random.Random(7)
    began = time.monotonic()
    settings = {f"BATON_{service}_TRANSPORTS": transport for service in ("PREFILL", "DECODE")}
    async with cluster(folder, engine="torch", model=model, environment=environment | settings) as house:
        results: dict[str, Any] = {"start_s": round(time.monotonic() - began, 1)}
        for _ in range(3):  # kernels are loaded at first use
            for length in lengths:
                await first_token_s(house, source.choices(VOCABULARY, k=length))
        for length in lengths:
            times = [await first_token_s(house, source.choices(VOCABULARY, k=length)) for _ in range(7)]
            results[f"prompt {length}"] = {
                "first_token_s": median([first for first, _ in times]),
                "best_s": min(first for first, _ in times),
                "token_gap_s": median([(last - first) / 7 for first, last in times]),
            }
        findings.run(f"first token over {transport}", lambda: dict(results))
        before = pulls(await house.metrics("decode-0"), transport)
        length, started = lengths[-2], time.perf_counter()
        body = {"model": "test-model", "max_tokens": 1, "temperature": 0}
        requests = (stream(house.http, house.url, prompt=source.choices(VOCABULARY, k=length), **body) for _ in range(48))
        answers = await asyncio.wait_for(asyncio.gather(*requests), 90)
        seconds = time.perf_counter() - started
        assert all(len(answer.token_ids) == 1 for answer in answers)
        after = pulls(await house.metrics("decode-0"), transport)
        num = {name: after[name] - before[name] for name in after}
        rates = {
            "prompts": f"48 of {length} tokens",
            "seconds": round(seconds, 3),
            "handoffs": num["handoffs"],
            "handoffs_per_s": round(num["handoffs"] / seconds, 2),
            "prompt_tokens_per_s": round(48 * length / seconds),
            "kv_gb_per_s_end_to_end": round(num["bytes"] / 1e9 / seconds, 3),
            "pull_gb_per_s_mean": round(num["pull_rate_sum"] / num["pulls"], 3) if num["pulls"] else None,
        }
        await house.settled()
        findings.run(f"handoffs over {transport}", lambda: rates)


def raised(error: BaseException) -> Callable[[], object]:
    """For Findings.run: what failed on the way."""

    def run() -> object:
        raise error

    return run


def main() -> int:
    """Each transport on its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/baton-gpu"), help="folder for the model and logs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script without a GPU")
    parser.add_argument("--transports", default="shm,tcp")
    options = parser.parse_args()
    shape = SMALL if options.small else LARGE
    findings = Findings(options.out / "serve.json", device=options.device, model=shape, **device_facts(options.device))
    shm_bytes, pool_bytes = shutil.disk_usage("/dev/shm").free, 16 << 20 if options.small else 1 << 30
    environment = {"BATON_DECODE_FETCH_MIN_TOKENS": "0"}
    for service in ("PREFILL", "DECODE"):
        environment |= {f"BATON_{service}_DEVICE": options.device, f"BATON_{service}_KV_MEMORY_BYTES": str(pool_bytes)}
    lengths = [32, 128, 200] if options.small else [128, 2048, 8192]
    folder = options.work / "serve"
    findings.run("model", lambda: str(make_model(folder, options.device, "bfloat16", shape)))
    findings.run("memory", lambda: {"shm_free_bytes": shm_bytes, "pool_bytes": pool_bytes})
    for transport in options.transports.split(","):
        logs = options.work / f"logs-{transport}"
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        try:
            asyncio.run(asyncio.wait_for(measure(findings, transport, folder, logs, environment, lengths), 150))
        except Exception as error:
            findings.run(f"Baton over {transport}", raised(error))
        tails = {path.name: path.read_text(errors="replace")[-6000:] for path in sorted(logs.glob("logs/*.log"))}
        (options.out / f"serve-{transport}-logs.json").write_text(json.dumps(tails, indent=1))
    return 1 if findings.failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
