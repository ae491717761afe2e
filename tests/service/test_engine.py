"""The backend over HTTP, with faults put into its trunks: shared passes, shared fate avoided."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from models.trunks.features import LAST_OUTPUT, BatchRequest
from models.trunks.output import TrunkOutput
from models.trunks.timm import TimmTrunk
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from service.worker.runner import Runner
from tests.conftest import Running, encode, running, wait_until

Forward = Callable[..., TrunkOutput]


@pytest.fixture(params=["in one process", "gateway and worker apart"])
def server(tiny_catalog: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    apart = "apart" in request.param
    with running(
        tiny_catalog, apart=apart, max_queue_size=8, streams=1, admin_keys="admin"
    ) as started:
        started.wait_ready()
        yield started


class Tap:
    """Stands between a runner and its trunk: counts passes, holds them, or makes them fail."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Callable[[torch.Tensor], None] = lambda pixels: None
        self._forward: Forward = runner.trunk.forward
        monkeypatch.setattr(runner.trunk, "forward", self._run)

    def _run(self, pixels: torch.Tensor, request: BatchRequest = LAST_OUTPUT) -> TrunkOutput:
        self.sizes.append(len(pixels))
        assert self.gate.wait(120)
        self.fault(pixels)
        return self._forward(pixels, request)


@pytest.fixture
def tap(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tap]:
    made = Tap(server.backend.trunks.runners["tiny"], monkeypatch)
    yield made
    made.gate.set()


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("image", ("photo", image, "image/jpeg")) for image in images]


def post(server: Running, path: str, *images: bytes, **options: Any) -> httpx.Response:
    return server.client.post(path, files=files(*images), **options)


def hold(server: Running, tap: Tap, pool: ThreadPoolExecutor, image: bytes) -> Any:
    """Occupy the only lane: its answer comes when the gate opens."""
    tap.gate.clear()
    before = len(tap.sizes)
    future = pool.submit(post, server, "/classify", image)
    wait_until(lambda: len(tap.sizes) == before + 1)
    return future


def test_models_on_one_trunk_cost_one_pass(
    server: Running, tap: Tap, jpegs: dict[str, bytes]
) -> None:
    answer = post(
        server, "/predict", jpegs["coffee"], data={"models": ["tiny", "tiny-embed", "conv"]}
    ).json()
    assert set(answer["results"][0]["outputs"]) == {"tiny", "tiny-embed", "conv"}
    assert tap.sizes == [1]


def test_requests_for_different_heads_ride_in_one_batch_and_agree_with_singles(
    server: Running, tap: Tap, jpegs: dict[str, bytes]
) -> None:
    paths = ["/classify", "/embed?model=tiny-embed", "/embed?model=tiny&pooling=mean", "/classify"]
    alone = [
        post(server, path, image).json() for path, image in zip(paths, jpegs.values(), strict=True)
    ]
    with ThreadPoolExecutor(8) as pool:
        held = hold(server, tap, pool, jpegs["coffee"])
        passes = len(tap.sizes)
        together = [
            pool.submit(post, server, path, image)
            for path, image in zip(paths, jpegs.values(), strict=True)
        ]
        wait_until(lambda: server.backend.batcher.depth()["tiny"] == 4)
        wait_until(lambda: len(server.backend.batcher._scheduler.queues["tiny"]) == 4)
        tap.gate.set()
        mixed = [future.result().json() for future in together]
        assert held.result().status_code == 200
    assert tap.sizes[passes:] == [4]
    for one, other in zip(alone, mixed, strict=True):
        first, second = one["results"][0], other["results"][0]
        if "embedding" in first:
            assert np.allclose(first["embedding"], second["embedding"], atol=1e-5)
        else:
            scores = [[p["score"] for p in r["predictions"]] for r in (first, second)]
            assert np.allclose(scores[0], scores[1], atol=1e-5)


