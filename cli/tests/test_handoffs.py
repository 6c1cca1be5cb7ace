"""`baton handoffs`: what a watch tells becomes rows; another replica takes over; errors name the fix."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from baton_cli import handoffs
from baton_cli.handoff_rows import Board, Row, row_of, state_of
from baton_cli.handoff_text import JsonLines, LiveTable, PlainLines, document, plain, short_id, size, text
from baton_cli.handoffs import Follower, NoBooks
from baton_contracts.discovery.v1 import instance_pb2 as discovery_pb
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_contracts.kvtransfer.v1.kvtransfer_service_pb2_grpc import KvTransferServiceServicer, add_KvTransferServiceServicer_to_server
from baton_runtime.discovery import InMemoryDiscovery
from baton_runtime.rpc import GrpcServer
from baton_runtime.testing import wait_until
from rich.console import Console

BEGUN, PROGRESS, ENDED = pb.HANDOFF_EVENT_KIND_BEGUN, pb.HANDOFF_EVENT_KIND_PROGRESS, pb.HANDOFF_EVENT_KIND_ENDED
CONFIRMED, FENCED = pb.HANDOFF_OUTCOME_CONFIRMED, pb.HANDOFF_OUTCOME_FENCED


def side(name: str, kind: int, held: int = 0, **kwargs: object) -> pb.HandoffSide:
    return pb.HandoffSide(instance_id=name, incarnation=name, kind=kind, held_bytes=held, **kwargs)


def view(request_id: str = "r1", *, is_live: bool = True, age_s: float = 1.0, **kwargs: object) -> pb.HandoffView:
    made = pb.HandoffView(is_live=is_live, age_us=int(age_s * 1e6), **kwargs)
    made.handoff.request_id, made.handoff.attempt, made.handoff.decode_incarnation = request_id, 1, "d1"
    return made


PULLING = view(
    source=side("prefill-0", PROGRESS, 2048),
    sink=side("decode-0", PROGRESS, 4096, confirmed_bytes=1024),
    transport="tcp",
    transport_reason="tcp: not on the same host",
    pulled_bytes=3_000_000,
    pull_us=1000,
)


def snapshot(*views: pb.HandoffView, **kwargs: int) -> pb.WatchHandoffsResponse:
    return pb.WatchHandoffsResponse(snapshot=pb.HandoffSnapshot(handoffs=views, **kwargs))


def delta(*views: pb.HandoffView) -> pb.WatchHandoffsResponse:
    return pb.WatchHandoffsResponse(delta=pb.HandoffDelta(handoffs=views))


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (view(sink=side("d", BEGUN, 9)), "begun"),
        (view(sink=side("d", BEGUN, 9), source=side("p", BEGUN)), "computing"),
        (PULLING, "pulling"),
        (view(sink=side("d", PROGRESS, 9), source=side("p", ENDED, outcome=CONFIRMED)), "ending"),
        (view(sink=side("d", ENDED, 9, outcome=FENCED)), "draining"),
        (view(sink=side("d", ENDED, outcome=CONFIRMED), source=side("p", ENDED, outcome=CONFIRMED), is_live=False), "confirmed"),
        (view(sink=side("d", ENDED, outcome=FENCED), is_live=False), "fenced"),
        (view(source=side("p", PROGRESS, 9, is_down=True), is_live=False), "lost"),
        (view(is_live=False), "lost"),
    ],
)
def test_state_is_one_word_for_both_sides(seen: pb.HandoffView, state: str) -> None:
    assert state_of(seen) == state


def test_row_has_pair_bytes_speed_age_and_why() -> None:
    row = row_of(PULLING)
    assert (row.source, row.sink, row.source_held_bytes, row.sink_held_bytes) == ("prefill-0", "decode-0", 2048, 4096)
    assert (row.confirmed_bytes, row.pulled_bytes, row.gb_per_s, row.age_s) == (1024, 3_000_000, 3.0, 1.0)
    assert (row.transport, row.transport_reason, row.kind) == ("tcp", "tcp: not on the same host", "handoff")


def test_side_that_has_not_reported_has_a_name_at_most() -> None:
    row = row_of(view(sink=side("decode-0", BEGUN, 9), source=side("prefill-0", 0)))
    assert (row.source, row.source_state, row.source_held_bytes) == ("prefill-0", None, None)
    assert row.state == "begun"
    row = row_of(view(sink=side("decode-0", BEGUN, 9)))
    assert (row.source, row.source_state, row.source_held_bytes, row.gb_per_s, row.transport) == (None, None, None, None, None)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_board_has_the_oldest_on_top_and_ages_go_on() -> None:
    clock = Clock()
    board = Board(clock)
    board.hear("kv-0", snapshot(view("young", age_s=1), view("old", age_s=5)))
    clock.now += 2
    assert [(row.request_id, row.age_s) for row in board.live()] == [("old", 7), ("young", 3)]


def test_board_replaces_what_changed_and_shows_what_ended_for_a_moment() -> None:
    clock = Clock()
    board = Board(clock)
    board.hear("kv-0", snapshot(view("a"), view("b")))
    board.hear("kv-0", delta(PULLING, view("a", is_live=False, sink=side("d", ENDED, outcome=CONFIRMED))))
    assert {row.request_id for row in board.live()} == {"b", "r1"}
    assert [(row.request_id, row.state) for row in board.ended()] == [("a", "confirmed")]
    clock.now += 4
    assert board.ended() == []


def test_snapshot_makes_everything_before_void_and_counts_what_was_missed() -> None:
    board = Board()
    board.hear("kv-0", snapshot(view("a")))
    board.hear("kv-1", snapshot(view("b"), dropped_changes=7, left_out=2))
    assert [row.request_id for row in board.live()] == ["b"]
    assert (board.kvtransfer, board.dropped_changes, board.left_out) == ("kv-1", 7, 2)


def test_document_is_one_object_with_every_live_handoff() -> None:
    board = Board()
    board.hear("kv-0", snapshot(PULLING, left_out=3))
    parsed = json.loads(document(board))
    assert (parsed["kvtransfer"], parsed["left_out"]) == ("kv-0", 3)
    assert parsed["handoffs"][0]["gb_per_s"] == 3.0


def test_text_and_plain_lines_show_the_pair_and_why() -> None:
    board = Board()
    rows = board.hear("kv-0", snapshot(PULLING))
    for shown in (text(board), plain(rows[0])):
        assert "prefill-0 > decode-0" in shown
        assert "tcp: not on the same host" in shown
        assert "3.00" in shown


def test_table_fits_the_terminal_and_says_what_is_hidden() -> None:
    board = Board()
    console = Console(width=120, height=10)
    table = LiveTable(console, board)
    assert table.render().title == "connecting"
    table.heard(board, board.hear("kv-0", snapshot(*(view(f"r{n}") for n in range(20)), left_out=5)), is_snapshot=True)
    rendered = table.render()
    assert rendered.row_count == 6
    assert (rendered.title, rendered.caption) == ("25 live handoffs, by kv-0", "and 19 more")
    table.lost("kv-0", "gone")
    assert "looking for another" in str(table.render().title)


def test_lines_say_where_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    board = Board()
    for display in (JsonLines(), PlainLines()):
        display.heard(board, board.hear("kv-0", snapshot(PULLING)), is_snapshot=True)
        display.lost("kv-0", "Connection refused")
    lines = capsys.readouterr().out.splitlines()
    objects = [json.loads(line) for line in lines[:3]]
    assert [found["event"] for found in objects] == ["snapshot", "handoff", "lost"]
    assert objects[1]["request_id"] == "r1"
    assert "1 live by kv-0" in lines[3]
    assert "lost kv-0: Connection refused" in lines[5]


@pytest.mark.parametrize(
    ("num_bytes", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes_have_a_unit(num_bytes: int, shown: str) -> None:
    assert size(num_bytes) == shown


def test_long_ids_keep_their_end() -> None:
    assert short_id("a" * 40 + "-17") == "…aaaaaaaaaaaaa-17"
    assert short_id("r1") == "r1"


class FakeKvTransfer(KvTransferServiceServicer):
    """Tells a snapshot of one handoff, then stays silent until told to end."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ending = asyncio.Event()
        self.requests: list[pb.WatchHandoffsRequest] = []

    async def WatchHandoffs(self, request: pb.WatchHandoffsRequest, context: object) -> AsyncIterator[pb.WatchHandoffsResponse]:
        self.requests.append(request)
        yield snapshot(view(self.request_id))
        await self.ending.wait()
        yield pb.WatchHandoffsResponse(end=pb.WatchEnd(reason="DRAINING"))


