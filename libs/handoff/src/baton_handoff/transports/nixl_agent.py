"""One nixl agent over the own pool: what nixl's Python API looks like to the rest of this package.

An agent is used by one thread at a time. With its progress thread off (it would burn a core), bytes move only inside calls into
the agent, and its end is the only thing that is sure to end what it reads: neither releasing a transfer nor removing the remote
agent is (bench/nixl_quarantine.py). Therefore there is an agent for every opened peer, and one for every peer that reads here.
"""

import gc
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from baton_engine.pool import MemoryPlace
from baton_runtime.log import get_logger

from baton_handoff.transports.nixl_library import NixlFailed, NixlLibrary
from baton_handoff.transports.operation import BlockIds

log = get_logger(__name__)

TOKEN_BYTES = 16
_KINDS = ("DRAM", "VRAM")
_not_ended: list["NixlAgent"] = []


class RemotePool(msgspec.Struct, frozen=True):
    """What a source tells a sink that has proved the pair's secret. Whoever has it may read the pool while the agent lives.

    metadata: nixl's own; address: of block 0; device: accelerator the pool lies on, None for host memory; token: bytes that
    lie at token_address in the source's memory, to prove that reads end up there.
    """

    metadata: bytes
    address: int
    num_blocks: int
    block_bytes: int
    token: bytes
    token_address: int
    device: int | None = None


class NixlAgent:
    """An agent with the own pool registered. Raises: NixlFailed from every method that calls into nixl."""

    def __init__(self, library: NixlLibrary, name: str, place: MemoryPlace, ucx: str) -> None:
        self.name = name
        self._library = library
        self._place = place
        self._token = np.zeros(TOKEN_BYTES, np.uint8)
        self._token[:] = np.frombuffer(secrets.token_bytes(TOKEN_BYTES), np.uint8)
        self._scratch = np.zeros(2 * TOKEN_BYTES, np.uint8)
        self._remote: RemotePool | None = None
        self._remote_name = ""
        self._lists: tuple[Any, Any] | None = None  # own blocks or rows of the staging buffer, the peer's blocks
        self.staging: npt.NDArray[np.uint8] = np.empty((0, 0), np.uint8)  # shape (rows, bytes of the peer's blocks)
        self._transfers: dict[int, Any] = {}
        self._next_transfer = 1
        self._is_destroyed = False
        with self._translated("making an agent"):
            # UCX is made by hand, because only so it can be given settings.
            config = library.api.nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent: Any = library.api.nixl_agent(name, config)
            self._agent.create_backend("UCX", {"engine_config": ucx})
        with self._translated(f"registering {place.num_bytes} bytes of {_kind(place.device)}"):
            self._agent.register_memory([(place.address, place.num_bytes, place.device or 0, "")], _kind(place.device))
            for buffer in (self._token, self._scratch):
                self._agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "")], "DRAM")

    def offered(self, num_blocks: int, block_bytes: int) -> RemotePool:
        """What a sink needs to read the own pool."""
        with self._translated("packing metadata"):
            metadata: bytes = self._agent.get_agent_metadata()
        token, address = self._token.tobytes(), self._token.ctypes.data
        return RemotePool(metadata, self._place.address, num_blocks, block_bytes, token, address, self._place.device)

    def progress(self) -> None:
        """Let UCX work: connections that are made, and reads of peers that have no other way."""
        with self._translated("progressing"):
            self._agent.get_new_notifs()

    def connect(self, remote: RemotePool, own_block_bytes: int, staging_rows: int) -> None:
        """Load the peer's metadata and prepare lists of all blocks. Once per agent.

        staging_rows: 0 to read into own blocks, else the rows of a buffer to read into, of the size of the peer's blocks.
        """
        own = self._place
        if staging_rows:
            self.staging = np.empty((staging_rows, remote.block_bytes), np.uint8)
            own, own_block_bytes = MemoryPlace(self.staging.ctypes.data, self.staging.nbytes), remote.block_bytes
            with self._translated(f"registering {own.num_bytes} bytes"):
                self._agent.register_memory([(own.address, own.num_bytes, 0, "")], "DRAM")
        with self._translated("adding the peer's agent"):
            self._remote_name = self._agent.add_remote_agent(remote.metadata)
            self._agent.make_connection(self._remote_name)
        there = MemoryPlace(remote.address, remote.num_blocks * remote.block_bytes, remote.device)
        with self._translated(f"preparing {remote.num_blocks} blocks of the peer"):
            local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", _all_blocks(own, own_block_bytes), _kind(own.device))
            self._lists = (local, None)
            blocks = _all_blocks(there, remote.block_bytes)
            self._lists = (local, self._agent.prep_xfer_dlist(self._remote_name, blocks, _kind(remote.device)))
        self._remote = remote

    def probes(self) -> Iterator[int]:
        """Begin to read the peer's token, then the first bytes of its pool, which may lie in memory of another kind.

        To be resumed when the transfer it gave is done. The first makes UCX connect.
        """
        assert self._remote is not None
        remote, scratch = self._remote, self._scratch.ctypes.data
        yield self._post_ranges("DRAM", [scratch], "DRAM", [remote.token_address], TOKEN_BYTES, (0, 0))
        devices = (0, remote.device or 0)
        yield self._post_ranges("DRAM", [scratch + TOKEN_BYTES], _kind(remote.device), [remote.address], TOKEN_BYTES, devices)

    def is_token_right(self) -> bool:
        """Whether what was read is what the peer said."""
        assert self._remote is not None
        return secrets.compare_digest(self._scratch[:TOKEN_BYTES].tobytes(), self._remote.token)

    def post_blocks(self, source_ids: BlockIds, dest_ids: BlockIds) -> int:
        """Begin to read whole blocks of the peer into own ones, or into rows of the buffer.

        Where the kernel does it all, this returns when it is done.
        """
        assert self._lists is not None
        local, remote = self._lists
        with self._translated(f"posting a read of {source_ids.size} blocks"):
            handle = self._agent.make_prepped_xfer("READ", local, dest_ids.astype(np.int32), remote, source_ids.astype(np.int32))
        return self._post(handle)

    def post_ranges(self, source_offsets: npt.NDArray[np.uint64], dest_offsets: npt.NDArray[np.uint64], num_bytes: int) -> int:
        """Begin to read byte ranges, all of num_bytes, at these offsets in the two pools."""
        assert self._remote is not None
        own, remote = self._place, self._remote
        here, there = dest_offsets + np.uint64(own.address), source_offsets + np.uint64(remote.address)
        return self._post_ranges(_kind(own.device), here, _kind(remote.device), there, num_bytes, (own.device or 0, remote.device or 0))

    def is_done(self, transfer: int) -> bool:
        """Whether a transfer is over; lets UCX work."""
        with self._translated("reading"):
            state = self._agent.check_xfer_state(self._transfers[transfer])
        return self._is_over(state)

    def release(self, transfer: int) -> None:
        """Forget a transfer that is over."""
        handle = self._transfers.pop(transfer)
        with self._translated("releasing a transfer"):
            handle.release()

    def destroy(self) -> bool:
        """End the agent and with it everything it reads or lets read; holds the interpreter lock for about 10 ms. Idempotent.

        Returns: False if something keeps nixl's object alive. Then nobody may believe that it writes nothing any more.
        """
        if self._agent is None:
            return self._is_destroyed
        for handle in (*self._transfers.values(), *(prepared for prepared in self._lists or () if prepared is not None)):
            try:
                handle.release()
            except self._library.errors as error:
                log.debug("nixl_release_failed", why=str(error))
        self._transfers.clear()
        self._lists = None
        handle = None  # each refers to the agent
        remains = weakref.ref(self._agent.agent)
        self._agent = None
        if remains() is not None:
            gc.collect()
        self._is_destroyed = remains() is None
        if not self._is_destroyed:
            log.error("nixl_agent_not_ended", agent=self.name)
            _not_ended.append(self)  # with the memory it may write
        return self._is_destroyed

    def _post_ranges(self, kind: str, here: Any, remote_kind: str, there: Any, num_bytes: int, devices: tuple[int, int]) -> int:
        with self._translated(f"posting a read of {len(here)} ranges of {num_bytes} bytes"):
            local = self._agent.get_xfer_descs(_ranges(here, num_bytes, devices[0]), kind)
            remote = self._agent.get_xfer_descs(_ranges(there, num_bytes, devices[1]), remote_kind)
            handle = self._agent.initialize_xfer("READ", local, remote, self._remote_name)
        return self._post(handle)

    def _post(self, handle: Any) -> int:
        number = self._next_transfer
        self._next_transfer += 1
        self._transfers[number] = handle  # from here on destroy() ends it, whatever happens
        with self._translated("posting a read"):
            self._is_over(self._agent.transfer(handle))
        return number

    def _is_over(self, state: str) -> bool:
        if state not in ("DONE", "PROC"):
            raise NixlFailed("reading", ValueError(f"state {state}"))
        return state == "DONE"

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except self._library.errors as error:
            raise NixlFailed(doing, error) from error


