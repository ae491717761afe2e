"""What can be proven of the deployment without a Docker engine: the compose file's own commands
and environments run as processes, and the real Prometheus scrapes the real service."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image
from playwright.sync_api import Browser
from prometheus_client import CollectorRegistry

from models import Registry
from models.checkpoints.store import default_store_path
from service.metrics import Metrics
from tests.conftest import answers, free_port, running, wait_until

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
GATEWAY = ROOT / "deploy/gateway-requirements.txt"
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/vitrail.json").read_text())


def filled(text: str) -> str:
    """`${NAME:-default}` filled in, as compose does."""
    return re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)


def dockerfile_environment() -> dict[str, str]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return dict(re.findall(r"(VITRAIL_\w+|HF_HOME)=(\S+)", text))


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_is_contained(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["pids_limit"]
    assert service["mem_limit"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:") or name == "gateway"


def test_hadolint_finds_no_fault() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint has no wheel for this platform")
    command = [
        str(hadolint),
        "--config",
        str(ROOT / "deploy/hadolint.yaml"),
        str(ROOT / "Dockerfile"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_page() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    for rule in ALERTS["groups"][0]["rules"]:
        assert f"## {rule['alert']}\n" in runbook
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"])
    for family in Metrics(CollectorRegistry()).registry.collect():
        assert family.name in shown


def test_collections_survive_the_gateways_container() -> None:
    gateway = COMPOSE["services"]["gateway"]
    folder = filled(gateway["environment"]["VITRAIL_COLLECTIONS"])
    [volume] = gateway["volumes"]
    name, _, mounted = volume.partition(":")
    assert name in COMPOSE["volumes"]
    # the image makes this folder for the user; a volume elsewhere would be root's
    assert mounted == "/var/lib/vitrail"
    assert f"install -d -o vitrail {mounted}" in (ROOT / "Dockerfile").read_text()
    assert folder.startswith(f"{mounted}/")


def test_compose_has_no_passwords() -> None:
    for service in COMPOSE["services"].values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|KEY|TOKEN|SECRET", variable):
                assert filled(str(value)) == "", variable
    grafana = COMPOSE["services"]["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


def test_images_run_as_a_numeric_user() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    served = [stage for stage in stages if re.search(r"^CMD \[", stage, re.MULTILINE)]
    assert len(served) == 2
    for stage in served:
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE) == ["10001:10001"]


@dataclass
class Deployed:
    """Where the compose file's services listen here."""

    gateway: str
    worker: str
    worker_metrics: str


@contextmanager
def compose_process(name: str, **changes: str) -> Iterator[None]:
    """A compose service's own command and environment as a process, but for its addresses."""
    service = COMPOSE["services"][name]
    environment = {**os.environ, **dockerfile_environment(), "VITRAIL_HOST": "127.0.0.1"}
    environment |= {key: filled(value) for key, value in service["environment"].items()}
    environment |= {"VITRAIL_STORE": str(default_store_path())}
    command = [changes.get(part, part) for part in service["command"]]
    environment |= {key: value for key, value in changes.items() if key.isupper()}
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli", *command], env=environment, stderr=subprocess.DEVNULL
    ) as started:
        try:
            yield
        finally:
            started.terminate()


@pytest.fixture(scope="module")
def deployed(demo: Registry) -> Iterator[Deployed]:
    """The compose file's gateway and CPU worker as processes."""
    ports = [str(free_port()) for _ in range(3)]
    gateway, worker, metrics = (f"127.0.0.1:{port}" for port in ports)
    changes = {"dns:///workers:8001": worker, "VITRAIL_PORT": ports[0]}
    with (
        compose_process("worker", VITRAIL_GRPC_PORT=ports[1], VITRAIL_METRICS_PORT=ports[2]),
        compose_process("gateway", **changes),
    ):
        wait_until(lambda: answers(f"http://{gateway}/readyz"), 120)
        yield Deployed(gateway, worker, metrics)


