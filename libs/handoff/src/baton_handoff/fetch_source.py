"""The source's side of every fetch of this worker: which of its cached blocks are pinned for whom. A plain state machine.

States: pinned -> over (docs/handoff.md, section 9). A fetch takes no block from anybody and waits for nothing: it is answered at once,
from the cache as it is. Pins are dropped as the sink confirms, and all of them when anything goes wrong.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

from baton_engine.blocks import BlockManager

from baton_handoff.actions import Action, Report, Send
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import ConfirmAnswer, EventKind, HandoffKey, Outcome, Side
from baton_handoff.messages import CancelHandoff, Confirm, ConfirmReply, Fetch, FetchReply
from baton_handoff.tag import KvShape, fetch_tag
from baton_handoff.tombstones import Tombstone, Tombstones

FetchFromSink: TypeAlias = Fetch | Confirm | CancelHandoff


@dataclass(slots=True, eq=False, kw_only=True)
class SourceFetch:
    """One live fetch. Blocks are counted in the sequence:

    first <= confirmed <= end
    [first, confirmed)  the sink's; unpinned here
    [confirmed, end)    pinned
    """

    key: HandoffKey
    peer_incarnation: str
    first: int
    confirmed: int
    block_ids: tuple[int, ...]  # of [first, end)
    hashes: tuple[bytes, ...]  # of the same
    traceparent: str

    @property
    def end(self) -> int:
        """End of the blocks that were pinned."""
        return self.first + len(self.block_ids)


class FetchSourceBook:
    """All fetches from this worker's cache. All its mutable state: `_live` by identity, `_tombstones`, `_is_draining`."""

    def __init__(self, blocks: BlockManager, shape: KvShape, config: HandoffConfig) -> None:
        self._blocks = blocks
        self._shape = shape
        self._max_readers = config.max_readers
        self._most_pinned = int(config.fetch_pin_share * blocks.counts().total)
        self._live: dict[HandoffKey, SourceFetch] = {}
        self._tombstones = Tombstones(config.times.tombstone_s)
        self._is_draining = False
        self._out: list[Action] = []

    @property
    def live(self) -> Collection[SourceFetch]:
        """Fetches that are not over."""
        return self._live.values()

    def live_with(self, incarnation: str) -> list[SourceFetch]:
        """Fetches by that sink."""
        return [fetch for fetch in self._live.values() if fetch.peer_incarnation == incarnation]

    # Events. Each returns what is to be done, in order.

    def receive(self, peer_incarnation: str, message: FetchFromSink, now: float) -> list[Action]:
        """A message about a fetch from a sink, in the order in which it was sent."""
        if message.key.decode_incarnation != peer_incarnation:
            return []  # a sink speaks for its own fetches only
        fetch = self._live.get(message.key)
        if isinstance(message, Fetch):
            self._say(peer_incarnation, self._fetch(fetch, message, now))
        elif isinstance(message, Confirm):
            place = len(self._out)  # before what the answer causes here: somebody waits for it
            self._out.insert(
                place, Send(peer_incarnation, ConfirmReply(message.key, message.end_block, self._confirm(fetch, message, now)))
            )
        elif fetch is not None:
            self._end(fetch, Outcome.CANCELLED, now)
        return self._done()

    def link_up(self, incarnation: str, listed: Collection[HandoffKey], now: float) -> list[Action]:
        """A sink has opened or re-opened its link; listed: what it has asked for and not ended. The others are over.

        What is listed and unknown needs no word: a Fetch or a Confirm of it follows, and is answered.
        """
        for fetch in self.live_with(incarnation):
            if fetch.key not in listed:
                self._end(fetch, Outcome.CANCELLED, now)
        return self._done()

    def fence(self, incarnation: str, now: float) -> list[Action]:
        """A sink is taken for dead, or has closed its link: nothing is pinned for it any more."""
        for fetch in self.live_with(incarnation):
            self._end(fetch, Outcome.FENCED, now)
        return self._done()

    def set_draining(self) -> None:
        """Answer new fetches with nothing, finish the others."""
        self._is_draining = True

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        self._tombstones.expire(now)
        return self._done()

    # Everything below changes state and appends to _out.

    def _done(self) -> list[Action]:
        out, self._out = self._out, []
        return out

    def _fetch(self, fetch: SourceFetch | None, asked: Fetch, now: float) -> FetchReply:
        if fetch is not None:
            return FetchReply(fetch.key, fetch.first, fetch.block_ids)  # said again after a re-open
        if self._tombstones.get(asked.key) is not None:
            return FetchReply(asked.key, asked.first_block, (), "OVER")
        if self._is_draining:
            return FetchReply(asked.key, asked.first_block, (), "DRAINING")
        room = self._most_pinned - sum(other.end - other.confirmed for other in self._live.values())
        if room <= 0 or len(self._live) >= self._max_readers:
            return FetchReply(asked.key, asked.first_block, (), "BUSY")
        block_ids = tuple(self._blocks.pin_cached(asked.key.owner, asked.first_block, asked.hashes, room))
        if block_ids:
            self._begin(asked, block_ids, now)
        return FetchReply(asked.key, asked.first_block, block_ids, "" if block_ids else "NOT_CACHED")

    def _begin(self, asked: Fetch, block_ids: tuple[int, ...], now: float) -> None:
        fetch = SourceFetch(
            key=asked.key,
            peer_incarnation=asked.key.decode_incarnation,
            first=asked.first_block,
            confirmed=asked.first_block,
            block_ids=block_ids,
            hashes=asked.hashes[: len(block_ids)],
            traceparent=asked.traceparent,
        )
        self._tombstones.saw(asked.key.request_id, asked.key.attempt)
        self._live[asked.key] = fetch
        self._report(fetch, EventKind.BEGUN)

    def _confirm(self, fetch: SourceFetch | None, asked: Confirm, now: float) -> ConfirmAnswer:
        if fetch is None:
            stone = self._tombstones.get(asked.key)
            was_confirmed = stone is not None and asked.end_block <= stone.confirmed_blocks
            return ConfirmAnswer.CONFIRMED if was_confirmed else ConfirmAnswer.NOT_PINNED
        if asked.end_block <= fetch.confirmed:
            return ConfirmAnswer.CONFIRMED
        if asked.end_block > fetch.end or not self._blocks.is_trusted(fetch.key.owner):
            self._end(fetch, Outcome.NOT_PINNED, now)
            return ConfirmAnswer.NOT_PINNED
        if fetch_tag(self._shape, fetch.hashes[asked.end_block - fetch.first - 1]) != asked.tag:
            self._end(fetch, Outcome.DATA_LOSS, now)
            return ConfirmAnswer.TAG_MISMATCH
        fetch.confirmed = asked.end_block
        self._blocks.unpin(fetch.key.owner, asked.end_block)
        if fetch.confirmed == fetch.end:
            self._end(fetch, Outcome.CONFIRMED, now)
        else:
            self._report(fetch, EventKind.PROGRESS)
        return ConfirmAnswer.CONFIRMED

    def _end(self, fetch: SourceFetch, outcome: Outcome, now: float) -> None:
        """The one way out. After it nothing is pinned."""
        del self._live[fetch.key]
        self._tombstones.bury(fetch.key, Tombstone(outcome, fetch.end, fetch.confirmed), now)
        self._blocks.unpin(fetch.key.owner)
        self._report(fetch, EventKind.ENDED, outcome)

    def _say(self, incarnation: str, reply: FetchReply) -> None:
        self._out.append(Send(incarnation, reply))

    def _report(self, fetch: SourceFetch, kind: EventKind, outcome: Outcome | None = None) -> None:
        held = 0 if kind is EventKind.ENDED else fetch.end - fetch.confirmed
        confirmed = fetch.confirmed - fetch.first
        self._out.append(Report(fetch.key, Side.SOURCE, kind, fetch.peer_incarnation, held, confirmed, fetch.traceparent, outcome))
