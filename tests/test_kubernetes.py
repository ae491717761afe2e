"""What can be proven of the Helm chart and the KServe runtime without a cluster: Helm renders the
chart, schemas and policies hold, and containers' commands and environments run as processes."""

import importlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml

from models.catalog import load_catalog
from service.ray.groups import narrowed, trunk_groups
from tests.conftest import free_port, wait_until
from tests.helm_process import ask as ask_helm
from tests.pods import (
    CHART,
    ask_grpc,
    ask_http,
    container_process,
    manifests_of,
    one,
    rendered_with,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from ray.serve.schema import ServeDeploySchema

    from service.processes.ray import Placement

ROOT = Path(__file__).parents[1]
SCHEMAS = ROOT.parent / "shared/schemas"
KSERVE = sorted((ROOT / "deploy/kserve").glob("*.yaml"))
# Values that each turn on what the others leave out.
EVERYTHING: dict[str, Any] = {
    "modelImage": "models:1",
    "catalogs": {"own.toml": "[trunks]"},
    "gateway": {"maxReplicas": 4, "env": {"VITRAIL_LOG_LEVEL": "debug"}},
    "workers": {"cpu": {"maxReplicas": 4}},
    "ingress": {"enabled": True},
    "monitoring": {"enabled": True},
}
VALUES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "everything": EVERYTHING,
    **{
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((ROOT / "deploy/helm/values").glob("*.yaml"))
    },
}


@cache
def files(name: str) -> dict[str, str]:
    """The files that Helm makes of the chart with these values."""
    made: dict[str, str] = ask_helm(CHART, VALUES[name])["files"]
    return made


def rendered(name: str) -> list[dict[str, Any]]:
    """The manifests that Helm makes of the chart with the values of this name."""
    return manifests_of(files(name))


def validate(manifest: dict[str, Any]) -> None:
    """Check a manifest against its schema: Kubernetes' own, or its custom resource's."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    if group.count(".") == 0 or group.endswith(".k8s.io"):
        kubernetes_validate.validate(manifest, "1.33", strict=True)
        return
    path = SCHEMAS / f"{group}_{version}_{manifest['kind']}.json"
    if not path.exists():
        pytest.skip(f"the schema is not here (shared/schemas/{path.name})")
    jsonschema.validate(manifest, closed(json.loads(path.read_text())))


def closed(schema: Any) -> Any:
    """The schema without unknown members, which the API server would drop silently, and without
    patterns that only Go understands."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {
        key: closed(value)
        for key, value in schema.items()
        if key != "pattern" or "(?i)" not in value
    }
    is_open = schema.get("x-kubernetes-preserve-unknown-fields")
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and not is_open
    ):
        inner.setdefault("additionalProperties", False)
    return inner


@pytest.mark.parametrize("name", VALUES)
def test_the_chart_renders_to_valid_manifests(name: str) -> None:
    manifests = rendered(name)
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(set(names)) == len(names)
    for manifest in manifests:
        validate(manifest)