def test_a_poisonous_image_fails_alone(server: Running, tap: Tap, jpegs: dict[str, bytes]) -> None:
    poison = encode(Image.new("RGB", (64, 64), (255, 0, 255)), "PNG")

    def fail_on_magenta(pixels: torch.Tensor) -> None:
        if (pixels[:, 1].amax((1, 2)) == 0).any():
            raise RuntimeError("kernel fault")

    tap.fault = fail_on_magenta
    answer = post(server, "/classify", jpegs["coffee"], poison, jpegs["rocket"])
    assert answer.status_code == 200
    good, bad, other = answer.json()["results"]
    assert "predictions" in good
    assert "predictions" in other
    assert bad["error"]["status"] == 500
    assert "kernel" not in answer.text
    assert server.metric("vitrail_trunk_failures_total", trunk="tiny") >= 1
    assert post(server, "/classify", poison).status_code == 500
    assert post(server, "/classify", jpegs["coffee"]).status_code == 200


def test_out_of_memory_halves_the_batch_and_lowers_the_cap(
    server: Running, tap: Tap, jpegs: dict[str, bytes]
) -> None:
    def fail_on_large_batches(pixels: torch.Tensor) -> None:
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("fake")

    with ThreadPoolExecutor(2) as pool:
        hold(server, tap, pool, jpegs["coffee"])
        asked = pool.submit(post, server, "/classify", *jpegs.values())
        wait_until(lambda: len(server.backend.batcher._scheduler.queues["tiny"]) == 4)
        tap.fault = fail_on_large_batches
        tap.gate.set()
        answer = asked.result().json()
    assert all("predictions" in entry for entry in answer["results"])
    assert server.backend.batcher._scheduler.queues["tiny"].limit.value == 1


def test_a_failing_head_fails_its_own_rows(
    server: Running, monkeypatch: pytest.MonkeyPatch, jpegs: dict[str, bytes]
) -> None:
    def fail(output: TrunkOutput, **options: Any) -> dict[str, torch.Tensor]:
        raise RuntimeError("head fault")

    model = server.backend.registry.get("tiny-embed")
    monkeypatch.setattr(model.heads["embed"], "forward", fail)
    answer = post(server, "/predict", jpegs["coffee"], data={"models": ["tiny", "tiny-embed"]})
    outputs = answer.json()["results"][0]["outputs"]
    assert "predictions" in outputs["tiny"]
    assert outputs["tiny-embed"]["error"]["status"] == 500


def test_a_classifier_that_overflows_is_an_error_and_not_an_empty_answer(
    server: Running, monkeypatch: pytest.MonkeyPatch, jpegs: dict[str, bytes]
) -> None:
    def overflow(output: TrunkOutput, **options: Any) -> dict[str, torch.Tensor]:
        return {"logits": torch.full((len(output.features), 1000), torch.nan)}

    head = server.backend.registry.get("tiny").heads["classify"]
    monkeypatch.setattr(head, "forward", overflow)
    answer = post(server, "/classify?model=tiny", jpegs["coffee"])
    assert answer.status_code == 500
    assert "not finite" in answer.json()["detail"]


def test_an_output_that_is_not_finite_is_an_error_and_not_an_answer(
    server: Running, monkeypatch: pytest.MonkeyPatch, jpegs: dict[str, bytes]
) -> None:
    def overflow(output: TrunkOutput, **options: Any) -> dict[str, torch.Tensor]:
        return {"embedding": torch.full((len(output.features), 4), torch.nan)}

    model = server.backend.registry.get("tiny-embed")
    monkeypatch.setattr(model.heads["embed"], "forward", overflow)
    answer = post(server, "/predict", jpegs["coffee"], data={"models": ["tiny", "tiny-embed"]})
    outputs = answer.json()["results"][0]["outputs"]
    assert "predictions" in outputs["tiny"]
    assert outputs["tiny-embed"]["error"]["status"] == 500
    assert "not finite" in outputs["tiny-embed"]["error"]["detail"]


