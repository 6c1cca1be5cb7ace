"""Simulated workers that fetch from each other, with the real books and the real block manager: no loop, no sockets, a clock moved
by hand. As `world`, which has handoffs; here every worker is source and sink to every other, and a block's content is its hash.
"""

from collections import deque
from dataclasses import dataclass

from baton_engine.api import Priority, SequenceKey
from baton_engine.blocks import BlockManager
from baton_engine.pool import BlockLayout

from baton_handoff.actions import Action, FetchEnded, Report, Send, StartPull
from baton_handoff.config import HandoffConfig
from baton_handoff.fetch_plan import FetchPlan
from baton_handoff.fetch_sink import FetchSinkBook, SinkFetch
from baton_handoff.fetch_source import FetchSourceBook
from baton_handoff.ids import FailureCause, FetchEnd, HandoffKey, PeerRef, Side
from baton_handoff.messages import Message
from baton_handoff.tag import KvShape

LAYOUT = BlockLayout(num_layers=1, block_tokens=2, num_kv_heads=1, head_dim=1, dtype="float32")
CONFIG = HandoffConfig(operation_bytes=2 * LAYOUT.block_bytes, fetch_min_tokens=2, fetch_pin_share=1.0)
LIMIT_S = 5.0


def chain(text: str) -> list[bytes]:
    """One hash per character, 16 bytes; equal prefixes have equal hashes. The content of a block is its hash."""
    return [text[: end + 1].encode().ljust(16, b".") for end in range(len(text))]


@dataclass
class Pull:
    start: StartPull
    memory: list[bytes]  # of the source's life it reads
    done: int = 0


class Peer:
    """One life of a worker: both books over one block manager."""

    def __init__(self, name: str, life: int, num_blocks: int, config: HandoffConfig) -> None:
        self.name, self.life, self.incarnation = name, life, f"{name}.{life}"
        self.blocks = BlockManager(num_blocks)
        self.memory = [b""] * num_blocks
        shape = KvShape(self.incarnation, "model", LAYOUT, 2)
        self.source = FetchSourceBook(self.blocks, shape, config)
        self.sink = FetchSinkBook(self.blocks, shape, config)
        self.is_stopped = False
        self.pulls: dict[int, Pull] = {}
        self.returned: deque[tuple[int, FailureCause | None]] = deque()
        self.booked: dict[tuple[HandoffKey, Side], int] = {}
        self.ends: dict[HandoffKey, FetchEnd] = {}

    def cache(self, text: str) -> None:
        """Compute a chain and leave it in the prefix cache, as far as there is room."""
        owner, hashes = SequenceKey(f"own {text}", 1), chain(text)
        if len(hashes) > self.blocks.available():
            return
        shared = self.blocks.acquire(owner, hashes, len(hashes))
        for index, block in enumerate(self.blocks.table(owner)):
            assert self.memory[block] == hashes[index] or index >= shared, "attended to a block with foreign content"
            self.memory[block] = hashes[index]
            self.blocks.publish(owner, index, hashes[index])
        self.blocks.release(owner)

    def overwrite(self) -> None:
        """A sequence of its own uses every block it may have, writes to them, and is over."""
        counts = self.blocks.counts()
        if counts.free + counts.cached:
            owner = SequenceKey("own", 1)
            self.blocks.acquire(owner, [], counts.free + counts.cached)
            for block in self.blocks.table(owner):
                self.memory[block] = b"own"
            self.blocks.release(owner)


