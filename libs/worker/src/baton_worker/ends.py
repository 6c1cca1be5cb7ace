"""How an attempt ended, in the words of the contract."""

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import EndReason
from baton_runtime.errors import BatonError, InvalidArgument

FINISH_OF_END: "dict[EndReason, pb.FinishReason]" = {
    EndReason.STOP: pb.FINISH_REASON_STOP,
    EndReason.LENGTH: pb.FINISH_REASON_LENGTH,
    EndReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    EndReason.PREFILLED: pb.FINISH_REASON_PREFILLED,
    EndReason.PREEMPTED: pb.FINISH_REASON_PREEMPTED,
    EndReason.ENGINE_ERROR: pb.FINISH_REASON_ENGINE_ERROR,
}


def error_detail(error: BatonError) -> pb.ErrorDetail:
    """An error as it travels in a Finished: the same facts as in google.rpc.ErrorInfo."""
    return pb.ErrorDetail(reason=error.reason, message=error.message, retry_after_ms=error.retry_after_ms)


def error_end(error: BatonError) -> pb.Finished:
    """The end of an attempt that never ran: INVALID for what is wrong with the Start itself, else REFUSED."""
    reason = pb.FINISH_REASON_INVALID if isinstance(error, InvalidArgument) else pb.FINISH_REASON_REFUSED
    return pb.Finished(reason=reason, error=error_detail(error))