def test_values_that_are_not_finite_fail_their_own_row_over_rest_grpc_and_npy(
    server: Running, monkeypatch: pytest.MonkeyPatch, jpegs: dict[str, bytes]
) -> None:
    head = server.backend.registry.get("tiny-embed").heads["embed"]
    finish, dark = head.finish, encode(Image.new("RGB", (8, 8)))

    def fail_small(row: Any, size: tuple[int, int], **options: Any) -> dict[str, np.ndarray]:
        embedding = finish(row, size, **options)["embedding"]
        return {"embedding": embedding * (np.nan if size == (8, 8) else 1)}

    monkeypatch.setattr(head, "finish", fail_small)
    answer = post(server, "/embed?model=tiny-embed", jpegs["coffee"], dark)
    fine, failed = answer.json()["results"]
    assert "embedding" in fine
    assert "not finite" in failed["error"]["detail"]
    npy = {"Accept": "application/x-npy"}
    whole = post(server, "/embed?model=tiny-embed", jpegs["coffee"], dark, headers=npy)
    assert whole.status_code == 500
    with grpc.insecure_channel(server.grpc) as channel:
        stub: Any = VisionStub(channel)
        request = pb.TaskRequest(model="tiny-embed", images=[jpegs["coffee"], dark])
        over_grpc = stub.Embed(request).results
    assert len(over_grpc[0].tensors) == 1
    assert "not finite" in over_grpc[1].error.detail


