"""KV that the server holds and none of our sequences explains: the end of a request over there that no abort brings about."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton_engine.sglang.http_api import Load


@dataclass(frozen=True, slots=True)
class Unexplained:
    """What is held beyond our sequences: KV slots of tokens, and requests in the server's queues."""

    num_tokens: int = 0
    num_requests: int = 0

    def __bool__(self) -> bool:
        return self.num_tokens > 0 or self.num_requests > 0


class PinWatch:
    """Judges the server's own numbers. Restarting it is the fence of last resort, so they must stay unexplained for limit_s.

    All its state: since when they are (None: they are not), and the newest ones.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: float | None = None
        self.unexplained = Unexplained()

    def judge(self, loads: Sequence[Load], explained_tokens: int, num_posted: int, now: float) -> bool:
        """Whether the server has to be restarted.

        explained_tokens: KV slots that our sequences may take there. num_posted: sequences it should have; its health check may be one
        more, and one may stand in two of its counts at once. Both as they were before loads was asked for, or what began and ended
        meanwhile would be taken for lost.
        """
        used = sum(load.num_used_tokens for load in loads)
        requests = sum(load.num_running_reqs + load.num_waiting_reqs + load.disaggregation.num_requests for load in loads)
        self.unexplained = Unexplained(max(0, used - explained_tokens), max(0, requests - 2 * num_posted - 2))
        if not self.unexplained:
            self._since = None
        elif self._since is None:
            self._since = now
        return self._since is not None and now - self._since >= self._limit_s

    def unexplained_s(self, now: float) -> float:
        """For how long its numbers have been unexplained; 0: they are not."""
        return now - self._since if self._since is not None else 0.0
