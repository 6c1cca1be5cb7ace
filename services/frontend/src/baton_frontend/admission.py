"""What one frontend process holds at a time, and what it refuses at once: requests, tokens and bytes.

Requests and tokens are counted from admission to the one end of a generation, bytes from the head of a call until it is tokenized.
Nothing waits here: what does not fit is refused (law 5). One per process, used on the loop only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from baton_runtime.errors import Draining, InvalidArgument

from baton_frontend.request_errors import AdmissionFull


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Inclusive bounds; the names are those of the settings.

    max_inflight: generations. max_inflight_tokens: prompt and max_tokens of these generations, as if all of it were generated.
    max_held_bytes: bodies of calls that are not tokenized yet, and text kept for clients that read slowly.
    retry_after_ms: advice with a refusal.
    """

    max_inflight: int = 4096
    max_inflight_tokens: int = 256 << 20
    max_held_bytes: int = 512 << 20
    retry_after_ms: int = 1000


class Admission:
    """The books of what is held. Whoever is admitted gives back exactly what it took."""

    __slots__ = ("_is_draining", "_on_refused", "limits", "num_bytes", "num_requests", "num_tokens")

    def __init__(self, limits: AdmissionLimits | None = None, on_refused: Callable[[str], None] = lambda setting: None) -> None:
        """on_refused: told the name of the setting that refused something."""
        self.limits = limits or AdmissionLimits()
        self.num_requests = 0
        self.num_tokens = 0
        self.num_bytes = 0
        self._is_draining = False
        self._on_refused = on_refused

    def set_draining(self) -> None:
        """Calls that begin from now on are refused by `check`; those that began before may still be admitted."""
        self._is_draining = True

    @property
    def is_open(self) -> bool:
        """Whether one more generation would be taken, if it is small."""
        return not self._is_draining and self.num_requests < self.limits.max_inflight

    def check(self) -> None:
        """A call begins: refuse it before its body is read if it would be refused afterwards. Takes nothing.

        Raises: Draining, AdmissionFull.
        """
        if self._is_draining:
            raise Draining("this frontend")
        if self.num_requests >= self.limits.max_inflight:
            raise self._full("requests", self.num_requests, 1, self.limits.max_inflight, "max_inflight")

    def admit(self, num_tokens: int) -> None:
        """Take one generation of so many tokens, prompt and output together.

        Raises: AdmissionFull; InvalidArgument if it would not fit into an empty frontend either.
        """
        limits = self.limits
        if self.num_requests >= limits.max_inflight:
            raise self._full("requests", self.num_requests, 1, limits.max_inflight, "max_inflight")
        if self.num_tokens + num_tokens > limits.max_inflight_tokens:
            if num_tokens > limits.max_inflight_tokens:
                raise InvalidArgument(
                    "max_tokens",
                    f"prompt and max_tokens are {num_tokens} tokens; this frontend takes at most {limits.max_inflight_tokens} at a time "
                    "(frontend.max_inflight_tokens). Lower max_tokens",
                )
            raise self._full("tokens", self.num_tokens, num_tokens, limits.max_inflight_tokens, "max_inflight_tokens")
        self.num_requests += 1
        self.num_tokens += num_tokens

    def leave(self, num_tokens: int) -> None:
        """The generation is over."""
        self.num_requests -= 1
        self.num_tokens -= num_tokens

    def take_bytes(self, num_bytes: int) -> None:
        """Hold so much more of a body. Raises: AdmissionFull."""
        if not self.try_take_bytes(num_bytes):
            raise self._full("bytes", self.num_bytes, num_bytes, self.limits.max_held_bytes, "max_held_bytes")

    def try_take_bytes(self, num_bytes: int) -> bool:
        """Hold so much more. False: it does not fit; nothing was taken."""
        if self.num_bytes + num_bytes > self.limits.max_held_bytes:
            return False
        self.num_bytes += num_bytes
        return True

    def give_bytes(self, num_bytes: int) -> None:
        """They are held no more."""
        self.num_bytes -= num_bytes

    def _full(self, what: str, held: int, wanted: int, limit: int, setting: str) -> AdmissionFull:
        self._on_refused(setting)
        return AdmissionFull(what, held, wanted, limit, f"frontend.{setting}", self.limits.retry_after_ms)
