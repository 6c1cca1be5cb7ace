"""How handoffs are shown: a table redrawn in place, plain lines, JSON."""

import asyncio
import sys
import time
from collections.abc import Iterable

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from baton_cli.handoff_rows import Board, Row

REFRESH_S = 0.25


class Silent:
    """A display for who looks at the board afterwards."""

    def heard(self, board: Board, rows: list[Row], *, is_snapshot: bool) -> None:
        """See Display."""

    def lost(self, kvtransfer: str, why: str) -> None:
        """See Display."""


class JsonLines:
    """One object per line, as they come. "event": snapshot, handoff or lost."""

    def heard(self, board: Board, rows: list[Row], *, is_snapshot: bool) -> None:
        """See Display."""
        if is_snapshot:
            self._print({"event": "snapshot", "kvtransfer": board.kvtransfer, "handoffs": len(rows), "left_out": board.left_out})
        for row in rows:
            self._print({"event": "handoff", "kvtransfer": board.kvtransfer, **msgspec.structs.asdict(row)})

    def lost(self, kvtransfer: str, why: str) -> None:
        """See Display."""
        self._print({"event": "lost", "kvtransfer": kvtransfer, "why": why})

    def _print(self, fields: dict[str, object]) -> None:
        print(msgspec.json.encode(fields).decode(), flush=True)


class PlainLines:
    """One line per change, for pipes and files."""

    def heard(self, board: Board, rows: list[Row], *, is_snapshot: bool) -> None:
        """See Display."""
        if is_snapshot:
            print(f"{time.strftime('%H:%M:%S')}  {len(rows)} live by {board.kvtransfer}", flush=True)
        for row in rows:
            print(f"{time.strftime('%H:%M:%S')}  {plain(row)}", flush=True)

    def lost(self, kvtransfer: str, why: str) -> None:
        """See Display."""
        print(f"{time.strftime('%H:%M:%S')}  lost {kvtransfer}: {why}", flush=True)


class LiveTable:
    """A table that is redrawn in place."""

    def __init__(self, console: Console, follower_board: Board) -> None:
        self._board = follower_board
        self._note = "connecting"
        self._console = console

    def heard(self, board: Board, rows: list[Row], *, is_snapshot: bool) -> None:
        """See Display."""
        self._note = ""

    def lost(self, kvtransfer: str, why: str) -> None:
        """See Display."""
        self._note = f"lost {kvtransfer} ({why}), looking for another"

    async def run(self) -> None:
        """Redraw until cancelled."""
        with Live(console=self._console, auto_refresh=False, transient=False) as live:
            while True:
                live.update(self.render(), refresh=True)
                await asyncio.sleep(REFRESH_S)

    def render(self) -> Table:
        """As many handoffs as fit."""
        rows, ended = self._board.live(), self._board.ended()
        room = max(3, self._console.height - 4)
        title = self._note or f"{len(rows) + self._board.left_out} live handoffs, by {self._board.kvtransfer}"
        if self._board.dropped_changes:
            title += f", {self._board.dropped_changes} changes came too fast to show"
        table = table_of([*rows, *ended][:room])
        table.title = title
        hidden = len(rows) + len(ended) + self._board.left_out - room
        table.caption = f"and {hidden} more" if hidden > 0 else None
        return table


def table_of(rows: Iterable[Row]) -> Table:
    """Columns: pair, request, state, both sides, bytes, GB/s, age, transport and why."""
    table = Table(box=None, header_style="bold", title_justify="left", caption_justify="left")
    for column in ("pair", "request", "state", "source", "sink"):
        table.add_column(column, no_wrap=True)
    for column in ("bytes", "GB/s", "age"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("transport", overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), style=None if row.is_live else "dim")
    return table


def _cells(row: Row) -> list[str]:
    return [
        f"{row.source or '?'} > {row.sink or '?'}",
        short_id(row.request_id) + (f" #{row.attempt}" if row.attempt > 1 else "") + (" fetch" if row.kind == "fetch" else ""),
        row.state,
        _side(row.source_state, row.source_held_bytes),
        _side(row.sink_state, row.sink_held_bytes),
        size(row.pulled_bytes or row.confirmed_bytes),
        f"{row.gb_per_s:.2f}" if row.gb_per_s is not None else "-",
        f"{row.age_s:.1f} s",
        row.transport_reason or row.transport or "-",
    ]


def _side(state: str | None, held_bytes: int | None) -> str:
    return "-" if state is None else f"{state}, holds {size(held_bytes)}" if held_bytes else state


def plain(row: Row) -> str:
    """One line without colours, the request's id in full."""
    pair, _, state, source, sink, *rest = _cells(row)
    attempt = f" #{row.attempt}" if row.attempt > 1 else ""
    return "  ".join([pair, row.request_id + attempt, state, f"source: {source}", f"sink: {sink}", *rest])


def short_id(request_id: str, length: int = 16) -> str:
    """The end of an id: request ids begin with their frontend's incarnation."""
    return request_id if len(request_id) <= length else "…" + request_id[-length:]


def size(num_bytes: int) -> str:
    """1.5 MiB of 1572864."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def document(board: Board) -> str:
    """All live handoffs as one JSON document."""
    fields = {"kvtransfer": board.kvtransfer, "handoffs": board.live(), "left_out": board.left_out}
    return msgspec.json.format(msgspec.json.encode(fields), indent=2).decode()


def text(board: Board) -> str:
    """All live handoffs as a table, for people."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    rows = board.live()
    with console.capture() as capture:
        console.print(f"{len(rows) + board.left_out} live handoffs, by {board.kvtransfer}", highlight=False)
        if rows:
            console.print(table_of(rows))
    return capture.get().rstrip()
