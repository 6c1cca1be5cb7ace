"""The faults of the matrix: how each strikes, what it severs, how it is mended."""

import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from cluster import Cluster
from hosts import Hosts

WORKERS = ("prefill", "decode")
RESTART_AFTER_S = 3.0

Strike = Callable[[Cluster, tuple[str, ...]], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """One kind of fault. lasts_s: until it is mended."""

    name: str
    lasts_s: float
    strike: Strike
    mend: Strike
    is_kill: bool = False
    is_stop: bool = False

    @property
    def is_partition(self) -> bool:
        """Whether every process goes on."""
        return not (self.is_kill or self.is_stop)

    @property
    def is_short(self) -> bool:
        """Too short for anybody to be given up."""
        return self.lasts_s < 2.0 and not self.is_kill


def is_worker(name: str) -> bool:
    """Whether an instance holds blocks."""
    return name.partition("-")[0] in WORKERS


def _net(house: Cluster) -> Hosts:
    assert house.hosts is not None, "partitions need hosts"
    return house.hosts


async def _kill(house: Cluster, victims: tuple[str, ...]) -> None:
    for victim in victims:
        await (house.etcd.kill() if victim == "etcd" else house.kill(victim))


async def _start(house: Cluster, victims: tuple[str, ...]) -> None:
    for victim in victims:
        await (house.etcd.start() if victim == "etcd" else house.start(victim))


async def _signal(number: signal.Signals, house: Cluster, victims: tuple[str, ...]) -> None:
    for victim in victims:
        if victim == "etcd":
            (house.etcd.stop if number == signal.SIGSTOP else house.etcd.cont)()
        else:
            house.signal(victim, number)


async def _cut(house: Cluster, victims: tuple[str, ...]) -> None:
    await (_net(house).cut(*victims) if len(victims) == 1 else _net(house).cut_pair(*victims))


async def _one_way(house: Cluster, victims: tuple[str, ...]) -> None:
    await _net(house).drop(*victims)


async def _deafen(house: Cluster, victims: tuple[str, ...]) -> None:
    await _net(house).deafen(*victims)


async def _mute(house: Cluster, victims: tuple[str, ...]) -> None:
    await _net(house).mute(*victims)


async def _reset(house: Cluster, victims: tuple[str, ...]) -> None:
    await _net(house).reset(victims[0], victims[1:])


async def _heal(house: Cluster, victims: tuple[str, ...]) -> None:
    await _net(house).heal()


def stop(lasts_s: float) -> Fault:
    """SIGSTOP, later SIGCONT."""
    return Fault(f"stop {lasts_s:g} s", lasts_s, partial(_signal, signal.SIGSTOP), partial(_signal, signal.SIGCONT), is_stop=True)


def partition(name: str, strike: Strike, lasts_s: float) -> Fault:
    """Something between hosts, later healed."""
    return Fault(f"{name} {lasts_s:g} s", lasts_s, strike, _heal)


KILL = Fault("kill -9", RESTART_AFTER_S, _kill, _start, is_kill=True)
STOP_SHORT, STOP_LONG = stop(1.0), stop(3.5)
CUT_SHORT, CUT_LONG = partition("cut", _cut, 1.0), partition("cut", _cut, 4.0)
CUT_VERY_LONG = partition("cut", _cut, 8.0)
ONE_WAY = partition("one way", _one_way, 4.0)
DEAF, MUTE = partition("deaf", _deafen, 4.0), partition("mute", _mute, 4.0)
RESET, BLIP = partition("reset", _reset, 4.0), partition("reset", _reset, 0.05)


@dataclass(frozen=True)
class Cell:
    """One field of the matrix. victims: one (it against all) or two (the pair; of one way: sender, receiver)."""

    fault: Fault
    victims: tuple[str, ...]
    transport: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.transport}: {self.fault.name} {' - '.join(self.victims)}"

    def severs(self, one: str, other: str) -> bool:
        """Whether the two cannot do business, or not in both directions."""
        if len(self.victims) == 1:
            return self.victims[0] in (one, other)
        return {one, other} == set(self.victims)


_P, _D = "prefill-0", "decode-0"
_ONE = [
    *((KILL, name) for name in (_P, _D, "kvtransfer-0", "router-0", "frontend-0", "etcd")),
    *((STOP_SHORT, name) for name in (_P, _D, "kvtransfer-0")),
    *((STOP_LONG, name) for name in (_P, _D, "kvtransfer-0", "router-0", "frontend-0", "etcd")),
    *((CUT_SHORT, name) for name in (_P, _D, "kvtransfer-0")),
    *((CUT_LONG, name) for name in (_P, _D, "kvtransfer-0", "router-0", "etcd")),
    *((CUT_VERY_LONG, name) for name in (_P, _D, "frontend-0")),
    *((DEAF, name) for name in (_P, _D, "kvtransfer-0")),
    *((MUTE, name) for name in (_P, _D, "kvtransfer-0")),
    *((RESET, name) for name in (_P, _D, "kvtransfer-0")),
]
_PAIRS = [
    (CUT_SHORT, _P, _D),
    (CUT_LONG, _P, _D),
    (ONE_WAY, _P, _D),
    (ONE_WAY, _D, _P),
    (RESET, _P, _D),
    (BLIP, _P, _D),
    (CUT_LONG, _P, "kvtransfer-0"),
    (CUT_LONG, _D, "kvtransfer-0"),
    (CUT_VERY_LONG, "frontend-0", _P),
    (CUT_VERY_LONG, "frontend-0", _D),
]


def all_cells(transport: str) -> list[Cell]:
    """The whole matrix on one transport. Neighbours strike other instances where they can, so that a barred pair is not waited for."""
    cells = [Cell(fault, tuple(victims), transport) for fault, *victims in [*_ONE, *_PAIRS]]
    return [_other_instances(cell) if index % 2 else cell for index, cell in enumerate(cells)]


def _other_instances(cell: Cell) -> Cell:
    return Cell(cell.fault, tuple(f"{name[:-1]}1" if is_worker(name) else name for name in cell.victims), cell.transport)
