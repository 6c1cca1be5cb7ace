"""Hosts that are network namespaces of this machine, and the faults a network between them can have.

    async with Hosts() as hosts:
        await hosts.add("decode-0")                      # a namespace, with addresses of its own
        command = hosts.command("decode-0", command)     # the same program and pid, over there
        await hosts.cut("decode-0")                      # the cable is out
        await hosts.heal()

Every host has two cables: `address` on the network the services talk over, which the faults strike, and `outside` on one that nothing
strikes, for clients and for whoever watches. This process is on both. The bridges are in a namespace of their own, out of reach of
the machine's own firewall rules. Needs root, iproute2 and iptables.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Self

LIMIT_S = 10.0
INSTALL_LIMIT_S = 180.0
# 198.18.0.0/15 is set aside for tests of networks (RFC 2544): 512 networks of 256 addresses, half inside, half outside.
NUM_NETWORKS = 512
_OURS = re.compile(r"baton(\d+)-\S+")


class CommandFailed(Exception):
    """A command of this machine failed; the message has its words."""


@cache
def why_not() -> str:
    """Why hosts cannot be made here; empty if they can. Installs iptables where apt-get does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    if shutil.which("iptables") is None and (problem := _install_iptables()):
        return problem
    probe = f"baton{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    rule = ["ip", "netns", "exec", probe, "iptables", "-w", "-A", "INPUT", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"]
    tried = subprocess.run(rule, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=LIMIT_S, check=False)
    return f"iptables does not work: {tried.stderr.strip()}" if tried.returncode else ""


def _install_iptables() -> str:
    if shutil.which("apt-get") is None:
        return "partitions need iptables"
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "iptables"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for command in (install, ["apt-get", "update", "-qq"], install):
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False, env=environment)
            if shutil.which("iptables") is not None:
                return ""
    except subprocess.TimeoutExpired:
        return f"iptables is missing and apt-get does not end within {INSTALL_LIMIT_S:g} s"
    return f"iptables is missing and cannot be installed: {done.stderr.strip()[-300:]}"


