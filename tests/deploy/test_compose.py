"""The compose files are what the compose specification allows, and fit the files beside them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import dashboard

DEPLOY = Path(__file__).parents[2] / "deploy"
BASE = DEPLOY / "docker-compose.yml"
OBSERVABILITY = DEPLOY / "docker-observability.yml"
FILES = [BASE, OBSERVABILITY]

PINNED_IMAGE = re.compile(r"[a-z0-9-]+(/[a-z0-9-]+)?:v?\d+\.\d+\.\d+(-alpine)?")
"""A name without a registry's host, and a version of three numbers."""


def load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    return content


def services(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = load(file)["services"]
    return found


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where in the container each file of ours, or volume, is found."""
    return {place: source for source, place, *_ in (v.split(":") for v in service["volumes"])}


every_service = pytest.mark.parametrize(
    ("file", "name"),
    [(file, name) for file in FILES for name in services(file)],
    ids=lambda value: value if isinstance(value, str) else "",
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_compose_specification_allows_the_file(file: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_guides_services_are_there_and_none_stands_twice() -> None:
    assert set(services(BASE)) == {"etcd", "nats"}
    assert set(services(OBSERVABILITY)) == {"prometheus", "grafana"}
    assert load(OBSERVABILITY)["include"] == [BASE.name]
    assert load(OBSERVABILITY)["name"] == load(BASE)["name"], "one project, however it is started"


@every_service
def test_images_are_pinned_and_name_no_registry(file: Path, name: str) -> None:
    assert PINNED_IMAGE.fullmatch(services(file)[name]["image"])


@every_service
def test_a_service_says_when_it_is_ready_and_keeps_its_state_in_a_volume(
    file: Path, name: str
) -> None:
    service = services(file)[name]
    assert service["healthcheck"]["test"][0] == "CMD"
    volumes = [source for source in mounts(service).values() if "/" not in source]
    assert volumes == [name]
    assert name in load(file)["volumes"]


@every_service
def test_ports_are_open_to_this_machine_only(file: Path, name: str) -> None:
    for port in services(file)[name]["ports"]:
        assert re.match(r"(127\.0\.0\.1|\$\{KVBM_BIND_ADDRESS:-127\.0\.0\.1\}):", port)


@every_service
def test_every_file_that_is_mounted_exists_and_cannot_be_written(file: Path, name: str) -> None:
    for volume in services(file)[name]["volumes"]:
        if volume.startswith("."):
            source, _, mode = volume.split(":")
            assert (DEPLOY / source).exists(), volume
            assert mode == "ro"


def test_the_ports_are_the_guides() -> None:
    ports = {
        name: [re.sub(r".*?(\d+):\d+$", r"\1", port) for port in service["ports"]]
        for file in FILES
        for name, service in services(file).items()
    }
    assert "4222" in ports["nats"]
    assert ports["etcd"] == ["2379"]
    assert ports["grafana"] == ["3000"]


def test_nats_has_jetstream() -> None:
    assert "--jetstream" in services(BASE)["nats"]["command"]


def test_grafana_lets_the_guides_user_in() -> None:
    environment = services(OBSERVABILITY)["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_USER"] == "dynamo"
    assert environment["GF_SECURITY_ADMIN_PASSWORD"] == "dynamo"


def test_prometheus_reads_our_configuration_and_reaches_the_host() -> None:
    service = services(OBSERVABILITY)["prometheus"]
    (config,) = [a for a in service["command"] if a.startswith("--config.file=")]
    assert mounts(service)[config.partition("=")[2]] == "./prometheus/prometheus.yml"
    assert "host.docker.internal:host-gateway" in service["extra_hosts"]


# -- what Grafana finds -------------------------------------------------------------------------


def provisioned(what: str) -> list[Path]:
    """Grafana's files for `what`, by way of the place in the container where it looks."""
    place = f"/etc/grafana/provisioning/{what}"
    source = mounts(services(OBSERVABILITY)["grafana"])[place]
    return sorted((DEPLOY / source).iterdir())


def test_grafana_is_given_prometheus_as_its_data_source() -> None:
    (file,) = provisioned("datasources")
    content = load(file)
    assert content["apiVersion"] == 1
    (source,) = content["datasources"]
    assert source["type"] == "prometheus"
    assert source["access"] == "proxy"
    assert source["isDefault"] is True
    port = services(OBSERVABILITY)["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{port}"


def test_grafana_is_given_the_dashboard() -> None:
    (file,) = provisioned("dashboards")
    content = load(file)
    assert content["apiVersion"] == 1
    (provider,) = content["providers"]
    assert provider["type"] == "file"
    grafana = services(OBSERVABILITY)["grafana"]
    folder = mounts(grafana)[provider["options"]["path"]]
    assert (DEPLOY / folder).resolve() == dashboard.FILE.parent.resolve()
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{dashboard.FILE.name}"


def test_every_panel_asks_the_data_source_that_is_there() -> None:
    (file,) = provisioned("datasources")
    (source,) = load(file)["datasources"]
    wanted = {"type": source["type"], "uid": source["uid"]}
    found = dashboard.load()
    asked = [
        *(panel["datasource"] for panel in found["panels"] if panel["type"] != "row"),
        *(variable["datasource"] for variable in found["templating"]["list"]),
    ]
    assert all(one == wanted for one in asked)
