"""`baton handoffs`: every live handoff, as it happens. One kvtransfer is watched; when it goes away, another one.

kvtransfer --WatchHandoffs--> Follower --> Board (handoff_rows.py) --> table, lines or JSON (handoff_text.py)
"""

import asyncio
import sys
import time
from dataclasses import dataclass, field
from typing import Protocol

import click
import grpc
from baton_contracts.discovery.v1 import instance_pb2 as discovery_pb
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2_grpc as pb_grpc
from baton_runtime.discovery import Discovery, View
from baton_runtime.errors import from_rpc_error
from baton_runtime.rpc import open_channel
from rich.console import Console

from baton_cli.handoff_rows import Board, Row
from baton_cli.handoff_text import JsonLines, LiveTable, PlainLines, Silent, document, text

FIRST_LIMIT_S = 3.0  # for the first message of a replica
SILENCE_LIMIT_S = 3.0  # kvtransfer beats every second
LOST_LIMIT_S = 15.0  # without any replica; `baton up` restarts one within 10 s
PAUSE_S = 0.2  # after all replicas have failed


class NoBooks(click.ClickException):
    """No kvtransfer can be reached; the message names the fix."""


class Display(Protocol):
    """Where it is shown."""

    def heard(self, board: Board, rows: list[Row], *, is_snapshot: bool) -> None:
        """A message was taken in; rows: what it told."""

    def lost(self, kvtransfer: str, why: str) -> None:
        """The watched kvtransfer is gone; the next one is tried."""


@dataclass
class Follower:
    """Follows the handoffs over whichever kvtransfer can be reached."""

    view: View
    etcd: str
    request: pb.WatchHandoffsRequest
    display: Display
    board: Board = field(default_factory=Board)
    problems: dict[str, str] = field(default_factory=dict)  # by replica, since the last message of any

    async def once(self) -> None:
        """The snapshot of the first replica that answers. Raises: NoBooks."""
        for instance in self._replicas():
            try:
                await self._watch(instance, is_once=True)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                self.problems[_name(instance)] = _why(error)
            else:
                if self.board.kvtransfer:
                    return
                self.problems[_name(instance)] = "it ends"
        raise self._no_books()

    async def run(self) -> None:
        """Until cancelled. Raises: NoBooks once none has answered for LOST_LIMIT_S; at once if there was none to begin with."""
        heard_at = time.monotonic()
        has_heard = False
        while True:
            for instance in self._replicas():
                why = "it has ended the watch"
                try:
                    await self._watch(instance)
                except (grpc.aio.AioRpcError, TimeoutError) as error:
                    why = _why(error)
                if self.board.kvtransfer == instance.instance_id:  # it told us something, then stopped
                    heard_at, has_heard = time.monotonic(), True
                    self.problems.clear()
                    self.board.kvtransfer = ""
                    self.display.lost(instance.instance_id, why)
                self.problems[_name(instance)] = why
            if not has_heard or time.monotonic() - heard_at > LOST_LIMIT_S:
                raise self._no_books()
            await asyncio.sleep(PAUSE_S)

    def _replicas(self) -> list[discovery_pb.Instance]:
        """All that are registered; those that failed since the last message come last."""
        found = sorted(self.view.instances.values(), key=lambda instance: (_name(instance) in self.problems, instance.instance_id))
        return [instance for instance in found if instance.grpc_address]

    async def _watch(self, instance: discovery_pb.Instance, *, is_once: bool = False) -> None:
        """One replica, until it ends the watch. Raises: AioRpcError; TimeoutError if it falls silent."""
        async with open_channel(instance.grpc_address, "kvtransfer") as channel:
            call = pb_grpc.KvTransferServiceStub(channel).WatchHandoffs(self.request)
            try:
                limit_s = FIRST_LIMIT_S
                while True:
                    async with asyncio.timeout(limit_s):
                        message = await call.read()
                    if not isinstance(message, pb.WatchHandoffsResponse) or message.HasField("end"):
                        return  # over, with its reason or without
                    limit_s = SILENCE_LIMIT_S
                    rows = self.board.hear(instance.instance_id, message)
                    self.display.heard(self.board, rows, is_snapshot=message.HasField("snapshot"))
                    if is_once:
                        return
            finally:
                call.cancel()

    def _no_books(self) -> NoBooks:
        fix = "start one with: baton up (or baton-kvtransfer with BATON_KVTRANSFER_ETCD set to this etcd)"
        if not self.problems:
            return NoBooks(f"no kvtransfer is registered in etcd at {self.etcd}; {fix}")
        tried = "; ".join(f"{name}: {why}" for name, why in sorted(self.problems.items()))
        return NoBooks(f"no kvtransfer answers ({tried}); see its log, or {fix}")


def _name(instance: discovery_pb.Instance) -> str:
    return f"{instance.instance_id} at {instance.grpc_address}"


def _why(error: grpc.aio.AioRpcError | TimeoutError) -> str:
    if isinstance(error, TimeoutError):
        return "it is silent"
    message = from_rpc_error(error).message
    return message.rpartition(": ")[2] if message.startswith("failed to connect") else message  # gRPC names the address three times


async def run(etcd: str, namespace: str, request: pb.WatchHandoffsRequest, *, is_watch: bool, is_json: bool) -> None:
    """What the command does. Raises: click.ClickException that names the fix."""
    discovery = Discovery(etcd, namespace)
    await discovery.start()
    try:
        view = discovery.view(discovery_pb.SERVICE_KVTRANSFER)
        if not await view.synced(FIRST_LIMIT_S):
            raise click.ClickException(f"etcd at {etcd} does not answer; is it running? Name another with --etcd HOST:PORT")
        if not is_watch:
            follower = Follower(view, etcd, request, Silent())
            await follower.once()
            click.echo(document(follower.board) if is_json else text(follower.board))
        elif is_json or not sys.stdout.isatty():
            await Follower(view, etcd, request, JsonLines() if is_json else PlainLines()).run()
        else:
            await _show(view, etcd, request)
    finally:
        await discovery.close()


async def _show(view: View, etcd: str, request: pb.WatchHandoffsRequest) -> None:
    board = Board()
    shown = LiveTable(Console(), board)
    problem: NoBooks | None = None
    async with asyncio.TaskGroup() as group:
        drawing = group.create_task(shown.run(), name="table")
        try:
            await Follower(view, etcd, request, shown, board).run()
        except NoBooks as error:
            problem = error
        finally:
            drawing.cancel()
    if problem is not None:
        raise problem