@pytest.mark.parametrize("path", KSERVE, ids=lambda path: str(path.stem))
def test_kserves_manifests_are_valid(path: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        validate(manifest)


def test_a_wrong_manifest_is_found() -> None:
    manifest = one(rendered("cpu"), "Deployment", "demo-gateway")
    manifest["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(manifest)
    if SCHEMAS.exists():
        scaled = one(rendered("gpu"), "ScaledObject", "demo-worker-gpu")
        scaled["spec"]["maxReplicas"] = 3
        with pytest.raises(jsonschema.ValidationError):
            validate(scaled)


def test_helm_finds_nothing_wrong_with_the_chart() -> None:
    found = ask_helm(CHART, None)["lint"]
    assert found["errors"] == []
    assert [m["error"] for m in found["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize(
    "values",
    [
        {"workers": {"cpu": {"replica": 2}}},
        {"workers": {"cpu": {"gpus": -1}}},
        {"workers": {"Not A Name": {}}},
        {"gateway": {"replicas": 0}},
        {"sekret": "keys"},
        {"drainSeconds": "60"},
        {"ray": {"placement": {"max_replica": 4}}},
        {"ray": {"enabled": True}, "catalogPollSeconds": 10},
        {"ray": {"enabled": True}, "monitoring": {"enabled": True}},
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    assert "error" in ask_helm(CHART, values)


def pods() -> Iterator[tuple[str, dict[str, Any], Mapping[str, str]]]:
    """Each pod of the rendered charts and of the KServe runtime, with its labels."""
    for name in VALUES:
        for manifest in rendered(name):
            for number, template in enumerate(pod_templates(manifest)):
                yield (
                    f"{name} {manifest['metadata']['name']} {number}",
                    template["spec"],
                    template["metadata"]["labels"],
                )


def pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The templates of the pods that a manifest makes."""
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "Deployment":
            return [spec["template"]]
        case "RayService":
            cluster = spec["rayClusterConfig"]
            groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            return [group["template"] for group in groups]
    return []


PODS = {name: (spec, labels) for name, spec, labels in pods()}


@pytest.mark.parametrize("name", PODS)
def test_pods_keep_to_the_restricted_standard(name: str) -> None:
    """Kubernetes' Pod Security Standard `restricted`, and a read-only root."""
    spec, _ = PODS[name]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    kinds = {"emptyDir", "configMap", "persistentVolumeClaim", "image"}
    assert all(volume.keys() & kinds for volume in spec["volumes"])
    [container] = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "privileged": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    drain = [e["value"] for e in container["env"] if e["name"].startswith("VITRAIL_DRAIN_")]
    assert drain
    assert spec["terminationGracePeriodSeconds"] >= 10 + sum(map(int, drain))


@pytest.mark.parametrize("name", PODS)
def test_no_service_sets_a_setting(name: str) -> None:
    """Of a Service named vitrail, service links would set VITRAIL_PORT to tcp://ADDRESS:PORT."""
    spec, _ = PODS[name]
    assert spec["enableServiceLinks"] is False


@pytest.mark.parametrize("name", VALUES)
def test_selectors_find_their_pods(name: str) -> None:
    manifests = rendered(name)
    labels = [pod["metadata"]["labels"] for m in manifests for pod in pod_templates(m)]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                selector = spec["selector"]
            case "PodDisruptionBudget" | "Deployment":
                selector = spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                selector = spec["podSelector"]["matchLabels"]
            case _:
                continue
        assert any(selector.items() <= pod.items() for pod in labels), manifest["metadata"]["name"]
    [monitors] = [[m for m in manifests if m["kind"] == "ServiceMonitor"]]
    services = [m for m in manifests if m["kind"] == "Service"]
    for monitor in monitors:
        wanted = monitor["spec"]["selector"]["matchLabels"]
        [service] = [s for s in services if wanted.items() <= s["metadata"]["labels"].items()]
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_workers_are_reached_by_gateways_and_prometheus_only() -> None:
    manifests = rendered("gpu")
    deny = one(manifests, "NetworkPolicy", "demo-default-deny")["spec"]
    assert (deny["policyTypes"], deny.get("ingress")) == (["Ingress"], None)
    grpc, metrics = one(manifests, "NetworkPolicy", "demo-workers")["spec"]["ingress"]
    [peer] = grpc["from"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    assert grpc["ports"] == [{"port": 8001}]
    assert metrics["ports"] == [{"port": 8002}]


def test_gpus_and_offline_are_as_the_values_say() -> None:
    gpu = one(rendered("gpu"), "Deployment", "demo-worker-gpu")["spec"]["template"]["spec"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "VITRAIL_DEVICE", "value": "cuda"} in gpu["containers"][0]["env"]
    offline = one(rendered("offline"), "Deployment", "demo-worker-cpu")["spec"]["template"]["spec"]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in offline["containers"][0]["env"]
    [store] = [v for v in offline["volumes"] if v["name"] == "store"]
    assert store["persistentVolumeClaim"] == {"claimName": "vitrail-checkpoints", "readOnly": True}


def test_ray_replaces_gateways_and_workers() -> None:
    manifests = rendered("ray")
    assert not [m for m in manifests if m["kind"] in ("Deployment", "Service", "ScaledObject")]
    spec = one(manifests, "RayService", "demo")["spec"]
    budget = one(manifests, "PodDisruptionBudget", "demo-ray")["spec"]
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert budget["minAvailable"] == sum(group["replicas"] for group in groups)  # and a head
    [deployed] = ServeDeploySchema.model_validate(
        yaml.safe_load(spec["serveConfigV2"])
    ).applications
    module, _, name = deployed.import_path.partition(":")
    assert inspect.isfunction(getattr(importlib.import_module(module), name))
    assert Placement(**deployed.args).gpus == 0.25
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    assert {"name": "VITRAIL_DEVICE", "value": "cuda"} in workers["containers"][0]["env"]
    stop = workers["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert stop == ["sleep", "5"]


def test_the_replicas_of_the_ray_example_fit_its_nodes() -> None:
    ray = VALUES["ray"]["ray"]
    placement, limits = Placement(**ray["placement"]), ray["resources"]["limits"]
    groups = trunk_groups(narrowed(load_catalog(ray["catalog"]), ray["models"]))
    assert len(groups) == len(ray["models"])
    replicas = len(groups) * placement.max_replicas
    assert replicas * placement.gpus <= ray["nodes"] * limits["nvidia.com/gpu"]
    assert 1 % placement.gpus == 0  # no part of a GPU is left that is too small
    cores = replicas * placement.cpus + ray["gateways"]
    assert cores <= ray["nodes"] * int(limits["cpu"])


def test_a_changed_catalog_replaces_pods_unless_they_watch_it() -> None:
    def template(**values: Any) -> dict[str, Any]:
        manifests = rendered_with(catalogs={"own.toml": "[trunks]"}, **values)
        found: dict[str, Any] = one(manifests, "Deployment", "demo-worker-cpu")["spec"]["template"]
        return found

    assert "checksum/catalogs" in template()["metadata"]["annotations"]
    watching = template(catalogPollSeconds=10)
    assert "annotations" not in watching["metadata"]
    environment = watching["spec"]["containers"][0]["env"]
    assert {"name": "VITRAIL_CATALOG_POLL_S", "value": "10"} in environment


# -- the containers' commands as processes -----------------------------------------------------


def test_containers_start_and_their_probes_are_answered(
    tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    manifests = rendered("cpu")
    ports = [str(free_port()) for _ in range(3)]
    gateway, worker, metrics = (f"127.0.0.1:{port}" for port in ports)
    discovery = {"dns:///demo-workers:8001": worker, "VITRAIL_PORT": ports[0]}
    with container_process(manifests, "demo-gateway", tmp_path, **discovery) as front:
        wait_until(lambda: ask_http(front["startupProbe"], gateway))
        assert ask_http(front["livenessProbe"], gateway)
        assert not ask_http(front["readinessProbe"], gateway)  # it has no worker
        own = {
            "VITRAIL_GRPC_PORT": ports[1],
            "VITRAIL_METRICS_PORT": ports[2],
            "VITRAIL_CATALOG": str(tiny_catalog),
        }
        with container_process(manifests, "demo-worker-cpu", tmp_path, **own) as back:
            wait_until(lambda: ask_grpc(back["startupProbe"], worker))
            assert ask_grpc(back["livenessProbe"], worker)
            assert ask_grpc(back["readinessProbe"], worker)
            wait_until(lambda: ask_http(front["readinessProbe"], gateway))
            answer = httpx.post(f"http://{gateway}/classify", content=jpegs["coffee"])
            assert answer.status_code == 200
            query = one(rendered("gpu"), "ScaledObject", "demo-worker-gpu")
            text = query["spec"]["triggers"][0]["metadata"]["query"]
            series = text.removeprefix("sum(").partition("{")[0]
            assert f"\n{series} " in httpx.get(f"http://{metrics}/metrics").text


@pytest.mark.nightly
def test_kserves_container_starts_and_its_probes_are_answered(
    tiny_catalog: Path, tmp_path: Path
) -> None:
    spec = yaml.safe_load((ROOT / "deploy/kserve/servingruntime.yaml").read_text())["spec"]
    pod = {
        "kind": "Deployment",
        "metadata": {"name": "kserve"},
        "spec": {"template": {"spec": spec}},
    }
    ports = {"8080": str(free_port()), "8081": str(free_port())}
    address = f"127.0.0.1:{ports['8080']}"
    changes = {**ports, "VITRAIL_CATALOG": str(tiny_catalog)}
    with container_process([pod], "kserve", tmp_path, **changes) as container:
        wait_until(lambda: ask_http(container["startupProbe"], address))
        assert ask_http(container["livenessProbe"], address)
        assert ask_http(container["readinessProbe"], address)
        assert httpx.get(f"http://{address}/v2/models/tiny/ready").status_code == 200
