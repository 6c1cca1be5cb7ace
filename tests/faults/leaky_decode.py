"""A decode process with a bug to be switched on: SIGUSR1 pins blocks for a handoff nobody knows, SIGUSR2 lets them go."""

import asyncio
import signal

from baton_decode.config import DecodeConfig
from baton_decode.main import DecodeService
from baton_engine.api import SequenceKey
from baton_runtime.config import load
from baton_runtime.lifecycle import run
from baton_worker.assembly import OpenedEngine

LEAKED_BLOCKS = 3
OWNER = SequenceKey("nobody", 1)


class LeakyDecode(DecodeService):
    """DecodeService, but for the leak."""

    async def _open_engine(self) -> OpenedEngine:
        opened = await super()._open_engine()
        engine = opened.engine

        def leak() -> None:
            engine.blocks.acquire(OWNER, [], LEAKED_BLOCKS)
            engine.blocks.pin(OWNER, 0, LEAKED_BLOCKS)
            engine.blocks.release(OWNER)

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, leak)
        loop.add_signal_handler(signal.SIGUSR2, engine.blocks.unpin, OWNER)
        return opened


if __name__ == "__main__":
    run(lambda: LeakyDecode(load(DecodeConfig, "decode")))
