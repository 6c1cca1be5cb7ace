"""The torch engine's model: transformers definitions, our own KV blocks, our own sampling. CPU and CUDA."""

import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from baton_runtime.errors import ConfigError
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from baton_engine.api import SamplingParams, SequenceKey, TokenLogprobs
from baton_engine.attention import StepPlan, attend_for, plan_step
from baton_engine.errors import StepFailed
from baton_engine.hf_model import block_layout, engine_info, inspect_model_folder, memory_limit_bytes, memory_need
from baton_engine.pool import KvPool
from baton_engine.runner import ChunkItem, Draw, StepLoad
from baton_engine.sampling import DrawRequest, draw
from baton_engine.step_time import StepTimeFit
from baton_engine.torch_pool import TorchPool

_ATTENTION = "baton_blocks"
_WARM_UP_TOKENS = 256
_WARM_UP_SEQUENCES = 8
_WARM_UP_LIMIT_S = 1.0  # a model this slow per 32 tokens is not measured further before it serves


def _block_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """What transformers' attention layers call; the plan travels through the model as a keyword."""
    runner: TorchRunner = kwargs["baton_runner"]
    return runner.attend(kwargs["baton_plan"], module.layer_idx, query, key, value, kwargs["scaling"]), None


AttentionInterface.register(_ATTENTION, _block_attention)