class House:
    """Discovery, kvtransfers that serve, and a follower with a display that notes."""

    def __init__(self) -> None:
        self.discovery = InMemoryDiscovery()
        self.view = self.discovery.view(discovery_pb.SERVICE_KVTRANSFER)
        self.servers: list[GrpcServer] = []
        self.seen: list[str] = []
        self.follower = Follower(self.view, "127.0.0.1:2379", pb.WatchHandoffsRequest(instance_id="decode-0"), self)

    async def serve(self, name: str, request_id: str) -> FakeKvTransfer:
        fake, server = FakeKvTransfer(request_id), GrpcServer("127.0.0.1:0")
        add_KvTransferServiceServicer_to_server(fake, server.server)
        await self.register(name, await server.start())
        self.servers.append(server)
        return fake

    async def register(self, name: str, address: str) -> None:
        service = discovery_pb.SERVICE_KVTRANSFER
        await self.discovery.register(discovery_pb.Instance(service=service, instance_id=name, incarnation=name, grpc_address=address))

    def heard(self, board: Board, rows: list[Row], *, is_snapshot: bool) -> None:
        self.seen += [f"{board.kvtransfer} {row.request_id}" for row in rows]

    def lost(self, kvtransfer: str, why: str) -> None:
        self.seen.append(f"lost {kvtransfer}")


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    yield made
    for server in made.servers:
        await server.close()


