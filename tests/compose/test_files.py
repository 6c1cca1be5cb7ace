"""The files of compose/ against what they speak about: the schema, the services' settings, their dependencies, the metrics they export."""

import re
import subprocess
import sys
import tomllib
from itertools import combinations
from pathlib import Path

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
from queries import COMPOSE, alert_queries, alert_rules, dashboard_panels, dashboard_queries

ROOT = COMPOSE.parent
FILES = sorted(COMPOSE.glob("compose*.yaml"))
CONFIGS = {
    "frontend": FrontendConfig,
    "router": RouterConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "kvtransfer": KvTransferConfig,
}
DEFAULT = re.compile(r"\$\{\w+:?-([^}]*)\}")
DOCKERFILE = (COMPOSE / "Dockerfile").read_text()


def read(name: str) -> dict:
    """A compose file, variables replaced by their defaults."""
    return yaml.safe_load(DEFAULT.sub(r"\1", (COMPOSE / name).read_text()))


def stages() -> dict[str, tuple[str, str]]:
    """Name of a stage of the Dockerfile -> (what it is from, its instructions)."""
    found = re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return {name: (base, text) for base, name, text in found}


def image_settings(service: str) -> dict[str, str]:
    """BATON_* that an image sets."""
    return dict(re.findall(r"(BATON_\w+)=(\S+)", stages()[service][1]))


def seconds(text: str) -> float:
    """Of a duration like 40s."""
    assert text.endswith("s"), text
    return float(text[:-1])


def test_compose_files_fit_the_schema():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *map(str, FILES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", [path.name for path in FILES])
@pytest.mark.parametrize("service", CONFIGS)
def test_settings_are_known_to_the_service_and_in_range(service: str, file: str):
    given = read(file)["services"].get(service, {}).get("environment", {})
    assert all(name.startswith(f"BATON_{service.upper()}_") for name in given), given
    load(CONFIGS[service], service, None, {**image_settings(service), **given})  # raises with the setting's name


@pytest.mark.parametrize("service", CONFIGS)
def test_a_container_is_given_more_time_to_stop_than_its_drain_may_take(service: str):
    about = read("compose.yaml")["services"][service]
    config = load(CONFIGS[service], service, None, about["environment"])
    assert seconds(about["stop_grace_period"]) > config.drain_grace_s + CLOSE_LIMIT_S


def test_only_the_frontend_and_the_uis_have_ports_and_these_on_loopback():
    published = {name: about["ports"] for name, about in read("compose.yaml")["services"].items() if "ports" in about}
    assert set(published) == {"frontend", "jaeger", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert not any("ports" in about for path in FILES if path.name != "compose.yaml" for about in read(path.name)["services"].values())


@pytest.mark.parametrize("name", read("compose.yaml")["services"])
def test_every_container_has_limits_and_no_privileges(name: str):
    about = read("compose.yaml")["services"][name]
    assert about["read_only"] is True
    assert about["cap_drop"] == ["ALL"]
    assert about["security_opt"] == ["no-new-privileges:true"]
    assert set(about["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}


@pytest.mark.parametrize("service", CONFIGS)
def test_an_image_is_built_from_the_members_it_declares_and_no_others(service: str):
    all_stages, stage, copied = stages(), f"build-{service}", set()
    while stage in all_stages:
        base, text = all_stages[stage]
        copied |= set(re.findall(r"^COPY (proto|libs/\w+|services/\w+) ", text, re.MULTILINE))
        stage = base
    assert copied == members_of(f"services/{service}")


def members_of(member: str) -> set[str]:
    """The member, and what it depends on."""
    declared = tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"]["dependencies"]
    ours = [match[1] for match in map(re.compile(r"baton-(\w+)").match, declared) if match]
    needed = ["proto" if name == "contracts" else f"libs/{name}" for name in ours]
    return {member}.union(*map(members_of, needed))


@pytest.mark.parametrize("service", CONFIGS)
def test_prometheus_looks_for_every_service_where_its_metrics_are(service: str):
    jobs = {job["job_name"]: job for job in yaml.safe_load((COMPOSE / "prometheus/prometheus.yml").read_text())["scrape_configs"]}
    (found,) = jobs[service]["dns_sd_configs"]
    assert (found["names"], found["type"]) == ([service], "A")
    assert image_settings(service)[f"BATON_{service.upper()}_METRICS_LISTEN"] == f"0.0.0.0:{found['port']}"


def test_queries_name_metrics_that_the_code_exports():
    asked = {name for query in [*dashboard_queries(), *alert_queries()] for name in re.findall(r"\bbaton_\w+", query.expression)}
    assert len(asked) > 40
    assert asked - exported() == set()


def test_series_of_the_alerts_unit_tests_are_exported_too():
    tests = yaml.safe_load((COMPOSE / "prometheus/alerts_test.yml").read_text())["tests"]
    series = {entry["series"].partition("{")[0] for test in tests for entry in test["input_series"]}
    assert series - exported() == {"up"}


def test_every_alert_is_seen_to_fire_and_to_be_quiet():
    tests = yaml.safe_load((COMPOSE / "prometheus/alerts_test.yml").read_text())["tests"]
    expected = [(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]]
    assert sorted(expected) == sorted((rule["alert"], fires) for rule in alert_rules() for fires in (True, False))


def test_an_alert_sends_nobody_to_a_panel_that_is_not_there():
    titles = {panel["title"] for panel in dashboard_panels()}
    named = {
        found for rule in alert_rules() for found in re.findall(r"panel ([A-Z][\w -]*?)(?=[;:]| shows|$)", rule["annotations"]["action"])
    }
    assert named
    assert named <= titles


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    panels = dashboard_panels()
    assert len({panel["id"] for panel in panels}) == len(panels) >= 30
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert not [pair for pair in combinations(places, 2) if overlap(*pair)]


def overlap(one: dict, other: dict) -> bool:
    """Whether two places share a cell."""
    return all(one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in (("x", "w"), ("y", "h")))


def test_panels_ask_the_data_source_that_is_provisioned():
    provisioned = yaml.safe_load((COMPOSE / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert {source["uid"] for panel in dashboard_panels() for source in [panel["datasource"]]} <= {source["uid"] for source in provisioned}


def test_what_images_are_made_from_is_not_kept_out_of_the_build():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = set(re.findall(r"^COPY (?:--chmod=\d+ )?(\S+)", DOCKERFILE, re.MULTILINE)) - {"--from"}
    needed = {source for source in sources if not source.startswith("--from")}
    assert needed
    assert all(any(Path(source).is_relative_to(entry) for entry in let_in) for source in needed)
