"""Three nodes of Ray on this machine, one of which is killed: under load, and during a bulk run."""

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.dataset as ds
import pytest

from models.heads.files import HeadFile, encode_head
from tests.conftest import answers, free_port, process, wait_until
from tests.service.test_heads import make  # noqa: F401

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

# Runs in a process of its own: Ray warns of its own deprecations. Nodes are killed by a line of
# standard input with the number of one.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"head": 1}})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
print("ADDRESS", cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes[int(line)], allow_graceful=False)
    print("KILLED", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster in a process of its own."""

    def __init__(self, started: "subprocess.Popen[str]") -> None:
        self._process = started
        self.address = self._line("ADDRESS").split()[1]

    def kill(self, number: int) -> None:
        """Kill a node's processes."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        self._line("KILLED")

    def _line(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise AssertionError("the cluster did not start")


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as started:  # fmt: skip
        try:
            yield Nodes(started)
        finally:
            assert started.stdin is not None
            started.stdin.close()
            started.wait(60)


def test_a_node_that_dies_under_load_loses_no_request(
    nodes: Nodes, tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["ray", "--catalog", str(tiny_catalog), "--address", nodes.address]
    command += ["--port", str(port), "--cpus", "0.5", "--replicas", "3", "--models", "tiny"]
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while not stop.is_set():
                statuses[client.post("/classify", content=jpegs["coffee"]).status_code] += 1

    environment = {"VITRAIL_HEADS_FOLDER": str(tmp_path), "VITRAIL_DEVICE": "cpu"}
    with process(*command, **environment) as server:
        wait_until(lambda: answers(f"{url}/readyz"), 400)
        clients = [threading.Thread(target=ask) for _ in range(6)]
        for client in clients:
            client.start()
        wait_until(lambda: statuses.total() > 50)
        nodes.kill(0)
        seen = statuses.total()
        wait_until(lambda: statuses.total() > seen + 200, 120)
        stop.set()
        for client in clients:
            client.join()
        assert set(statuses) == {200}, statuses
        server.terminate()
        server.wait(60)


KILL_STATE = """
import sys
import ray
from service.ray.state import NAME, NAMESPACE
ray.init(address=sys.argv[1], namespace=NAMESPACE, log_to_driver=False)
ray.kill(ray.get_actor(NAME), no_restart=False)
"""


def test_an_actor_of_heads_that_starts_anew_without_its_files_gets_them_from_the_replicas(
    nodes: Nodes,
    tiny_catalog: Path,
    tmp_path: Path,
    jpegs: dict[str, bytes],
    make: Callable[..., HeadFile],  # noqa: F811
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["ray", "--catalog", str(tiny_catalog), "--address", nodes.address]
    command += ["--port", str(port), "--cpus", "0.5", "--models", "tiny"]
    heads = tmp_path / "heads"
    environment = {
        "VITRAIL_HEADS_FOLDER": str(heads), "VITRAIL_DEVICE": "cpu", "VITRAIL_ADMIN_KEYS": "admin",
    }  # fmt: skip
    with process(*command, **environment) as server:
        wait_until(lambda: answers(f"{url}/readyz"), 400)
        with httpx.Client(base_url=url, timeout=60, headers={"X-API-Key": "admin"}) as client:
            fields = {"name": "pets"}
            answer = client.post("/heads", files={"file": encode_head(make())}, data=fields)
            assert answer.status_code == 201, answer.text
            wait_until((heads / "pets.safetensors").exists)
            (heads / "pets.safetensors").unlink()
            subprocess.run([sys.executable, "-c", KILL_STATE, nodes.address], check=True)
            wait_until((heads / "pets.safetensors").exists)
            classify = client.post("/classify?model=pets", content=jpegs["coffee"])
            assert classify.status_code == 200, classify.text
            assert client.delete("/heads/pets").status_code == 204
            assert not (heads / "pets.safetensors").exists()
        server.terminate()
        server.wait(60)


def test_a_node_that_dies_leaves_a_bulk_run_whole(
    nodes: Nodes, tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    source, undisturbed, output = (tmp_path / name for name in ("photos", "undisturbed", "out"))
    source.mkdir()
    for n in range(400):
        (source / f"{n:03}.jpg").write_bytes(jpegs["coffee" if n % 2 else "rocket"])
    bulk = ["bulk", "classify", str(source)]
    flags = ["--catalog", str(tiny_catalog), "--device", "cpu", "--shard-size", "5"]
    with process(*bulk, str(undisturbed), *flags) as alone:
        assert alone.wait(200) == 0
    on_ray = ["--ray", nodes.address, "--actors", "3", "--cpus", "1"]
    with process(*bulk, str(output), *flags, *on_ray) as disturbed:
        wait_until(lambda: len(list(output.glob("*.parquet"))) > 5, 300)
        nodes.kill(1)
        assert disturbed.wait(400) == 0
    ours, theirs = (
        sorted((row["id"], row["label"][0]) for row in dataset(folder))
        for folder in (output, undisturbed)
    )
    assert len(ours) == 400
    assert ours == theirs


def dataset(folder: Path) -> list[dict[str, Any]]:
    table = ds.dataset(folder, format="parquet", exclude_invalid_files=True).to_table()
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
