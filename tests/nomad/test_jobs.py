"""The files of nomad/ against what they speak about: Nomad's blocks, the services' settings, the metrics they export, and compose/.

No Nomad runs here: the files are parsed by python-hcl2, and what a scheduler would look up is looked up.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml
from baton_decode.config import DecodeConfig
from baton_frontend.config import FrontendConfig
from baton_kvtransfer.config import KvTransferConfig
from baton_prefill.config import PrefillConfig
from baton_router.config import RouterConfig
from baton_runtime.config import load
from baton_runtime.lifecycle import CLOSE_LIMIT_S
from metric_names import exported

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "nomad").glob("*.nomad.hcl"))
CONFIGS = {
    "frontend": FrontendConfig,
    "router": RouterConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "kvtransfer": KvTransferConfig,
}
CLIENT_MAX_KILL_TIMEOUT_S = 60.0  # nomad/README.md tells operators to allow so much
# What may stand where, from the public documentation of Nomad's job specification (1.9), as far as these files use it.
BLOCKS = {
    "job": {"update", "migrate", "group", "datacenters", "type", "constraint"},
    "constraint": {"attribute", "operator", "value"},
    "update": {
        *("max_parallel", "canary", "auto_promote", "auto_revert", "health_check"),
        *("min_healthy_time", "healthy_deadline", "progress_deadline"),
    },
    "migrate": {"max_parallel", "health_check", "min_healthy_time", "healthy_deadline"},
    "group": {"count", "scaling", "network", "restart", "ephemeral_disk", "volume", "service", "task"},
    "ephemeral_disk": {"sticky", "size"},
    "scaling": {"enabled", "min", "max", "policy"},
    "network": {"mode", "port"},
    "port": {"static", "to"},
    "restart": {"attempts", "interval", "delay", "mode"},
    "volume": {"type", "source", "read_only"},
    "service": {"name", "provider", "port", "task", "tags", "check"},
    "check": {"name", "type", "path", "task", "command", "args", "interval", "timeout"},
    "task": {
        *("driver", "kill_signal", "kill_timeout", "shutdown_delay", "config"),
        *("volume_mount", "env", "template", "resources"),
    },
    "volume_mount": {"volume", "destination", "read_only"},
    "template": {"destination", "env", "change_mode", "perms", "uid", "gid", "data"},
    "resources": {"cpu", "memory", "device"},
    "device": {"count"},
}
# Of the docker driver.
DOCKER = {
    *("image", "command", "args", "network_mode", "ipc_mode", "readonly_rootfs", "cap_drop", "cap_add"),
    *("pids_limit", "healthchecks", "devices", "ulimit", "mount", "shm_size"),
}
LABELLED = {"group", "port", "volume", "task", "device", "scaling_check"}


def plain(value: Any) -> Any:
    """As it was meant: strings without their quotes, no marks of the parser."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items() if not str(key).startswith("__")}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value[1:-1] if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"' else value


def parsed(path: Path) -> dict[str, Any]:
    return plain(hcl2.loads(path.read_text()))


def variables(path: Path) -> dict[str, Any]:
    """Defaults, by name."""
    return {name: about.get("default") for entry in parsed(path)["variable"] for name, about in entry.items()}


def job(path: Path) -> dict[str, Any]:
    ((about,),) = [list(entry.values()) for entry in parsed(path)["job"]]
    return about


def group(path: Path) -> dict[str, Any]:
    ((about,),) = [list(entry.values()) for entry in job(path)["group"]]
    return about


def task(path: Path) -> dict[str, Any]:
    ((about,),) = [list(entry.values()) for entry in group(path)["task"]]
    return about


def file_of(service: str) -> Path:
    return ROOT / "nomad" / f"{service}.nomad.hcl"


