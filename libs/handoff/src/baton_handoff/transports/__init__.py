"""Ways of moving KV blocks between two workers. One interface (`base`), in order of preference: shared memory, nixl, TCP."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton_contracts.discovery.v1.instance_pb2 import Instance
from baton_engine.pool import KvPool
from baton_runtime.log import get_logger

from baton_handoff.transports.base import ChecksumMismatch, PeerPool, PullFailed, PullStats, Transport, TransportUnavailable
from baton_handoff.transports.nixl import NixlTransport
from baton_handoff.transports.nixl_config import NixlConfig
from baton_handoff.transports.nixl_library import NixlMissing
from baton_handoff.transports.segment import PoolMemory, sweep_stale
from baton_handoff.transports.shm import ShmTransport
from baton_handoff.transports.tcp import TcpTransport
from baton_handoff.transports.tcp_wire import TcpConfig

__all__ = [
    "Candidate",
    "ChecksumMismatch",
    "NixlConfig",
    "PeerPool",
    "PoolMemory",
    "PullFailed",
    "PullStats",
    "TcpConfig",
    "Transport",
    "TransportUnavailable",
    "choose",
    "make_transports",
    "sweep_stale",
]

log = get_logger(__name__)

TRANSPORT_NAMES = ("shm", "nixl", "tcp")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A transport that may work with a peer, what its open_peer needs, and why it is in this place, for logs and traces."""

    transport: Transport
    parameters: bytes
    reason: str


def make_transports(
    names: Sequence[str],
    memory: PoolMemory,
    pool: KvPool,
    incarnation: str,
    listen: str,
    advertise: str,
    tcp: TcpConfig | None = None,
    nixl: NixlConfig | None = None,
) -> list[Transport]:
    """The transports named, best first; not yet open. Left out, with a warning: shm if the pool is not in shared memory, nixl if it
    is not installed.

    listen, advertise: host:port (host alone: any port) of the tcp transport, as others reach it; nixl listens there on any port.

    Raises: ValueError for a name nobody knows or if none is left.
    """
    if unknown := [name for name in names if name not in TRANSPORT_NAMES]:
        raise ValueError(f"unknown transport {unknown[0]!r}; known are {', '.join(TRANSPORT_NAMES)}")
    made: list[Transport] = []
    problems: list[str] = []
    if "shm" in names and memory.offer is not None:
        made.append(ShmTransport(memory, pool))
    elif "shm" in names:
        problems.append(f"shm: {memory.problem}")
    if "nixl" in names:
        try:
            made.append(NixlTransport(pool, incarnation, listen, advertise, nixl))
        except NixlMissing as error:
            problems.append(f"nixl: {error}")
    if "tcp" in names:
        made.append(TcpTransport(pool, incarnation, listen, advertise, tcp))
    if not made:
        raise ValueError(f"no transport of {', '.join(names) or 'none'} can be used: {'; '.join(problems)}")
    for problem in problems:
        log.warning("transport_left_out", why=problem)
    return made


def choose(own: Sequence[Transport], peer: Instance) -> list[Candidate]:
    """What to try with a peer, in the own order of preference. Each reason says what spoke against those before it."""
    offers = {offer.name: offer.parameters for offer in peer.transports}
    found: list[Candidate] = []
    against: list[str] = []
    for transport in own:
        problem = transport.why_not(peer, offers[transport.name]) if transport.name in offers else f"{transport.name} is not offered"
        if problem:
            against.append(problem)
        else:
            found.append(Candidate(transport, offers[transport.name], _reason(transport.name, found, against)))
    return found


def _reason(name: str, better: Sequence[Candidate], against: Sequence[str]) -> str:
    if name == ShmTransport.name:
        return "shm: same segment token"
    if against:
        return f"{name}: {'; '.join(against)}"
    return f"{name}: fall-back of {better[-1].transport.name}" if better else f"{name}: the first that both offer"
