"""The files of compose/patterns/ against the services' settings, SGLang's flags, one another, and the numbers of docs/patterns.md."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sglang_patterns
import yaml
from baton_runtime.config import load
from baton_runtime.lifecycle import CLOSE_LIMIT_S
from queries import COMPOSE
from sglang_patterns import MODELS, WORKERS, flags, loaded
from test_files import CONFIGS, members_of, seconds, stages

PATTERNS = COMPOSE / "patterns"
TWO_NODES = PATTERNS / "llama-70b-two-nodes"
# One host of a pattern -> the files that are laid over one another on it.
HOSTS = {
    "gpt-oss-120b": [COMPOSE / "compose.yaml", PATTERNS / "gpt-oss-120b.yaml"],
    "node-1": [TWO_NODES / "node-1.yaml"],
    "node-2": [TWO_NODES / "node-2.yaml"],
}
HOSTS_OF = {"gpt-oss-120b": ["gpt-oss-120b"], "llama-70b-two-nodes": ["node-1", "node-2"]}
GIVEN = {"NODE_1": "10.0.0.1", "NODE_2": "10.0.0.2", "IB_DEVICES": "mlx5_0,mlx5_1", "BATON_MODEL": "/models/x"}
VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}")


def read(path: Path) -> dict[str, Any]:
    """A compose file; variables are what GIVEN says, else their defaults."""

    def value(found: re.Match[str]) -> str:
        name, kind, text = found.groups()
        assert name in GIVEN or (kind or "").endswith("-"), f"{path.name}: {name} has no default"
        return GIVEN.get(name, text or "")

    document: dict[str, Any] = yaml.safe_load(VARIABLE.sub(value, path.read_text()))
    return document


def laid_over(below: Any, above: Any) -> Any:
    """As compose merges: mappings by name, lists one after the other (but commands, which are replaced), anything else replaced."""
    if isinstance(below, dict) and isinstance(above, dict):
        replaced = {"command", "entrypoint", "test"}
        return below | {
            name: laid_over(below[name], item) if name in below and name not in replaced else item for name, item in above.items()
        }
    return [*below, *above] if isinstance(below, list) and isinstance(above, list) else above


def extended(path: Path, name: str) -> dict[str, Any]:
    """A service of a file with what it extends below it."""
    about = dict(read(path)["services"][name])
    if "extends" not in about:
        return about
    source = about.pop("extends")
    merged: dict[str, Any] = laid_over(extended(path.parent / source["file"] if "file" in source else path, source["service"]), about)
    return merged


def services(host: str) -> dict[str, dict[str, Any]]:
    """What runs on a host."""
    found: dict[str, dict[str, Any]] = {}
    for path in HOSTS[host]:
        found = laid_over(found, {name: extended(path, name) for name in read(path)["services"]})
    return found


def image_settings(service: str, about: dict[str, Any]) -> dict[str, str]:
    """What the image of a service sets for it."""
    target = about["build"]["target"]
    pairs = re.findall(rf"(BATON_{service.upper()}_\w+)=(\"[^\"]*\"|\S+)", stages()[target][1])
    return {name: text.strip('"') for name, text in pairs}


def environment(host: str, service: str) -> dict[str, str]:
    about = services(host)[service]
    return image_settings(service, about) | about["environment"]


def batons_of(host: str) -> list[str]:
    return [name for name in services(host) if name in CONFIGS]


def workers(pattern: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """prefill and decode -> the host each is on, and what the file says about it."""
    found = {name: (host, about) for host in HOSTS_OF[pattern] for name, about in services(host).items() if name in WORKERS}
    assert set(found) == set(WORKERS)
    return found


def gpus(about: dict[str, Any]) -> list[str]:
    (device,) = about["deploy"]["resources"]["reservations"]["devices"]
    assert len(set(device["device_ids"])) == len(device["device_ids"])
    ids: list[str] = device["device_ids"]
    return ids


def test_files_fit_the_schema():
    files = sorted(PATTERNS.rglob("*.yaml"))
    assert len(files) == 4
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def has_compose() -> bool:
    return shutil.which("docker") is not None and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_compose(), reason="needs docker compose")
@pytest.mark.parametrize("host", HOSTS)
def test_compose_itself_reads_them_as_we_do(host: str):
    files = [part for path in HOSTS[host] for part in ("-f", str(path))]
    done = subprocess.run(["docker", "compose", *files, "config"], capture_output=True, text=True, env={**os.environ, **GIVEN})
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)["services"]
    for service in batons_of(host):
        assert resolved[service]["environment"] == services(host)[service]["environment"]


@pytest.mark.parametrize("host", HOSTS)
def test_settings_are_known_to_the_services_and_in_range(host: str):
    for service in batons_of(host):
        given = environment(host, service)
        mine = {name: text for name, text in given.items() if name.startswith("BATON_")}
        assert all(name.startswith(f"BATON_{service.upper()}_") for name in mine), mine
        if service in WORKERS:
            loaded(mine, service)
        else:
            load(CONFIGS[service], service, None, mine)


@pytest.mark.parametrize("host", HOSTS)
def test_a_container_is_given_more_time_to_stop_than_its_drain_may_take(host: str):
    for service in batons_of(host):
        given = environment(host, service)
        config = loaded(given, service) if service in WORKERS else load(CONFIGS[service], service, None, given)
        child_s = 30 if service in WORKERS else 0  # SIGTERM, a grace, SIGKILL of SGLang
        assert seconds(services(host)[service]["stop_grace_period"]) > config.drain_grace_s + CLOSE_LIMIT_S + child_s


@pytest.mark.parametrize("pattern", HOSTS_OF)
def test_prefill_and_decode_fit_each_other_and_their_gpus(pattern: str):
    about = workers(pattern)
    given = {service: environment(host, service) for service, (host, _) in about.items()}
    sglang_patterns.must_fit(pattern, given, {service: len(gpus(entry)) for service, (_, entry) in about.items()})


@pytest.mark.parametrize("host", HOSTS)
def test_no_gpu_of_a_host_is_given_twice(host: str):
    given = [gpu for name, about in services(host).items() if name in WORKERS for gpu in gpus(about)]
    assert len(given) == len(set(given)) == 8


@pytest.mark.parametrize("host", HOSTS)
def test_every_container_has_limits_and_no_privileges(host: str):
    for name, about in services(host).items():
        if "profiles" in about:
            continue  # of compose.yaml, as they are there
        assert about["read_only"] is True, name
        assert about["cap_drop"] == ["ALL"], name
        assert about["security_opt"] == ["no-new-privileges:true"], name
        assert set(about["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert "privileged" not in about


@pytest.mark.parametrize("host", HOSTS)
def test_a_container_is_not_taken_for_dead_while_sglang_starts(host: str):
    (allowed,) = re.findall(r"--start-period=(\d+)s", stages()["worker-sglang"][1])
    for service in set(WORKERS) & set(services(host)):
        assert services(host)[service]["build"]["target"] == "worker-sglang"
        assert float(environment(host, service)[f"BATON_{service.upper()}_SGLANG_START_S"]) < float(allowed)


@pytest.mark.parametrize("host", ["node-1", "node-2"])
def test_on_a_shared_network_all_is_tls_and_no_port_is_used_twice(host: str):
    listens = []
    for service in batons_of(host):
        given = environment(host, service)
        prefix = f"BATON_{service.upper()}_"
        assert {given[f"{prefix}TLS_{name}"] for name in ("CA", "CERTIFICATE", "KEY")} == {
            f"/certificates/{file}.pem" for file in ("ca", "certificate", "key")
        }
        assert any(volume.endswith(f"/{service}:/certificates:ro") for volume in services(host)[service]["volumes"])
        assert given[f"{prefix}ADVERTISE"] == ""
        listens += [text for name, text in given.items() if name.endswith("LISTEN") and not text.endswith(":0")]
        if service != "frontend":  # asked over HTTP, by the image's own check
            assert services(host)[service]["healthcheck"]["test"][-1] == given[f"{prefix}LISTEN"]
    assert len(listens) == len(set(listens))
    address = GIVEN["NODE_1" if host == "node-1" else "NODE_2"]
    assert all(listen.startswith((f"{address}:", "127.0.0.1:")) for listen in listens)


def test_the_image_of_the_workers_holds_both_and_the_libraries_they_declare():
    copied = set(re.findall(r"^COPY (proto|libs/\w+|services/\w+) ", stages()["build-worker-sglang"][1], re.MULTILINE))
    assert copied == members_of("services/prefill") | members_of("services/decode")


@pytest.mark.parametrize("pattern", HOSTS_OF)
def test_the_numbers_of_the_page_follow_from_the_files(pattern: str):
    page = (COMPOSE.parent / "docs/patterns.md").read_text()
    model = MODELS[pattern]
    assert f"{model.handoff_bytes:,} bytes" in page
    for service, (host, about) in workers(pattern).items():
        fraction = float(flags(environment(host, service), service)["--mem-fraction-static"])
        tokens = model.pool_tokens(len(gpus(about)), fraction)
        assert f"| {pattern} | {service} | {fraction:g} | {tokens:,} |" in page