def blocks(about: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    """The blocks of a kind without labels, those of dynamic ones included."""
    yield from about.get(kind, ())
    for entry in about.get("dynamic", ()):
        for name, dynamic in entry.items():
            if name == kind:
                yield from dynamic["content"]


def ports(path: Path) -> set[str]:
    return {name for network in group(path)["network"] for entry in network["port"] for name in entry}


def environment(service: str) -> dict[str, str]:
    """Of the task, with variables at their defaults and any address where Nomad would put one."""
    path = file_of(service)
    known = variables(path)

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name.startswith("NOMAD_ADDR_"):
            return "10.0.0.5:20000"
        if name.startswith("var.") and name[4:] in known:
            return str(known[name[4:]])
        assert name in ("NOMAD_SHORT_ALLOC_ID", "node.datacenter", 'var.gpus > 0 ? "cuda" : "cpu"'), name
        return "cpu" if "cuda" in name else "x1"

    (env,) = task(path)["env"]
    return {name: re.sub(r"\$\{([^}]*)\}", value, str(text)) for name, text in env.items()}


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def unknown(kind: str, about: dict[str, Any]) -> Iterator[str]:
    """Names that may not stand in a block, and in those below it."""
    for name, value in about.items():
        if name == "dynamic":
            for entry in value:
                for inner, dynamic in entry.items():
                    if inner not in BLOCKS[kind]:
                        yield f"{kind}: {inner}"
                    for content in dynamic["content"]:
                        yield from unknown(inner, content)
        elif name not in BLOCKS[kind]:
            yield f"{kind}: {name}"
        elif name in BLOCKS and name not in ("config", "env") and isinstance(value, list):
            for entry in value:
                inside = entry.values() if name in LABELLED else [entry]
                for block in inside:
                    yield from unknown(name, block)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_blocks_hold_what_nomad_knows(path: Path):
    assert list(unknown("job", job(path))) == []


def test_there_is_a_job_for_every_service_and_one_for_etcd():
    assert {path.name for path in FILES} == {f"{name}.nomad.hcl" for name in (*CONFIGS, "etcd")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_variable_is_used_and_every_one_used_is_declared(path: Path):
    assert set(re.findall(r"\bvar\.(\w+)", path.read_text())) == set(variables(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_port_that_is_named_is_declared_and_the_other_way_round(path: Path):
    text = path.read_text()
    named = set(re.findall(r"NOMAD_(?:PORT|ADDR)_(\w+)", text)) | {service["port"] for service in group(path)["service"]}
    assert named == ports(path)


@pytest.mark.parametrize("service", CONFIGS)
def test_settings_are_known_to_the_service_and_in_range(service: str):
    given = environment(service)
    assert all(name.startswith(f"BATON_{service.upper()}_") for name in given), given
    from_templates = re.findall(r"^\s*(BATON_\w+)=", file_of(service).read_text(), re.MULTILINE)
    assert sorted(name.removeprefix(f"BATON_{service.upper()}_") for name in from_templates) == [
        "ETCD",
        "TLS_CA",
        "TLS_CERTIFICATE",
        "TLS_KEY",
    ]
    load(CONFIGS[service], service, None, {**given, **dict.fromkeys(from_templates, "10.0.0.5:2379")})  # raises with the setting's name


@pytest.mark.parametrize("service", CONFIGS)
def test_a_task_is_given_more_time_to_stop_than_its_drain_may_take(service: str):
    config = load(CONFIGS[service], service, None, environment(service))
    kill_timeout_s = seconds(task(file_of(service))["kill_timeout"])
    assert config.drain_grace_s + CLOSE_LIMIT_S < kill_timeout_s <= CLIENT_MAX_KILL_TIMEOUT_S
    assert f'max_kill_timeout = "{CLIENT_MAX_KILL_TIMEOUT_S:g}s"' in (ROOT / "nomad/README.md").read_text()


@pytest.mark.parametrize("service", CONFIGS)
def test_grpc_health_is_checked_with_and_without_tls(service: str):
    (about,) = [found for found in group(file_of(service))["service"] if found["name"] == f"baton-{service}"]
    assert about["provider"] == "consul"  # Nomad's own service discovery has no gRPC checks
    assert {check["type"] for check in blocks(about, "check")} == {"grpc", "script"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_task_has_limits_and_every_etcd_look_up_a_service(path: Path):
    (resources,) = task(path)["resources"]
    assert resources["cpu"] > 0
    assert resources["memory"] > 0
    assert task(path)["driver"] == "docker"
    (config,) = task(path)["config"]
    assert config.keys() - DOCKER == set()
    assert config["readonly_rootfs"] is True
    assert config["cap_drop"] == ["all"]
    assert all(name == "baton-etcd" for name in re.findall(r'range \$i, \$s := service "([^"]+)"', path.read_text()))


def scaling_checks(service: str) -> dict[str, dict[str, Any]]:
    """By name."""
    (scaling,) = group(file_of(service))["scaling"]
    (policy,) = scaling["policy"]
    return {name: about for entry in policy["check"] for name, about in entry.items()}


@pytest.mark.parametrize("service", ["prefill", "decode"])
def test_workers_scale_on_metrics_that_are_exported(service: str):
    queries = [about["query"] for about in scaling_checks(service).values()]
    assert len(queries) == {"prefill": 1, "decode": 2}[service]
    asked = {name for query in queries for name in re.findall(r"\bbaton_\w+", query)}
    assert asked - exported() == set()
    assert all(service in query for query in queries)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
@pytest.mark.parametrize(("service", "check"), [("prefill", "queue_wait"), ("decode", "inter_token")])
def test_times_to_scale_by_are_numbers_also_without_traffic_and_never_under_half_their_target(tmp_path: Path, service: str, check: str):
    about = scaling_checks(service)[check]
    ((strategy,),) = [list(entry.values()) for entry in about["strategy"]]
    target = float(strategy["target"])

    def asked(series: dict[str, str], expected: float) -> dict[str, Any]:
        return {
            "interval": "15s",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [{"expr": about["query"], "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": expected}]}],
        }

    def waits(**per_interval: int) -> dict[str, str]:
        bounds = {"shorter": target / 100, "longer": target * 100, "all": "+Inf"}
        labels = 'work="prefill_only",priority="interactive"'
        return {f'baton_queue_wait_seconds_bucket{{{labels},le="{bounds[name]}"}}': f"0+{count}x40" for name, count in per_interval.items()}

    def steps(*seconds: float) -> dict[str, str]:
        """Of one instance each, as two routers see it."""
        metric = "baton_router_predicted_decode_step_seconds"
        return {f'{metric}{{instance="r{r}",instance_id="d{n}"}}': f"{s}x40" for n, s in enumerate(seconds) for r in range(2)}

    cases = {
        "prefill": [
            (waits(longer=0, all=0), target / 2),  # nothing is asked
            (waits(shorter=10, all=10), target / 2),
            (waits(shorter=0, longer=10, all=10), target / 100 + 0.95 * (target * 100 - target / 100)),
        ],
        "decode": [(steps(0, 0), target / 2), (steps(target / 100, 0), target / 2), (steps(target, 3 * target), 2 * target)],
    }
    before_the_first_scrape: tuple[dict[str, str], float] = ({}, target / 2)
    rules = {"tests": [asked(*case) for case in [before_the_first_scrape, *cases[service]]]}
    (tmp_path / "scaling.yml").write_text(json.dumps(rules))
    done = subprocess.run(["promtool", "test", "rules", "scaling.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", CONFIGS)
def test_nomad_and_compose_agree(service: str):
    about = yaml.safe_load((ROOT / "compose/compose.yaml").read_text())["services"][service]
    path = file_of(service)
    assert variables(path)["image"] == about["image"].replace("${BATON_TAG:-latest}", "latest")
    # What says where a process is, and which transports fit there, is a matter of the scheduler.
    placing = {"LISTEN", "HTTP_LISTEN", "TRANSFER_LISTEN", "METRICS_LISTEN", "INSTANCE_ID", "ZONE", "ETCD", "TRANSPORTS", "DEVICE"}
    chosen = {"PROFILE", "TORCH_THREADS", "TRACE_SAMPLE_RATIO"}  # compose's alone: it also runs the sim engine, and on a laptop
    prefix = f"BATON_{service.upper()}_"
    assert {name.removeprefix(prefix) for name in environment(service)} - placing == {
        name.removeprefix(prefix) for name in about["environment"]
    } - placing - chosen
    assert seconds(about["stop_grace_period"]) == seconds(task(path)["kill_timeout"])
