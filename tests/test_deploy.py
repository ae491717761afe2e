"""What can be proven of the deployment without a Docker engine: the compose file's own commands
and environments run as processes, and the real Prometheus scrapes the real service."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from models import Registry
from models.store import default_store_path
from tests.conftest import answers, free_port, wait_until

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/vitrail.json").read_text())


def compose_environment(service: str) -> dict[str, str]:
    """The service's environment with `${NAME:-default}` filled in, as compose does."""
    given = COMPOSE["services"][service].get("environment", {})
    return {k: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", v) for k, v in given.items()}


def dockerfile_environment() -> dict[str, str]:
    final = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2].replace("\\\n", " ")
    return dict(re.findall(r"(VITRAIL_\w+|HF_HOME)=(\S+)", final))


@pytest.fixture(scope="module")
def service(demo: Registry) -> Iterator[str]:
    """The compose file's `vitrail` service as a process; its address."""
    port = free_port()
    environment = {**os.environ, **dockerfile_environment(), **compose_environment("vitrail")}
    environment |= {"VITRAIL_PORT": str(port), "VITRAIL_STORE": str(default_store_path())}
    environment["VITRAIL_HOST"] = "127.0.0.1"
    command = [sys.executable, "-m", "service.cli", *COMPOSE["services"]["vitrail"]["command"]]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 120)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def prometheus(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The compose file's `prometheus` service as a process that scrapes that address; its URL."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(ROOT / "deploy/prometheus", folder / "etc")
    config = folder / "etc/prometheus.yml"
    text = config.read_text().replace("vitrail:8000", service).replace(": 5s", ": 1s")
    config.write_text(text)
    mounts = {"/etc/prometheus": str(folder / "etc"), "/prometheus": str(folder / "data")}
    command = ["prometheus"]
    for argument in COMPOSE["services"]["prometheus"]["command"]:
        name, path = argument.split("=")
        mount = max((m for m in mounts if path.startswith(m)), key=len)
        command.append(f"{name}={path.replace(mount, mounts[mount], 1)}")
    port = free_port()
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as started:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/ready"))
            yield f"http://127.0.0.1:{port}"
        finally:
            started.terminate()


def query(prometheus: str, expression: str) -> list[Any]:
    expression = expression.replace("$__rate_interval", "1m")
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    result: list[Any] = answer["data"]["result"]
    return result


def expressions() -> dict[str, str]:
    """Every expression of dashboard and alerts; of alerts without the threshold."""
    found = {}
    for panel in DASHBOARD["panels"]:
        for number, target in enumerate(panel["targets"]):
            found[f"{panel['title']} {number}"] = target["expr"]
    for rule in ALERTS["groups"][0]["rules"]:
        quantity, threshold = re.fullmatch(r"(.*?)\s([<>] [\d.]+)\s*", rule["expr"], re.S).groups()  # type: ignore[union-attr]
        assert threshold
        found[rule["alert"]] = quantity
    return found


@pytest.fixture(scope="module")
def after_traffic(prometheus: str, service: str, jpegs: dict[str, bytes]) -> str:
    """Prometheus after requests of each kind, seen in at least two scrapes."""
    for round_number in range(2):
        for path in ("/classify", "/embed", "/segment", "/classify?model=none"):
            httpx.post(f"http://{service}{path}", content=jpegs["coffee"], timeout=30)
        wanted = 4 * (round_number + 1)
        wait_until(
            lambda wanted=wanted: (
                sum(  # type: ignore[misc]
                    float(series["value"][1])
                    for series in query(prometheus, "vitrail_requests_total")
                )
                >= wanted
            )
        )
    return prometheus


def test_prometheus_loads_the_rules_and_sees_the_service(prometheus: str) -> None:
    rules = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert {rule["name"] for rule in rules} == {r["alert"] for r in ALERTS["groups"][0]["rules"]}
    assert all(rule["health"] != "err" for rule in rules)
    wait_until(lambda: bool(query(prometheus, 'up{job="vitrail"} == 1')))


@pytest.mark.parametrize("name", expressions())
def test_every_expression_returns_data_after_traffic(after_traffic: str, name: str) -> None:
    expression = expressions()[name]
    wait_until(lambda: bool(query(after_traffic, expression)), 20)


def test_promtool_finds_no_fault() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    for check in (["config", "prometheus.yml"], ["rules", "alerts.yml"]):
        command = ["promtool", "check", check[0], str(ROOT / "deploy/prometheus" / check[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_mounted_path_exists_and_every_volume_is_declared() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), source
            else:
                assert source in COMPOSE["volumes"]


def test_the_image_copies_what_it_needs_and_runs_as_nobody_special() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            ignored = (ROOT / ".dockerignore").read_text()
            assert f"!{source}\n" in ignored
    final = text.rpartition("\nFROM ")[2]
    assert "USER vitrail" in final
    assert "HEALTHCHECK" in final
    assert "ARG TORCH_INDEX_URL" in text


def test_the_grace_period_outlasts_the_drain() -> None:
    from service.settings import Settings

    grace = COMPOSE["services"]["vitrail"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > Settings().drain_timeout_s


def test_the_health_check_of_the_image_passes_on_the_running_service(service: str) -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    found = re.search(r"HEALTHCHECK .*? CMD (\[.*\])", text)
    assert found
    _, *arguments = json.loads(found[1].replace("127.0.0.1:8000", service))
    assert subprocess.run([sys.executable, *arguments], check=False).returncode == 0


def test_the_dashboard_uses_the_provisioned_data_source() -> None:
    provisioned = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]
    assert all(panel["datasource"]["uid"] == provisioned["uid"] for panel in DASHBOARD["panels"])
    assert provisioned["url"] == "http://prometheus:9090"