async def test_none_registered_names_etcd_and_the_fix(house: House) -> None:
    for attempt in (house.follower.once, house.follower.run):
        with pytest.raises(NoBooks) as problem:
            await attempt()
        assert "no kvtransfer is registered in etcd at 127.0.0.1:2379" in problem.value.message
        assert "baton up" in problem.value.message


async def test_none_that_answers_is_named_with_its_address(house: House) -> None:
    await house.register("kvtransfer-0", "127.0.0.1:1")
    for attempt in (house.follower.once, house.follower.run):
        with pytest.raises(NoBooks, match=r"kvtransfer-0 at 127\.0\.0\.1:1"):
            await attempt()


async def test_once_takes_the_first_that_answers(house: House) -> None:
    await house.register("kvtransfer-0", "127.0.0.1:1")
    fake = await house.serve("kvtransfer-1", "r7")
    await house.follower.once()
    assert house.seen == ["kvtransfer-1 r7"]
    assert fake.requests[0].instance_id == "decode-0"


@pytest.mark.parametrize("way", ["ends", "silent"])
async def test_watch_goes_on_with_another_replica(house: House, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await house.serve("kvtransfer-0", "r1")
    await house.serve("kvtransfer-1", "r1")
    monkeypatch.setattr(handoffs, "SILENCE_LIMIT_S", 0.2 if way == "silent" else 30)
    watching = asyncio.create_task(house.follower.run())
    await wait_until(lambda: house.seen == ["kvtransfer-0 r1"])
    if way == "ends":
        first.ending.set()
    await wait_until(lambda: house.seen[:3] == ["kvtransfer-0 r1", "lost kvtransfer-0", "kvtransfer-1 r1"])
    watching.cancel()
    await asyncio.wait([watching])


async def test_watch_that_finds_nobody_any_more_ends_with_the_fix(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoffs, "LOST_LIMIT_S", 0.3)
    await house.serve("kvtransfer-0", "r1")
    watching = asyncio.create_task(house.follower.run())
    await wait_until(lambda: house.seen)
    await house.servers.pop().close()
    with pytest.raises(NoBooks, match="no kvtransfer answers"):
        await watching
    assert house.seen == ["kvtransfer-0 r1", "lost kvtransfer-0"]
