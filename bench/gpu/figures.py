"""Speed of the torch engine on a GPU: prefill, decode, copies of KV blocks, and how often bf16 draws generate()'s tokens.

    python bench/gpu/figures.py --out DIR [--device cuda] [--small]

The model is random, of the shape of a Llama with 1.2 billion parameters, in bf16. Beside each figure stands transformers' own on
the same weights (`generate()` with its DynamicCache, SDPA), so that a ratio is left when the card is another. Times are wall clock from
the first call to the last token on the host; medians of repeats, after a warm-up.
"""

import argparse
import random
import sys
import time
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baton_engine.api import EngineRequest, SamplingParams, SequenceKey, Work
from baton_engine.paged_engine import PagedEngine
from baton_engine.pool import BlockLayout, KvPool
from baton_engine.runner import ChunkItem
from baton_engine.scheduler import SchedulerLimits
from baton_engine.testing import make_random_model
from baton_engine.torch_pool import LEAST_RUN_BYTES, TorchPool
from baton_engine.torch_runner import TorchRunner
from baton_runtime.hashing import cache_root
from common import LARGE, MAX_MODEL_TOKENS, SMALL, Findings, device_facts, make_model, median, timed
from transformers import AutoModelForCausalLM

BLOCK_TOKENS = 16
REPEATS = 3
SETTINGS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class Bench:
    """One engine over a random model, and transformers' model on the same weights."""

    def __init__(self, folder: Path, device: str, num_blocks: int) -> None:
        self.device = device
        self.runner = TorchRunner(folder, block_tokens=BLOCK_TOKENS, device=device, dtype=None if device != "cpu" else "bfloat16")
        self.pool = KvPool(np.zeros((num_blocks, self.runner.layout.block_bytes), np.uint8), self.runner.layout)
        limits = SchedulerLimits(BLOCK_TOKENS, max_batch_sequences=64, max_chunk_tokens=2048)
        self.engine = PagedEngine(self.runner, self.pool, limits=limits)
        self.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
        self._root = cache_root(self.runner.info.fingerprint)
        self._random = random.Random(1)
        self._number = 0

    def tokens(self, length: int) -> list[int]:
        """A prompt nobody has seen."""
        return [self._random.randrange(3, self.runner.info.vocab_size) for _ in range(length)]

    def add(self, prompt: list[int], max_tokens: int, work: Work = Work.WHOLE) -> SequenceKey:
        """Queue one."""
        self._number += 1
        key = SequenceKey(f"r{self._number}", 1)
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.engine.add(EngineRequest(key, array("I", prompt), len(prompt), self._root, work, sampling=sampling))
        return key

    def step(self) -> Any:
        """One step."""
        self.engine.plan()
        return self.engine.step()

    def finish(self) -> dict[SequenceKey, list[int]]:
        """Run until idle."""
        told: dict[SequenceKey, list[int]] = {}
        while self.engine.has_work():
            output = self.step()
            assert not [end for end in output.ends if end.message], output.ends
            for key, token in zip(output.keys, output.token_ids, strict=True):
                told.setdefault(key, []).append(token)
        return told

    def prefill(self, num_tokens: int, chunk_tokens: int) -> dict[str, float]:
        """First token of one prompt, which is computed in chunks of this many tokens."""
        self.engine._scheduler.limits = replace(self.engine._scheduler.limits, max_chunk_tokens=chunk_tokens)
        self.add(self.tokens(num_tokens), 1)
        self.finish()
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(REPEATS):
            self.add(self.tokens(num_tokens), 1)
            with timed(ours):
                self.finish()
        for repeat in range(REPEATS + 1):
            ids = torch.tensor([self.tokens(num_tokens)], device=self.device)
            synchronize(self.device)
            with timed(theirs), torch.inference_mode():
                self.reference(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
            theirs = theirs if repeat else []
        return {
            "engine_tokens_per_s": round(num_tokens / median(ours)),
            "transformers_tokens_per_s": round(num_tokens / median(theirs)),
            "ratio": round(median(theirs) / median(ours), 3),
            "engine_s": median(ours),
        }

    def decode(self, batch: int, prompt_tokens: int, num_new: int) -> dict[str, float]:
        """Tokens per second once all sequences decode together."""
        prompts = [self.tokens(prompt_tokens) for _ in range(batch)]
        for prompt in prompts:
            self.add(prompt, num_new + 16)
        while True:
            output = self.step()
            if output.decode_sequences == batch:
                break
            assert not output.ends, "a sequence ended before all decoded"
        steps: list[float] = []
        for _ in range(num_new - 4):
            with timed(steps):
                output = self.step()
            if output.decode_sequences != batch:
                break
        self.finish()
        ids = torch.tensor(prompts, device=self.device)
        theirs = []
        for count in (1, 1, num_new):  # the time of the prompts is taken off
            synchronize(self.device)
            with timed(theirs), torch.inference_mode():
                self.reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **SETTINGS)
                synchronize(self.device)
        their_step = (theirs[2] - theirs[1]) / (num_new - 1)
        return {
            "engine_tokens_per_s": round(batch / median(steps), 1),
            "transformers_tokens_per_s": round(batch / their_step, 1),
            "ratio": round(their_step / median(steps), 3),
            "step_ms": round(1e3 * median(steps), 3),
            "steps": len(steps),
        }


