from baton_engine.api import StepOutput
from baton_engine.blocks import BlockManager, CacheEvents
from baton_worker.cache_feed import MAX_SAMPLES, CacheFeed, FeedLimits, Subscriber, apply_message
from hypothesis import given
from hypothesis import strategies as st


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def cache(blocks: BlockManager, owner: str, *numbers: int) -> None:
    """Compute and leave behind blocks with these hashes."""
    blocks.acquire(owner, [], len(numbers))
    for index, number in enumerate(numbers):
        blocks.publish(owner, index, digest(number))
    blocks.release(owner)


def test_first_message_is_a_snapshot_and_the_next_a_delta() -> None:
    blocks = BlockManager(8)
    cache(blocks, "a", 1, 2)
    feed = CacheFeed(blocks)
    subscriber = feed.subscribe()
    first = feed.next_message(subscriber, 0.0)
    cache(blocks, "b", 3)
    second = feed.next_message(subscriber, 1.0)
    assert (first.sequence_number, first.snapshot, first.stored) == (1, True, digest(1) + digest(2))
    assert (second.sequence_number, second.snapshot, second.stored) == (2, False, digest(3))


def test_evicted_blocks_are_removed() -> None:
    blocks = BlockManager(2)
    cache(blocks, "a", 1, 2)
    feed = CacheFeed(blocks)
    subscriber = feed.subscribe()
    seen: set[bytes] = set()
    apply_message(seen, feed.next_message(subscriber, 0.0))
    cache(blocks, "b", 3, 4)
    apply_message(seen, feed.next_message(subscriber, 1.0))
    assert seen == {digest(3), digest(4)}


def test_hash_stored_removed_and_stored_again_is_one_store() -> None:
    subscriber = Subscriber([], FeedLimits())
    subscriber.next_message(0.0)
    for events in (CacheEvents([digest(1)], []), CacheEvents([], [digest(1)]), CacheEvents([digest(1)], [])):
        subscriber.apply(events)
    message = subscriber.next_message(1.0)
    assert (message.stored, message.removed) == (digest(1), b"")


def test_long_snapshot_travels_in_parts_and_changes_wait_for_its_end() -> None:
    subscriber = Subscriber([digest(n) for n in range(5)], FeedLimits(message_hashes=2))
    subscriber.apply(CacheEvents([], [digest(4)]))
    seen: set[bytes] = set()
    messages = [subscriber.next_message(float(n)) for n in range(4)]
    for message in messages:
        apply_message(seen, message)
    assert [message.snapshot for message in messages] == [True, False, False, False]
    assert seen == {digest(n) for n in range(4)}


def test_subscriber_that_does_not_read_gets_a_new_snapshot() -> None:
    blocks = BlockManager(64)
    feed = CacheFeed(blocks, FeedLimits(pending_hashes=10))
    subscriber = feed.subscribe()
    feed.next_message(subscriber, 0.0)
    cache(blocks, "a", *range(1, 41))
    feed.collect()
    message = feed.next_message(subscriber, 1.0)
    assert message.snapshot
    assert len(message.stored) == 40 * 16
    assert message.sequence_number == 2


def test_load_is_due_within_250_ms_and_news_sooner() -> None:
    subscriber = Subscriber([], FeedLimits())
    assert subscriber.due_in_s(0.0) == 0.0
    subscriber.next_message(0.0)
    assert 0.1 < subscriber.due_in_s(0.0) < 0.25
    subscriber.apply(CacheEvents([digest(1)], []))
    assert subscriber.due_in_s(0.0) < 0.05


def test_samples_are_the_newest_and_reported_once() -> None:
    feed = CacheFeed(BlockManager(2))
    subscriber = feed.subscribe()
    for number in range(40):
        feed.on_output(StepOutput(step=number, decode_sequences=number + 1, duration_s=0.001))
    samples = feed.next_message(subscriber, 0.0).load.samples
    assert (len(samples), samples[-1].decode_sequences, samples[-1].duration_us) == (MAX_SAMPLES, 40, 1000)
    assert not feed.next_message(subscriber, 1.0).load.samples


def test_nothing_is_kept_for_nobody() -> None:
    blocks = BlockManager(4)
    feed = CacheFeed(blocks)
    feed.unsubscribe(feed.subscribe())
    cache(blocks, "a", 1)
    feed.collect()
    assert feed.num_subscribers == 0
    assert not blocks.drain_events().stored


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.integers(0, 3)), max_size=60), st.integers(1, 5), st.integers(2, 20))
def test_reader_ends_up_with_what_is_cached(changes: list[tuple[int, bool, int]], message_hashes: int, pending: int) -> None:
    cached = {digest(0), digest(1)}
    subscriber = Subscriber(sorted(cached), FeedLimits(message_hashes=message_hashes, pending_hashes=pending))
    seen: set[bytes] = set()
    for number, is_stored, num_messages in changes:
        block_hash = digest(number)
        (cached.add if is_stored else cached.discard)(block_hash)
        subscriber.apply(CacheEvents([block_hash] if is_stored else [], [] if is_stored else [block_hash]))
        for _ in range(num_messages):
            read(subscriber, seen, cached)
    for _ in range(60):
        read(subscriber, seen, cached)
    assert seen == cached


def read(subscriber: Subscriber, seen: set[bytes], cached: set[bytes]) -> None:
    if subscriber.needs_snapshot:
        subscriber.restart(sorted(cached))
    apply_message(seen, subscriber.next_message(0.0))
