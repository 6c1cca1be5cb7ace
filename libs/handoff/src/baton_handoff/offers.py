"""Whom a source offers next: the oldest, within its look-ahead and each sink's share of the pool."""

from collections.abc import Iterator, Mapping

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
        ahead = self._ahead_tokens(now)
        held_back: set[str] = set()  # peers whose oldest waits for its share: its younger ones would eat what it waits for
        for handoff in self._queue.due(now):
            if ahead >= self._config.look_ahead_tokens:
                return
            peer = handoff.peer.incarnation
            if not linked.get(peer) or peer in held_back:
                continue
            if len(linked) > 1 and self._is_over_share(handoff):
                held_back.add(peer)
                continue
            yield handoff
            ahead += self._counted(handoff.num_tokens)

    def _counted(self, num_tokens: int) -> int:
        # A quarter at most, so that some short prompts can be begun beside a long one and overtake it in the engine.
        return min(num_tokens, max(1, self._config.look_ahead_tokens // 4))

    def _ahead_tokens(self, now: float) -> int:
        """Tokens begun and not computed; offers count only while an answer is to be expected, or one hung sink would stop all."""
        computing = sum(
            self._counted(max(0, handoff.num_tokens - handoff.computed * self._block_tokens))
            for handoff in self._begun.values()
            if handoff.state in (SourceState.COMPUTING, SourceState.FETCHING)
        )
        return computing + sum(self._counted(handoff.num_tokens) for handoff in self._queue.recently_offered(now))

    def _is_over_share(self, handoff: SourceHandoff) -> bool:
        peer = handoff.peer.incarnation
        holding = [*self._begun.values(), *self._queue.awaiting_answer()]
        others = sum(other.num_blocks - other.confirmed for other in holding if other.peer.incarnation == peer)
        return others > 0 and others + handoff.num_blocks > self._config.peer_share * self._total_blocks
