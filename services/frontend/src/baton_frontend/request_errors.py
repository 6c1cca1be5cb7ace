"""Ends of a request that only the frontend knows.

BatonError
|- DeadlineExceeded
|  `- DeadlinePassed      DEADLINE_EXCEEDED   DEADLINE_EXCEEDED    no
|- EngineCrash            ENGINE_CRASH        INTERNAL             no
|- QueueFull
|  |- AdmissionFull       ADMISSION_FULL      RESOURCE_EXHAUSTED   yes
|  `- Overloaded          OVERLOADED          RESOURCE_EXHAUSTED   yes
`- Unavailable
   `- AttemptsExhausted   ATTEMPTS_EXHAUSTED  UNAVAILABLE          yes
"""

import grpc
from baton_runtime.errors import BatonError, DeadlineExceeded, QueueFull, Unavailable


class DeadlinePassed(DeadlineExceeded):
    """The time of the whole request is over; what was delivered stays delivered."""

    def __init__(self, deadline_s: float, setting: str) -> None:
        """setting: which one said so: "baton.deadline_s" of the request, or "frontend.default_deadline_s"."""
        super().__init__(f"the request was not finished within {deadline_s:g} s ({setting}); ask for less or give it more time")


class EngineCrash(BatonError):
    """Workers died under the request; a further try could take the fleet."""

    reason = "ENGINE_CRASH"
    status = grpc.StatusCode.INTERNAL

    def __init__(self, num_crashes: int) -> None:
        super().__init__(
            f"{num_crashes} workers failed while they ran this request, so it is not tried again; change it before you send it again",
            num_crashes=num_crashes,
        )


class AdmissionFull(QueueFull):
    """This frontend holds as much as it may. Nothing was started."""

    reason = "ADMISSION_FULL"

    def __init__(self, what: str, held: int, wanted: int, limit: int, setting: str, retry_after_ms: int) -> None:
        """what: "requests", "tokens" or "bytes". setting: the one that bounds them."""
        BatonError.__init__(
            self,
            f"this frontend holds {held} of at most {limit} {what} ({setting}), and {wanted} more do not fit; "
            f"send the request again in {retry_after_ms} ms",
            retry_after_ms=retry_after_ms,
            bound=what,
            held=held,
            wanted=wanted,
            limit=limit,
            setting=setting,
        )


class Overloaded(QueueFull):
    """No instance takes the request now."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_ms: int) -> None:
        BatonError.__init__(self, message or "every instance of the model is full", retry_after_ms=retry_after_ms)


class AttemptsExhausted(Unavailable):
    """Every try failed."""

    reason = "ATTEMPTS_EXHAUSTED"

    def __init__(self, num_attempts: int, cause: str) -> None:
        super().__init__(f"gave up after {num_attempts} attempts, the last failed with {cause}", num_attempts=num_attempts, cause=cause)
