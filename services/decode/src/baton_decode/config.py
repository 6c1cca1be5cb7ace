"""Settings of baton-decode."""

from dataclasses import dataclass

from baton_worker.config import WorkerConfig


@dataclass(frozen=True)
class DecodeConfig(WorkerConfig):
    """See WorkerConfig.

    can_prefill: whether this instance may be given whole requests, prompt and answer; also what the frontend falls back to. sglang: a
        server takes either whole requests (true) or the answers of prompts handed over (false).
    """

    can_prefill: bool = True
