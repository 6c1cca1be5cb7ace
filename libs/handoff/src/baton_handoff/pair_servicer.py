"""The source's end of every pair's channel: `baton.worker.v1.HandoffService`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_contracts.worker.v1 import handoff_service_pb2 as pb
from baton_contracts.worker.v1.handoff_service_pb2_grpc import HandoffServiceServicer
from baton_runtime.errors import InvalidArgument, PermissionDenied, StaleIncarnation, Unavailable
from baton_runtime.log import get_logger

from baton_handoff import wire
from baton_handoff.config import HandoffConfig
from baton_handoff.introductions import Introductions, layout_problem
from baton_handoff.link import STREAM_ENDED, LinkOwner, MessageQueue, is_eof, until_first
from baton_handoff.messages import Message
from baton_handoff.peer_watch import PeerWatch

CLOSE_PROOF_S = 0.05

log = get_logger(__name__)

_Context = grpc.aio.ServicerContext[pb.PairRequest, pb.PairResponse]


@dataclass(slots=True, eq=False)
class SinkSession:
    """One open stream from a sink. why_ended: set when we end it."""

    incarnation: str
    number: int
    queue: MessageQueue
    why_ended: str = ""
    is_closed_by_sink: bool = False
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, why: str) -> None:
        """End the stream now. Idempotent."""
        self.why_ended = self.why_ended or why
        self.queue.close()
        self.ending.set()


@dataclass(slots=True, eq=False)
class SinkPeer:
    """One life of a sink that has linked to us; watched until fenced. session: None while the link is lost."""

    watch: PeerWatch
    session: SinkSession | None = None
    is_suspect: bool = False


class PairServicer(HandoffServiceServicer):
    """Serves Pair. The manager judges `peers` and drops those it fences."""

    def __init__(self, owner: LinkOwner, introductions: Introductions, own: Callable[[], Instance], config: HandoffConfig) -> None:
        self.peers: dict[str, SinkPeer] = {}
        self._owner = owner
        self._introductions = introductions
        self._own = own
        self._config = config
        self._is_open = False

    def open(self) -> None:
        """Serve from now on; before, streams are answered UNAVAILABLE."""
        self._is_open = True

    def send(self, incarnation: str, message: Message) -> None:
        """Say it if the sink's link is up, else drop it (`actions.Send`)."""
        peer = self.peers.get(incarnation)
        if peer is not None and peer.session is not None:
            peer.session.queue.put(message)

    def drop(self, incarnation: str, why: str) -> None:
        """Forget a sink and end its stream. Idempotent."""
        peer = self.peers.pop(incarnation, None)
        if peer is not None and peer.session is not None:
            peer.session.end(why)

    def close(self) -> None:
        """End all streams and refuse new ones, so that the server can stop. Idempotent."""
        self._is_open = False
        for incarnation in list(self.peers):
            self.drop(incarnation, "the worker stops")

    async def Pair(self, request_iterator: AsyncIterator[pb.PairRequest], context: _Context) -> None:
        """One stream of one sink, until it breaks, is closed, replaced by a newer one, or its sink is fenced."""
        hello = await self._hello(context)
        now = self._owner.notice()
        session = self._admit(hello, now)
        try:
            listed = [wire.key_from_proto(handoff) for handoff in hello.handoffs]
            self._owner.sink_linked(session.incarnation, hello.pair_secret, listed)
            # Not in the writer's task: were the first write cancelled under way, gRPC could not send a status any more
            # (GRPC_CALL_ERROR_TOO_MANY_OPERATIONS), and the sink would wait for one until it fences us.
            await context.write(self._welcome())
            await until_first(
                self._read(context, session), self._write(context, session), session.ending.wait(), session.queue.is_overrun.wait()
            )
        except STREAM_ENDED:
            pass  # the sink is gone; so is who would read a status
        finally:
            self._ended(session)
        if not session.is_closed_by_sink:
            raise Unavailable(session.why_ended or "the sink does not read")

    async def _hello(self, context: _Context) -> pb.PairHello:
        if not self._is_open:
            raise Unavailable("the worker does not serve handoffs now")
        try:
            async with asyncio.timeout(self._config.times.hello_s):
                first = await context.read()
        except TimeoutError:
            raise InvalidArgument("hello", f"did not come within {self._config.times.hello_s} s") from None
        if is_eof(first) or not first.HasField("hello"):
            raise InvalidArgument("hello", "must be the first message")
        return first.hello

    def _admit(self, hello: pb.PairHello, now: float) -> SinkSession:
        own = self._own()
        if hello.source_incarnation != own.incarnation:
            raise StaleIncarnation(expected=own.incarnation, got=hello.source_incarnation)
        if not self._introductions.knows_secret(hello.incarnation, hello.pair_secret):
            raise PermissionDenied("this pair was not introduced to us, or with another secret")
        if why := layout_problem(own, Instance(instance_id=hello.instance_id, layout=hello.layout)):
            raise InvalidArgument("layout", f"{own.instance_id} and {hello.instance_id}: {why}")
        peer = self.peers.get(hello.incarnation)
        if peer is None:
            peer = self.peers[hello.incarnation] = SinkPeer(PeerWatch(self._config.times, now))
        if peer.session is not None:
            if hello.session <= peer.session.number:
                raise Unavailable("a newer stream of this pair is open")
            peer.session.end("replaced by a newer stream")
        peer.session = SinkSession(hello.incarnation, hello.session, MessageQueue(self._config.max_unsent_messages))
        peer.watch.linked(now)
        return peer.session

    def _ended(self, session: SinkSession) -> None:
        peer = self.peers.get(session.incarnation)
        if peer is None or peer.session is not session:
            return  # fenced, or replaced
        peer.session = None
        if session.is_closed_by_sink:
            del self.peers[session.incarnation]
        else:
            peer.watch.lost(self._owner.notice())
        self._owner.sink_lost(session.incarnation, is_closed=session.is_closed_by_sink)

    def _welcome(self) -> pb.PairResponse:
        welcome = pb.PairWelcome(contract_version=wire.CONTRACT_VERSION, incarnation=self._own().incarnation)
        return pb.PairResponse(beat=wire.beat_to_proto(self._owner.engine_beat()), welcome=welcome)

    async def _read(self, context: _Context, session: SinkSession) -> None:
        while True:
            request = await context.read()
            now = self._owner.notice()
            peer = self.peers.get(session.incarnation)
            if peer is None or peer.session is not session:
                return
            if is_eof(request):
                await self._end_of_requests(session)
                return
            peer.watch.heard(wire.beat_from_proto(request.beat), now)
            message = wire.message_from_request(request)
            if message is not None:
                self._owner.heard_sink(session.incarnation, message)

    async def _end_of_requests(self, session: SinkSession) -> None:
        """The same is read when the sink closes an unused link and when its connection is reset. Only after a reset is this call
        cancelled as well, a moment later; and nobody closes a link that is in use."""
        await asyncio.sleep(CLOSE_PROOF_S)
        session.is_closed_by_sink = not self._owner.is_sink_in_use(session.incarnation)
        session.why_ended = session.why_ended or "you have ended the stream"

    async def _write(self, context: _Context, session: SinkSession) -> None:
        async def write(message: Message | None) -> None:
            await context.write(wire.response_to_proto(message, self._owner.engine_beat()))

        await session.queue.write_all(write, self._config.times.beat_s)
