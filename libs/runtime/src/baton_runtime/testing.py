"""For tests and local runs: a real etcd as a child process, free ports, waiting for conditions."""

import socket


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago; prefer port 0 where the bound port can be learned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
