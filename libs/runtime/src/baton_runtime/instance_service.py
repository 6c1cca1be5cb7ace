"""baton.instance.v1.InstanceService: every service's drain, for those who operate it."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc.aio
from baton_contracts.instance.v1 import instance_service_pb2 as pb
from baton_contracts.instance.v1 import instance_service_pb2_grpc as rpc
from google.protobuf.duration_pb2 import Duration

from baton_runtime.drain import Phase
from baton_runtime.errors import InvalidArgument, StaleIncarnation
from baton_runtime.lifecycle import Service
from baton_runtime.log import get_logger
from baton_runtime.rpc import GrpcServer

if TYPE_CHECKING:
    from baton_contracts.instance.v1.instance_service_pb2 import DrainPhase

PROGRESS_S = 0.25
GRACE_LIMIT_S = 3600.0

_PHASES: dict[Phase, "DrainPhase"] = {
    Phase.DRAINING: pb.DRAIN_PHASE_DRAINING,
    Phase.DRAINED: pb.DRAIN_PHASE_DRAINED,
    Phase.CUT_OFF: pb.DRAIN_PHASE_CUT_OFF,
}

log = get_logger(__name__)


def serve_instance(service: Service, server: GrpcServer) -> None:
    """Add the InstanceService of a service to its server; before the server starts."""
    rpc.add_InstanceServiceServicer_to_server(InstanceServicer(service), server.server)


class InstanceServicer(rpc.InstanceServiceServicer):
    """Asks for the drain and tells how far it is. What a caller does never changes the drain once it has begun."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Drain(self, request: pb.DrainRequest, context: Any) -> None:
        """Until the drain is over or the caller has left. Raises: StaleIncarnation, InvalidArgument; nothing was begun then."""
        if request.incarnation and request.incarnation != self._service.incarnation:
            raise StaleIncarnation(self._service.incarnation, request.incarnation)
        grace_s = _seconds(request.grace) if request.HasField("grace") else None
        if grace_s is not None and not 0.0 <= grace_s <= GRACE_LIMIT_S:
            raise InvalidArgument("grace", f"must be 0 to {GRACE_LIMIT_S:g} s, not {grace_s:g} s")
        drain = self._service.drain_state
        log.info("drain_asked", grace_s=grace_s, phase=drain.phase.value, peer=context.peer())
        with drain.watched():
            drain.ask(grace_s)  # no await since the checks: it has begun even if the caller is gone by now
            try:
                while True:
                    progress = self._progress()
                    await context.write(progress)
                    if progress.phase != pb.DRAIN_PHASE_DRAINING:
                        return
                    await _until(drain.over, PROGRESS_S)
            except grpc.aio.BaseError as error:  # the caller has left while we wrote
                log.info("drain_caller_left", error=str(error))

    def _progress(self) -> pb.DrainResponse:
        drain, held = self._service.drain_state, self._service.holdings()
        return pb.DrainResponse(
            instance_id=self._service.instance_id,
            incarnation=self._service.incarnation,
            phase=_PHASES[drain.phase],
            elapsed=_duration(drain.elapsed_s),
            remaining=_duration(drain.remaining_s),
            holdings=pb.Holdings(
                running=held.running,
                live_handoffs=held.live_handoffs,
                pinned_blocks=held.pinned_blocks,
                reserved_blocks=held.reserved_blocks,
            ),
        )


async def _until(event: asyncio.Event, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return


def _duration(seconds: float) -> Duration:
    made = Duration()
    made.FromMilliseconds(round(seconds * 1000))
    return made


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