def copies(device: str, kib: int, total_mib: int) -> dict[str, Any]:
    """GB/s of KV blocks between the device and pinned host memory, by the engine's own code, and of one plain copy of the same bytes.

    By the way it chooses, and by each of its two ways: a call for each run of neighbours, one kernel for all blocks.
    """
    layout = BlockLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=kib * 16, dtype="bfloat16")
    assert layout.block_bytes == kib << 10
    num_blocks = (total_mib << 10) // kib
    host = KvPool(np.zeros((num_blocks, layout.block_bytes), np.uint8), layout)
    host.data[:] = np.random.default_rng(0).integers(0, 64, host.data.shape, dtype=np.uint8)
    plain_host = torch.empty(host.data.nbytes, dtype=torch.uint8, pin_memory=device != "cpu")
    plain_device = torch.zeros(host.data.nbytes, dtype=torch.uint8, device=device)
    seconds: dict[str, list[float]] = {}

    def measure(name: str, run: Any) -> None:
        run()  # a warm-up, checked by the caller
        for _ in range(5):
            synchronize(device)
            with timed(seconds.setdefault(name, [])):
                run()
                synchronize(device)

    measure("plain to device", lambda: plain_device.copy_(plain_host, non_blocking=True))
    measure("plain to host", lambda: plain_host.copy_(plain_device, non_blocking=True))
    found: dict[str, Any] = {"num_blocks": num_blocks}
    contiguous = list(range(num_blocks))
    orders = {"contiguous": contiguous, "scattered": random.Random(1).sample(contiguous, num_blocks)}
    key, end = SequenceKey("r", 1), num_blocks * layout.block_tokens
    wanted = torch.from_numpy(host.data).clone().to(device)
    for way, least_run_bytes in {"": LEAST_RUN_BYTES, " by run": 0, " by kernel": 1 << 60}.items():
        pool = TorchPool(host, torch.device(device), mirrored=True, least_run_bytes=least_run_bytes)
        found["is_pinned"], found["is_mapped"] = pool.is_pinned, pool._mapped is not None
        for order, table in orders.items():

            def load(pool: TorchPool = pool, blocks: list[int] = table) -> None:
                pool.forget(key)
                pool.load([ChunkItem(key, array("I"), end, end + 16, [*blocks, 0], 0, SamplingParams(), 0)])

            def store(pool: TorchPool = pool, blocks: list[int] = table) -> None:
                with pool.storing([ChunkItem(key, array("I"), 0, end, blocks, 0, SamplingParams(), 0)]):
                    pass

            pool.tensor.zero_()
            measure(f"{order}{way} to device", load)
            assert torch.equal(pool.tensor.flatten().view(torch.uint8), wanted.flatten()), f"{order}{way}: wrong bytes on the device"
            host.data[:] = 0
            measure(f"{order}{way} to host", store)
            assert torch.equal(torch.from_numpy(host.data).to(device), wanted), f"{order}{way}: wrong bytes on the host"
        del pool, load, store  # its pages must be free of it before they are pinned again
    rates = {name: host.data.nbytes / 1e9 / median(times) for name, times in seconds.items()}
    found["gb_per_s"] = {name: round(rate, 2) for name, rate in rates.items()}
    found["ratio_to_plain"] = {
        name: round(rate / rates["plain to " + name.rsplit(" ", 1)[1]], 3) for name, rate in rates.items() if not name.startswith("plain")
    }
    return found


