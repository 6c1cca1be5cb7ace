"""A simulated fleet of workers with the real books and the real block manager: no loop, no sockets, a clock moved by hand.

What is simulated: processes that stop, wake, crash and restart; links that are FIFO within a direction, break, lose what was on
the way and are re-opened with a hello; engines that step; pulls that copy unit by unit and end whenever the test wants; one
frontend that places requests, cancels, and places again; with `fetches`, prefill instances that fetch what decode or another one has
cached (fetches alone: `fetch_net`); with `native`, engines that move KV themselves: a pull is the meeting of two of them, and its KV
moves at once. Sources and sinks may have blocks of different sizes; contents are kept and checked token by token. What is checked after
every event: `World.check`.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from baton_engine.api import EngineRequest, Priority, SequenceKey, StepOutput, Work
from baton_engine.blocks import BlockManager
from baton_engine.pool import BlockLayout
from baton_runtime.errors import BatonError

from baton_handoff.actions import (
    Action,
    CancelEngine,
    CancelFetch,
    Completed,
    Ended,
    FetchEnded,
    Report,
    Send,
    StartEngine,
    StartFetch,
    StartPull,
)
from baton_handoff.config import HandoffConfig
from baton_handoff.fetch_plan import plan_fetch
from baton_handoff.fetch_sink import FetchSinkBook, SinkFetch
from baton_handoff.fetch_source import FetchSourceBook
from baton_handoff.ids import ConfirmAnswer, EndReason, FailureCause, FetchEnd, FetchHint, HandoffEnd, HandoffKey, PeerRef, Side
from baton_handoff.messages import ConfirmReply, Message
from baton_handoff.sink import SinkBook
from baton_handoff.sink_handoff import SinkHandoff, SinkState
from baton_handoff.source import SourceBook
from baton_handoff.source_handoff import SourceHandoff, SourceState
from baton_handoff.tag import KvShape
from baton_handoff.testing.engine import MiniEngine
from baton_handoff.testing.native import NativeMiniEngine

BLOCK_TOKENS = 2
LAYOUT = BlockLayout(num_layers=1, block_tokens=BLOCK_TOKENS, num_kv_heads=1, head_dim=1, dtype="float32")
ROOT = b"\0" * 16
FETCH_LIMIT_S = 1.0

Content = tuple[int, ...]  # what the slot of a token should hold: the tokens it depends on, from the first one of the sequence
Memory = list[list[Content | None]]  # by block, by slot


def content_of(request: EngineRequest, token: int) -> Content:
    """Content of the slot of one token."""
    return tuple(request.token_ids[: token + 1])


@dataclass(slots=True)
class Pull:
    """A running operation of a sink. It reads the memory of the source's life that it was opened with."""

    start: StartPull
    source_memory: Memory
    done: int = 0
    has_moved: bool = False  # of engines that move KV themselves

    @property
    def is_done(self) -> bool:
        """Whether every unit was copied."""
        return self.has_moved if self.start.request is not None else self.done == len(self.start.dest_ids)


@dataclass(slots=True)
class Hello:
    """First message of a link."""

    listed: list[HandoffKey]


@dataclass(slots=True)
class Link:
    """One stream from a sink (process `sink`) to a source. Cleared when it breaks."""

    sink: str
    source: str
    sink_incarnation: str = ""
    source_incarnation: str = ""
    is_open: bool = False
    is_welcomed: bool = False  # the source has read the hello
    up: deque[Message | Hello] = field(default_factory=deque)
    down: deque[Message] = field(default_factory=deque)


