"""Random histories of one or two sources and sinks: processes stop, wake and die, links break, requests are placed again."""

import random

import pytest
from baton_engine.api import Priority
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import FailureCause
from baton_handoff.testing.world import LAYOUT, World
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

# Prompts share prefixes, so that caches on both sides matter; with two tokens per block and six blocks, two requests fit.
PROMPTS = [(1, 2, 3, 4, 5), (1, 2, 3, 4, 6, 7), (1, 2, 8), (9, 9, 9, 9, 9, 9, 9), (1, 2)]
LONG_PROMPTS = [(1, 2, 3, *range(50, 60)), (1, 2, 3, *range(50, 64)), tuple(range(70, 86))]  # up to eight blocks
LINK = st.integers(0, 3)
PROCESS = st.integers(0, 3)
THEN = st.integers(0, 1 << 20)
BLOCK_TOKENS = [(2, 2), (2, 4), (4, 2), (2, 8), (8, 2)]  # of sources and of sinks


class ProtocolMachine(RuleBasedStateMachine):
    """Every rule is an event of the world; the world checks the laws after each."""

    @initialize(sources=st.integers(1, 2), sinks=st.integers(1, 2), block_tokens=st.sampled_from(BLOCK_TOKENS))
    def build(self, sources: int, sinks: int, block_tokens: tuple[int, int]) -> None:
        num_blocks = 6 if max(block_tokens) < 8 else 12  # two requests fit, as told above
        self.world = World(sources, sinks, num_blocks, block_tokens=block_tokens)
        self.names = list(self.world.processes)
        for sink, source in self.world.links:
            self.world.open_link(sink, source)

    def name(self, number: int) -> str:
        return self.names[number % len(self.names)]

    def link(self, number: int) -> tuple[str, str]:
        return list(self.world.links)[number % len(self.world.links)]

    def open_requests(self) -> list[str]:
        return [request_id for request_id, request in self.world.frontend.requests.items() if not request.is_over]

    @rule(link=LINK, prompt=st.sampled_from(PROMPTS), priority=st.sampled_from(list(Priority)), how_many=st.integers(1, 3), then=THEN)
    def place_new(self, link: int, prompt: tuple[int, ...], priority: Priority, how_many: int, then: int) -> None:
        for _ in range(how_many):
            if len(self.open_requests()) < 8:
                request_id = f"r{len(self.world.frontend.requests)}"
                self.world.submit(request_id, prompt, priority)
                sink, source = self.link(link)
                self.world.place(request_id, source, sink)
        self.go_on(then)

    @precondition(lambda self: self.open_requests())
    @rule(request=st.integers(0, 7), link=LINK, then=THEN)
    def place_again(self, request: int, link: int, then: int) -> None:
        request_id = self.open_requests()[request % len(self.open_requests())]
        sink, source = self.link(link)
        if self.world.frontend.requests[request_id].attempt < 4:
            self.world.place(request_id, source, sink)
        self.go_on(then)

    @precondition(lambda self: self.open_requests())
    @rule(request=st.integers(0, 7), then=THEN)
    def cancel(self, request: int, then: int) -> None:
        self.world.cancel(self.open_requests()[request % len(self.open_requests())])
        self.go_on(then)

    @rule(then=THEN)
    def go_on(self, then: int) -> None:
        """Steps that bring something forward, in any order across processes and links.

        How many and which is drawn as one number, because hypothesis prefers short lists and quiet histories find nothing.
        """
        choices = random.Random(then)
        for _ in range(then % 48):
            steps = self.world.enabled()
            if steps:
                choices.choice(steps)()
            else:
                self.world.pass_time(0.25)

    @rule(link=LINK, is_up=st.booleans(), then=THEN)
    def duplicate(self, link: int, is_up: bool, then: int) -> None:
        deliver = self.world.deliver_up if is_up else self.world.deliver_down
        deliver(*self.link(link), duplicate=True)
        self.go_on(then)

    @rule(link=LINK, is_opened_again=st.booleans(), then=THEN)
    def break_link(self, link: int, is_opened_again: bool, then: int) -> None:
        self.world.break_link(*self.link(link))
        if is_opened_again:
            self.world.open_link(*self.link(link))
        self.go_on(then)

    @rule(number=st.integers(0, 3), then=THEN)
    def pull_fails(self, number: int, then: int) -> None:
        running = [(name, operation) for name, process in self.world.processes.items() for operation in process.pulls]
        if running:
            name, operation = running[number % len(running)]
            self.world.pull_ends(name, operation, FailureCause.PATH_DOWN)
        self.go_on(then)

    @rule(seconds=st.sampled_from([0.02, 0.25, 1.5, 70.0]))
    def pass_time(self, seconds: float) -> None:
        if seconds > 60:  # nothing is on its way for longer than a tombstone lives
            if any(process.is_stopped for process in self.world.processes.values()):
                return
            self.deliver_all()
        self.world.pass_time(seconds)

    def deliver_all(self) -> None:
        while self.world.frontend.pending:
            self.world.deliver_pending()
        for (sink, source), link in self.world.every_link().items():
            while link.up or link.down:
                self.world.deliver_up(sink, source)
                self.world.deliver_down(sink, source)
        if self.world.frontend.pending:  # what arrived made the frontend cancel something
            self.deliver_all()

    @rule(process=PROCESS, then=THEN)
    def stop_or_wake(self, process: int, then: int) -> None:
        name = self.name(process)
        if self.world.processes[name].is_stopped:
            self.world.wake(name)
        else:
            self.world.stop(name)
        self.go_on(then)

    @rule(link=LINK, by_sink=st.booleans(), closes_links=st.booleans(), then=THEN)
    def fence(self, link: int, by_sink: bool, closes_links: bool, then: int) -> None:
        """Rightly or not, and even if the other side goes on talking: laws and accounts must hold."""
        sink, source = self.link(link)
        observer, observed = (sink, source) if by_sink else (source, sink)
        self.world.fence(observer, self.world.processes[observed].incarnation, closes_links=closes_links)
        self.go_on(then)

    @rule(process=PROCESS, then=THEN)
    def crash(self, process: int, then: int) -> None:
        self.world.crash(self.name(process))
        self.go_on(then)

    @rule(process=PROCESS, then=THEN)
    def own_work(self, process: int, then: int) -> None:
        self.world.own_work(self.name(process))
        self.go_on(then)

    @rule(process=PROCESS)
    @precondition(lambda self: len(self.world.completions) > 2)
    def drain(self, process: int) -> None:
        self.world.drain(self.name(process))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