@pytest.fixture(scope="module")
def service(deployed: Deployed) -> str:
    """The address that users have."""
    return deployed.gateway


@pytest.fixture(scope="module")
def prometheus(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The compose file's `prometheus` service as a process that scrapes them; its URL."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(ROOT / "deploy/prometheus", folder / "etc")
    config = folder / "etc/prometheus.yml"
    settings = yaml.safe_load(config.read_text().replace(": 5s", ": 1s"))
    gateways, workers = settings["scrape_configs"]
    assert gateways["static_configs"] == [{"targets": ["gateway:8000"]}]
    gateways["static_configs"] = [{"targets": [deployed.gateway]}]
    [discovery] = workers.pop("dns_sd_configs")
    assert (discovery["names"], discovery["port"]) == (["workers"], 8002)
    workers["static_configs"] = [{"targets": [deployed.worker_metrics]}]
    config.write_text(yaml.safe_dump(settings))
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


def test_the_images_copy_what_they_need_and_run_as_nobody_special() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            ignored = (ROOT / ".dockerignore").read_text()
            assert f"!{source}\n" in ignored
    stages = re.split(r"\nFROM ", text)
    for stage in (next(s for s in stages if "AS gateway" in s), stages[-1]):
        assert "USER 10001:10001" in stage
        assert "HEALTHCHECK" in stage
    assert "ARG TORCH_INDEX_URL" in text
    assert "torch" not in next(s for s in stages if "AS build-gateway" in s)


def test_the_grace_period_outlasts_the_drain() -> None:
    from service.settings import Settings

    for name in ("gateway", "worker", "worker-gpu-0"):
        grace = COMPOSE["services"][name]["stop_grace_period"]
        assert int(grace.removesuffix("s")) >= 10 + Settings().stop_timeout_s


def test_every_profile_has_its_workers_and_each_gpu_one() -> None:
    for profile, gpus in (("gpu", 1), ("gpus-2", 2), ("gpus-4", 4), ("gpus-8", 8)):
        found = [s for s in COMPOSE["services"].values() if profile in s.get("profiles", ())]
        devices = [s["deploy"]["resources"]["reservations"]["devices"][0] for s in found]
        assert [device["device_ids"] for device in devices] == [[str(n)] for n in range(gpus)]
        assert all(s["environment"]["VITRAIL_DEVICE"] == "cuda" for s in found)
        assert all(s["networks"]["default"]["aliases"] == ["workers"] for s in found)
    assert COMPOSE["services"]["worker"]["profiles"] == ["cpu"]
    assert "COMPOSE_PROFILES=cpu\n" in (ROOT / ".env").read_text()


def test_the_health_checks_pass_on_the_running_services(deployed: Deployed) -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    for found in re.findall(r"HEALTHCHECK .*? CMD (\[.*\])", text):
        _, *arguments = json.loads(found.replace("127.0.0.1:8000", deployed.gateway))
        assert subprocess.run([sys.executable, *arguments], check=False).returncode == 0
    _, _, *arguments = COMPOSE["services"]["worker"]["healthcheck"]["test"]
    for address, status in ((deployed.worker, 0), (f"127.0.0.1:{free_port()}", 1)):
        here = [argument.replace("127.0.0.1:8001", address) for argument in arguments]
        command = [sys.executable, "-m", "service.cli", *here]
        assert subprocess.run(command, check=False, capture_output=True).returncode == status


def test_the_gateway_runs_with_its_own_requirements_alone(
    tiny_catalog: Path, jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    """As its image does: no torch, no timm, nothing else that the list leaves out."""
    listed = {line for line in GATEWAY.read_text().splitlines() if not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = [*project["dependencies"], *project["optional-dependencies"]["postgres"]]
    assert listed < {re.split(r"[>;]", line)[0] for line in known}
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pinned = [*install, "-c", str(ROOT / "constraints.txt"), "-r", str(GATEWAY)]
    if subprocess.run(pinned, check=False).returncode:
        pytest.skip("the gateway's requirements cannot be installed here")
    with running(tiny_catalog) as worker:
        worker.wait_ready()
        port = free_port()
        command = [str(python), "-m", "service.cli", "gateway", "--workers", worker.grpc]
        with subprocess.Popen([*command, "--port", str(port)], cwd=ROOT) as gateway:
            try:
                url = f"http://127.0.0.1:{port}"
                wait_until(lambda: answers(f"{url}/readyz") or gateway.poll() is not None)
                image = jpegs["coffee"]
                there = httpx.post(f"{url}/classify", content=image)
                assert there.json() == worker.client.post("/classify", content=image).json()
            finally:
                gateway.terminate()


def test_the_dashboard_uses_the_provisioned_data_source() -> None:
    provisioned = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]
    assert all(panel["datasource"]["uid"] == provisioned["uid"] for panel in DASHBOARD["panels"])
    assert provisioned["url"] == "http://prometheus:9090"


DRAWING = ROOT / "docs/images/dashboard"
SECONDS = 60  # of traffic that the dashboard shows


def send_mixed_traffic(service: str, jpegs: dict[str, bytes], seconds: int) -> None:
    """Requests of several tasks, some of them wrong, in waves from eight clients."""
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        with httpx.Client(base_url=f"http://{service}", timeout=60) as connection:
            while time.monotonic() < end:
                path = ("/classify", "/embed", "/segment", "/classify?model=none")[number % 4]
                connection.post(path, content=jpegs["coffee"])
                time.sleep(0.2 * (1 + number % 3))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))