class Process:
    """One worker process: its books, its memory, its engine, its pulls."""

    def __init__(
        self,
        name: str,
        life: int,
        num_blocks: int,
        config: HandoffConfig,
        layout: BlockLayout = LAYOUT,
        layout_of: Callable[[str], BlockLayout | None] = lambda incarnation: None,
        *,
        fetches: bool = False,
        native: bool = False,
    ) -> None:
        self.name = name
        self.life = life
        self.incarnation = f"{name}.{life}"
        self.blocks = BlockManager(num_blocks)
        self.layout = layout
        self.block_tokens = layout.block_tokens
        self.memory: Memory = [[None] * self.block_tokens for _ in range(num_blocks)]
        shape = KvShape(self.incarnation, "model", layout, 0 if native else BLOCK_TOKENS)

        def wants_fetch(incarnation: str, num_tokens: int) -> bool:
            return fetches and incarnation != self.incarnation

        self.shape = shape
        self.source = SourceBook(self.blocks, shape, config, layout_of, wants_fetch)
        self.fetch_source = FetchSourceBook(self.blocks, shape, config)
        self.fetch_sink = FetchSinkBook(self.blocks, shape, config)
        self.fetch_ends: list[FetchEnd] = []
        self.sink = SinkBook(self.blocks, shape, config, layout_of)
        self.engine: MiniEngine | NativeMiniEngine
        if native:
            self.engine = NativeMiniEngine(self.blocks)
        else:
            self.engine = MiniEngine(self.blocks, self.block_tokens, self._compute, hash_block_tokens=BLOCK_TOKENS)
        self.rooms: dict[SequenceKey, HandoffKey] = {}  # where its engine waits for the other
        self.engine_cancels: list[SequenceKey] = []
        self.outputs: deque[StepOutput] = deque()
        self.pulls: dict[int, Pull] = {}  # by operation; those of fetches are numbered downwards, from -1
        self.returned: deque[tuple[int, FailureCause | None]] = deque()  # pulls whose result the loop has not seen
        self.decoding: dict[SequenceKey, EngineRequest] = {}
        self.requests: dict[SequenceKey, EngineRequest] = {}
        self.is_stopped = False
        self.booked: dict[tuple[HandoffKey, Side], int] = {}  # held blocks by the reports
        self.starts: dict[tuple[HandoffKey, Side], int] = {}  # ends still to come: 1 or 0
        self.confirmed_as_source: dict[HandoffKey, int] = {}

    def ref(self) -> PeerRef:
        """How others name it."""
        return PeerRef(self.name, self.incarnation)

    def _compute(self, block_id: int, request: EngineRequest, index: int) -> None:
        start = index * self.block_tokens
        self.check_tokens(request, start, "attended to a block with foreign content")
        tokens = range(start, start + self.block_tokens)
        self.memory[block_id] = [content_of(request, token) if token < request.num_kv_tokens else None for token in tokens]

    def check_tokens(self, request: EngineRequest, num_tokens: int, message: str) -> None:
        """Raises: AssertionError unless the leading tokens of the sequence lie in its table as they should."""
        table = self.blocks.table(request.key)
        for token in range(num_tokens):
            assert self.memory[table[token // self.block_tokens]][token % self.block_tokens] == content_of(request, token), message


@dataclass(slots=True)
class Request:
    """One request at the frontend."""

    token_ids: tuple[int, ...]
    priority: Priority
    attempt: int = 0
    prefill: PeerRef | None = None
    decode: PeerRef | None = None
    is_over: bool = False
    is_failed_attempt: bool = False
    completed: int = 0  # attempts whose KV arrived


@dataclass(slots=True)
class Frontend:
    """What is on its way from the frontend to workers: (incarnation, what to do there). Any order."""

    requests: dict[str, Request] = field(default_factory=dict)
    pending: list[tuple[str, Callable[["Process"], list[Action]]]] = field(default_factory=list)


class World:
    """Everything. Methods are events; each leaves the world checked.

    num_blocks: per process, of BLOCK_TOKENS tokens. block_tokens: of sources and of sinks, multiples of BLOCK_TOKENS; a process with
    larger blocks has fewer of them.
    """

    def __init__(
        self,
        sources: int = 1,
        sinks: int = 1,
        num_blocks: int = 6,
        config: HandoffConfig | None = None,
        block_tokens: tuple[int, int] = (BLOCK_TOKENS, BLOCK_TOKENS),
        *,
        fetches: bool = False,
        native: bool = False,
    ) -> None:
        self.fetches = fetches
        self.native = native
        self.config = config or HandoffConfig(operation_bytes=2 * LAYOUT.block_bytes)
        if native:
            self.config = self.config.for_native_engine()
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.now = 1000.0
        names = [f"p{i}" for i in range(sources)] + [f"d{i}" for i in range(sinks)]
        self.processes = {name: self._process(name, 1) for name in names}
        self.links = {(d, p): Link(d, p) for d in names if d[0] == "d" for p in names if p[0] == "p"}
        # What a prefill instance fetches over; from other ones, too.
        self.back_links = {(p, x): Link(p, x) for p in names if p[0] == "p" for x in names if x != p} if fetches else {}
        self.frontend = Frontend()
        self.ends: list[tuple[HandoffKey, Side, HandoffEnd]] = []
        self.completions: list[HandoffKey] = []

    def _process(self, name: str, life: int) -> Process:
        layout = self._layout_of(name)
        num_blocks = self.num_blocks * BLOCK_TOKENS // layout.block_tokens
        return Process(name, life, num_blocks, self.config, layout, self._layout_of, fetches=self.fetches, native=self.native)

    def _layout_of(self, incarnation: str) -> BlockLayout:
        return replace(LAYOUT, block_tokens=self.block_tokens[incarnation[0] == "d"])

    # The frontend.

    def submit(self, request_id: str, token_ids: Iterable[int], priority: Priority = Priority.INTERACTIVE) -> None:
        """A new request; not placed yet."""
        self.frontend.requests[request_id] = Request(tuple(token_ids), priority)

    def place(self, request_id: str, prefill: str, decode: str, hint: str = "") -> None:
        """The next attempt: a Cancel for the one before is on its way to both, then both Starts. hint: who is said to have all of it."""
        request = self.frontend.requests[request_id]
        if request.attempt and not request.is_failed_attempt:
            self.cancel(request_id, is_final=False)
        request.attempt += 1
        request.is_failed_attempt = False
        request.prefill, request.decode = self.processes[prefill].ref(), self.processes[decode].ref()
        for is_sink, here, there in ((False, request.prefill, request.decode), (True, request.decode, request.prefill)):
            peer = FetchHint(self.processes[hint].ref(), len(request.token_ids)) if hint and not is_sink else None
            self.frontend.pending.append((here.incarnation, self._start(request_id, request, there, is_sink, peer)))

    def cancel(self, request_id: str, *, is_final: bool = True, reason: str = "CLIENT_GONE") -> None:
        """Cancel for the present attempt is on its way to both sides."""
        request = self.frontend.requests[request_id]
        request.is_over = request.is_over or is_final
        request.is_failed_attempt = True
        attempt = request.attempt
        for ref in (request.prefill, request.decode):
            if ref is not None:
                self.frontend.pending.append((ref.incarnation, lambda process: self._cancel(process, request_id, attempt, reason)))

    def deliver_pending(self, index: int = 0) -> None:
        """One Start or Cancel arrives, if its process lives and runs; one for a dead life is dropped."""
        incarnation, event = self.frontend.pending[index]
        process = self.find(incarnation)
        if process is None:
            del self.frontend.pending[index]
            for request_id, request in self.frontend.requests.items():
                if incarnation in (ref.incarnation for ref in (request.prefill, request.decode) if ref) and not request.is_failed_attempt:
                    self.cancel(request_id, is_final=False)
        elif not process.is_stopped:
            del self.frontend.pending[index]
            self.perform(process, event(process))

    def _start(
        self, request_id: str, request: Request, there: PeerRef, is_sink: bool, hint: FetchHint | None = None
    ) -> Callable[[Process], list[Action]]:
        key = SequenceKey(request_id, request.attempt)
        work = Work.DECODE_ONLY if is_sink else Work.PREFILL_ONLY
        engine_request = EngineRequest(key, array("I", request.token_ids), len(request.token_ids), ROOT, work, request.priority)

        def event(process: Process) -> list[Action]:
            side = Side.SINK if is_sink else Side.SOURCE
            decode_incarnation = process.incarnation if is_sink else there.incarnation
            process.requests[key] = engine_request
            try:
                if is_sink:
                    actions = process.sink.start(engine_request, there, "", self.now)
                else:
                    actions = process.source.start(engine_request, there, "", self.now, hint)
            except BatonError:
                self._attempt_failed(key)
                return []
            process.starts[HandoffKey(*key, decode_incarnation), side] = 1
            return actions

        return event

    def _cancel(self, process: Process, request_id: str, attempt: int, reason: str) -> list[Action]:
        for key in [key for key in process.decoding if key.request_id == request_id and key.attempt <= attempt]:
            self.finish_decode(process, key)
        actions = process.source.cancel(request_id, attempt, reason, self.now) + process.sink.cancel(request_id, attempt, reason, self.now)
        return actions + process.fetch_sink.cancel(request_id, attempt, reason)

    def _attempt_failed(self, key: SequenceKey) -> None:
        request = self.frontend.requests[key.request_id]
        if key.attempt == request.attempt and not request.is_failed_attempt:
            self.cancel(key.request_id, is_final=False)

    # Processes.

    def find(self, incarnation: str) -> Process | None:
        """The process of that life, if it is not over."""
        process = self.processes.get(incarnation.split(".")[0])
        return process if process is not None and process.incarnation == incarnation else None

    def stop(self, name: str) -> None:
        """SIGSTOP."""
        self.processes[name].is_stopped = True

    def wake(self, name: str) -> None:
        """SIGCONT after a long time: the loop's own stall check fences everybody before anything is looked at."""
        process = self.processes[name]
        process.is_stopped = False
        for other in self.processes.values():
            if other is not process:
                self.fence(name, other.incarnation)

    def crash(self, name: str) -> None:
        """The process dies and is started again. Its peers see their links reset; who holds blocks for it fences later."""
        old = self.processes[name]
        for link in self.every_link().values():
            if name in (link.sink, link.source):
                self._break(link)
        self.processes[name] = self._process(name, old.life + 1)
        for request_id, request in self.frontend.requests.items():
            concerned = old.incarnation in (ref.incarnation for ref in (request.prefill, request.decode) if ref)
            if concerned and not request.is_failed_attempt and not request.is_over:
                self.cancel(request_id, is_final=False)

    def fence(self, name: str, incarnation: str, *, closes_links: bool = True) -> None:
        """Process `name` takes that incarnation for dead, rightly or not, and closes the links to it."""
        process, other = self.processes[name], incarnation.split(".")[0]
        if process.is_stopped:
            return
        for link in self.every_link().values():
            if closes_links and {name, other} == {link.sink, link.source}:
                self._break(link)
        self.perform(process, process.source.fence(incarnation, self.now))
        self.perform(process, process.sink.fence(incarnation, FailureCause.PEER_FENCED, self.now))
        self.perform(process, process.fetch_source.fence(incarnation, self.now))
        self.perform(process, process.fetch_sink.fence(incarnation))

    def fence_the_dead(self) -> None:
        """Everybody who runs fences every life that is over."""
        for process in self.processes.values():
            for other in self.processes.values():
                for life in range(1, other.life):
                    self.fence(process.name, f"{other.name}.{life}")

    def drain(self, name: str) -> None:
        """SIGTERM."""
        process = self.processes[name]
        self.perform(process, process.source.set_draining(self.now))
        self.perform(process, process.sink.set_draining(self.now))
        process.fetch_source.set_draining()

    def pass_time(self, seconds: float) -> None:
        """Time passes; running processes tick."""
        self.now += seconds
        for process in self.processes.values():
            if not process.is_stopped:
                self.perform(process, process.source.tick(self.now))
                self.perform(process, process.sink.tick(self.now))
                self.perform(process, process.fetch_source.tick(self.now))
                self.perform(process, process.fetch_sink.tick(self.now))

    # Links.

    def every_link(self) -> dict[tuple[str, str], Link]:
        """Those of handoffs and those that only fetches use."""
        return {**self.links, **self.back_links}

    def open_link(self, sink: str, source: str) -> None:
        """The sink opens or re-opens its link."""
        link, process = self.every_link()[sink, source], self.processes[sink]
        if link.is_open or process.is_stopped:
            return
        self._break(link)
        peer = self.processes[source].incarnation
        link.sink_incarnation, link.source_incarnation, link.is_open = process.incarnation, peer, True
        link.up.append(Hello([*process.sink.begun_with(peer), *process.fetch_sink.begun_with(peer)]))
        self.perform(process, process.sink.link_up(peer, self.now))
        self.perform(process, process.fetch_sink.link_up(peer))

    def break_link(self, sink: str, source: str) -> None:
        """It breaks, and what was on the way is lost."""
        self._break(self.every_link()[sink, source])

    def _break(self, link: Link) -> None:
        was_welcomed = link.is_open and link.is_welcomed
        link.is_open = link.is_welcomed = False
        link.up.clear()
        link.down.clear()
        source = self.find(link.source_incarnation)
        if was_welcomed and source is not None:
            self.perform(source, source.source.link_down(link.sink_incarnation, self.now))

    def deliver_up(self, sink: str, source: str, *, duplicate: bool = False) -> None:
        """The next message from the sink arrives at the source, perhaps twice."""
        link = self.every_link()[sink, source]
        process = self.find(link.source_incarnation)
        if not link.up or process is None or process.is_stopped:
            return
        message = link.up.popleft()
        if isinstance(message, Hello):
            link.is_welcomed = True
            of_fetches = [key for key in message.listed if key.is_fetch]
            others = [key for key in message.listed if not key.is_fetch]
            self.perform(process, process.source.link_up(link.sink_incarnation, others, self.now))
            self.perform(process, process.fetch_source.link_up(link.sink_incarnation, of_fetches, self.now))
            return
        book = process.fetch_source if message.key.is_fetch else process.source
        for _ in range(2 if duplicate else 1):
            self.perform(process, book.receive(link.sink_incarnation, message, self.now))  # type: ignore[arg-type]

    def deliver_down(self, sink: str, source: str, *, duplicate: bool = False) -> None:
        """The next message from the source arrives at the sink, perhaps twice."""
        link = self.every_link()[sink, source]
        process = self.find(link.sink_incarnation)
        if not link.down or process is None or process.is_stopped:
            return
        message = link.down.popleft()
        for _ in range(2 if duplicate else 1):
            if message.key.is_fetch:
                self.perform(process, process.fetch_sink.receive(link.source_incarnation, message))  # type: ignore[arg-type]
            else:
                self.perform(process, process.sink.receive(link.source_incarnation, message, self.now))  # type: ignore[arg-type]

    # Engines and pulls.

    def engine_step(self, name: str) -> None:
        """One step; its output is seen by the loop later."""
        process = self.processes[name]
        if process.is_stopped:
            return
        if process.engine.has_work():
            process.outputs.append(process.engine.step())
        elif not self.native:
            return
        while process.engine_cancels:  # a step that runs when a cancel comes goes on, and pins
            process.engine.cancel(process.engine_cancels.pop())

    def engine_output(self, name: str) -> None:
        """The loop sees the output of the oldest step."""
        process = self.processes[name]
        if process.is_stopped or not process.outputs:
            return
        output = process.outputs.popleft()
        for ready in output.ready:
            self.perform(process, process.source.blocks_ready(ready, self.now))
        for end in output.ends:
            self.perform(process, process.source.engine_ended(end, self.now))

    def own_work(self, name: str) -> None:
        """Sequences of the process's own use every block it may use, write to them, and are over."""
        process = self.processes[name]
        num_blocks = process.blocks.available()
        if process.is_stopped or num_blocks <= 0:
            return
        owner = SequenceKey("own", 1)
        process.blocks.acquire(owner, [], num_blocks)
        for block in process.blocks.table(owner):
            process.memory[block] = [(-1,)] * process.block_tokens
        process.blocks.release(owner)

    def pull_block(self, name: str, operation: int) -> None:
        """The transport's thread copies one more unit, whatever the loop does."""
        process = self.processes[name]
        pull = process.pulls.get(operation)
        if pull is None or pull.is_done:
            return
        if pull.start.request is not None:
            return self._move(process, pull)
        source_tokens = self._layout_of(pull.start.peer_incarnation).block_tokens
        unit = min(source_tokens, process.block_tokens)
        source, source_unit = divmod(pull.start.source_ids[pull.done], source_tokens // unit)
        dest, dest_unit = divmod(pull.start.dest_ids[pull.done], process.block_tokens // unit)
        owner = pull.start.key.owner
        table = process.blocks.table(owner)
        assert dest in table[len(table) - process.blocks.held(owner) :], "an operation wrote to a block not reserved for it"
        copied = pull.source_memory[source][source_unit * unit : (source_unit + 1) * unit]
        process.memory[dest][dest_unit * unit : (dest_unit + 1) * unit] = copied
        pull.done += 1

    def _can_move(self, pull: Pull) -> bool:
        """Whether the two engines are in one room, or the pull is of blocks. Engines go on while their workers stand still."""
        if pull.start.request is None:
            return True
        key, source = pull.start.key, self.find(pull.start.peer_incarnation)
        return source is not None and source.rooms.get(key.sequence) == key and source.engine.holds(key.sequence)

    def _move(self, process: Process, pull: Pull) -> None:
        if not self._can_move(pull):
            return
        key, source = pull.start.key, self.processes[pull.start.peer_incarnation.split(".")[0]]
        request, table = process.requests[key.sequence], process.blocks.table(key.sequence)
        assert process.blocks.held(key.sequence) == len(table), "KV moved to blocks that are not reserved for it"
        for token in range(request.num_kv_tokens):
            process.memory[table[token // process.block_tokens]][token % process.block_tokens] = content_of(request, token)
        pull.has_moved = True
        assert isinstance(source.engine, NativeMiniEngine)
        source.engine.moved(key.sequence)

    def _is_unwanted(self, process: Process, operation: int) -> bool:
        """Whether the receiver would end the operation by itself."""
        return self.native and any(handoff.operation == operation for handoff in process.sink.draining)

    def pull_ends(self, name: str, operation: int, failure: FailureCause | None = None) -> None:
        """The transport's thread is done with the operation; the loop sees it later. Not all copied: it failed."""
        process = self.processes[name]
        pull = process.pulls.pop(operation)
        process.returned.append((operation, failure or (None if pull.is_done else FailureCause.PATH_DOWN)))

    def pull_seen(self, name: str) -> None:
        """The loop sees the result of the oldest ended operation."""
        process = self.processes[name]
        if not process.is_stopped and process.returned:
            operation, failure = process.returned.popleft()
            if operation < 0:
                self.perform(process, process.fetch_sink.pull_returned(-operation, failure))
            else:
                self.perform(process, process.sink.pull_returned(operation, failure, self.now))

    def finish_decode(self, process: Process, key: SequenceKey) -> None:
        """The sequence ends at the sink's engine."""
        if process.decoding.pop(key, None) is not None:
            process.blocks.release(key)
            request = self.frontend.requests[key.request_id]
            if request.attempt == key.attempt:
                request.is_over = True

    # Progress.

    def enabled(self, *, with_frontend: bool = True) -> list[Callable[[], None]]:
        """Every single step that would bring something forward now, in a fixed order. For choosing among them at random."""
        steps: list[Callable[[], None]] = []
        for index, (incarnation, _) in enumerate(self.frontend.pending if with_frontend else ()):
            process = self.find(incarnation)
            if process is None or not process.is_stopped:
                steps.append(partial(self.deliver_pending, index))
        for (sink, source), link in self.every_link().items():
            if not link.is_open and self._needs_link(sink, source):
                steps.append(partial(self.open_link, sink, source))
            steps += [partial(self.deliver_up, sink, source)] * bool(link.up and not self.processes[source].is_stopped)
            steps += [partial(self.deliver_down, sink, source)] * bool(link.down and not self.processes[sink].is_stopped)
        for name, process in self.processes.items():
            steps += [partial(self.pull_block, name, n) for n, pull in process.pulls.items() if not pull.is_done and self._can_move(pull)]
            steps += [
                partial(self.pull_ends, name, n) for n, pull in process.pulls.items() if pull.is_done or self._is_unwanted(process, n)
            ]
            if not process.is_stopped:
                steps += [partial(self.engine_step, name)] * (process.engine.has_work() or (self.native and bool(process.engine_cancels)))
                steps += [partial(self.engine_output, name)] * bool(process.outputs)
                steps += [partial(self.pull_seen, name)] * bool(process.returned)
                steps += [partial(self.finish_decode, process, key) for key in process.decoding]
        return steps

    def _needs_link(self, sink: str, source: str) -> bool:
        """Whether the sink or the source would wait for ever without one."""
        if (sink, source) in self.links and (self.processes[sink].sink.live or self.processes[source].source.live):
            return True
        fetching = self.processes[sink].fetch_sink.live_with(self.processes[source].incarnation)
        return bool(fetching or self.processes[source].fetch_source.live_with(self.processes[sink].incarnation))

    # What the books want.

    def perform(self, process: Process, actions: list[Action]) -> None:
        """Perform actions in order, then what they cause, then check."""
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, StartFetch | CancelFetch | FetchEnded):
                todo.extend(self._perform_fetch(process, action))
            else:
                self._perform_one(process, action)
        self.check(process)

    def _perform_one(self, process: Process, action: Action) -> None:
        if isinstance(action, Send):
            self._send(process, action)
        elif isinstance(action, StartEngine):
            process.engine.start(action.request)
            process.rooms[action.key.sequence] = action.key
        elif isinstance(action, CancelEngine):
            process.engine_cancels.append(action.sequence)
        elif isinstance(action, StartPull):
            # The memory of a life that is over is still mapped: a pull reads it, a Confirm is never answered.
            number = -action.operation if action.key.is_fetch else action.operation
            process.pulls[number] = Pull(action, self._memory_of(action.peer_incarnation))
        elif isinstance(action, Completed):
            self._completed(process, action)
        elif isinstance(action, Ended):
            self._count_end(process, action.key, action.side)
            self.ends.append((action.key, action.side, action.end))
            if action.end.reason is not EndReason.PREFILLED:
                self._attempt_failed(action.key.sequence)
        elif isinstance(action, Report):
            process.booked[action.key, action.side] = action.held_blocks

    def _perform_fetch(self, process: Process, action: StartFetch | CancelFetch | FetchEnded) -> list[Action]:
        if isinstance(action, CancelFetch):
            return process.fetch_sink.cancel(action.key.request_id, action.key.attempt, "CANCELLED")
        if isinstance(action, FetchEnded):
            process.fetch_ends.append(action.end)
            return process.source.fetch_ended(action.key, action.end, self.now)
        fetch = SinkFetch(
            key=action.key,
            peer=action.peer,
            priority=action.request.priority,
            plan=plan_fetch(process.shape, self._layout_of(action.peer.incarnation), action.request, action.hashes, action.num_tokens),
            deadline=self.now + FETCH_LIMIT_S,
            traceparent=action.traceparent,
        )
        link = self.every_link().get((process.name, action.peer.instance_id))
        is_linked = link is not None and link.is_open and link.source_incarnation == action.peer.incarnation
        return process.fetch_sink.start(fetch, is_linked=is_linked)

    def _memory_of(self, incarnation: str) -> Memory:
        process = self.find(incarnation)
        block_tokens = self._layout_of(incarnation).block_tokens
        return process.memory if process is not None else [[None] * block_tokens for _ in range(self.num_blocks)]

    def _send(self, process: Process, action: Send) -> None:
        if isinstance(action.message, ConfirmReply) and action.message.answer is ConfirmAnswer.CONFIRMED:
            key = action.message.key
            process.confirmed_as_source[key] = max(process.confirmed_as_source.get(key, 0), action.message.end_block)
        for link in self.every_link().values():
            if not link.is_open:
                continue
            is_from_sink = action.message.key.decode_incarnation == process.incarnation
            if is_from_sink and (link.sink_incarnation, link.source_incarnation) == (process.incarnation, action.peer_incarnation):
                link.up.append(action.message)
            elif (
                not is_from_sink
                and link.is_welcomed
                and (link.source_incarnation, link.sink_incarnation) == (process.incarnation, action.peer_incarnation)
            ):
                link.down.append(action.message)

    def _completed(self, process: Process, action: Completed) -> None:
        self._count_end(process, action.key, Side.SINK)
        request = process.requests[action.key.sequence]
        table = process.blocks.table(action.key.sequence)
        process.check_tokens(request, request.num_kv_tokens, "completed with foreign content")
        assert len(table) == -(-request.num_kv_tokens // process.block_tokens)
        valid = request.num_kv_tokens % process.block_tokens
        assert (action.tail_block, action.tail_tokens) == ((table[-1], valid) if valid else (-1, 0))
        process.decoding[action.key.sequence] = request
        self.completions.append(action.key)
        self.frontend.requests[action.key.request_id].completed += 1

    def _count_end(self, process: Process, key: HandoffKey, side: Side) -> None:
        assert process.starts.get((key, side)) == 1, f"{side.name} of {key} ended twice, or never started"
        process.starts[key, side] = 0

    # What must always hold.

    def check(self, process: Process) -> None:
        """The laws, for one process."""
        process.blocks.check()
        offered = sum(source.num_blocks for source in process.source.live if source.state is SourceState.OFFERED)
        assert process.blocks.promised() <= offered, "blocks are promised to an offer that is over"
        for source in process.source.live:
            if not source.is_begun:
                self._check_holds_nothing(process, source)
        for sink in process.sink.live:
            if sink.state is SinkState.TICKET:
                self._check_holds_nothing(process, sink)
            else:
                self._check_confirmed(process, sink)
        self._check_books(process)

    def _check_holds_nothing(self, process: Process, handoff: SourceHandoff | SinkHandoff) -> None:
        sequence = handoff.key.sequence
        assert not process.blocks.has_table(sequence), "waits while holding"
        assert process.blocks.held(sequence) == 0, "waits while holding"

    def _check_confirmed(self, process: Process, sink: SinkHandoff) -> None:
        source_tokens = self._layout_of(sink.peer.incarnation).block_tokens
        num_tokens = max(sink.cut.num_cached * process.block_tokens, min(sink.confirmed * source_tokens, sink.num_tokens))
        process.check_tokens(process.requests[sink.key.sequence], num_tokens, "a confirmed block has foreign content")
        assert sink.committed_tokens <= num_tokens, "a block is committed that was not confirmed whole"
        source = self.find(sink.peer.incarnation)
        if source is not None and sink.confirmed > sink.first:
            assert sink.confirmed <= source.confirmed_as_source.get(sink.key, 0), "the sink counts more than the source confirmed"

    def _check_books(self, process: Process) -> None:
        """The reports add up to what the block manager counts; pins of outputs the loop has not seen come on top."""
        booked = sum(process.booked.values())
        held = sum(process.blocks.pinned_owners().values())
        unseen = sum(len(ready.block_ids) for output in process.outputs for ready in output.ready)
        assert booked <= held <= booked + unseen, f"reports say {booked} blocks, the block manager {held}, {unseen} of them unseen"

    # Until nothing moves.

    def settle(self, max_rounds: int = 400) -> None:
        """Let everything run until nothing is left to do: nobody fails from here on.

        Raises: AssertionError if something never ends or any block stays held.
        """
        for name, process in self.processes.items():
            if process.is_stopped:
                self.wake(name)
        for link in self.every_link().values():
            self._break(link)
        self.fence_the_dead()
        for _ in range(max_rounds):
            self._settle_round()
            if self._is_quiet():
                break
        self._check_quiet()

    def _settle_round(self) -> None:
        while self.frontend.pending:
            self.deliver_pending()
        for (sink, source), link in self.every_link().items():
            if not link.is_open and self._needs_link(sink, source):
                self.open_link(sink, source)
            while link.up or link.down:
                self.deliver_up(sink, source)
                self.deliver_down(sink, source)
        for name, process in self.processes.items():
            self.engine_step(name)
            while process.outputs:
                self.engine_output(name)
            for operation, pull in list(process.pulls.items()):
                while not pull.is_done and self._can_move(pull):
                    self.pull_block(name, operation)
                if pull.is_done or self._is_unwanted(process, operation):
                    self.pull_ends(name, operation)
            while process.returned:
                self.pull_seen(name)
            for key in list(process.decoding):
                self.finish_decode(process, key)
        self.pass_time(0.1)

    def _is_quiet(self) -> bool:
        return not self.frontend.pending and not any(
            process.source.live
            or process.sink.live
            or process.sink.draining
            or process.fetch_source.live
            or process.fetch_sink.live
            or process.fetch_sink.draining
            or process.engine.has_work()
            or process.engine_cancels
            or process.pulls
            or process.outputs
            or process.decoding
            for process in self.processes.values()
        )

    def _check_quiet(self) -> None:
        for process in self.processes.values():
            assert not process.source.live, f"never ended at {process.name}: {[h.key for h in process.source.live]}"
            assert not any(map(process.engine.holds, process.rooms)), f"an engine at {process.name} waits for ever"
            assert not process.sink.live, f"never ended at {process.name}: {[h.key for h in process.sink.live]}"
            assert not any(process.starts.values()), f"no end: {process.starts}"
            counts = process.blocks.counts()
            assert (counts.pinned, counts.reserved, counts.used) == (0, 0, 0), f"{process.name} still holds {counts}"
            assert not process.blocks.pinned_owners()
            self.check(process)
