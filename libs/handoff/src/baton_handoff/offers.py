"""Whom a source offers next: the oldest, within its look-ahead and each sink's share of the pool."""

from collections.abc import Iterable, Iterator, Mapping

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
            if self._tokens_before(handoff, ahead) >= self._config.look_ahead_tokens:
                continue
            peer = handoff.peer.incarnation
            if not linked.get(peer) or peer in held_back:
                continue
            if len(linked) > 1 and self._is_over_share(handoff):
                held_back.add(peer)
                continue
            yield handoff
            ahead.append((handoff.priority, handoff.num_tokens))

    def _tokens_before(self, handoff: SourceHandoff, ahead: Iterable[tuple[Priority, int]]) -> int:
        """Tokens of those under way that the engine takes before it, or may.

        Batch work never holds an interactive prompt back, which the engine takes first. A long prompt counts a quarter of the look-ahead
        at most, and all of them together three quarters for a short one, which overtakes them.
        """
        quarter = max(1, self._config.look_ahead_tokens // 4)
        counted = [tokens for priority, tokens in ahead if priority <= handoff.priority]
        long = quarter * sum(tokens > quarter for tokens in counted)
        short = sum(tokens for tokens in counted if tokens <= quarter)
        return short + (min(long, 3 * quarter) if handoff.num_tokens <= quarter else long)

    def _ahead(self, now: float) -> list[tuple[Priority, int]]:
        """Class of each that is begun and not computed, and tokens to go; offers count only while an answer is to be expected, or one
        hung sink would stop all."""
        computing = [
            (handoff.priority, max(0, handoff.num_tokens - handoff.computed * self._block_tokens))
            for handoff in self._begun.values()
            if handoff.state in (SourceState.COMPUTING, SourceState.FETCHING)
        ]
        return computing + [(handoff.priority, handoff.num_tokens) for handoff in self._queue.recently_offered(now)]

    def _is_over_share(self, handoff: SourceHandoff) -> bool:
        peer = handoff.peer.incarnation
        holding = [*self._begun.values(), *self._queue.awaiting_answer()]
        others = sum(other.num_blocks - other.confirmed for other in holding if other.peer.incarnation == peer)
        return others > 0 and others + handoff.num_blocks > self._config.peer_share * self._total_blocks
