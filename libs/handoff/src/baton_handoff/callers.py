"""Who waits for each Start of this worker: they are told how it ended, once; traces and metrics learn what happened meanwhile."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.trace import Tracer

from baton_handoff.actions import Completed, Ended, Report
from baton_handoff.handoff_metrics import HandoffMetrics, outcome_of
from baton_handoff.ids import ConfirmAnswer, HandoffComplete, HandoffEnd, HandoffKey, Side
from baton_handoff.messages import Accepted, Announce, Begin, BeginReply, Confirm, ConfirmReply, Message
from baton_handoff.spans import HandoffTrace, PullTotals
from baton_handoff.transports.base import PullStats


@dataclass(slots=True)
class _Caller:
    on_end: Callable[[HandoffEnd], None]
    on_complete: Callable[[HandoffComplete], None] | None
    trace: HandoffTrace
    confirmed_blocks: int = 0


class Callers:
    """All its state: `_callers`, by handoff and side, from a Start that was taken until it is over. What happens to handoffs that have no
    caller (those that are draining, and fetches) is ignored."""

    def __init__(self, metrics: HandoffMetrics, tracer: Tracer, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._clock = clock
        self._callers: dict[tuple[HandoffKey, Side], _Caller] = {}

    def add(
        self,
        key: HandoffKey,
        side: Side,
        traceparent: str,
        on_end: Callable[[HandoffEnd], None],
        on_complete: Callable[[HandoffComplete], None] | None = None,
    ) -> None:
        """A Start was taken. Only a sink completes."""
        self._callers[key, side] = _Caller(on_end, on_complete, HandoffTrace(traceparent))

    # For traces and metrics.

    def sent(self, message: Message) -> None:
        """We say something to a peer."""
        if isinstance(message, Confirm):
            if (asking := self._callers.get((message.key, Side.SINK))) is not None:
                asking.trace.asked(self._clock())
        elif isinstance(message, Begin | Announce | ConfirmReply) and (source := self._callers.get((message.key, Side.SOURCE))) is not None:
            if isinstance(message, Begin):
                source.trace.begin.opened()
            elif isinstance(message, Announce):
                source.trace.announced(self._clock())
            elif message.answer is ConfirmAnswer.CONFIRMED:
                source.trace.answered(self._clock())

    def heard(self, reply: BeginReply) -> None:
        """A sink has answered an offer."""
        if isinstance(reply.answer, Accepted) and (source := self._callers.get((reply.key, Side.SOURCE))) is not None:
            source.trace.accepted(reply.answer.first_block)

    def pulling(self, key: HandoffKey) -> None:
        """An operation begins."""
        if (caller := self._callers.get((key, Side.SINK))) is not None:
            caller.trace.pull.opened()

    def pulled(self, key: HandoffKey, transport: str, why: str, stats: PullStats, *, is_retry: bool) -> None:
        """An operation is over, all bytes have come."""
        if (caller := self._callers.get((key, Side.SINK))) is not None:
            caller.trace.pulled(transport, why, stats, is_retry=is_retry)

    def confirmed(self, report: Report, block_bytes: int) -> None:
        """A sink's report: what it has confirmed by now. block_bytes: of the source's blocks."""
        caller = self._callers.get((report.key, Side.SINK))
        if caller is not None and report.confirmed_blocks > caller.confirmed_blocks:
            self._metrics.confirmed((report.confirmed_blocks - caller.confirmed_blocks) * block_bytes)
            caller.confirmed_blocks = report.confirmed_blocks
            caller.trace.confirmed(self._clock())

    def totals(self, key: HandoffKey) -> PullTotals | None:
        """What a sink's handoff has pulled so far; None: nobody waits for it."""
        caller = self._callers.get((key, Side.SINK))
        return caller.trace.totals if caller is not None else None

    # The end.

    def completed(self, action: Completed) -> None:
        """The sink has everything. The engine hears of it first: what follows only tells."""
        caller = self._callers.pop((action.key, Side.SINK))
        assert caller.on_complete is not None, "only a sink completes"
        caller.on_complete(action.complete)
        if action.complete.handoff_bytes:
            self._metrics.exposed(action.complete.exposed_s)
        self._metrics.ended(Side.SINK, None)
        self._later(lambda: caller.trace.tell_completed(self._tracer, action.key, action.complete))

    def ended(self, action: Ended) -> None:
        """It is over, and nothing was completed at a sink."""
        caller = self._callers.pop((action.key, action.side))
        self._metrics.ended(action.side, action.end)
        caller.on_end(action.end)
        self._later(lambda: caller.trace.tell_ended(self._tracer, action.key, action.side, action.end, outcome_of(action.end)))

    @staticmethod
    def _later(tell: Callable[[], None]) -> None:
        """What only people read is written when the messages of this turn are on their way: it costs some 0.3 ms."""
        asyncio.get_running_loop().call_soon(tell)
