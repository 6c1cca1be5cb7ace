"""Settings of baton-prefill."""

from dataclasses import dataclass

from baton_worker.config import WorkerConfig


@dataclass(frozen=True)
class PrefillConfig(WorkerConfig):
    """See WorkerConfig: a prefill instance has no settings of its own."""
