"""baton-prefill: wiring only."""

import importlib.metadata
from collections.abc import Sequence

from baton_contracts.discovery.v1.instance_pb2 import Capability
from baton_contracts.discovery.v1.instance_pb2 import Service as ServiceKind
from baton_runtime.config import config_file, load
from baton_runtime.lifecycle import run
from baton_worker.worker import Worker

from baton_prefill.config import PrefillConfig

DISTRIBUTION = "baton-prefill"


class PrefillService(Worker):
    """A prefill process."""

    name = "prefill"
    kind = ServiceKind.SERVICE_PREFILL
    distribution = DISTRIBUTION
    config: PrefillConfig

    @property
    def capabilities(self) -> Sequence["Capability"]:
        """Prompts, for the decode instance named in the Start."""
        return [Capability.CAPABILITY_PREFILL_FOR]


def main() -> None:
    """Entry point of `baton-prefill`."""
    file = config_file("prefill", version=importlib.metadata.version(DISTRIBUTION))
    run(lambda: PrefillService(load(PrefillConfig, "prefill", file)))


if __name__ == "__main__":
    main()
