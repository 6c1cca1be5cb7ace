"""Whether fetching cached blocks is worth it, and how long it may take: two measured speeds and one rule.

    fetch  if  missing tokens >= fetch_min_tokens  and  OVERHEAD_S + bytes / link speed < missing tokens x time per prompt token
    limit  =   max(fetch_min_limit_s, missing tokens x time per prompt token)

So a fetch that comes to nothing delays a request by no more than computing what it was for.
"""

from dataclasses import dataclass

from baton_handoff.config import HandoffConfig
from baton_handoff.transports.base import PullStats

# Question, answer, an operation and a Confirm between two busy event loops, beside the bytes themselves. Assumed, not
# measured; four such hops of a handoff take 1 to 2 ms on loopback (bench/handoff_latency.py).
OVERHEAD_S = 0.005
# Assumed until something was measured; as the router does.
DEFAULT_TOKEN_S = 50e-6
DEFAULT_LINK_BYTES_PER_S = 2e9
# What was measured before counts this much less with every new sample.
DECAY = 0.9


@dataclass(slots=True)
class _Speed:
    """Amount per second, newer samples counting more, each by its size."""

    amount: float = 0.0
    seconds: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self.amount = DECAY * self.amount + amount
        self.seconds = DECAY * self.seconds + seconds

    def seconds_for(self, amount: float, default_per_s: float) -> float:
        """How long that amount takes."""
        if not self.amount or not self.seconds:
            return amount / default_per_s
        return amount * self.seconds / self.amount


class FetchPolicy:
    """All its state: `_compute`, tokens per second of our own prefill, and `_links`, bytes per second by the source's incarnation."""

    def __init__(self, config: HandoffConfig, token_bytes: float) -> None:
        """token_bytes: KV of one token."""
        self._config = config
        self._token_bytes = token_bytes
        self._compute = _Speed()
        self._links: dict[str, _Speed] = {}

    def stepped(self, prefill_tokens: int, duration_s: float) -> None:
        """A step of our engine has ended."""
        if prefill_tokens:
            self._compute.add(prefill_tokens, duration_s)

    def pulled(self, incarnation: str, stats: PullStats) -> None:
        """An operation has ended, for whatever it was."""
        self._links.setdefault(incarnation, _Speed()).add(stats.num_bytes, stats.duration_s)

    def forget(self, incarnation: str) -> None:
        """That source is gone. Idempotent."""
        self._links.pop(incarnation, None)

    def compute_s(self, num_tokens: int) -> float:
        """Predicted time to compute that many prompt tokens here."""
        return self._compute.seconds_for(num_tokens, 1 / DEFAULT_TOKEN_S)

    def transfer_s(self, incarnation: str, num_tokens: int) -> float:
        """Predicted time to fetch that many tokens' KV from there."""
        link = self._links.get(incarnation) or _Speed()
        return OVERHEAD_S + link.seconds_for(num_tokens * self._token_bytes, DEFAULT_LINK_BYTES_PER_S)

    def is_worth(self, incarnation: str, num_tokens: int) -> bool:
        """The rule above."""
        least = self._config.fetch_min_tokens
        return 0 < least <= num_tokens and self.transfer_s(incarnation, num_tokens) < self.compute_s(num_tokens)

    def limit_s(self, num_tokens: int) -> float:
        """How long a fetch of that many tokens may take."""
        return max(self._config.fetch_min_limit_s, self.compute_s(num_tokens))
