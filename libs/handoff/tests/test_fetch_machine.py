"""Random histories of workers that fetch from each other: they stop, wake and die, links break, blocks are evicted and used again.

What is checked after every event is in `Net.check`: published blocks hold what their hash says, reports and block manager agree.
"""

import random

import pytest
from baton_handoff.ids import FetchOutcome
from baton_handoff.testing.fetch_net import LIMIT_S, Net, Peer


class History:
    """Random events drawn by a seed."""

    TEXTS = ("abcdef", "abcxyz", "abcdefgh", "qrstu", "abq", "z")

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.net = Net("abc"[: self.random.randint(2, 3)], num_blocks=self.random.choice([6, 10, 24]))
        chaos = [
            self.cut,
            self.fence,
            self.crash,
            self.stop_or_wake,
            self.pull_fails,
            self.duplicate,
            self.cancel,
            self.overwrite,
            self.late,
        ]
        self.chaos = self.random.sample(chaos, self.random.randint(1, 5))
        self.num_fetches = 0

    def run(self) -> None:
        share = self.random.choice([0.01, 0.05, 0.15])
        for _ in range(self.random.randint(20, 300)):
            drawn = self.random.random()
            if drawn < share:
                self.random.choice(self.chaos)()
            elif drawn > 0.92:
                self.fetch()
            elif drawn > 0.86:
                self.peer().cache(self.random.choice(self.TEXTS))
            elif steps := self.steps():
                self.random.choice(steps)()
        self.net.settle()

    def steps(self) -> list:
        net, steps = self.net, []
        for peer in net.peers.values():
            wanted = [fetch.peer.incarnation for fetch in peer.sink.live if net.find(fetch.peer.incarnation) is not None]
            steps += [lambda a=peer.name, b=b[0]: net.open(a, b) for b in wanted if (peer.incarnation, b) not in net.up]
            for operation, pull in peer.pulls.items():
                if pull.done < len(pull.start.dest_ids):
                    steps.append(lambda peer=peer, operation=operation: net.pull_block(peer, operation))
                else:
                    steps.append(lambda peer=peer, operation=operation: net.pull_ends(peer, operation))
            if peer.returned:
                steps.append(lambda peer=peer: net.pull_seen(peer))
        for link in net.up:
            steps += [lambda link=link: net.deliver_up(link)] * bool(net.up[link])
            steps += [lambda link=link: net.deliver_down(link)] * bool(net.down[link])
        return steps

    def peer(self) -> Peer:
        return self.random.choice(list(self.net.peers.values()))

    def fetch(self) -> None:
        sink, source = self.random.sample(list(self.net.peers), 2)
        if not self.net.peers[sink].is_stopped:
            self.num_fetches += 1
            self.net.fetch(sink, source, self.random.choice(self.TEXTS), f"r{self.num_fetches}")

    def cut(self) -> None:
        if self.net.up:
            self.net.cut(self.random.choice(list(self.net.up)))

    def fence(self) -> None:
        a, b = self.random.sample(list(self.net.peers), 2)
        self.net.fence(a, self.net.peers[b].incarnation, closes_links=self.random.random() < 0.4)
        if self.random.random() < 0.6:
            self.net.peers[a].overwrite()

    def crash(self) -> None:
        self.net.crash(self.peer().name)

    def stop_or_wake(self) -> None:
        peer = self.peer()
        if peer.is_stopped:
            self.net.wake(peer.name)
        else:
            peer.is_stopped = True

    def pull_fails(self) -> None:
        for peer in self.net.peers.values():
            for operation in list(peer.pulls)[:1]:
                self.net.pull_ends(peer, operation)

    def duplicate(self) -> None:
        if self.net.up:
            deliver = self.random.choice([self.net.deliver_up, self.net.deliver_down])
            deliver(self.random.choice(list(self.net.up)), times=2)

    def cancel(self) -> None:
        peer = self.peer()
        if not peer.is_stopped and peer.sink.live:
            key = self.random.choice([fetch.key for fetch in peer.sink.live])
            self.net.perform(peer, peer.sink.cancel(key.request_id, 1, "CLIENT_GONE"))

    def overwrite(self) -> None:
        self.peer().overwrite()

    def late(self) -> None:
        self.net.pass_time(self.random.choice([0.1, LIMIT_S]))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first_seed", range(0, 600, 100))
def test_no_history_of_fetches_breaks_a_law(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        try:
            History(seed).run()
        except Exception as error:
            error.add_note(f"History({seed}).run()")
            raise


def test_histories_do_something() -> None:
    """Else the laws would hold for lack of events: most ends of a fetch are to be met, and many blocks arrive."""
    ends = []
    for seed in range(60):
        history = History(seed)
        history.run()
        ends += [end for peer in history.net.peers.values() for end in peer.ends.values()]
    assert {end.outcome for end in ends} >= {FetchOutcome(name) for name in ("fetched", "partial", "not_found", "timeout", "fenced")}
    assert sum(end.num_tokens for end in ends) > 200
