"""baton-decode: wiring only."""

import importlib.metadata
from collections.abc import Sequence

from baton_contracts.discovery.v1.instance_pb2 import Capability
from baton_contracts.discovery.v1.instance_pb2 import Service as ServiceKind
from baton_runtime.config import config_file, load
from baton_runtime.lifecycle import run
from baton_worker.worker import Worker

from baton_decode.config import DecodeConfig

DISTRIBUTION = "baton-decode"


class DecodeService(Worker):
    """A decode process."""

    name = "decode"
    kind = ServiceKind.SERVICE_DECODE
    distribution = DISTRIBUTION
    config: DecodeConfig

    @property
    def capabilities(self) -> Sequence["Capability"]:
        """Answers, to prompts read elsewhere and, unless told not to, to prompts it reads itself; of an SGLang server one or the other."""
        decode, whole = Capability.CAPABILITY_DECODE_FROM, Capability.CAPABILITY_WHOLE
        if self.config.engine == "sglang":
            return [whole] if self.config.can_prefill else [decode]
        return [decode, whole] if self.config.can_prefill else [decode]


def main() -> None:
    """Entry point of `baton-decode`."""
    file = config_file("decode", version=importlib.metadata.version(DISTRIBUTION))
    run(lambda: DecodeService(load(DecodeConfig, "decode", file)))


if __name__ == "__main__":
    main()