class TorchRunner:
    """ModelRunner over a Hugging Face folder (Llama, Qwen2 and Qwen3).

    In float32 on CPU the greedy tokens are those of transformers' generate(), however the prompt is cut into chunks, whatever
    else is in the batch, and whether the KV was computed here or came by a handoff.
    """

    def __init__(
        self,
        model_path: Path | str,
        *,
        block_tokens: int = 16,
        device: str = "cpu",
        dtype: str | None = None,
        num_threads: int | None = None,
        max_model_tokens: int | None = None,
    ) -> None:
        """Load the model.

        dtype: of weights and KV; default float32 on CPU, else the stored one. num_threads: of torch in this whole process;
        default: torch's own choice.

        Raises: ModelFolderError; ModelTooLarge if the weights alone do not fit; ConfigError for a device that is not there.
        """
        self._device = _usable_device(device)
        self.attend = attend_for(self._device)
        self._folder = folder = inspect_model_folder(model_path)
        self.tokens_per_step = 1
        self.layout = block_layout(folder, block_tokens, dtype or ("float32" if self._device.type == "cpu" else None))
        self.info = engine_info(folder, max_model_tokens)
        self._refuse_too_large(num_blocks=0)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        transformers_logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            folder.path, dtype=getattr(torch, self.layout.dtype), attn_implementation=_ATTENTION, local_files_only=True
        )
        self._model.eval().requires_grad_(False).to(self._device)
        self._step_time = StepTimeFit()
        self._pool: TorchPool | None = None

    def bind(self, pool: KvPool) -> None:
        """Use this pool, and run a few steps in it to learn how long they take; it is left zeroed.

        Raises: ModelTooLarge if weights and pool together do not fit (pages of a fresh pool are not taken yet).
        """
        if pool.layout != self.layout:
            raise ValueError(f"pool of {pool.layout} given to a model of {self.layout}")
        self._refuse_too_large(pool.num_blocks)
        self._pool = TorchPool(pool, self._device)
        self._warm_up(pool)

    def predict_s(self, load: StepLoad) -> float:
        """Predicted length of such a step in seconds, from steps so far."""
        return self._step_time.predict_s(load)

    def forget(self, key: SequenceKey) -> None:
        """The sequence ended."""
        if self._pool is not None:
            self._pool.forget(key)

    def run(self, items: Sequence[ChunkItem]) -> list[Draw | None]:
        """One forward pass over all items.

        Raises: StepFailed for sequences whose activations are not finite (weights or KV are damaged, or the dtype overflows).
        """
        if not items:
            return []
        started = time.perf_counter()
        with torch.inference_mode():
            draws = self._run(items)
        self._step_time.observe(StepLoad.of_items(items), time.perf_counter() - started)
        return draws

    def _run(self, items: Sequence[ChunkItem]) -> list[Draw | None]:
        assert self._pool is not None, "bind comes before run"
        self._pool.load(items)
        plan = plan_step(items, self._pool.tensor)
        last_rows = torch.tensor(plan.last_rows, device=self._device)  # here, because it waits for what the device does
        hidden = self._model.model(
            input_ids=plan.token_ids,
            position_ids=plan.positions,
            attention_mask=None,
            use_cache=False,
            baton_plan=plan,
            baton_runner=self,
        ).last_hidden_state[0]
        last = hidden[last_rows]
        self._refuse_damaged(items, plan, last)
        with self._pool.storing(items):
            return self._draw(items, last)

    def _draw(self, items: Sequence[ChunkItem], last: Tensor) -> list[Draw | None]:
        """Of the items that draw. last: [items, hidden]."""
        drawing = [i for i, item in enumerate(items) if item.draws]
        draws: list[Draw | None] = [None] * len(items)
        if drawing:
            logits = self._model.lm_head(last[torch.tensor(drawing, device=self._device)])
            requests = [DrawRequest(items[i].sampling, items[i].token_ids, items[i].num_prompt_tokens) for i in drawing]
            for i, drawn in zip(drawing, draw(logits, requests, self.info.eos_token_ids), strict=True):
                key, position = items[i].key, items[i].position
                logprobs: tuple[TokenLogprobs, ...] = ()
                if drawn.logprob is not None:
                    logprobs = (TokenLogprobs(key, position, drawn.logprob, drawn.top_token_ids, drawn.top_logprobs),)
                draws[i] = Draw((drawn.token_id,), logprobs)
        return draws

    def _refuse_damaged(self, items: Sequence[ChunkItem], plan: StepPlan, last: Tensor) -> None:
        """The last token of an item attends to all others of its sequence, so it shows damage anywhere in them."""
        assert self._pool is not None
        damaged = [i for i, is_finite in enumerate(last.isfinite().all(-1).tolist()) if not is_finite]
        if not damaged:
            return
        for i in damaged:
            rows = slice(plan.first_rows[i], plan.last_rows[i] + 1)
            self._pool.clear(plan.write_blocks[rows], plan.write_slots[rows])
        raise StepFailed([items[i].key for i in damaged], "activations are not finite")

    def _refuse_too_large(self, num_blocks: int) -> None:
        limit = memory_limit_bytes() if self._device.type == "cpu" else _device_memory_bytes(self._device)
        memory_need(self._folder, self.layout, num_blocks).check(limit)

    def _warm_up(self, pool: KvPool) -> None:
        """Observe steps of several shapes on throw-away tokens, then zero the blocks used."""
        tokens = min(_WARM_UP_TOKENS, pool.num_blocks * self.layout.block_tokens, self.info.max_model_tokens)
        table = range(-(-tokens // self.layout.block_tokens))
        token_ids = array("I", [i % self.info.vocab_size for i in range(tokens)])

        def item(start: int, end: int, number: int = 0) -> ChunkItem:
            key = SequenceKey(f"warm-up-{number}", 0)
            return ChunkItem(key, token_ids[:end], start, end, table, 1, SamplingParams(), tokens)

        shapes = [[item(0, min(tokens, 32))], [item(tokens - 1, tokens)]]
        self.run(shapes[0])  # the first step also pays for lazy starts; it is forgotten
        self._step_time = StepTimeFit()
        shapes += [
            [item(0, tokens)],
            [item(tokens // 2, tokens)],
            [item(tokens - 1, tokens, i) for i in range(_WARM_UP_SEQUENCES)],
            [item(31 % tokens, 31 % tokens + 1, i) for i in range(_WARM_UP_SEQUENCES)],
        ]
        for shape in shapes * 2:
            self.run(shape)
            if self._step_time.predict_s(StepLoad(prefill_tokens=32)) > _WARM_UP_LIMIT_S:
                break
        for number in range(_WARM_UP_SEQUENCES):
            self.forget(SequenceKey(f"warm-up-{number}", 0))
        pool.data[: len(table)] = 0


def _usable_device(name: str) -> torch.device:
    """Raises: ConfigError if torch has no such device here, or the engine cannot use it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("device", f"{name!r} is not a device; write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("device", f"{device.type} is not supported; supported are cpu, cuda")
    if device.type == "cuda" and not 0 <= (device.index or 0) < (num_devices := torch.cuda.device_count()):
        raise ConfigError(
            "device", f"{name} is not there: torch {torch.__version__} sees {num_devices} CUDA devices; choose another or cpu"
        )
    return device


def _device_memory_bytes(device: torch.device) -> int:
    """Device memory this process may have in all: what torch holds and what is free."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device)
