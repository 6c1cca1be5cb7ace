"""nixl driven by hand: what the nixl transport is compared with. No event loop, no operations, no secret, no deadline.

One prepared transfer of all blocks per order, posted again and again and waited for by asking all the time. The source lets UCX work
only while it is read, so that it does not take part in other measurements.
"""

import base64
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from baton_engine.pool import KvPool
from baton_handoff.transports.nixl_library import engine_config, load_nixl

Settings = tuple[tuple[str, str], ...]  # of UCX, without UCX_
_HOT, _CALM = b"1", b"0"


def make_agent(name: str, pool: KvPool, settings: Settings) -> Any:
    """An agent without progress thread, the pool registered."""
    api = load_nixl().api
    agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend("UCX", {"engine_config": engine_config(emulation=True, settings=settings)})
    agent.register_memory([(pool.place.address, pool.place.num_bytes, 0, "")], "DRAM")
    return agent


def serve(pool: KvPool, settings: Settings) -> dict[str, Any]:
    """The source. Returns: what Reader wants to know of it."""
    agent = make_agent("by-hand-source", pool, settings)
    listener = socket.create_server(("127.0.0.1", 0))

    def work() -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        while True:
            try:
                word = connection.recv(1)
            except BlockingIOError:
                word = None
            if word == b"":
                return
            if word is not None:
                connection.setblocking(word != _HOT)
            agent.get_new_notifs()
            time.sleep(0)

    threading.Thread(target=work, name="by-hand-source", daemon=True).start()
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    return {"metadata": metadata, "address": pool.place.address, "port": listener.getsockname()[1]}


class Reader:
    """The sink. orders: source and destination ids of each."""

    def __init__(self, pool: KvPool, source: dict[str, Any], settings: Settings, orders: dict[str, tuple[list[int], list[int]]]) -> None:
        self._connection = socket.create_connection(("127.0.0.1", source["port"]))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._is_emulated = bool(settings)
        self._agent = agent = make_agent("by-hand-sink", pool, settings)
        remote = agent.add_remote_agent(base64.b64decode(source["metadata"]))
        here = agent.prep_xfer_dlist("NIXL_INIT_AGENT", _all_blocks(pool.place.address, pool), "DRAM")
        there = agent.prep_xfer_dlist(remote, _all_blocks(source["address"], pool), "DRAM")
        self._transfers = {
            name: agent.make_prepped_xfer("READ", here, _indices(dest_ids), there, _indices(source_ids))
            for name, (source_ids, dest_ids) in orders.items()
        }

        self._wait(agent.make_prepped_xfer("READ", here, _indices([0]), there, _indices([0])))  # makes UCX connect
        self._connection.sendall(_CALM)

    def read(self, order: str) -> None:
        """All blocks. Blocks the thread."""
        if self._is_emulated:
            self._connection.sendall(_HOT)
        self._wait(self._transfers[order])
        if self._is_emulated:
            self._connection.sendall(_CALM)

    def _wait(self, transfer: Any) -> None:
        state = self._agent.transfer(transfer)
        while state == "PROC":
            state = self._agent.check_xfer_state(transfer)
        if state != "DONE":
            raise RuntimeError(f"nixl says {state}")


def _all_blocks(address: int, pool: KvPool) -> npt.NDArray[np.uint64]:
    return np.array([[address, pool.block_bytes, 0, pool.block_bytes, pool.num_blocks]], np.uint64)


def _indices(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.asarray(ids, np.int32)
