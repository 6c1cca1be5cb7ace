"""A worker that writes down every state of its handoffs, and can stop itself in one.

    python watched_worker.py prefill|decode, with BATON_WATCHED_FOLDER in the environment

<folder>/<instance>.jsonl gets a line whenever the state of a handoff changes here, or the number of blocks that are held for it, as the
block manager counts: what is left in the table or pinned after the handoff is over counts too; and one whenever a step ends. Times are of
CLOCK_MONOTONIC, which all processes of a machine share, and the file outlives a SIGKILL: what held whom at any instant can be told
afterwards.

SIGUSR1 arms: <folder>/<instance>.arm names a side, a state and peers; as soon as a handoff with one of them is in it, the process sends
itself SIGSTOP, before anything it would say about it has left. SIGUSR2 disarms.

BATON_WATCHED_PULL_DELAY_S: every pull begins so much later, as on a slow link, so that there are operations to be hit.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import baton_worker.worker
from baton_decode.config import DecodeConfig
from baton_decode.main import DecodeService
from baton_engine.api import StepOutput
from baton_handoff.actions import Action, Completed
from baton_handoff.ids import HandoffKey
from baton_handoff.manager import HandoffManager
from baton_handoff.transports import PeerPool, PullFailed, PullStats, Transport
from baton_prefill.config import PrefillConfig
from baton_prefill.main import PrefillService
from baton_runtime.config import load
from baton_runtime.lifecycle import run
from baton_worker.assembly import transports_of

# States beside those of the two state machines. MOVING: pulling, and an operation runs.
OVER, MOVING, DECODING, FETCH = "over", "moving", "decoding", "fetch"
Place = tuple[HandoffKey, str]  # side: "source" or "sink"
Fact = tuple[str, int, str]  # state, blocks held, incarnation of the peer


class WatchedManager(HandoffManager):
    """HandoffManager, but for the writing."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._facts: dict[Place, Fact] = {}
        self._decoding: dict[HandoffKey, str] = {}
        self._armed: tuple[str, str, frozenset[str]] | None = None
        self._depth = 0
        folder, name = Path(os.environ["BATON_WATCHED_FOLDER"]), os.environ["BATON_WATCHED_NAME"]
        self._arm_file = folder / f"{name}.arm"
        self._file = os.open(folder / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def open(self) -> None:
        """See HandoffManager."""
        await super().open()
        self._write({"life": self._own().incarnation, "pid": os.getpid()})
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self._arm)
        loop.add_signal_handler(signal.SIGUSR2, self._disarm)

    def on_output(self, output: StepOutput) -> None:
        """See HandoffManager."""
        self._write({"step": output.step})
        super().on_output(output)
        ended = {end.key for end in output.ends}
        for key in [key for key in self._decoding if key.sequence in ended]:
            del self._decoding[key]
        self._note()

    def _perform(self, actions: list[Action]) -> None:
        self._depth += 1
        try:
            super()._perform(actions)
        finally:
            self._depth -= 1
        if not self._depth:
            self._note()

    def _completed(self, action: Completed) -> None:
        sink = self._facts.get((action.key, "sink"))
        self._decoding[action.key] = sink[2] if sink is not None else ""
        super()._completed(action)

    def _note(self) -> None:
        """Write what has changed; stop if that is what we are armed for."""
        now = dict(self._look())
        for place, (_, held, peer) in self._facts.items():
            if place not in now and (held or self._facts[place][0] != OVER):
                now[place] = (OVER, self._held(place[0].owner), peer)
        changed = [(place, fact) for place, fact in now.items() if self._facts.get(place) != fact]
        self._facts = {place: fact for place, fact in now.items() if fact[0] != OVER or fact[1]}
        if changed:
            self._write(*(_line(place, fact) for place, fact in changed))
        if self._armed is not None:
            side, state, peers = self._armed
            if any(place[1] == side and fact[0] == state and fact[2] in peers for place, fact in now.items()):
                self._armed = None
                os.kill(os.getpid(), signal.SIGSTOP)

    def _look(self) -> Iterator[tuple[Place, Fact]]:
        for source in self._source.live:
            yield (source.key, "source"), (source.state.value, self._held(source.key.owner), source.peer.incarnation)
        for sink in (*self._sink.live, *self._sink.draining):
            state = MOVING if sink.operation and sink.state.value == "pulling" else sink.state.value
            yield (sink.key, "sink"), (state, self._held(sink.key.owner), sink.peer.incarnation)
        for key, peer in self._decoding.items():
            yield (key, "sink"), (DECODING, self._held(key.owner), peer)
        for owner, held in self._engine.blocks.pinned_owners().items():
            start = self._starts.get(owner)
            if isinstance(owner, HandoffKey) and start is not None:  # only fetches own blocks under such a name
                yield (owner, "source" if start.is_source else "sink"), (FETCH, held, start.peer_incarnation)

    def _held(self, owner: Hashable) -> int:
        """Blocks in its table, cached ones at its beginning included; without a table, those pinned for it."""
        try:
            return len(self._engine.blocks.table(owner))
        except KeyError:  # the engine's thread releases tables
            return self._engine.blocks.held(owner)

    def _arm(self) -> None:
        wanted = json.loads(self._arm_file.read_text())
        self._armed = (wanted["side"], wanted["state"], frozenset(wanted["peers"]))
        self._note()

    def _disarm(self) -> None:
        self._armed = None

    def _write(self, *lines: dict[str, object]) -> None:
        now = time.monotonic()
        os.write(self._file, "".join(json.dumps({"t": now, **line}) + "\n" for line in lines).encode())


class SlowPool:
    """A PeerPool whose operations take longer."""

    def __init__(self, inner: PeerPool, delay_s: float) -> None:
        self.name = inner.name
        self._inner = inner
        self._delay_s = delay_s
        self._dropped = asyncio.Event()

    async def pull(self, source_ids: Sequence[int], dest_ids: Sequence[int]) -> PullStats:
        """See PeerPool."""
        self._dropped.clear()
        try:
            async with asyncio.timeout(self._delay_s):
                await self._dropped.wait()
        except TimeoutError:
            return await self._inner.pull(source_ids, dest_ids)
        raise PullFailed(self.name, "peer dropped")

    def drop(self) -> None:
        """See PeerPool."""
        self._dropped.set()
        self._inner.drop()


def slow_transports(*args: Any, **settings: Any) -> list[Transport]:
    """As transports_of, but for pulls that begin later."""
    transports = transports_of(*args, **settings)
    for transport in transports:
        transport.open_peer = _slow(transport.open_peer)  # type: ignore[method-assign]
    return transports


def _slow(open_peer: Callable[..., Awaitable[PeerPool]]) -> Callable[..., Awaitable[PeerPool]]:
    async def opened(*args: Any, **settings: Any) -> PeerPool:
        return SlowPool(await open_peer(*args, **settings), float(os.environ["BATON_WATCHED_PULL_DELAY_S"]))

    return opened


def _line(place: Place, fact: Fact) -> dict[str, object]:
    key, side = place
    request = f"{key.request_id} fetch" if key.is_fetch else key.request_id
    return {"request": request, "attempt": key.attempt, "side": side, "state": fact[0], "held": fact[1], "peer": fact[2]}


if __name__ == "__main__":
    baton_worker.worker.HandoffManager = WatchedManager  # type: ignore[misc]
    baton_worker.worker.transports_of = slow_transports
    if sys.argv.pop(1) == "prefill":
        run(lambda: PrefillService(load(PrefillConfig, "prefill")))
    run(lambda: DecodeService(load(DecodeConfig, "decode")))
