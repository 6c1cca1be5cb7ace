"""What a worker has to do and room for, in the words of the contract."""

from typing import Protocol

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import Engine, EngineBeat
from baton_engine.errors import IntegrityError
from baton_runtime.drain import Holdings

from baton_worker.dispatch import Dispatcher


class HandoffCounts(Protocol):
    """What status needs of `baton_handoff.manager.HandoffManager`."""

    def live_handoffs(self) -> int:
        """Handoffs that are not over."""

    def stranded_bytes(self) -> int:
        """Bytes pinned or reserved for a handoff whose other side is dead, fenced or silent for over 5 s."""

    def queued(self) -> int:
        """Sequences that wait for their handoff to begin."""

    def safe_to_stop(self) -> bool:
        """Nothing is pinned or reserved, and nothing is queued."""


class WorkerState:
    """Reads engine, dispatcher and handoffs; changes nothing."""

    def __init__(
        self,
        instance_id: str,
        incarnation: str,
        engine: Engine,
        dispatcher: Dispatcher,
        handoffs: HandoffCounts,
    ) -> None:
        self.instance_id = instance_id
        self.incarnation = incarnation
        self._engine = engine
        self._dispatcher = dispatcher
        self._handoffs = handoffs

    def beat(self) -> pb.Beat:
        """Sign of life of the engine, now."""
        return beat_message(self._engine.beat())

    def fill_load(self, load: pb.WorkerLoad) -> None:
        """Everything of a WorkerLoad but its samples."""
        counts, stats = self._engine.blocks.counts(), self._engine.stats()
        load.blocks.total = counts.total
        load.blocks.free = counts.free
        load.blocks.cached = counts.cached
        load.blocks.pinned = counts.pinned
        load.blocks.reserved = counts.reserved
        load.blocks.used = counts.used
        load.running_sequences = stats.running_sequences
        load.waiting_sequences = stats.waiting_sequences + self._handoffs.queued()
        load.waiting_prefill_tokens = self._dispatcher.waiting_handoff_tokens() + stats.waiting_prefill_tokens
        load.active_kv_tokens = stats.active_kv_tokens
        load.draining = self._dispatcher.is_draining

    def is_safe_to_stop(self) -> bool:
        """Draining, and nothing runs, is pinned or reserved."""
        return self._dispatcher.is_draining and self._dispatcher.num_live == 0 and self._handoffs.safe_to_stop()

    def holdings(self) -> Holdings:
        """What keeps a drain from its end."""
        counts = self._engine.blocks.counts()
        return Holdings(self._dispatcher.num_live, self._handoffs.live_handoffs(), counts.pinned, counts.reserved)

    def status(self, integrity_error: str) -> pb.GetStatusResponse:
        """For people and tests."""
        status = pb.GetStatusResponse(
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            integrity_error=integrity_error,
            block_bytes=self._engine.pool.block_bytes,
            stranded_bytes=self._handoffs.stranded_bytes(),
            live_handoffs=self._handoffs.live_handoffs(),
            live_sequences=self._dispatcher.num_live,
            safe_to_stop=self.is_safe_to_stop(),
        )
        self.fill_load(status.load)
        return status

    def integrity_error(self) -> str:
        """Result of the block manager's check; empty if sound. Takes time with the number of blocks: call it in a thread."""
        try:
            self._engine.blocks.check()
        except IntegrityError as error:
            return error.message
        return ""


def beat_message(beat: EngineBeat) -> pb.Beat:
    """An engine's beat as it travels. A running step has at least 1 us, because 0 says that none runs."""
    age_us = max(1, int(beat.running_step_age_s * 1e6)) if beat.running_step_age_s > 0 else 0
    return pb.Beat(step=beat.step, running_step_age_us=age_us, predicted_step_us=int(beat.predicted_step_s * 1e6))