class AgentMaker:
    """Makes agents over the own pool, one ahead: making one takes 12 ms, the first of a process 0.5 s."""

    def __init__(self, make: Callable[[str], NixlAgent], incarnation: str) -> None:
        self._make = make
        self._incarnation = incarnation
        self._lock = threading.Lock()
        self._spare: NixlAgent | None = None
        self._is_closed = False

    def take(self) -> NixlAgent:
        """An agent with a name that no other agent has had. Its user calls refill() when there is time. Raises: NixlFailed."""
        with self._lock:
            spare, self._spare = self._spare, None
        return spare or self._made()

    def refill(self) -> None:
        """Make the one for the next user, unless there is one. One that cannot be made is missed when it is needed."""
        try:
            self.prepare()
        except NixlFailed as error:
            log.warning("nixl_agent_failed", why=str(error))

    def prepare(self) -> None:
        """As refill. Raises: NixlFailed."""
        with self._lock:
            if self._spare is not None or self._is_closed:
                return
        made: NixlAgent | None = self._made()
        with self._lock:
            if self._spare is None and not self._is_closed:
                self._spare, made = made, None
        if made is not None:
            made.destroy()

    def close(self) -> None:
        """End the spare one. Idempotent."""
        with self._lock:
            self._is_closed = True
            spare, self._spare = self._spare, None
        if spare is not None:
            spare.destroy()

    def _made(self) -> NixlAgent:
        return self._make(f"{self._incarnation}.{secrets.token_hex(8)}")


def _kind(device: int | None) -> str:
    return _KINDS[device is not None]


def _all_blocks(place: MemoryPlace, block_bytes: int) -> npt.NDArray[np.uint64]:
    """One row stands for all: address, length, device, stride, count."""
    return np.array([[place.address, block_bytes, place.device or 0, block_bytes, place.num_bytes // block_bytes]], np.uint64)


def _ranges(addresses: Any, num_bytes: int, device: int) -> npt.NDArray[np.uint64]:
    rows = np.empty((len(addresses), 3), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = addresses, num_bytes, device
    return rows
