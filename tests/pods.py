"""Pods of the Helm chart: their manifests, and their containers' commands as processes."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from service.rpc.health import check_health
from tests.conftest import answers
from tests.helm_process import ask as ask_helm
from tests.test_deploy import dockerfile_environment

CHART = Path(__file__).parents[1] / "deploy/helm/vitrail"


def rendered_with(**values: Any) -> list[dict[str, Any]]:
    """The manifests that Helm makes of the chart with these values."""
    return manifests_of(ask_helm(CHART, values)["files"])


def manifests_of(made: Mapping[str, str]) -> list[dict[str, Any]]:
    texts = [text for path, text in made.items() if path.endswith(".yaml")]
    return [item for text in texts for item in yaml.safe_load_all(text) if item]


def one(manifests: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    [found] = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


@contextmanager
def container_process(
    manifests: list[dict[str, Any]], name: str, store: Path, **changes: str
) -> Iterator[dict[str, Any]]:
    """A deployment's container as a process, but for its addresses; yields the container.

    Args:
        changes: of environment variables in upper case, and of arguments.
    """
    spec = one(manifests, "Deployment", name)["spec"]["template"]["spec"]
    [container] = spec["containers"]
    environment = {**os.environ, **dockerfile_environment(), "VITRAIL_HOST": "127.0.0.1"}
    environment |= {item["name"]: item["value"] for item in container["env"]}
    environment |= {"VITRAIL_STORE": str(store)}
    environment |= {key: value for key, value in changes.items() if key.isupper()}
    command = [changes.get(part, part) for part in container["args"]]
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli", *command], env=environment, stderr=subprocess.DEVNULL
    ) as started:
        try:
            yield container
        finally:
            started.terminate()


def ask_http(probe: dict[str, Any], address: str) -> bool:
    """Whether an HTTP probe succeeds, asked as kubelet does."""
    return answers(f"http://{address}{probe['httpGet']['path']}")


def ask_grpc(probe: dict[str, Any], address: str) -> bool:
    """Whether a gRPC probe succeeds."""
    try:
        return check_health(address, probe["grpc"].get("service", ""))
    except Exception:  # not listening yet
        return False
