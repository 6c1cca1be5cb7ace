"""The feed of cache events and load for routers: a snapshot, then deltas, per subscriber and bounded.

Block hashes become and stop being reusable faster than a router may read. Per subscriber only the net change since its last
message is kept; when that grows beyond a bound it is dropped, and the next message is a snapshot again.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from baton_contracts.worker.v1 import worker_service_pb2 as pb
from baton_engine.api import PrefixCache, StepOutput
from baton_engine.blocks import CacheEvents

MAX_SAMPLES = 32  # of one message; proto/baton/worker/v1/worker_service.proto


@dataclass(frozen=True, slots=True)
class FeedLimits:
    """message_hashes: hashes in one message (16 bytes each). pending_hashes: net changes kept for a subscriber that does not
    read, beyond which it gets a snapshot instead. load_s: longest time without load, below the promised 250 ms. min_gap_s: shortest
    time between two messages, in which changes gather."""

    message_hashes: int = 65_536
    pending_hashes: int = 262_144
    load_s: float = 0.2
    min_gap_s: float = 0.02


class Subscriber:
    """One router's view of the cache on its way.

    State: `_snapshot`, hashes of a snapshot that are not sent yet; `_changes`, what became of a hash after that: reusable or
    not. A snapshot travels in several messages if it is long; changes wait until it has left, so that they are applied after it.
    """

    def __init__(self, hashes: Sequence[bytes], limits: FeedLimits, wake: Callable[[], None] = lambda: None) -> None:
        self._limits = limits
        self._wake = wake  # called when there is something new to say
        self._snapshot: Sequence[bytes] = hashes
        self._sent_of_snapshot = 0
        self._starts_snapshot = True
        self._needs_snapshot = False
        self._changes: dict[bytes, bool] = {}
        self._samples: deque[pb.StepSample] = deque(maxlen=MAX_SAMPLES)
        self._number = 0
        self._last_message_at = float("-inf")

    def apply(self, events: CacheEvents) -> None:
        """What changed in the cache."""
        if self._needs_snapshot or not (events.stored or events.removed):
            return
        for block_hash in events.stored:
            self._changes[block_hash] = True
        for block_hash in events.removed:
            self._changes[block_hash] = False
        if len(self._changes) > self._limits.pending_hashes:
            self._changes.clear()
            self._needs_snapshot = True
        self._wake()

    def add_sample(self, sample: pb.StepSample) -> None:
        """A step was done."""
        self._samples.append(sample)
        self._wake()

    @property
    def has_news(self) -> bool:
        """Whether there is anything but load to say."""
        is_in_snapshot = self._starts_snapshot or self._needs_snapshot or self._sent_of_snapshot < len(self._snapshot)
        return bool(is_in_snapshot or self._changes or self._samples)

    @property
    def needs_snapshot(self) -> bool:
        """It fell behind: give it `restart` before the next message."""
        return self._needs_snapshot

    def restart(self, hashes: Sequence[bytes]) -> None:
        """Begin again with these hashes."""
        self._snapshot, self._sent_of_snapshot, self._starts_snapshot = hashes, 0, True
        self._changes.clear()
        self._needs_snapshot = False

    def due_in_s(self, now: float) -> float:
        """Seconds until the next message may or must go."""
        wait_s = self._limits.min_gap_s if self.has_news else self._limits.load_s
        return max(0.0, self._last_message_at + wait_s - now)

    def next_message(self, now: float) -> pb.WatchWorkerResponse:
        """The next message but for beat, incarnation and the numbers of load, which the caller fills in."""
        self._number += 1
        self._last_message_at = now
        message = pb.WatchWorkerResponse(sequence_number=self._number, snapshot=self._starts_snapshot)
        self._starts_snapshot = False
        limit = self._limits.message_hashes
        if self._sent_of_snapshot < len(self._snapshot):
            part = self._snapshot[self._sent_of_snapshot : self._sent_of_snapshot + limit]
            self._sent_of_snapshot += len(part)
            message.stored = b"".join(part)
        else:
            self._snapshot, self._sent_of_snapshot = (), 0
            changed = [self._changes.popitem() for _ in range(min(limit, len(self._changes)))]
            message.stored = b"".join(block_hash for block_hash, is_stored in changed if is_stored)
            message.removed = b"".join(block_hash for block_hash, is_stored in changed if not is_stored)
        message.load.samples.extend(self._samples)
        self._samples.clear()
        return message


class CacheFeed:
    """All subscribers. Call `collect` after steps and before messages; it moves the block manager's events to all of them."""

    def __init__(self, cache: PrefixCache, limits: FeedLimits | None = None) -> None:
        self._cache = cache
        self._limits = limits if limits is not None else FeedLimits()
        self._subscribers: set[Subscriber] = set()

    @property
    def num_subscribers(self) -> int:
        """Open feeds."""
        return len(self._subscribers)

    def subscribe(self, wake: Callable[[], None] = lambda: None) -> Subscriber:
        """A new feed, which starts with everything that is cached now. wake: called when there is something new to say."""
        subscriber = Subscriber(self._hashes(), self._limits, wake)
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """The feed is over. Idempotent."""
        self._subscribers.discard(subscriber)

    def collect(self) -> None:
        """Take what changed from the block manager and tell every subscriber; without one the events end here."""
        self._apply(self._cache.drain_events())

    def on_output(self, output: StepOutput) -> None:
        """One step was done: a sample for everyone who fits speeds."""
        if not self._subscribers or not (output.prefill_tokens or output.decode_sequences):
            return
        sample = pb.StepSample(
            prefill_tokens=output.prefill_tokens,
            decode_sequences=output.decode_sequences,
            kv_tokens=output.kv_tokens,
            duration_us=int(output.duration_s * 1e6),
        )
        for subscriber in self._subscribers:
            subscriber.add_sample(sample)

    def next_message(self, subscriber: Subscriber, now: float) -> pb.WatchWorkerResponse:
        """What to tell this subscriber now; see Subscriber.next_message."""
        self.collect()
        if subscriber.needs_snapshot:
            subscriber.restart(self._hashes())
        return subscriber.next_message(now)

    def _hashes(self) -> Sequence[bytes]:
        """Everything cached now; all changes up to now have been told."""
        events, hashes = self._cache.drain_with_hashes()
        self._apply(events)
        return hashes

    def _apply(self, events: CacheEvents) -> None:
        for subscriber in self._subscribers:
            subscriber.apply(events)


def apply_message(hashes: set[bytes], message: pb.WatchWorkerResponse) -> None:
    """What a reader does with a message: the definition of the feed, for tests and routers."""
    if message.snapshot:
        hashes.clear()
    hashes.update(_split(message.stored))
    hashes.difference_update(_split(message.removed))


def _split(column: bytes) -> Iterable[bytes]:
    return (column[start : start + 16] for start in range(0, len(column), 16))
