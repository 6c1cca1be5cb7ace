"""Limits and settings of the nixl transport."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NixlConfig:
    """Settings of the nixl transport.

    operation_limit_s: an operation of at most 32 MiB that takes longer has failed, and the agent that runs it is ended.
    connect_limit_s: limit of connecting, of proving the secret and of reading the peer's token, each.
    stop_grace_s: how long an operation that is not wanted any more may go on before its agent, and with it every other operation
        with the same peer, is ended.
    max_connections: peers that may read at a time; about 10 file descriptors and 5 MB each.
    emulation: read also where UCX would have the peer's software send the bytes (plain TCP). Off, because a reader that is
        killed in the middle of such a read takes the source down with it (docs/transports.md).
    ucx: further settings of UCX, names without UCX_; the environment wins over them.
    """

    operation_limit_s: float = 2.0
    connect_limit_s: float = 2.0
    stop_grace_s: float = 0.05
    max_connections: int = 64
    emulation: bool = False
    ucx: tuple[tuple[str, str], ...] = ()
