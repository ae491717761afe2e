"""The images, really built and run: read-only root, numeric user, no capabilities."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.rpc.health import check_health
from tests.conftest import answers, free_port, running, wait_until

ROOT = Path(__file__).parents[1]
# In mounts of its own: the root read-only but for the folders that docker-compose.yml and the chart
# mount; then the image's user, without capabilities.
CONTAINED = """
set -e
root=$1 user=$2 group=$3 catalogs=$4; shift 4
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount --rbind /proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
for folder in /home/vitrail /var/lib/vitrail; do
    mount -t tmpfs -o "uid=$user,gid=$group" tmpfs "$root$folder"
done
mount --bind "$catalogs" "$root/mnt"
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid="$user" --regid="$group" --clear-groups --no-new-privs \
    --inh-caps=-all --bounding-set=-all -- "$@"
"""


def buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


class Image:
    """An image whose root is mounted.

    Attributes:
        config: user, environment, entry point and health check.
    """

    def __init__(self, name: str, catalogs: Path) -> None:
        """
        Args:
            catalogs: a folder that the image has at /mnt.
        """
        inspected = json.loads(buildah("inspect", "--type", "image", name))
        self.config: dict[str, Any] = inspected["Docker"]["config"]
        self.container = buildah("from", "--pull-never", name)
        self._root = buildah("mount", self.container)
        catalogs.chmod(0o755)  # pytest's folders, and safetensors' files, are for their owner alone
        for path in catalogs.glob("*.*"):
            path.chmod(0o644)
        self._catalogs = str(catalogs)

    @contextmanager
    def running(self, *command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """A command in the image, on this machine's network."""
        own = dict(item.split("=", 1) for item in self.config["Env"])
        user = self.config["User"].split(":")
        contained = ["unshare", "--mount", "sh", "-c", CONTAINED, "sh", self._root, *user]
        with subprocess.Popen(
            [*contained, self._catalogs, *command],
            env={"PATH": os.environ["PATH"], **own, **environment},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.terminate()

    def serving(self, *arguments: str, **environment: str) -> Any:
        """The image's entry point with these arguments."""
        return self.running(*self.config["Entrypoint"], *arguments, **environment)

    def ask(self, *command: str) -> tuple[int, str]:
        """A command's exit status and output."""
        with self.running(*command) as process:
            output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def health(self, port: int) -> int:
        """The exit status of the image's health check, asked at another port."""
        command = self.config["Healthcheck"]["Test"][1:]
        return self.ask(*(part.replace(":8000/", f":{port}/") for part in command))[0]


@contextmanager
def built(name: str, target: str, catalogs: Path) -> Iterator[Image]:
    """An image as `make images` makes it."""
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (apt-get install buildah debootstrap)")
    if os.geteuid() != 0:
        pytest.skip("only root can mount an image and run in it")
    command = [str(ROOT / "deploy/images.sh"), target]
    environment = {**os.environ, "BASE": "debian"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    image = Image(name, catalogs)
    try:
        yield image
    finally:
        buildah("rm", image.container)


@pytest.fixture(scope="module")
def gateway_image(tiny_catalog: Path) -> Iterator[Image]:
    with built("vitrail-gateway", "gateway", tiny_catalog.parent) as image:
        yield image


def contained(image: Image) -> None:
    """Check what the image keeps its processes from."""
    status, output = image.ask("sh", "-c", "id -u; grep Cap /proc/self/status; touch /var/x /x")
    assert status != 0
    user, *capabilities = output.splitlines()
    assert user == "10001"
    assert {line.split()[1] for line in capabilities} == {"0" * 16}
    missing = "import importlib.util as i; print(i.find_spec('pip'))"
    assert image.ask("python", "-c", missing) == (0, "None\n")


@pytest.mark.timeout(600)
def test_the_gateways_image_serves(
    gateway_image: Image, tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    contained(gateway_image)
    modules = "import psycopg, lancedb, importlib.util as i; print(i.find_spec('torch'))"
    assert gateway_image.ask("python", "-c", modules) == (0, "None\n")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    own = {"VITRAIL_PORT": str(port), "VITRAIL_COLLECTIONS": "/var/lib/vitrail/collections"}
    with running(tiny_catalog) as worker:
        command = [*gateway_image.config["Cmd"], "--workers", worker.grpc]
        with gateway_image.serving(*command, **own) as process:
            wait_until(lambda: answers(f"{url}/healthz"))
            wait_until(lambda: answers(f"{url}/readyz"))
            assert gateway_image.health(port) == 0
            answer = httpx.post(f"{url}/classify", content=jpegs["coffee"])
            assert answer.json() == worker.client.post("/classify", content=jpegs["coffee"]).json()
            made = httpx.put(f"{url}/collections/photos", json={"model": "tiny-embed"}, timeout=60)
            assert made.is_success
            process.terminate()
            assert process.wait(60) == 0


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_whole_image_works_behind_the_gateways(
    gateway_image: Image, tiny_catalog: Path, jpegs: dict[str, bytes]
) -> None:
    with built("vitrail", "service", tiny_catalog.parent) as image:
        contained(image)
        ports = {name: free_port() for name in ("VITRAIL_GRPC_PORT", "VITRAIL_METRICS_PORT")}
        catalog = {"VITRAIL_CATALOG": f"/mnt/{tiny_catalog.name}"}
        own = {name: str(port) for name, port in ports.items()} | catalog
        address = f"127.0.0.1:{ports['VITRAIL_GRPC_PORT']}"
        front, alone = free_port(), free_port()
        with (
            image.serving("worker", **own) as worker,
            gateway_image.serving("gateway", "--workers", address, VITRAIL_PORT=str(front)),
            image.serving("serve", "--grpc-port", "0", VITRAIL_PORT=str(alone), **catalog) as serve,
        ):
            found = []
            for port in (front, alone):
                url = f"http://127.0.0.1:{port}"
                wait_until(lambda url=url: answers(f"{url}/readyz"), 120)  # type: ignore[misc]
                answer = httpx.post(f"{url}/classify", content=jpegs["coffee"], timeout=60)
                found.append(answer.raise_for_status().json()["results"])
            assert found[0] == found[1]
            assert check_health(address, "liveness")
            assert image.health(alone) == 0
            for process in (worker, serve):
                process.terminate()
                assert process.wait(60) == 0
