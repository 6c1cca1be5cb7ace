"""Where a running Baton is written down, so that `baton down` and `baton status` find it.

One folder per Baton: state.json (who supervises, where etcd and the HTTP server are), logs/ (one file per process) and etcd/ (data of the
embedded store). Default: $XDG_STATE_HOME/baton, else ~/.local/state/baton.
"""

import os
from pathlib import Path

import click
import msgspec
import psutil


class State(msgspec.Struct, frozen=True):
    """A Baton that was started with `baton up`."""

    pid: int  # of the supervisor
    created_at: float  # the supervisor's process start, seconds since the epoch; a reused pid has another one
    etcd: str  # endpoints
    etcd_namespace: str
    url: str  # of the OpenAI-compatible server; empty until it is ready
    model: str  # served name
    ready: bool
    tls: str = ""  # folder of its certificates; empty: without TLS

    def is_alive(self) -> bool:
        """Whether that very supervisor still runs."""
        try:
            return psutil.Process(self.pid).create_time() == self.created_at
        except psutil.NoSuchProcess:
            return False


def default_folder() -> Path:
    """The folder used when the user names none."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "baton"


def read(folder: Path) -> State | None:
    """The state in folder, or None if no Baton runs there."""
    try:
        state = msgspec.json.decode((folder / "state.json").read_bytes(), type=State)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return state if state.is_alive() else None


def write(folder: Path, state: State) -> None:
    """Replace the state in folder, all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "state.json.new"
    new.write_bytes(msgspec.json.encode(state))
    new.replace(folder / "state.json")


def remove(folder: Path) -> None:
    """Forget the Baton of folder."""
    (folder / "state.json").unlink(missing_ok=True)


def require(folder: Path) -> State:
    """The running Baton's state, or an error that says how to start one."""
    state = read(folder)
    if state is None:
        raise click.ClickException(f"no Baton runs here (looked in {folder}); start one with: baton up")
    return state
