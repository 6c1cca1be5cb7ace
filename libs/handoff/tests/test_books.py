"""The client of kvtransfer against a small real server: hello with a snapshot, order, sums, deaths of kvtransfer."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_contracts.discovery.v1.instance_pb2 import Service as ServiceKind
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_contracts.kvtransfer.v1.kvtransfer_service_pb2_grpc import KvTransferServiceServicer, add_KvTransferServiceServicer_to_server
from baton_handoff import books as books_module
from baton_handoff.actions import Report
from baton_handoff.books import BooksClient
from baton_handoff.config import Times
from baton_handoff.ids import EventKind, HandoffKey, Outcome, Side
from baton_handoff.pulls import LinkStats
from baton_handoff.transports.base import PullStats
from baton_runtime.discovery import InMemoryDiscovery
from baton_runtime.rpc import GrpcServer
from baton_runtime.testing import wait_until

KEY = HandoffKey("r", 1, "own")


class FakeKvTransfer(KvTransferServiceServicer):
    """Collects what is reported; says what a test puts into `news`; echoes if told to."""

    def __init__(self) -> None:
        self.echoes = False
        self.streams: list[list[pb.BooksRequest]] = []
        self.news: asyncio.Queue[pb.BooksResponse] = asyncio.Queue()

    async def Books(self, requests: AsyncIterator[pb.BooksRequest], context: object) -> AsyncIterator[pb.BooksResponse]:
        received: list[pb.BooksRequest] = []
        self.streams.append(received)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read(requests, received))
            try:
                while True:
                    yield await self.news.get()
            finally:
                reader.cancel()

    async def _read(self, requests: AsyncIterator[pb.BooksRequest], received: list[pb.BooksRequest]) -> None:
        async for request in requests:
            received.append(request)
            if self.echoes:
                self.news.put_nowait(pb.BooksResponse(booked_sequence=request.sequence))

    def echo(self) -> None:
        """All that has come is booked."""
        self.news.put_nowait(pb.BooksResponse(booked_sequence=self.streams[-1][-1].sequence))

    def events(self) -> list[pb.HandoffEvent]:
        """Of the newest stream."""
        return [event for request in (self.streams[-1] if self.streams else []) for event in request.events]


class Setup:
    def __init__(self) -> None:
        self.discovery = InMemoryDiscovery()
        self.introduced: list[pb.Introduction] = []
        self.downs: list[tuple[str, str]] = []
        self.reserved = 0
        self.links: dict[str, LinkStats] = {}
        self.late_s = 0.0  # how far our clock has been put forward
        self.books = BooksClient(
            lambda: Instance(instance_id="d", incarnation="own"),
            lambda: pb.BooksSums(reserved_bytes=self.reserved),
            self.introduced.append,
            lambda incarnation, reason: self.downs.append((incarnation, reason)),
            100,
            Times(sums_s=0.1),
            lambda: self.links,
            lambda: time.monotonic() + self.late_s,
        )
        self.books.follow(self.discovery.view(ServiceKind.SERVICE_KVTRANSFER))

    async def serve(self, name: str, incarnation: str = "k1", listen: str = "127.0.0.1:0") -> tuple[FakeKvTransfer, GrpcServer]:
        fake, server = FakeKvTransfer(), GrpcServer(listen)
        add_KvTransferServiceServicer_to_server(fake, server.server)
        address = await server.start()
        record = Instance(service=ServiceKind.SERVICE_KVTRANSFER, instance_id=name, incarnation=incarnation, grpc_address=address)
        await self.discovery.register(record)
        return fake, server

    def report(self, kind: EventKind, held: int = 0, request_id: str = "r", outcome: Outcome | None = None) -> None:
        key = KEY._replace(request_id=request_id)
        self.books.report(Report(key, Side.SINK, kind, "peer", held, 0, "", outcome), "shm")


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    made = Setup()
    async with asyncio.TaskGroup() as tasks:
        made.books.start(tasks)
        yield made
        made.books.close()


@contextlib.asynccontextmanager
async def closing(server: GrpcServer) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await server.close()


async def test_hello_brings_the_record_and_a_snapshot_of_what_lives(setup: Setup) -> None:
    setup.report(EventKind.BEGUN, held=3)
    setup.report(EventKind.BEGUN, held=2, request_id="over")
    setup.report(EventKind.ENDED, request_id="over", outcome=Outcome.CONFIRMED)
    fake, server = await setup.serve("kv-0")
    async with closing(server):
        await wait_until(lambda: fake.streams and fake.streams[0])
        first = fake.streams[0][0]
        assert first.hello.instance.incarnation == "own"
        assert [(event.handoff.request_id, event.held_bytes) for event in first.events] == [("r", 300)]
        assert first.events[0].age_us > 0
        assert first.sequence == 1


async def test_events_come_in_order_to_every_kvtransfer(setup: Setup) -> None:
    (one, server_one), (two, server_two) = await setup.serve("kv-0"), await setup.serve("kv-1")
    async with closing(server_one), closing(server_two):
        await wait_until(lambda: setup.books.num_streams == 2 and one.streams and two.streams)
        for held in (5, 4, 3):
            setup.report(EventKind.PROGRESS, held=held)
        setup.report(EventKind.ENDED, outcome=Outcome.CONFIRMED)
        for fake in (one, two):
            await wait_until(lambda fake=fake: len(fake.events()) == 4)
            assert [event.held_bytes for event in fake.events()] == [500, 400, 300, 0]
            assert fake.events()[-1].outcome == pb.HANDOFF_OUTCOME_CONFIRMED
            assert fake.events()[0].transport == "shm"


async def test_sums_come_without_events_and_with_the_last_of_them(setup: Setup) -> None:
    fake, server = await setup.serve("kv-0")
    async with closing(server):
        await wait_until(lambda: fake.streams and len(fake.streams[0]) >= 3)
        setup.reserved = 700
        setup.report(EventKind.BEGUN, held=7)
        await wait_until(fake.events)
        message = next(request for request in fake.streams[0] if request.events)
        assert message.sums.reserved_bytes == 700


async def test_news_are_passed_on(setup: Setup) -> None:
    fake, server = await setup.serve("kv-0")
    async with closing(server):
        await wait_until(lambda: setup.books.num_streams and fake.streams)
        introduction = pb.Introduction(peer=Instance(incarnation="peer"), pair_secret=b"s")
        fake.news.put_nowait(pb.BooksResponse(introductions=[introduction], peers_down=[pb.PeerDown(incarnation="x", reason="SILENT")]))
        await wait_until(lambda: setup.introduced and setup.downs)
        assert setup.introduced == [introduction]
        assert setup.downs == [("x", "SILENT")]
        setup.books.peer_down("y", "STEP_STUCK")
        await wait_until(lambda: any(request.peers_down for request in fake.streams[0]))


async def test_kvtransfer_that_comes_back_gets_a_snapshot(setup: Setup) -> None:
    _, server = await setup.serve("kv-0")
    await wait_until(lambda: setup.books.num_streams == 1)
    setup.report(EventKind.BEGUN, held=1)
    address = server.address
    await server.close()
    setup.report(EventKind.PROGRESS, held=2)
    again, server = await setup.serve("kv-0", "k2", address)
    async with closing(server):
        await wait_until(lambda: again.streams and again.events())
        assert [event.held_bytes for event in again.events()] == [200]


async def test_reader_too_slow_is_dropped_and_starts_with_a_snapshot(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books_module, "MAX_PENDING_EVENTS", 50)
    fake, server = await setup.serve("kv-0")
    async with closing(server):
        await wait_until(lambda: fake.streams and fake.streams[0])
        for held in range(100):
            setup.report(EventKind.PROGRESS, held=held)
        await wait_until(lambda: len(fake.streams) == 2 and fake.events())
        assert [event.held_bytes for event in fake.events()] == [9900]


async def test_kvtransfer_gone_from_discovery_is_kept_while_its_stream_lives(setup: Setup) -> None:
    fake, server = await setup.serve("kv-0")
    async with closing(server):
        await wait_until(lambda: setup.books.num_streams == 1)
        await setup.discovery.close()  # every record is gone
        setup.report(EventKind.BEGUN, held=1)
        await wait_until(fake.events)
        assert setup.books.num_streams == 1
    await wait_until(lambda: not setup.books.num_streams)


async def test_events_wait_for_the_echo_and_leave_together(setup: Setup) -> None:
    fake, server = await setup.serve("kv-0")
    async with closing(server):
        await wait_until(lambda: fake.streams and fake.streams[0])
        fake.echo()
        setup.report(EventKind.PROGRESS, held=1)
        await wait_until(lambda: len(fake.events()) == 1)
        for held in range(2, 50):
            setup.report(EventKind.PROGRESS, held=held)
            await asyncio.sleep(0)
        fake.echo()
        await wait_until(lambda: len(fake.events()) == 49)
        assert sum(bool(request.events) for request in fake.streams[0]) <= 3


async def test_news_of_a_death_do_not_wait_for_an_echo(setup: Setup) -> None:
    setup.books._times = Times(sums_s=60)
    fake, server = await setup.serve("kv-0")
    async with closing(server):
        await wait_until(lambda: fake.streams and fake.streams[0])
        fake.echo()
        setup.report(EventKind.PROGRESS, held=1)
        await wait_until(fake.events)
        setup.report(EventKind.PROGRESS, held=2)
        setup.books.peer_down("y", "STEP_STUCK")
        await wait_until(lambda: any(request.peers_down for request in fake.streams[0]))


async def test_kvtransfer_that_hangs_does_not_hear_us_until_it_echoes_again(setup: Setup) -> None:
    fake, server = await setup.serve("kv-0")
    async with closing(server):
        await wait_until(lambda: fake.streams and fake.streams[0])
        assert setup.books.num_streams == 1
        fake.echo()
        await wait_until(lambda: len(fake.streams[0]) >= 3)
        setup.late_s = 2.5
        assert setup.books.num_streams == 0
        fake.echoes = True
        await wait_until(lambda: setup.books.num_streams == 1)
        assert len(fake.streams) == 1


async def test_links_are_told_to_each_stream_when_they_change(setup: Setup) -> None:
    link = setup.links["p1"] = LinkStats("tcp", "tcp: the only one")
    (one, server_one) = await setup.serve("kv-0")
    async with closing(server_one):
        await wait_until(lambda: one.streams and one.streams[0])
        assert [(told.transport, told.reason) for told in one.streams[0][0].links] == [("tcp", "tcp: the only one")]
        link.pulled(PullStats(num_bytes=500, num_operations=1, duration_s=0.25))
        await wait_until(lambda: len(links_told(one)) == 2)
        assert (links_told(one)[1].pulled_bytes, links_told(one)[1].bytes_per_s) == (500, 2000)
        (two, server_two) = await setup.serve("kv-1")
        async with closing(server_two):
            await wait_until(lambda: two.streams and two.streams[0])
            assert two.streams[0][0].links[0].pulled_bytes == 500
            del setup.links["p1"]
            await wait_until(lambda: len(links_told(one)) == 3 and len(links_told(two)) == 2)
            assert links_told(two)[1] == pb.LinkReport(source_incarnation="p1", is_closed=True)


def links_told(fake: FakeKvTransfer) -> list[pb.LinkReport]:
    return [link for request in fake.streams[-1] for link in request.links]
