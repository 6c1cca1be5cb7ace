"""The server's prefix cache in our block hashes, from the cache events it publishes over ZeroMQ.

Its own hashes are signed 64-bit numbers; ours are chained from each event's parent, its tokens, and the cache root, which travels as
the request's cache_salt. What is published under no salt was no request of ours (a health check, a warm-up) and is left out.
"""

import asyncio
from array import array
from collections.abc import Callable, Sequence

import msgspec
from baton_runtime.errors import BatonError
from baton_runtime.hashing import HASH_BYTES, chain_hashes
from baton_runtime.log import get_logger

from baton_engine.block_states import CacheEvents

log = get_logger(__name__)

TOPIC = "kv"
_GPU_MEDIA = (None, "GPU")


class BlockStored(msgspec.Struct, frozen=True, tag=True):
    """Full pages that became reusable, a chain: block_size tokens each, of which token_ids are all."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    cache_salt: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True):
    """Pages that are reusable no longer."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """Nothing is reusable."""


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """Payload of one message."""

    timestamp: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    dp_rank: int | None = None


class CachedPrefixes:
    """What the server has cached, as far as told; what `CacheFeed` needs of a block manager."""

    def __init__(self, hash_block_tokens: int) -> None:
        self._hash_block_tokens = hash_block_tokens
        self._ours: dict[int, bytes] = {}
        self._stored: dict[bytes, None] = {}  # net change since the last drain
        self._removed: dict[bytes, None] = {}

    def apply(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        """One event."""
        if isinstance(event, AllBlocksCleared):
            return self.clear()
        if event.medium not in _GPU_MEDIA:
            return
        if isinstance(event, BlockStored):
            return self._store(event)
        for theirs in event.block_hashes:
            ours = self._ours.pop(theirs, None)
            if ours is not None:
                _note(ours, self._removed, self._stored)

    def clear(self) -> None:
        """Nothing is cached, or nothing is known."""
        for ours in self._ours.values():
            _note(ours, self._removed, self._stored)
        self._ours.clear()

    def drain_events(self) -> CacheEvents:
        """Net change since the last call."""
        events = CacheEvents(tuple(self._stored), tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events

    def drain_with_hashes(self) -> tuple[CacheEvents, Sequence[bytes]]:
        """drain_events, and all that is cached."""
        return self.drain_events(), tuple(self._ours.values())

    def _store(self, event: BlockStored) -> None:
        parent, root = self._parent(event), _root_of(event)
        if parent is None and (event.parent_block_hash is not None or root is None):
            return
        width = event.block_size
        try:
            tokens = array("I", event.token_ids)
            for index, theirs in enumerate(event.block_hashes):
                page = tokens[index * width : (index + 1) * width]
                # A chain goes on from its parent as it starts from its root.
                parent = chain_hashes(parent or root or b"", page, self._hash_block_tokens)[-1]
                if theirs not in self._ours:
                    self._ours[theirs] = parent
                    _note(parent, self._stored, self._removed)
        except (BatonError, IndexError, OverflowError):
            log.warning("kv_event_not_understood", block_size=width, num_tokens=len(event.token_ids), num_blocks=len(event.block_hashes))

    def _parent(self, event: BlockStored) -> bytes | None:
        return self._ours.get(event.parent_block_hash) if event.parent_block_hash is not None else None


def _root_of(event: BlockStored) -> bytes | None:
    try:
        root = bytes.fromhex(event.cache_salt or "")
    except ValueError:
        return None
    return root if len(root) == HASH_BYTES else None


def _note(block_hash: bytes, into: dict[bytes, None], against: dict[bytes, None]) -> None:
    if block_hash in against:
        del against[block_hash]
    else:
        into[block_hash] = None


async def follow(endpoint: str, apply: Callable[[BlockStored | BlockRemoved | AllBlocksCleared], None], lost: Callable[[], None]) -> None:
    """Take events from one publisher for ever. lost: some were missed, so nothing is known any more. To be cancelled."""
    import zmq  # an extra, with its event loop
    import zmq.asyncio

    decoder = msgspec.msgpack.Decoder(EventBatch)
    with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.connect(endpoint)
        socket.subscribe(TOPIC.encode())
        next_number: int | None = None
        while True:
            _, number_bytes, payload = await socket.recv_multipart()
            number = int.from_bytes(number_bytes, "big")
            if next_number is not None and number != next_number:
                log.warning("kv_events_missed", endpoint=endpoint, expected=next_number, got=number)
                lost()
            next_number = number + 1
            try:
                batch = decoder.decode(payload)
            except msgspec.DecodeError as error:
                log.warning("kv_events_not_understood", endpoint=endpoint, why=str(error))
                lost()
                continue
            for event in batch.events:
                apply(event)
            await asyncio.sleep(0)  # a long backlog must not keep the loop


def config_json(port: int) -> str:
    """Value of `--kv-events-config`. Without bind, SGLang connects to a loopback endpoint, and nobody ever sees an event."""
    endpoint = f"tcp://127.0.0.1:{port}"
    return msgspec.json.encode({"publisher": "zmq", "topic": TOPIC, "endpoint": endpoint, "bind": True}).decode()
