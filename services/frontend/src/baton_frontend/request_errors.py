"""Ends of a request that only the frontend knows.

BatonError
|- EngineCrash            ENGINE_CRASH        INTERNAL             no
|- QueueFull
|  `- Overloaded          OVERLOADED          RESOURCE_EXHAUSTED   yes
`- Unavailable
   `- AttemptsExhausted   ATTEMPTS_EXHAUSTED  UNAVAILABLE          yes
"""

import grpc
from baton_runtime.errors import BatonError, QueueFull, Unavailable


class EngineCrash(BatonError):
    """Workers died under the request; a further try could take the fleet."""

    reason = "ENGINE_CRASH"
    status = grpc.StatusCode.INTERNAL

    def __init__(self, num_crashes: int) -> None:
        super().__init__(
            f"{num_crashes} workers failed while they ran this request, so it is not tried again; change it before you send it again",
            num_crashes=num_crashes,
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