class Hosts:
    """All hosts of one run. Names and addresses are this process's own; everything is deleted at the end, also what a dead run left."""

    def __init__(self) -> None:
        self._run = f"baton{os.getpid()}"
        self._fabric = f"{self._run}-fabric"
        self._numbers: dict[str, int] = {}  # host -> last part of its addresses
        self._struck: set[str] = set()  # hosts with rules or without a cable
        self._network = 0

    async def __aenter__(self) -> Self:
        await delete_leftovers()
        self._network = await _free_network()
        try:
            await _ip(None, f"netns add {self._fabric}")
            links = [f"link add {kind} type bridge forward_delay 0" for kind in ("inside", "outside")]
            await _ip(self._fabric, *links, "link set inside up", "link set outside up")
            await self._plug(None, 126)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Delete every namespace and, with them, every cable. Processes in them are the caller's to end before. Idempotent."""
        for kind in "io":
            with contextlib.suppress(CommandFailed):  # else it goes with the namespace, some time later
                await _ip(None, f"link del {self._leg(kind)}")
        for name in [self._namespace(host) for host in self._numbers] + [self._fabric]:
            await delete_namespace(name)
        self._numbers.clear()

    async def add(self, host: str) -> None:
        """A new host, connected."""
        number = len(self._numbers) + 1
        assert number < 100, "addresses above are not for hosts"
        self._numbers[host] = number
        await _ip(None, f"netns add {self._namespace(host)}")
        await self._plug(host, number)
        await _ip(self._namespace(host), "link set lo up")

    def address(self, host: str) -> str:
        """Of the host, on the network that faults strike."""
        return self._address(self._numbers[host])

    def outside(self, host: str) -> str:
        """Of the host, on the network that nothing strikes."""
        return self._address(128 + self._numbers[host])

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """The same command on that host. `ip` becomes the program (exec), so the pid is the program's."""
        program = shutil.which("ip")
        assert program is not None, "see why_not"
        return [program, "netns", "exec", self._namespace(host), *command]

    # Faults. Each returns once it is in force.

    async def cut(self, host: str) -> None:
        """The cable is out: nothing in, nothing out."""
        self._struck.add(host)
        await _ip(self._fabric, f"link set i{self._numbers[host]} down")

    async def drop(self, source: str, dest: str) -> None:
        """What source sends to dest is lost; the other way is open."""
        await self._rule(dest, "-s", self.address(source), "-j", "DROP")

    async def cut_pair(self, one: str, other: str) -> None:
        """The two do not hear each other; everybody else hears both."""
        await asyncio.gather(self.drop(one, other), self.drop(other, one))

    async def deafen(self, host: str) -> None:
        """The host hears nobody; what it sends arrives."""
        await self._rule(host, "-j", "DROP")

    async def mute(self, host: str) -> None:
        """Nobody hears the host; what others send to it arrives."""
        await asyncio.gather(*(self.drop(host, other) for other in self._numbers if other != host))

    async def reset(self, host: str, others: Iterable[str] = ()) -> None:
        """Connections between host and others (all, if none is named) are reset, in both directions, and new ones refused."""
        among = [other for other in others or self._numbers if other != host]
        reject = ("-p", "tcp", "--tcp-flags", "RST", "NONE", "-j", "REJECT", "--reject-with", "tcp-reset")  # resets themselves arrive
        rules = [(at, away) for other in among for at, away in ((host, other), (other, host))]
        await asyncio.gather(*(self._rule(at, "-s", self.address(away), *reject) for at, away in rules))

    async def slow(self, host: str, mbit_per_s: float) -> None:
        """Limit what the host hears to a rate, for good: everything it is sent queues up before it, at most 1 s of it."""
        rate = f"rate {mbit_per_s:g}mbit burst 32kb latency 1s"
        await _run("tc", "-n", self._fabric, "qdisc", "add", "dev", f"i{self._numbers[host]}", "root", "tbf", *rate.split())

    async def heal(self) -> None:
        """End all faults."""
        await asyncio.gather(*(self._heal(host) for host in self._struck))
        self._struck.clear()

    async def _heal(self, host: str) -> None:
        await _run(*self.command(host, ["iptables", "-w", "-F", "INPUT"]))
        await _ip(self._fabric, f"link set i{self._numbers[host]} up")

    async def _rule(self, host: str, *rule: str) -> None:
        self._struck.add(host)
        await _run(*self.command(host, ["iptables", "-w", "-A", "INPUT", "-i", "inside", *rule]))

    async def _plug(self, host: str | None, number: int) -> None:
        """Two cables from the fabric to a host, None: to this process's own namespace."""
        namespace = self._namespace(host) if host is not None else None
        for kind, address in (("inside", number), ("outside", 128 + number)):
            near, far = f"{kind[0]}{number}", kind if host is not None else self._leg(kind[0])
            where = f"netns {namespace}" if namespace else f"netns {os.getpid()}"
            await _ip(self._fabric, f"link add {near} type veth peer name {far} {where}", f"link set {near} master {kind} up")
            await _ip(namespace, f"addr add {self._address(address)}/25 dev {far}", f"link set {far} up")

    @staticmethod
    def _leg(kind: str) -> str:
        """This process's own end of a cable; names of interfaces have 15 characters at most."""
        return f"bt{os.getpid()}{kind}"

    def _namespace(self, host: str) -> str:
        return f"{self._run}-{host}"

    def _address(self, last: int) -> str:
        return f"198.{18 + self._network // 256}.{self._network % 256}.{last}"


async def delete_leftovers() -> None:
    """Remove what runs left that were killed: their namespaces, and the processes in them that were stopped and could not end."""
    for line in (await _run("ip", "netns", "list")).splitlines():
        found = _OURS.match(line)
        if found is not None and not os.path.exists(f"/proc/{found[1]}"):
            for pid in (await _run("ip", "netns", "pids", found[0])).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            await delete_namespace(found[0])


async def delete_namespace(name: str) -> None:
    """Idempotent."""
    with contextlib.suppress(CommandFailed):  # it is not there
        await _run("ip", "netns", "del", name)


async def _free_network() -> int:
    """A network of which this machine has no address."""
    taken = {item.get("local", "") for link in json.loads(await _run("ip", "-j", "addr")) for item in link["addr_info"]}
    for number in range(os.getpid(), os.getpid() + NUM_NETWORKS):
        network = number % NUM_NETWORKS
        prefix = f"198.{18 + network // 256}.{network % 256}."
        if not any(address.startswith(prefix) for address in taken):
            return network
    raise CommandFailed("every network for tests is taken")


async def _ip(namespace: str | None, *lines: str) -> None:
    """Commands of `ip`, in a namespace, as one batch that ends with the first that fails."""
    where = ("-n", namespace) if namespace is not None else ()
    await _run("ip", *where, "-batch", "-", text="\n".join(lines) + "\n")


async def _run(*command: str, text: str = "") -> str:
    """Raises: CommandFailed."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate(text.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise CommandFailed(f"{' '.join(command)}: {err.decode().strip()}; {text.strip()}")
    return out.decode()