def later_chunk_is_right(device: str) -> dict[str, float]:
    """A chunk after others through the kernel that bf16 takes on this device, against float64."""
    from baton_engine.attention import gather_attend, plan_step

    heads, kv_heads, dim, start, end = 8, 2, 64, 300, 557
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn((40, 1, 2, BLOCK_TOKENS, kv_heads, dim), generator=generator).to(device, torch.bfloat16)
    q, k, v = (torch.randn((1, n, end - start, dim), generator=generator).to(device, torch.bfloat16) for n in (heads, kv_heads, kv_heads))
    table = random.Random(2).sample(range(40), -(-end // BLOCK_TOKENS))
    item = ChunkItem(SequenceKey("r", 1), array("I", range(end)), start, end, table, False, SamplingParams(), end)
    with torch.inference_mode():
        out = gather_attend(plan_step([item], pool), 0, q, k, v, dim**-0.5)[0].double()
        keys, values = (pool[table, 0, i].flatten(0, 1)[:end].double().repeat_interleave(heads // kv_heads, 1) for i in (0, 1))
        scores = torch.einsum("hqd,khd->hqk", q[0].double(), keys) * dim**-0.5
        beyond = torch.arange(end, device=device)[None] > torch.arange(start, end, device=device)[:, None]
        wanted = torch.einsum("hqk,khd->qhd", scores.masked_fill(beyond, -torch.inf).softmax(-1), values)
    error = float((out - wanted).norm() / wanted.norm())
    assert error < 1e-2, f"relative error {error}"
    return {"relative_error": error}


def bf16_agreement(device: str, folder: Path) -> dict[str, Any]:
    """How many greedy tokens of the engine in bf16 are those of generate() in bf16 (not promised: law 3 is of float32)."""
    make_random_model(folder, dtype="bfloat16", num_layers=4, hidden=256, num_heads=8)
    bench = Bench(folder, device, 256)
    prompts = [bench.tokens(length) for length in (5, 16, 47, 100, 200, 300)]
    keys = [bench.add(prompt, 32) for prompt in prompts]
    told = bench.finish()
    same = wanted = equal_prompts = 0
    for key, prompt in zip(keys, prompts, strict=True):
        ids = torch.tensor([prompt], device=device)
        theirs = bench.reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, **SETTINGS)[
            0, len(prompt) :
        ].tolist()
        differs = next((i for i, pair in enumerate(zip(told[key], theirs, strict=True)) if pair[0] != pair[1]), 32)
        same, wanted, equal_prompts = same + differs, wanted + 32, equal_prompts + (differs == 32)
    assert same > wanted // 4, f"{same} of {wanted} tokens before the first difference: more than rounding"
    return {"tokens_before_first_difference": same, "of": wanted, "answers_equal": equal_prompts, "answers": len(prompts)}


def main() -> int:
    """Everything, each on its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/baton-gpu"), help="folder for models")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script without a GPU")
    options = parser.parse_args()
    device, shape = options.device, SMALL if options.small else LARGE
    findings = Findings(options.out / "figures.json", device=device, model=shape, **device_facts(device))
    findings.run("later chunk in bf16 against float64", lambda: later_chunk_is_right(device))
    findings.run("bf16 agreement with generate()", lambda: bf16_agreement(device, options.work / "agreement"))
    for kib in (16, 64, 256, 512):
        findings.run(f"copies of {kib} KiB blocks", partial(copies, device, kib, 16 if options.small else 256))
    made: list[Bench] = []

    def load() -> dict[str, Any]:
        started = time.monotonic()
        folder = make_model(options.work / "figures", device, "bfloat16", shape, 512 if options.small else 128256)
        saved = time.monotonic()
        made.append(Bench(folder, device, 256 if options.small else 4096))
        bench = made[0]
        return {
            "parameters": sum(p.numel() for p in bench.reference.parameters()),
            "block_bytes": bench.pool.block_bytes,
            "pool_bytes": bench.pool.data.nbytes,
            "is_pinned": bench.runner._pool is not None and bench.runner._pool.is_pinned,
            "make_s": round(saved - started, 1),
            "load_s": round(time.monotonic() - saved, 1),
        }

    findings.run("model", load)
    if made:
        bench = made[0]
        for num_tokens in (128, 256) if options.small else (2048, 8192):
            assert num_tokens < MAX_MODEL_TOKENS
            for chunk_tokens in sorted({2048, max(2048, num_tokens)}):  # the default, and all at once
                findings.run(f"prefill {num_tokens} by {chunk_tokens}", partial(bench.prefill, num_tokens, chunk_tokens))
        for batch in (1, 4) if options.small else (1, 16, 64):
            findings.run(f"decode batch {batch}", partial(bench.decode, batch, 64 if options.small else 512, 12 if options.small else 48))
        if device != "cpu":
            findings.run("memory", lambda: {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)})
    return 1 if findings.failed else 0


if __name__ == "__main__":
    sys.exit(main())
