"""A worker that does one thing at one point of a request, when the file named by BATON_TEST_ORDER is there (who takes it away does it).

    python told_worker.py prefill|decode

The file is JSON, an `Order`: who, when, what. So a test strikes at the very token or state it means, however fast the machine is. What is
done is what happens in life: a signal to the process itself, or an end of the attempt that workers give for reasons hard to bring about.
"""

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import baton_worker.core
import baton_worker.frontends
import baton_worker.worker
from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_decode.config import DecodeConfig
from baton_decode.main import DecodeService
from baton_handoff.actions import Action
from baton_handoff.manager import HandoffManager
from baton_prefill.config import PrefillConfig
from baton_prefill.main import PrefillService
from baton_runtime.config import load
from baton_runtime.errors import QueueFull
from baton_runtime.lifecycle import run
from baton_worker.attach import FrontendSession
from baton_worker.dispatch import Dispatcher
from baton_worker.output_log import OutputLog

FILE = "BATON_TEST_ORDER"


@dataclass(frozen=True)
class Order:
    """service: who. at: "start", "token" (of that position, or the first after it), or a state of a handoff there ("computed").

    do: "SIGKILL", "SIGSTOP", "SIGTERM" to itself; "REFUSE" the Start; "SKIP" the token; "HOLD" the sequence, which keeps
    its blocks; or end the attempt with a FinishReason ("STALE").
    times: how often.
    """

    service: str
    at: str
    do: str
    position: int = 0
    times: int = 1

    def write(self, file: Path) -> None:
        """Give the order."""
        draft = file.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self)))
        draft.rename(file)


def taken(service: str, at: str, position: int = 0) -> str | None:
    """What to do now; each order is followed as often as it says, by one process."""
    file = Path(os.environ[FILE])
    try:
        order = Order(**json.loads(file.read_text()))
        if (order.service, order.at) != (service, at) or position < order.position:
            return None
        if order.times == 1:
            file.unlink()
        else:
            replace(order, times=order.times - 1).write(file)
    except FileNotFoundError:  # no order, or another process was faster
        return None
    if order.do.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[order.do])
    return order.do


class ToldSession(FrontendSession):
    """FrontendSession that looks for orders at each token."""

    def append(self, log: OutputLog, position: int, token_id: int) -> None:
        """See FrontendSession."""
        super().append(log, position, token_id)
        if log.is_cancelled:
            return  # over, but for a step that was under way
        do = taken(SERVICE, "token", position)
        if do == "SKIP":
            log.sent += 1
        elif do == "HOLD":
            self._control.pause(log.key)
        elif do is not None and not do.startswith("SIG"):
            self._end_live(log, pb.FinishReason.Value(f"FINISH_REASON_{do}"))


class ToldDispatcher(Dispatcher):
    """Dispatcher that looks for orders at each Start."""

    def start(self, start: pb.Start) -> None:
        """See Dispatcher."""
        if taken(SERVICE, "start") == "REFUSE":
            raise QueueFull(depth=1, limit=1, retry_after_ms=50)
        super().start(start)


class ToldManager(HandoffManager):
    """HandoffManager that looks for orders whenever a handoff may be in another state; what it would say about it has not left then."""

    def _perform(self, actions: list[Action]) -> None:
        super()._perform(actions)
        for handoff in (*self._source.live, *self._sink.live):
            taken(SERVICE, handoff.state.value)


if __name__ == "__main__":
    SERVICE = sys.argv.pop(1)
    baton_worker.frontends.FrontendSession = ToldSession  # type: ignore[misc]
    baton_worker.core.Dispatcher = ToldDispatcher  # type: ignore[misc]
    baton_worker.worker.HandoffManager = ToldManager  # type: ignore[misc]
    if SERVICE == "prefill":
        run(lambda: PrefillService(load(PrefillConfig, "prefill")))
    run(lambda: DecodeService(load(DecodeConfig, "decode")))