class RandomHistory:
    """The same events drawn by a seed alone: no shrinking, but ten times as many histories in the same time, and busier ones."""

    def __init__(self, seed: int, *, fetches: bool = False, native: bool = False) -> None:
        """fetches: prefill instances fetch what decode, or whom a hint names, has cached. native: the engines move KV themselves."""
        self.random = random.Random(seed)
        self.fetches = fetches
        # Half of the histories have blocks of one size, as most fleets do.
        block_tokens = self.random.choice([(2, 2), self.random.choice(BLOCK_TOKENS)])
        num_blocks = self.random.choice([8, 20, 40] if fetches else [4, 8, 20])  # a fetch takes only what is to spare
        num_sources, num_sinks = self.random.randint(1, 2), self.random.randint(1, 2)
        block_tokens = (2, 2) if native else block_tokens
        self.world = World(num_sources, num_sinks, num_blocks, self._config(), block_tokens=block_tokens, fetches=fetches, native=native)
        self.prompts = PROMPTS if self.world.num_blocks < 8 else [*PROMPTS, *LONG_PROMPTS]
        self.waited_s = 0.0
        self.links = list(self.world.links)
        self.every_link = list(self.world.every_link())
        chaos = [self.break_link, self.fence, self.crash, self.stop_or_wake, self.pull_fails, self.duplicate, self.cancel]
        chaos += [self.place_again, self.own_work]
        # Each history has some kinds of trouble only, and some have a frontend whose messages are late: else one hides the other.
        self.chaos = self.random.sample(chaos, self.random.randint(1, 4))
        if fetches:
            self.chaos += [self.forget] * 2
        self.frontend_delay = self.random.choice([0.0, 0.9, 0.97])

    def _config(self) -> HandoffConfig:
        """Few places to read a source in half of the histories."""
        max_readers, max_readers_per_sink = self.random.choice([(8, 4), self.random.choice([(1, 1), (2, 1)])])
        operation_bytes = 2 * LAYOUT.block_bytes
        return HandoffConfig(
            operation_bytes=operation_bytes, max_readers=max_readers, max_readers_per_sink=max_readers_per_sink, fetch_min_tokens=2
        )

    def run(self) -> None:
        share_of_chaos = self.random.choice([0.01, 0.03, 0.1, 0.2])
        for _ in range(self.random.randint(10, 400)):
            drawn = self.random.random()
            if drawn < share_of_chaos:
                self.random.choice(self.chaos)()
            elif drawn > 0.93 and len(self.open_requests()) < 8:
                self.place_new()
            elif steps := self.world.enabled(with_frontend=self.random.random() >= self.frontend_delay):
                self.random.choice(steps)()
            else:
                self.pass_time()
        self.world.settle()

    def pass_time(self) -> None:
        """Nothing is on its way for longer than a tombstone lives."""
        self.waited_s = self.waited_s + 0.25 if self.world.frontend.pending else 0.0
        self.world.pass_time(0.25)
        if self.waited_s > 40.0:
            for name, process in self.world.processes.items():
                if process.is_stopped:
                    self.world.wake(name)
            while self.world.frontend.pending:
                self.world.deliver_pending()

    def open_requests(self) -> list[str]:
        return [name for name, request in self.world.frontend.requests.items() if not request.is_over]

    def place_new(self) -> None:
        name = f"r{len(self.world.frontend.requests)}"
        self.world.submit(name, self.random.choice(self.prompts), self.random.choice(list(Priority)))
        sink, source = self.random.choice(self.links)
        self.world.place(name, source, sink, self.hint())

    def hint(self) -> str:
        """Who is said to have the whole prompt, rightly or not."""
        return self.random.choice(["", "", *self.world.processes]) if self.fetches else ""

    def break_link(self) -> None:
        self.world.break_link(*self.random.choice(self.every_link))

    def fence(self) -> None:
        busy = [link for link in self.links if any(h.is_begun for h in self.world.processes[link[1]].source.live)]
        fetching = [link for link in self.world.back_links if self.world.processes[link[0]].fetch_sink.live]
        sink, source = self.random.choice(busy + fetching or self.links)
        observer, observed = (source, sink) if self.random.random() < 0.7 else (sink, source)
        # Links that stay open let the other side go on in good faith; the books must find it out without being told.
        self.world.fence(observer, self.world.processes[observed].incarnation, closes_links=self.random.random() < 0.3)
        if self.random.random() < 0.7:
            self.world.own_work(observer)  # what was pinned is used for something else at once

    def crash(self) -> None:
        self.world.crash(self.random.choice(list(self.world.processes)))

    def stop_or_wake(self) -> None:
        name = self.random.choice(list(self.world.processes))
        (self.world.wake if self.world.processes[name].is_stopped else self.world.stop)(name)

    def own_work(self) -> None:
        self.world.own_work(self.random.choice(list(self.world.processes)))

    def forget(self) -> None:
        """A prefill instance loses its cache."""
        self.world.own_work(self.random.choice(self.links)[1])

    def pull_fails(self) -> None:
        for name, process in self.world.processes.items():
            for operation in list(process.pulls)[:1]:
                self.world.pull_ends(name, operation)

    def duplicate(self) -> None:
        self.random.choice([self.world.deliver_up, self.world.deliver_down])(*self.random.choice(self.every_link), duplicate=True)

    def cancel(self) -> None:
        if open_requests := self.open_requests():
            self.world.cancel(self.random.choice(open_requests))

    def place_again(self) -> None:
        again = [name for name in self.open_requests() if self.world.frontend.requests[name].attempt < 4]
        if again:
            sink, source = self.random.choice(self.links)
            self.world.place(self.random.choice(again), source, sink, self.hint())


