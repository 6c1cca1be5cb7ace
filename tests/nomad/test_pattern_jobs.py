"""The jobs of nomad/patterns/ against Nomad's blocks, the services' settings, and the compose files of the same patterns.

No Nomad runs here: the files are parsed by python-hcl2, as in test_jobs.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import sglang_patterns
from baton_runtime.lifecycle import CLOSE_LIMIT_S
from sglang_patterns import WORKERS, flags, loaded
from test_jobs import DOCKER, ROOT, job, seconds, unknown, variables
from test_patterns import environment as compose_environment
from test_patterns import gpus as compose_gpus
from test_patterns import workers as compose_workers

FILES = sorted((ROOT / "nomad/patterns").glob("*.nomad.hcl"))
CLIENT_MAX_KILL_TIMEOUT_S = 180.0  # nomad/README.md tells operators of the patterns to allow so much


def name_of(path: Path) -> str:
    return path.name.removesuffix(".nomad.hcl")


def groups(path: Path) -> dict[str, dict[str, Any]]:
    return {name: about for entry in job(path)["group"] for name, about in entry.items()}


def tasks(path: Path) -> dict[str, dict[str, Any]]:
    """prefill and decode, of whichever group."""
    found = {name: about for group in groups(path).values() for entry in group["task"] for name, about in entry.items()}
    assert set(found) == set(WORKERS)
    return found


def environment(path: Path, service: str) -> dict[str, str]:
    """Of a task, with variables at their defaults and any address where Nomad would put one."""
    known = variables(path)

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name.startswith("NOMAD_ADDR_"):
            return "10.0.0.5:20000"
        if name.startswith("var."):
            return str(known[name[4:]])
        assert name in ("NOMAD_SHORT_ALLOC_ID", "NOMAD_ALLOC_DIR", "node.datacenter") or name.startswith("NOMAD_IP_grpc_"), name
        return "x1"

    (env,) = tasks(path)[service]["env"]
    return {name: re.sub(r"\$\{([^}]*)\}", value, str(text)) for name, text in env.items()}


def gpus(path: Path, service: str) -> int:
    (resources,) = tasks(path)[service]["resources"]
    ((device,),) = [list(entry.values()) for entry in resources["device"]]
    return int(device["count"])


def batons(given: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in given.items() if name.startswith("BATON_")}


def test_there_is_a_job_for_every_pattern_of_compose():
    assert [name_of(path) for path in FILES] == ["gpt-oss-120b", "llama-70b-two-nodes"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_blocks_hold_what_nomad_knows(path: Path):
    assert list(unknown("job", job(path))) == []
    for task in tasks(path).values():
        (config,) = task["config"]
        assert config.keys() - DOCKER == set()
        assert config["readonly_rootfs"] is True
        assert config["cap_drop"] == ["all"]
        assert task["driver"] == "docker"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_variable_and_every_port_that_is_named_is_declared_and_the_other_way_round(path: Path):
    text = path.read_text()
    assert set(re.findall(r"\bvar\.(\w+)", text)) == set(variables(path))
    for group in groups(path).values():
        declared = {name for network in group["network"] for entry in network["port"] for name in entry}
        names = [name for entry in group["task"] for name in entry]
        named = {service["port"] for service in group["service"]} | {
            f"{kind}_{name}" for kind in ("grpc", "kv", "metrics") for name in names
        }
        assert named == declared
    everywhere = {name for g in groups(path).values() for network in g["network"] for entry in network["port"] for name in entry}
    assert set(re.findall(r"NOMAD_(?:PORT|ADDR|IP)_(\w+)", text)) == everywhere


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_prefill_and_decode_fit_each_other_and_their_gpus(path: Path):
    given = {service: environment(path, service) for service in WORKERS}
    for service, env in given.items():
        assert all(name.startswith(f"BATON_{service.upper()}_") for name in batons(env)), env
    sglang_patterns.must_fit(name_of(path), given, {service: gpus(path, service) for service in WORKERS})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_task_is_given_more_time_to_stop_than_its_drain_may_take(path: Path):
    for service, task in tasks(path).items():
        kill_timeout_s = seconds(task["kill_timeout"])
        assert loaded(environment(path, service), service).drain_grace_s + CLOSE_LIMIT_S < kill_timeout_s <= CLIENT_MAX_KILL_TIMEOUT_S
    assert f'max_kill_timeout = "{CLIENT_MAX_KILL_TIMEOUT_S:g}s"' in (ROOT / "nomad/README.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_new_worker_is_waited_for_longer_than_sglang_may_take(path: Path):
    (update,) = job(path)["update"]
    assert int(update["canary"]) == 0  # there are no GPUs for one
    for service in WORKERS:
        start_s = float(environment(path, service)[f"BATON_{service.upper()}_SGLANG_START_S"])
        assert (
            start_s < 60 * float(update["healthy_deadline"].removesuffix("m")) < 60 * float(update["progress_deadline"].removesuffix("m"))
        )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nomad_and_compose_agree(path: Path):
    for service, (host, about) in compose_workers(name_of(path)).items():
        prefix = f"BATON_{service.upper()}_"
        # What says where a process is, who it is and where its certificates are is a matter of the scheduler; MODEL is another path; the
        # command is the image's; the rest stands in compose.yaml for other engines.
        elsewhere = {"LISTEN", "TRANSFER_LISTEN", "METRICS_LISTEN", "INSTANCE_ID", "ZONE", "ETCD", "ADVERTISE", "MODEL", "OTLP_ENDPOINT"}
        elsewhere |= {"TLS_CA", "TLS_CERTIFICATE", "TLS_KEY", "SGLANG_COMMAND", "PROFILE", "TORCH_THREADS", "KV_MEMORY_BYTES", "TRANSPORTS"}
        elsewhere |= {"SGLANG_ARGS", "SERVED_NAME"}  # below
        left, right = environment(path, service), compose_environment(host, service)
        skipped = {f"{prefix}{name}" for name in elsewhere}
        assert {name: left[name] for name in batons(left).keys() - skipped} == {
            name: right[name] for name in batons(right).keys() - skipped
        }
        of_compose, of_nomad = flags(right, service), flags(left, service)
        device = "--disaggregation-ib-device"  # of the hosts
        assert (device in of_compose) == (device in of_nomad)
        assert of_compose | {device: ""} == of_nomad | {device: ""}
        assert left.get("UCX_TLS") == right.get("UCX_TLS")
        assert gpus(path, service) == len(compose_gpus(about))
        assert seconds(tasks(path)[service]["kill_timeout"]) == seconds(about["stop_grace_period"])
        assert variables(path)["image"] == about["image"].replace("${BATON_TAG:-latest}", "latest")
