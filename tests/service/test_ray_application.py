"""The application that KubeRay deploys, from a configuration file, on a Ray of its own: Ray Serve's
controller imports and builds it as it does for KubeRay."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import answers, free_port, running, wait_until
from tests.service.test_gateway import as_files
from tests.service.test_ray import rounded

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


def test_a_configuration_of_ray_serve_answers_as_one_process_does(
    tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    port = free_port()
    gateway = {"name": "gateway", "ray_actor_options": {"num_cpus": 0.25}}
    application = {
        "name": "vitrail",
        "import_path": "service.processes.ray_application:application",
        "route_prefix": "/",
        "args": {"cpus": 0.25},
        "deployments": [gateway],
    }
    config = tmp_path / "serve.yaml"
    http = {"host": "127.0.0.1", "port": port}
    config.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
    environment = {
        **os.environ,
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VITRAIL_CATALOG": str(tiny_catalog),
        "VITRAIL_DEVICE": "cpu",
        "VITRAIL_HEADS_FOLDER": str(tmp_path / "heads"),
    }
    photos = as_files(*jpegs.values(), b"no image")
    serve = Path(sys.executable).with_name("serve")
    url = f"http://127.0.0.1:{port}"
    with (
        subprocess.Popen([str(serve), "run", str(config)], env=environment) as started,
        running(tiny_catalog) as alone,
    ):
        try:
            wait_until(lambda: answers(f"{url}/readyz") or started.poll() is not None, 300)
            assert started.poll() is None
            alone.wait_ready()
            for path in ("/classify", "/predict?models=tiny&models=conv", "/classify?model=none"):
                ours, theirs = (
                    httpx.post(f"{server}{path}", files=photos, timeout=60)
                    for server in (url, alone.url)
                )
                assert ours.status_code == theirs.status_code
                answer, expected = ours.json(), theirs.json()
                answer.pop("request_id", None)
                expected.pop("request_id", None)
                assert rounded(answer) == rounded(expected)
        finally:
            started.send_signal(signal.SIGINT)
            started.wait(60)
