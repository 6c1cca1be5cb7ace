"""The sink's end of a pair's channel: opens it, opens it again when it breaks, says hello, beats."""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import grpc
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_contracts.worker.v1 import handoff_service_pb2 as pb
from baton_contracts.worker.v1.handoff_service_pb2_grpc import HandoffServiceStub
from baton_runtime.errors import BatonError, InvalidArgument, PermissionDenied, StaleIncarnation, Unavailable, from_rpc_error
from baton_runtime.log import get_logger
from baton_runtime.rpc import open_channel

from baton_handoff import wire
from baton_handoff.config import HandoffConfig
from baton_handoff.ids import FailureCause, HandoffKey, PeerRef
from baton_handoff.introductions import Introductions
from baton_handoff.link import STREAM_ENDED, LinkOwner, MessageQueue, is_eof, until_first
from baton_handoff.messages import Message
from baton_handoff.peer_watch import FenceReason, PeerWatch

if TYPE_CHECKING:
    _Call = grpc.aio.StreamStreamCall[pb.PairRequest, pb.PairResponse]

RETRY_FIRST_S = 0.01
RETRY_MAX_S = 0.1
GOODBYE_S = 0.5  # how long a source gets to end a stream we have closed

log = get_logger(__name__)


class PairClient:
    """The link to one life of one source. The manager judges `watch` and `created_at`, and closes it.

    watch is None until the source has welcomed us for the first time.
    """

    def __init__(
        self,
        peer: PeerRef,
        owner: LinkOwner,
        introductions: Introductions,
        own: Callable[[], Instance],
        begun_with: Callable[[str], list[HandoffKey]],
        config: HandoffConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.peer = peer
        self.watch: PeerWatch | None = None
        self.created_at = clock()
        self.used_at = self.created_at
        self.was_refused = False  # the source does not know our introduction (yet)
        self.has_failed = False  # an attempt to open the stream failed on the way, since the source was last heard
        self._owner = owner
        self._introductions = introductions
        self._own = own
        self._begun_with = begun_with
        self._config = config
        self._clock = clock
        self._queue: MessageQueue | None = None
        self._session = 0
        self._tries = 0
        self._is_closed = False
        self._closing = asyncio.Event()
        self._introduced = asyncio.Event()

    @property
    def is_introduced(self) -> bool:
        """Whether there is a secret to open the link with."""
        known = self._introductions.get(self.peer.incarnation)
        return known is not None and bool(known.secrets) and not known.refusal

    @property
    def is_open(self) -> bool:
        """Whether a stream is open, its hello said."""
        return self._queue is not None

    def introduced(self) -> None:
        """An introduction of this peer has arrived."""
        if self.is_introduced:
            self._introduced.set()

    def send(self, message: Message) -> None:
        """Say it if a stream is open, else drop it (`actions.Send`)."""
        if self._queue is not None:
            self._queue.put(message)

    def close(self) -> None:
        """End the stream now: the peer is fenced, or we stop. Idempotent."""
        self._is_closed = True
        self._closing.set()

    def close_idle(self) -> None:
        """Close the stream in a way that tells the source that nothing is wrong. Idempotent."""
        self._is_closed = True
        if self._queue is not None:
            self._queue.close()
        else:
            self._closing.set()

    async def run(self) -> None:
        """Keep the link up until closed. A peer's failure never raises. Cancelling it ends the stream."""
        self.introduced()
        await until_first(self._introduced.wait(), self._closing.wait())
        pause_s = RETRY_FIRST_S
        while not self._is_closed:
            was_linked_at = self._clock()
            try:
                await self._one_stream()
            except BatonError as error:
                self._failed(error)
            except grpc.aio.AioRpcError as error:
                self._failed(from_rpc_error(error))
            if self._is_closed:
                return
            if self.watch is not None:
                self.watch.lost(self._clock())
            pause_s = RETRY_FIRST_S if self._clock() - was_linked_at > 1.0 else min(2 * pause_s, RETRY_MAX_S)
            await self._pause(pause_s)

    async def _pause(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._closing.wait()
        except TimeoutError:
            pass

    async def _one_stream(self) -> None:
        """From hello to the end of the stream. Raises: AioRpcError or BatonError saying why it ended."""
        channel = open_channel(self.peer.address or self._acquaintance_address())
        try:
            call = HandoffServiceStub(channel).Pair()
            try:
                # The hello lists what is begun now; whatever is said after this block is said after it, in this order.
                hello = self._hello()
                queue = self._queue = MessageQueue(self._config.max_unsent_messages)
                self._owner.source_link_opened(self.peer.incarnation)
                await until_first(self._read(call), self._write(call, hello, queue), self._closing.wait(), self._overrun(queue.is_overrun))
            finally:
                self._queue = None
                call.cancel()
        finally:
            await channel.close(None)

    def _acquaintance_address(self) -> str:
        known = self._introductions.get(self.peer.incarnation)
        return known.peer.grpc_address if known is not None else ""

    def _hello(self) -> pb.PairRequest:
        own = self._own()
        known = self._introductions.get(self.peer.incarnation)
        secrets = known.secrets if known is not None else []
        if not secrets:
            raise PermissionDenied("the pair is not introduced")
        self._session += 1
        hello = pb.PairHello(
            contract_version=wire.CONTRACT_VERSION,
            instance_id=own.instance_id,
            incarnation=own.incarnation,
            source_incarnation=self.peer.incarnation,
            pair_secret=secrets[self._tries % len(secrets)],
            session=self._session,
            layout=own.layout,
            handoffs=[wire.key_to_proto(key) for key in self._begun_with(self.peer.incarnation)],
        )
        return pb.PairRequest(beat=wire.beat_to_proto(self._owner.engine_beat()), hello=hello)

    async def _write(self, call: "_Call", hello: pb.PairRequest, queue: MessageQueue) -> None:
        async def write(message: Message | None) -> None:
            await call.write(wire.request_to_proto(message, self._owner.engine_beat()))

        try:
            await call.write(hello)
            await queue.write_all(write, self._config.times.beat_s)
            await call.done_writing()
            await asyncio.sleep(GOODBYE_S)
        except STREAM_ENDED:
            await self._closing.wait()  # the reader learns why

    async def _read(self, call: "_Call") -> None:
        is_first = True
        while True:
            response = cast(pb.PairResponse, await call.read())
            if is_eof(response):
                raise Unavailable("the source has ended the stream")
            now = self._owner.notice()
            if self._closing.is_set():
                return
            if self._is_closed:
                continue  # closing an unused link: only its end is of interest
            if is_first:
                is_first = False
                self._welcomed(response, now)
            assert self.watch is not None
            self.watch.heard(wire.beat_from_proto(response.beat), now)
            message = wire.message_from_response(response) if not response.HasField("welcome") else None
            if message is not None:
                self._owner.heard_source(self.peer.incarnation, message)

    def _welcomed(self, response: pb.PairResponse, now: float) -> None:
        if not response.HasField("welcome"):
            raise wire.ProtocolError("welcome", "must be the first message")
        if response.welcome.incarnation != self.peer.incarnation:
            raise StaleIncarnation(expected=self.peer.incarnation, got=response.welcome.incarnation)
        self.was_refused = self.has_failed = False
        if self.watch is None:
            self.watch = PeerWatch(self._config.times, now)
        self.watch.linked(now)

    async def _overrun(self, is_overrun: asyncio.Event) -> None:
        await is_overrun.wait()
        raise Unavailable("the source does not read")

    def _failed(self, error: BatonError) -> None:
        log.debug("pair_link_failed", peer=self.peer.incarnation, session=self._session, why=error.message)
        if isinstance(error, StaleIncarnation):
            self._owner.source_failed(self.peer.incarnation, FailureCause.PEER_FENCED, FenceReason.REPLACED)
        elif isinstance(error, InvalidArgument) and not isinstance(error, wire.ProtocolError):
            log.warning("pair_refused", peer=self.peer.incarnation, why=error.message)
            self._owner.source_failed(self.peer.incarnation, FailureCause.NO_INTRODUCTION, FenceReason.STREAM_BROKEN)
        elif isinstance(error, PermissionDenied):
            self.was_refused = True  # its introduction may be on its way, or another of our secrets may do
            self._tries += 1
        else:
            self.has_failed = True
