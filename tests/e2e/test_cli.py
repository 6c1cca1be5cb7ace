"""`baton up`, `status`, `chat`, `down` as a user runs them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(90)
BATON = [sys.executable, "-m", "baton_cli.main"]


@pytest.fixture
def baton(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run the command with a state folder of the test's own; whatever is up at the end is taken down."""

    def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        command = [*BATON, *arguments, "--state-dir", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    yield run
    run("down")


def status(baton: Callable[..., subprocess.CompletedProcess[str]]) -> dict:
    return json.loads(baton("status", "--json").stdout)


def pids_below(state_dir: Path) -> list[int]:
    """Processes whose environment or command line names this state folder."""
    return [p.pid for p in psutil.process_iter() if str(state_dir) in " ".join(_command(p)) and p.pid != os.getpid()]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_up_answers_a_chat_from_the_handed_over_kv_and_down_leaves_nothing(
    baton: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    up = baton("up", "--detach", "--port", "0")
    assert up.returncode == 0, up.stderr
    assert "curl" in up.stderr
    chat = baton("chat", "red = 4 7 1 ; blue = 2 2 8 ; red ?")
    assert (chat.returncode, chat.stdout.strip()) == (0, "4 7 1"), chat.stderr
    report = status(baton)
    assert {i["service"] for i in report["instances"]} == {"frontend", "router", "prefill", "decode", "kvtransfer"}
    assert all(i[key] for i in report["instances"] for key in ("service", "version", "address", "pid", "metrics"))
    assert "decode-0" in baton("status").stdout
    pids = [i["pid"] for i in report["instances"]]
    assert baton("down").returncode == 0
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert pids_below(tmp_path) == []
    assert baton("status").returncode == 1


def test_a_worker_that_dies_is_restarted_and_the_log_says_so(
    baton: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert baton("up", "--detach", "--engine", "sim", "--port", "0").returncode == 0
    before = next(i for i in status(baton)["instances"] if i["service"] == "decode")
    os.kill(before["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while True:
        after = next((i for i in status(baton)["instances"] if i["service"] == "decode"), before)
        if after["incarnation"] != before["incarnation"]:
            break
        assert time.monotonic() < deadline
    assert "decode-0 ended (killed by SIGKILL), restart 1" in (tmp_path / "supervisor.log").read_text()
    assert baton("chat", "hello", "--max-tokens", "3").returncode == 0


def test_interrupt_stops_everything_within_five_seconds(tmp_path: Path) -> None:
    command = [*BATON, "up", "--engine", "sim", "--port", "0", "--state-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "logs:" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 6
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - began < 5
        assert not [child for child in children if child.is_running()]
    finally:
        process.kill()
        process.communicate()


def test_a_supervisor_killed_with_sigkill_leaves_nothing_running(tmp_path: Path) -> None:
    command = [*BATON, "up", "--engine", "sim", "--port", "0", "--state-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "logs:" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/nowhere"], ["--model", "/nowhere"]),
        (["--engine", "magic"], ["--engine", "torch", "sim"]),
        (["--profile", "unheard-of", "--engine", "sim"], ["profile", "unheard-of", "instant", "polynomial"]),
        (["--port", "70000"], ["--port", "65535"]),
        (["--decode", "0"], ["--decode"]),
        (["--etcd", "127.0.0.1:1", "--engine", "sim", "--ready-timeout", "4"], ["etcd", "127.0.0.1:1"]),
    ],
)
def test_bad_arguments_are_refused_by_name_and_nothing_is_left(
    baton: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    done = baton("up", "--port", "0", *arguments)
    assert done.returncode != 0
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr
    assert pids_below(tmp_path) == []


def test_a_busy_port_is_named_with_the_way_out(baton: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = baton("up", "--port", port)
    assert done.returncode != 0
    assert port in done.stderr
    assert "--port" in done.stderr
    assert pids_below(tmp_path) == []


def test_a_model_that_does_not_fit_is_refused(
    baton: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_DECODE_NUM_BLOCKS", "2000000000")
    done = baton("up", "--port", "0")
    assert done.returncode != 0
    assert "num_blocks" in done.stderr
    assert "Traceback" not in done.stderr
    assert pids_below(tmp_path) == []


def test_down_and_chat_without_a_baton_say_how_to_start_one(baton: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for command in (["down"], ["chat", "hi"], ["status"]):
        done = baton(*command)
        assert done.returncode == 1
        assert "baton up" in done.stderr