class Net:
    """Links are FIFO within a direction, break, lose what is on the way, and are opened again with a hello."""

    def __init__(self, names: str = "ab", num_blocks: int = 16, config: HandoffConfig = CONFIG) -> None:
        self.config, self.num_blocks, self.now = config, num_blocks, 1000.0
        self.peers = {name: Peer(name, 1, num_blocks, config) for name in names}
        self.up: dict[tuple[str, str], deque[object]] = {}  # (sink life, source life): open links only
        self.down: dict[tuple[str, str], deque[Message]] = {}
        self.welcomed: set[tuple[str, str]] = set()

    def find(self, incarnation: str) -> Peer | None:
        peer = self.peers[incarnation[0]]
        return peer if peer.incarnation == incarnation else None

    # What the manager does.

    def fetch(self, sink: str, source: str, text: str, request: str = "r") -> HandoffKey:
        """A new attempt wants the blocks of a text."""
        peer, hashes = self.peers[sink], chain(text)
        key = HandoffKey(request, 1, peer.incarnation, is_fetch=True)
        ref = PeerRef(source, self.peers[source].incarnation)
        fetch = SinkFetch(
            key=key,
            peer=ref,
            priority=Priority.INTERACTIVE,
            plan=FetchPlan(LAYOUT, LAYOUT, hashes, hashes),
            deadline=self.now + LIMIT_S,
            traceparent="",
        )
        self.perform(peer, peer.sink.start(fetch, is_linked=(peer.incarnation, ref.incarnation) in self.up))
        return key

    def open(self, sink: str, source: str) -> None:
        a, b = self.peers[sink], self.peers[source]
        link = (a.incarnation, b.incarnation)
        if link in self.up or a.is_stopped:
            return
        self.up[link], self.down[link] = deque([("hello", a.sink.begun_with(b.incarnation))]), deque()
        self.perform(a, a.sink.link_up(b.incarnation))

    def cut(self, link: tuple[str, str]) -> None:
        self.up.pop(link, None)
        self.down.pop(link, None)
        self.welcomed.discard(link)

    def deliver_up(self, link: tuple[str, str], times: int = 1) -> None:
        source = self.find(link[1])
        if source is None or source.is_stopped or not self.up.get(link):
            return
        message = self.up[link].popleft()
        for _ in range(times):
            if isinstance(message, tuple):
                self.welcomed.add(link)
                self.perform(source, source.source.link_up(link[0], message[1], self.now))
            else:
                self.perform(source, source.source.receive(link[0], message, self.now))  # type: ignore[arg-type]

    def deliver_down(self, link: tuple[str, str], times: int = 1) -> None:
        sink = self.find(link[0])
        if sink is None or sink.is_stopped or not self.down.get(link):
            return
        message = self.down[link].popleft()
        for _ in range(times):
            self.perform(sink, sink.sink.receive(link[1], message))  # type: ignore[arg-type]

    def talk(self) -> None:
        while any(self.up.values()) or any(self.down.values()):
            for link in list(self.up):
                self.deliver_up(link)
                self.deliver_down(link)

    def fence(self, name: str, incarnation: str, *, closes_links: bool = True) -> None:
        peer = self.peers[name]
        if peer.is_stopped:
            return
        for link in [link for link in self.up if closes_links and set(link) == {peer.incarnation, incarnation}]:
            self.cut(link)
        self.perform(peer, peer.source.fence(incarnation, self.now))
        self.perform(peer, peer.sink.fence(incarnation))

    def crash(self, name: str) -> None:
        old = self.peers[name]
        for link in [link for link in self.up if old.incarnation in link]:
            self.cut(link)
        self.peers[name] = Peer(name, old.life + 1, self.num_blocks, self.config)

    def wake(self, name: str) -> None:
        peer = self.peers[name]
        peer.is_stopped = False
        for other in self.peers.values():
            if other is not peer:
                self.fence(name, other.incarnation)

    def pull_block(self, peer: Peer, operation: int) -> None:
        """The transport's thread copies one more block, whatever the loop does."""
        pull = peer.pulls.get(operation)
        if pull is not None and pull.done < len(pull.start.dest_ids):
            dest = pull.start.dest_ids[pull.done]
            assert dest in peer.blocks.table(pull.start.key.owner), "an operation wrote to a block it no longer owns"
            peer.memory[dest] = pull.memory[pull.start.source_ids[pull.done]]
            pull.done += 1

    def pull_ends(self, peer: Peer, operation: int) -> None:
        pull = peer.pulls.pop(operation)
        is_done = pull.done == len(pull.start.dest_ids)
        peer.returned.append((operation, None if is_done else FailureCause.PATH_DOWN))

    def pull_seen(self, peer: Peer) -> None:
        if peer.returned and not peer.is_stopped:
            self.perform(peer, peer.sink.pull_returned(*peer.returned.popleft()))

    def pull_all(self, name: str) -> None:
        """Running operations copy everything and are seen."""
        peer = self.peers[name]
        for operation, pull in list(peer.pulls.items()):
            for _ in pull.start.dest_ids:
                self.pull_block(peer, operation)
            self.pull_ends(peer, operation)
        while peer.returned and not peer.is_stopped:
            self.pull_seen(peer)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for peer in self.peers.values():
            if not peer.is_stopped:
                self.perform(peer, peer.source.tick(self.now))
                self.perform(peer, peer.sink.tick(self.now))

    def perform(self, peer: Peer, actions: list[Action]) -> list[Message]:
        said: list[Message] = []
        for action in actions:
            if isinstance(action, Send):
                said.append(action.message)
                self._send(peer, action)
            elif isinstance(action, StartPull):
                source = self.find(action.peer_incarnation)
                peer.pulls[action.operation] = Pull(action, source.memory if source is not None else [b""] * self.num_blocks)
            elif isinstance(action, Report):
                peer.booked[action.key, action.side] = action.held_blocks
            elif isinstance(action, FetchEnded):
                assert action.key not in peer.ends, "ended twice"
                peer.ends[action.key] = action.end
        self.check(peer)
        return said

    def _send(self, peer: Peer, action: Send) -> None:
        up, down = (peer.incarnation, action.peer_incarnation), (action.peer_incarnation, peer.incarnation)
        if action.message.key.decode_incarnation == peer.incarnation:
            if up in self.up:
                self.up[up].append(action.message)
        elif down in self.welcomed:
            self.down[down].append(action.message)

    # What must always hold.

    def check(self, peer: Peer) -> None:
        peer.blocks.check()
        for block_hash, block in peer.blocks._states.by_hash.items():
            assert peer.memory[block] == block_hash, "a published block has foreign content"
        held = peer.blocks.pinned_owners()
        assert sum(peer.booked.values()) == sum(held.values()), "reports and block manager differ"
        for fetch in peer.sink.live:
            assert fetch.is_begun or not peer.blocks.has_table(fetch.key.owner), "waits while holding"

    def settle(self) -> None:
        """From here on nobody fails: everything ends, and nobody holds anything."""
        for peer in self.peers.values():
            if peer.is_stopped:
                self.wake(peer.name)
        for link in list(self.up):
            self.cut(link)
        for peer in self.peers.values():
            for other in self.peers.values():
                for life in range(1, other.life):
                    self.fence(peer.name, f"{other.name}.{life}")
        for _ in range(200):
            for a in self.peers.values():
                for fetch in list(a.sink.live):
                    self.open(a.name, fetch.peer.incarnation[0])
                for pinned in list(a.source.live):
                    self.open(pinned.peer_incarnation[0], a.name)
            self.talk()
            for name in self.peers:
                self.pull_all(name)
            self.pass_time(0.1)
        for peer in self.peers.values():
            assert not peer.sink.live
            assert not peer.sink.draining
            assert not peer.source.live
            assert not peer.blocks.pinned_owners()
            counts = peer.blocks.counts()
            assert (counts.pinned, counts.reserved, counts.used) == (0, 0, 0), f"{peer.name} still holds {counts}"