def test_a_full_queue_is_429_with_retry_after_and_takes_nothing(
    server: Running, tap: Tap, jpegs: dict[str, bytes]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        hold(server, tap, pool, jpegs["coffee"])
        waiting = pool.submit(post, server, "/classify", *[jpegs["coffee"]] * 7)
        wait_until(lambda: server.backend.batcher.depth()["tiny"] == 7)
        refused = post(server, "/classify", jpegs["coffee"], jpegs["coffee"])
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.headers["Content-Type"] == "application/problem+json"
        tap.gate.set()
        assert len(waiting.result().json()["results"]) == 7
    assert server.backend.batcher.depth()["tiny"] == 0
    assert server.metric("vitrail_requests_total", task="classify", outcome="rejected") == 1


def test_a_deadline_is_504_and_never_costs_compute(
    server: Running, tap: Tap, jpegs: dict[str, bytes]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        held = hold(server, tap, pool, jpegs["coffee"])
        late = post(server, "/classify", jpegs["rocket"], headers={"X-Timeout-Ms": "1000"})
        assert late.status_code == 504
        tap.gate.set()
        assert held.result().status_code == 200
    wait_until(lambda: server.metric("vitrail_queue_dropped_images_total", reason="expired") == 1)
    assert tap.sizes == [1]


def test_a_client_that_leaves_takes_its_images_out_of_the_queue(
    server: Running, tap: Tap, jpegs: dict[str, bytes]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        held = hold(server, tap, pool, jpegs["coffee"])
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url) as impatient:
            impatient.post("/classify", files=files(jpegs["rocket"]), timeout=0.3)
        wait_until(
            lambda: (
                server.metric("vitrail_requests_total", outcome="cancelled", task="classify") == 1
            )
        )
        tap.gate.set()
        assert held.result().status_code == 200
    wait_until(lambda: server.metric("vitrail_queue_dropped_images_total", reason="cancelled") == 1)
    assert tap.sizes == [1]


def test_load_and_unload_under_traffic_lose_nothing(
    server: Running, tap: Tap, jpegs: dict[str, bytes]
) -> None:
    admin = {"X-API-Key": "admin"}
    stop = threading.Event()
    statuses: set[int] = set()

    def traffic() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not stop.is_set():
                statuses.add(client.post("/classify", files=files(jpegs["coffee"])).status_code)

    threads = [threading.Thread(target=traffic) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        described = server.client.post("/models/tiny/unload", headers=admin).json()
        assert described["state"] == "unloaded"
        server.client.post("/models/tiny-embed/unload", headers=admin).raise_for_status()
        assert server.client.get("/readyz").status_code == 503
        assert server.client.post("/models/tiny/load", headers=admin).json()["state"] == "ready"
        server.client.post("/models/tiny-embed/load", headers=admin).raise_for_status()
    wait_until(lambda: 200 in statuses)
    stop.set()
    for thread in threads:
        thread.join()
    assert statuses <= {200, 503}
    refused = server.client.post("/models/tiny/unload", headers=admin) and post(
        server, "/classify", jpegs["coffee"]
    )
    assert refused.status_code == 503
    assert "Retry-After" in refused.headers


def test_health_tells_of_a_failing_probe_and_of_its_recovery(
    tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_catalog, probe_interval_s=0.1, stuck_after_s=5) as server:
        server.wait_ready()
        tap = Tap(server.backend.trunks.runners["tiny"], monkeypatch)

        def fail(pixels: torch.Tensor) -> None:
            raise RuntimeError("the device fell off the bus")

        tap.fault = fail
        wait_until(lambda: server.client.get("/readyz").status_code == 503)
        assert "tiny" in server.client.get("/readyz").text
        assert server.client.get("/healthz").status_code == 200
        tap.fault = lambda pixels: None
        wait_until(lambda: server.client.get("/readyz").status_code == 200)


def test_a_broken_trunk_does_not_hide_behind_a_busy_one(
    tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch, jpegs: dict[str, bytes]
) -> None:
    with running(tiny_catalog, probe_interval_s=0.3, stuck_after_s=5) as server:
        server.wait_ready()
        tap = Tap(server.backend.trunks.runners["tiny"], monkeypatch)

        def fail(pixels: torch.Tensor) -> None:
            raise RuntimeError("kernel fault")

        tap.fault = fail

        def unready_under_traffic() -> bool:
            assert post(server, "/classify?model=conv", jpegs["coffee"]).status_code == 200
            return server.client.get("/readyz").status_code == 503

        wait_until(unready_under_traffic)


def test_a_trunk_that_does_not_run_fails_its_model_and_leaves_no_queue(
    tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: TimmTrunk, pixels: torch.Tensor, request: BatchRequest) -> TrunkOutput:
        raise RuntimeError("kernel fault")

    monkeypatch.setattr(TimmTrunk, "forward", fail)
    with running(tiny_catalog, admin_keys="admin") as server:
        wait_until(lambda: server.client.get("/models/conv").json()["state"] == "failed")
        assert "kernel fault" in server.client.get("/models/tiny").json()["reason"]
        assert server.backend.batcher.depth() == {}
        monkeypatch.undo()
        for name in ("tiny", "tiny-embed", "conv"):
            loaded = server.client.post(f"/models/{name}/load", headers={"X-API-Key": "admin"})
            assert loaded.json()["state"] == "ready"


def test_health_tells_of_a_stuck_device(
    tiny_catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_catalog, probe_interval_s=0.1, stuck_after_s=0.3) as server:
        server.wait_ready()
        tap = Tap(server.backend.trunks.runners["tiny"], monkeypatch)
        tap.gate.clear()
        wait_until(lambda: server.client.get("/healthz").status_code == 503)
        assert server.metric("vitrail_worker_up") == 0
        tap.gate.set()
        wait_until(lambda: server.client.get("/readyz").status_code == 200)


def test_a_model_that_does_not_load_keeps_the_server_unready_but_serving(
    tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    path = tmp_path / "half.toml"
    (tmp_path / "tiny.safetensors").write_bytes(
        (tiny_catalog.parent / "tiny.safetensors").read_bytes()
    )
    path.write_text(tiny_catalog.read_text())
    with running(path) as server:
        wait_until(lambda: server.client.get("/models/conv").json()["state"] == "failed")
        wait_until(lambda: server.client.get("/models/tiny").json()["state"] == "ready")
        assert "no such file" in server.client.get("/models/conv").json()["reason"]
        assert server.client.get("/readyz").status_code == 503
        assert post(server, "/classify", jpegs["coffee"]).status_code == 200
        assert post(server, "/classify?model=conv", jpegs["coffee"]).status_code == 503
