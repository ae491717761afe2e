"""Planning: the model agrees with the scheduler in virtual time, and plans keep their target."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.errors import CatalogError
from service.cli import app
from service.planning.load import TrunkLoad, read_loads
from service.planning.measured import measured_loads
from service.planning.placement import place
from service.planning.queueing import predict
from service.planning.simulation import simulate
from service.worker.batch_queue import BatchQueue

VIT = {1: 0.010, 4: 0.025, 16: 0.085, 32: 0.165}


def load(name: str, share: float, *, scale: float = 1, cap: int = 16, memory: int = 0) -> TrunkLoad:
    """A load whose full passes take that share of a lane's time."""
    passes = {size: scale * seconds for size, seconds in VIT.items()}
    return TrunkLoad(name, share / TrunkLoad(name, 1, passes, cap).utilization, passes, cap, memory)


def test_passes_between_the_measured_ones_lie_on_a_line() -> None:
    seconds = TrunkLoad("a", 1, {2: 0.02, 4: 0.03}, 8).seconds()
    assert seconds == pytest.approx([0, 0.02, 0.02, 0.025, 0.03, 0.0375, 0.045, 0.0525, 0.06])


@pytest.mark.parametrize("share", [0.5, 0.85])
@pytest.mark.parametrize("lanes", [1, 2])
def test_the_model_agrees_with_the_scheduler(share: float, lanes: int) -> None:
    predicted = predict(load("a", share * lanes), lanes)
    [seen] = simulate([load("a", share * lanes)], images=20_000, lanes=lanes)
    assert seen.images == 20_000
    assert len(seen.latencies) > 17_000
    assert predicted.p50 == pytest.approx(seen.quantile(0.5), rel=0.12)
    assert predicted.p99 == pytest.approx(seen.quantile(0.99), rel=0.15)


def test_a_pass_takes_longer_for_each_further_head_in_it() -> None:
    one = TrunkLoad("a", 100, {1: 0.01, 2: 0.02}, 4)
    many = replace(one, heads=3, head_s=0.004)
    assert many.seconds() - one.seconds() == pytest.approx([0, 0, 0.004, 0.008, 0.008])
    [alone], [mixed] = (simulate([load], images=4000) for load in (one, many))
    assert alone.heads == {0}
    assert mixed.heads == {0, 1, 2}
    everything = simulate([replace(one, pass_s={2: 0.028})], images=4000)[0]
    assert alone.quantile(0.5) < mixed.quantile(0.5) < everything.quantile(0.5)


def test_what_is_more_than_a_device_can_do_takes_forever() -> None:
    assert predict(load("a", 1.1)).p99 == math.inf
    assert predict(load("a", 1.1), lanes=2).p99 < math.inf


def test_a_plan_keeps_its_target_with_few_devices() -> None:
    loads = [load("large", 5.0), *(load(f"small-{n}", 0.03, memory=60) for n in range(12))]
    devices = place(loads, 0.150, memory=360)  # of six trunks
    assert sum(device.count * len(device.loads) for device in devices) == devices[0].count + 12
    large, *shared = devices
    assert 6 <= large.count <= 8
    assert 2 <= len(shared) <= 5
    assert all(device.memory <= 360 for device in shared)
    for device in devices:
        seen = simulate(device.loads, images=4000)
        assert max(each.quantile(0.99) for each in seen) < 0.150 * 1.1


def test_what_cannot_be_planned_says_why() -> None:
    with pytest.raises(CatalogError, match="cannot keep to 9 ms"):
        place([load("a", 0.1)], 0.009)
    with pytest.raises(CatalogError, match="more than a device has"):
        place([load("a", 0.1, memory=2)], 1.0, memory=1)


def test_the_command_plans_a_file(tmp_path: Path) -> None:
    path = tmp_path / "load.toml"
    path.write_text('[trunks."vit-s"]\nrate = 200\npass_ms = {1 = 10, 4 = 25, 16 = 85}\n')
    command = ["plan", str(path), "--p99-ms", "150", "--images", "2000"]
    answer = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    [row] = answer["trunks"]
    assert answer["devices"] == row["devices"] == 2
    assert row["p99_ms"] <= 150
    assert row["simulated_p99_ms"] <= 170
    assert "vit-s" in CliRunner().invoke(app, command).stdout
    for content, message in {
        "[trunks.a]\nrate = 1\npass_ms = {many = 1}": "milliseconds by the number of images",
        "[trunks.a]\nrate = -1\npass_ms = {1 = 1}": "trunks.a.rate",
        "trunks = 1": "trunks",
        "[": "load.toml",
    }.items():
        path.write_text(content)
        with pytest.raises(CatalogError, match=message):
            read_loads(path)


@contextmanager
def answering(path: str, content: object) -> Iterator[str]:
    """A server on this machine that answers one path, for the admin key `boss`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == path and self.headers["X-API-Key"] == "boss"
            self.send_response(200 if known else 403)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_servers_measured_passes_become_a_file(tmp_path: Path) -> None:
    q = BatchQueue("vit.s", max_batch_size=8, capacity=8)
    for size, seconds in ((1, 0.01), (2, 0.015), (8, 0.04)):
        q.ran(size, seconds)
    idle = BatchQueue("idle", max_batch_size=8, capacity=8)
    queues = {queue.name: queue.state() for queue in (q, idle)}
    with answering("/debug/queues", {"queues": queues}) as url:
        (tmp_path / "load.toml").write_text(measured_loads(f"{url}/", "boss"))
        with pytest.raises(CatalogError, match="403"):
            measured_loads(url, None)
    [found] = read_loads(tmp_path / "load.toml")
    assert (found.name, found.rate) == ("vit.s", 1.0)
    assert found.pass_s == {1: 0.01, 2: 0.015, 8: 0.04}
    with (
        answering("/debug/queues", {"workers": {}}) as url,
        pytest.raises(CatalogError, match="no trunk has run a pass"),
    ):
        measured_loads(url, "boss")
