"""Whom a source offers next: the oldest, within its look-ahead and each sink's share of the pool."""

from collections import Counter
from collections.abc import Iterator, Mapping

from baton_engine.api import Priority

from baton_handoff.admission import OfferQueue
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import HandoffKey
from baton_handoff.source_handoff import SourceHandoff, SourceState


class Offers:
    """A view of the source's queue and of what it has begun; changes neither."""

    def __init__(
        self,
        queue: OfferQueue[SourceHandoff],
        begun: Mapping[HandoffKey, SourceHandoff],
        config: HandoffConfig,
        total_blocks: int,
        block_tokens: int,
    ) -> None:
        """total_blocks: of the own pool; block_tokens: of its blocks."""
        self._queue = queue
        self._begun = begun
        self._config = config
        self._total_blocks = total_blocks
        self._block_tokens = block_tokens

    def may_offer(self, linked: Mapping[str, bool], now: float) -> Iterator[SourceHandoff]:
        """Those that may be offered now, in order. Offer each before asking for the next, for it counts then, or ask for no more.

        linked: incarnations of the sinks we know, and whether offers may go out to them.
        """
        if not len(self._queue):
            return
        ahead = self._ahead(now)
        held_back: set[str] = set()  # peers whose oldest waits for its share: its younger ones would eat what it waits for
        for handoff in self._queue.due(now):
            if ahead.is_full():
                return
            if ahead.before(handoff.priority, handoff.num_tokens) >= self._config.look_ahead_tokens:
                continue
            peer = handoff.peer.incarnation
            if not linked.get(peer) or peer in held_back:
                continue
            if len(linked) > 1 and self._is_over_share(handoff):
                held_back.add(peer)
                continue
            yield handoff
            ahead.add(handoff.priority, handoff.num_tokens)

    def _ahead(self, now: float) -> "_Ahead":
        """What is begun and not computed; offers count only while an answer is to be expected, or one hung sink would stop all."""
        ahead = _Ahead(self._config.look_ahead_tokens)
        for handoff in self._begun.values():
            if handoff.state in (SourceState.COMPUTING, SourceState.FETCHING):
                ahead.add(handoff.priority, max(0, handoff.num_tokens - handoff.computed * self._block_tokens))
        for handoff in self._queue.recently_offered(now):
            ahead.add(handoff.priority, handoff.num_tokens)
        return ahead

    def _is_over_share(self, handoff: SourceHandoff) -> bool:
        peer = handoff.peer.incarnation
        holding = [*self._begun.values(), *self._queue.awaiting_answer()]
        others = sum(other.num_blocks - other.confirmed for other in holding if other.peer.incarnation == peer)
        return others > 0 and others + handoff.num_blocks > self._config.peer_share * self._total_blocks


class _Ahead:
    """Tokens under way, summed by class: hundreds may wait, and each is held against them.

    Batch work never holds an interactive prompt back, which the engine takes first. A long prompt counts a quarter of the look-ahead
    at most, and all of them together three quarters for a short one, which overtakes them.
    """

    def __init__(self, look_ahead_tokens: int) -> None:
        self._limit = look_ahead_tokens
        self._quarter = max(1, look_ahead_tokens // 4)
        self._short: Counter[Priority] = Counter()  # tokens of short prompts
        self._long: Counter[Priority] = Counter()  # long prompts

    def add(self, priority: Priority, num_tokens: int) -> None:
        """One more, with so many tokens to go."""
        if num_tokens > self._quarter:
            self._long[priority] += 1
        else:
            self._short[priority] += num_tokens

    def before(self, priority: Priority, num_tokens: int) -> int:
        """Tokens that the engine takes before a prompt of this class and length, or may."""
        short = sum(tokens for other, tokens in self._short.items() if other <= priority)
        long = self._quarter * sum(count for other, count in self._long.items() if other <= priority)
        return short + (min(long, 3 * self._quarter) if num_tokens <= self._quarter else long)

    def is_full(self) -> bool:
        """Whether not even a short interactive prompt may go."""
        return self.before(Priority.INTERACTIVE, 1) >= self._limit