@pytest.mark.nightly
@pytest.mark.weights
@pytest.mark.timeout(600)
def test_grafanas_components_draw_every_panel(
    after_traffic: str, service: str, jpegs: dict[str, bytes], browser: Browser, tmp_path: Path
) -> None:
    """Drawn by @grafana/ui from npm, not by Grafana itself, with the data of a real Prometheus."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed (apt-get install npm)")
    for name in ("package.json", "dashboard.jsx"):
        shutil.copy(DRAWING / name, tmp_path)
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    if subprocess.run(install, cwd=tmp_path, check=False).returncode:
        pytest.skip("Grafana's components cannot be installed here")
    options = ["--bundle", "--format=esm", "--outfile=drawn.js"]
    bundle = ["node_modules/.bin/esbuild", "dashboard.jsx", *options]
    production = '--define:process.env.NODE_ENV="production"'
    subprocess.run([*bundle, production, "--minify"], cwd=tmp_path, check=True)
    send_mixed_traffic(service, jpegs, SECONDS)
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    empty, address = "<!doctype html><title>Vitrail</title>", f"{after_traffic}/vitrail"
    page.route(address, lambda route: route.fulfill(body=empty, content_type="text/html"))
    page.goto(address)
    given = {"DASHBOARD": DASHBOARD, "SECONDS": SECONDS}
    page.evaluate("given => Object.assign(window, given)", given)
    page.add_style_tag(path=tmp_path / "drawn.css")
    page.add_script_tag(path=tmp_path / "drawn.js", type="module")
    page.wait_for_function("window.EMPTY", timeout=60_000)
    titles = {panel["title"] for panel in DASHBOARD["panels"]}
    page.locator("canvas").nth(len(titles) - 1).wait_for()  # a plot each
    assert page.evaluate("window.EMPTY") == []
    assert {title.inner_text() for title in page.get_by_role("heading").all()} == titles
    assert problems == []
    if folder := os.environ.get("VITRAIL_SCREENSHOTS"):
        with Image.open(io.BytesIO(page.screenshot(full_page=True))) as shown:
            shown.convert("RGB").save(Path(folder) / "dashboard.webp", quality=80)
    page.close()