# make test: 400 busy histories, 150 with fetches, 200 of engines that move KV themselves, 40 of hypothesis: half a minute. The long hunt,
# make test-slow: 4,000, 1,500, 2,000 and 1,000 longer ones. Shrinking takes minutes, so only that one does it.
QUICK = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    print_blob=True,
    phases=[Phase.generate],
)


@pytest.mark.timeout(120)
def test_no_history_breaks_a_law() -> None:
    run_state_machine_as_test(ProtocolMachine, settings=QUICK)


def first_seeds(num_quick: int, num_all: int, step: int) -> list:
    """Where the seeds of a test begin: those of make test, and the others, which are slow."""
    return [pytest.param(first, marks=[pytest.mark.slow] * (first >= num_quick)) for first in range(0, num_all, step)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first_seed", first_seeds(400, 4000, 50))
def test_no_busy_history_breaks_a_law(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 50):
        try:
            RandomHistory(seed).run()
        except Exception as error:
            error.add_note(f"RandomHistory({seed}).run()")
            raise


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first_seed", first_seeds(150, 1500, 50))
def test_no_busy_history_with_fetches_breaks_a_law(first_seed: int) -> None:
    num_fetched = 0
    for seed in range(first_seed, first_seed + 50):
        history = RandomHistory(seed, fetches=True)
        try:
            history.run()
        except Exception as error:
            error.add_note(f"RandomHistory({seed}, fetches=True).run()")
            raise
        num_fetched += sum(end.num_tokens > 0 for process in history.world.processes.values() for end in process.fetch_ends)
    assert num_fetched > 3, "histories without fetches show nothing"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first_seed", first_seeds(200, 2000, 50))
def test_no_busy_history_of_engines_that_move_kv_themselves_breaks_a_law(first_seed: int) -> None:
    num_completed = 0
    for seed in range(first_seed, first_seed + 50):
        history = RandomHistory(seed, native=True)
        try:
            history.run()
        except Exception as error:
            error.add_note(f"RandomHistory({seed}, native=True).run()")
            raise
        num_completed += len(history.world.completions)
    assert num_completed > 50, "histories in which nothing is handed over show nothing"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_long_history_breaks_a_law() -> None:
    run_state_machine_as_test(
        ProtocolMachine, settings=settings(QUICK, max_examples=1000, stateful_step_count=120, phases=[Phase.generate, Phase.shrink])
    )
