"""The nixl library, loaded when it is asked for, and the settings that UCX below it is given (docs/transports.md)."""

import importlib
import importlib.metadata
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

# "nixl" chooses by the CUDA it finds; the other two are what it chooses from and do without it.
_MODULES = ("nixl", "nixl_cu13", "nixl_cu12")
_RDMA_DEVICES = Path("/sys/class/infiniband")
_TRUE = frozenset(("1", "y", "yes", "on", "true"))

# Class name in nixl's bindings to what it means here. "ERR" as a state was never seen; failures are raised.
_MEANINGS = {
    "nixlRemoteDisconnectError": "the peer is gone, or no path leads to it on which memory is read without the peer's help",
    "nixlBackendError": "UCX failed",
    "nixlNotFoundError": "not among what was registered",
    "nixlNotAllowedError": "not allowed in this state",
    "nixlInvalidParamError": "a wrong argument",
    "nixlMismatchError": "the two sides do not fit",
    "nixlNotSupportedError": "not supported",
    "nixlRepostActiveError": "the transfer is still running",
    "nixlNotPostedError": "the transfer was never posted",
    "nixlCancelledError": "cancelled",
    "nixlUnknownError": "an unknown error",
}


class NixlMissing(Exception):
    """nixl is not installed, or does not load. The text names the reason and what to do."""


class NixlFailed(Exception):
    """A call of nixl failed. The text says at what, and why."""

    def __init__(self, doing: str, error: BaseException) -> None:
        name = type(error).__name__
        super().__init__(f"{doing}: {_MEANINGS.get(name, name)} ({str(error) or name})")


@dataclass(frozen=True, slots=True)
class NixlLibrary:
    """The loaded library. api: its Python module; errors: everything its calls raise; version: "1.5.1"."""

    api: Any
    errors: tuple[type[Exception], ...]
    version: str


@lru_cache(maxsize=1)
def load_nixl() -> NixlLibrary:
    """Load the library; takes about 0.1 s. Sets environment variables it reads, unless they are set. Raises: NixlMissing."""
    # Its own lines say less than our errors do; UCX warns of every agent that ends in the middle of a read, on the standard output.
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    if not has_rdma():
        # Beside a system's ibverbs-providers the library's own RDMA modules crash the process when it exits.
        os.environ.setdefault("UCX_MODULES", "^ib")
    api = _import_first()
    bindings: ModuleType = api.nixlBind
    errors = tuple(getattr(bindings, name) for name in _MEANINGS if hasattr(bindings, name))
    return NixlLibrary(api, errors, _version(api.__name__.partition(".")[0]))


def has_rdma() -> bool:
    """Whether the kernel knows an RDMA device."""
    try:
        return any(_RDMA_DEVICES.iterdir())
    except OSError:
        return False


def is_emulation_on(wanted: bool) -> bool:
    """Whether reads may be made by the peer's software instead of its hardware or kernel; the environment has the last word."""
    given = os.environ.get("UCX_PROTO_EMULATION_ENABLE")
    return wanted if given is None else given.lower() in _TRUE


def engine_config(emulation: bool, settings: tuple[tuple[str, str], ...]) -> str:
    """Settings of UCX, as nixl's UCX backend takes them. Environment variables (UCX_<name>) win over them."""
    # UCX asks every 20 s whether a peer lives, and reads wait until the peer, which works for us twice a second, has answered: a pull
    # took half a second now and then (measured 2026-11-25). Whether it lives is told by the control connection.
    own = {"PROTO_EMULATION_ENABLE": "y" if emulation else "n", "KEEPALIVE_INTERVAL": "inf"}
    if not has_rdma():
        own["NET_DEVICES"] = "lo"  # all paths without RDMA end on this host: nobody else need reach UCX's ports
    own.update(settings)
    return ",".join(f"{name}={value}" for name, value in own.items())


def _import_first() -> Any:
    problems: list[str] = []
    for name in _MODULES:
        try:
            return importlib.import_module(f"{name}._api")
        except ImportError as error:
            problems.append(f"{name}: {error}")
    raise NixlMissing(
        f"nixl cannot be loaded ({'; '.join(problems)}); install the extra baton-handoff[nixl], or take nixl out of the setting"
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
