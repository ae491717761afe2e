"""Triton's extensions with tritonclient: configuration, statistics, UINT8, compression and shared
memory, over HTTP and gRPC."""

import asyncio
import base64
import gzip
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from PIL import Image
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from service.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
)
from service.key_file import Scope
from service.keys import ApiKey
from service.open_inference.shared_memory import (
    MAX_OWN_BYTES,
    MAX_OWN_REGIONS,
    Place,
    SharedMemory,
)
from service.open_inference.system_memory import SystemRegion
from service.stubs import open_inference_pb2 as oip
from service.stubs.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.types import InferRequest, InferResult
from tests.conftest import Running, running, wait_until
from tests.service import triton_shared_memory
from tests.service.cuda_stand_in import StandIn
from tests.test_architecture import ROOT

PREFIX = f"vitrail_test_{os.getpid()}"
T = TypeVar("T")
# Closed ones stay: their destructor fails in another thread, such as a server's.
CLIENTS: list[Any] = []


@pytest.fixture(scope="module")
def devices() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module")
def server(tiny_catalog: Path, devices: StandIn) -> Iterator[Running]:
    with running(tiny_catalog, shared_memory=PREFIX, cuda=lambda: devices) as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    opened = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield opened
    opened.close()
    CLIENTS.append(opened)


@pytest.fixture(scope="module")
def embedding(server: Running, jpegs: dict[str, bytes]) -> Any:
    """What our own route answers for chelsea."""
    answer = server.client.post("/embed?model=tiny-embed", content=jpegs["chelsea"])
    return answer.json()["results"][0]["embedding"]


@pytest.fixture
def region() -> Iterator[tuple[str, Any]]:
    """The key of 128 KiB of shared memory, and its handle."""
    shared, key = triton_shared_memory.load(), f"/{PREFIX}_region"
    handle = shared.create_shared_memory_region("region", key, 2**17)
    yield key, handle
    shared.destroy_shared_memory_region(handle)


def uint8(array: np.ndarray) -> Any:
    tensor = triton.InferInput("image", array.shape, "UINT8")
    tensor.set_data_from_numpy(array)
    return tensor


def encoded(image: bytes) -> np.ndarray:
    return np.frombuffer(image, np.uint8)[None]


def test_a_configuration_names_batches_types_and_sizes(client: Any, server: Running) -> None:
    config = client.get_model_config("tiny")
    size = list(server.backend.registry.get("tiny").trunk.preprocess.input_size)
    assert config["max_batch_size"] == 64
    assert config["input"] == [
        {"name": "image", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "pixel_values", "data_type": "TYPE_FP32", "dims": [3, *size]},
    ]
    assert {"name": "score", "data_type": "TYPE_FP32", "dims": [-1]} in config["output"]
    levels = {"priority_levels": 2, "default_priority_level": 1}
    assert config["dynamic_batching"] == levels


@pytest.fixture
def priorities(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each request to the backend was bulk."""
    seen: list[bool] = []
    infer = server.backend.infer

    async def note(request: InferRequest) -> InferResult:
        seen.append(request.bulk)
        return await infer(request)

    monkeypatch.setattr(server.backend, "infer", note)
    return seen


def test_the_second_level_of_priority_is_bulk(
    client: Any, jpegs: dict[str, bytes], priorities: list[bool]
) -> None:
    image = uint8(encoded(jpegs["coffee"]))
    for level in (0, 1, 2):
        client.infer("tiny-embed", [image], priority=level)
    bulk = {"X-Priority": "bulk"}
    for level in (0, 1):  # the body's level replaces the header's
        client.infer("tiny-embed", [image], headers=bulk, priority=level)
    assert priorities == [False, False, True, True, False]
    with pytest.raises(InferenceServerException, match="priority is 1"):
        client.infer("tiny-embed", [image], priority=3)


def test_statistics_count_requests_images_and_failures(
    client: Any, jpegs: dict[str, bytes]
) -> None:
    def read() -> Any:
        [entry] = client.get_inference_statistics("conv")["model_stats"]
        return entry

    before = read()
    assert before["inference_count"] == before["last_inference"] == 0
    image = uint8(encoded(jpegs["coffee"]))
    for _ in range(3):
        client.infer("conv", [image])
    with pytest.raises(InferenceServerException):
        client.infer("conv", [uint8(np.zeros((1, 8), np.uint8))])
    after = read()
    assert after["inference_count"] == after["execution_count"] == 3
    assert after["last_inference"] > 0
    stages = after["inference_stats"]
    assert (stages["success"]["count"], stages["fail"]["count"]) == (3, 1)
    parts = [stages[name]["ns"] for name in ("queue", "compute_input", "compute_infer")]
    assert 0 < sum(parts) <= stages["success"]["ns"]
    assert [entry["batch_size"] for entry in after["batch_stats"]] == [1]
    names = {entry["name"] for entry in client.get_inference_statistics()["model_stats"]}
    assert names == {"tiny", "tiny-embed", "conv"}


def test_uint8_holds_encoded_images_or_pixels(
    client: Any, embedding: Any, jpegs: dict[str, bytes], photos: dict[str, Image.Image]
) -> None:
    one = client.infer("tiny-embed", [uint8(encoded(jpegs["chelsea"]))]).as_numpy("embedding")
    assert np.allclose(one[0], embedding, atol=1e-6)
    pixels = np.stack([np.asarray(photos["chelsea"])] * 2)
    both = client.infer("tiny-embed", [uint8(pixels)]).as_numpy("embedding")
    assert both.shape == (2, len(embedding))
    assert np.allclose(both[1], embedding, atol=0.05)  # without JPEG's losses
    with pytest.raises(InferenceServerException, match="height, width, 3"):
        client.infer("tiny-embed", [uint8(pixels[..., :2])])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_bodies_are_compressed_both_ways(
    client: Any, embedding: Any, jpegs: dict[str, bytes], algorithm: str
) -> None:
    tensor = triton.InferInput("image", [8], "BYTES")
    tensor.set_data_from_numpy(np.array([jpegs["chelsea"]] * 8, dtype=object))
    answer = client.infer(
        "tiny-embed",
        [tensor],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert np.allclose(answer.as_numpy("embedding")[7], embedding, atol=1e-6)


def test_responses_are_compressed_only_for_those_that_accept_it(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    def encoding(accepted: str) -> str | None:
        headers = {"Inference-Header-Content-Length": "0", "Accept-Encoding": accepted}
        url = "/v2/models/tiny-embed/infer"
        answer = server.client.post(url, content=jpegs["chelsea"], headers=headers)
        assert answer.json()["model_name"] == "tiny-embed"
        found: str | None = answer.headers.get("content-encoding")
        return found

    assert encoding("br, gzip") == "gzip"
    assert encoding("deflate") == "deflate"
    assert encoding("identity") is None
    assert encoding("gzip;q=0") is None


@pytest.mark.parametrize(
    ("content", "encoding", "status"),
    [
        (b"not compressed", "gzip", 400),
        (gzip.compress(b"{}")[:-4], "gzip", 400),
        (gzip.compress(b"{}") * 2, "gzip", 400),
        (zlib.compress(bytes(100 * 2**20)), "deflate", 413),
        (b"{}", "br", 415),
    ],
    ids=["other", "cut off", "two members", "too large", "unknown"],
)
def test_what_cannot_be_inflated_is_refused(
    server: Running, content: bytes, encoding: str, status: int
) -> None:
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    assert server.client.post("/classify", content=content, headers=headers).status_code == status


def test_tensors_come_and_go_in_shared_memory(
    client: Any, embedding: Any, jpegs: dict[str, bytes], region: tuple[str, Any]
) -> None:
    shared, (key, handle) = triton_shared_memory.load(), region
    image = encoded(jpegs["chelsea"])
    start = 2**16  # the output's place
    assert image.nbytes <= start
    shared.set_shared_memory_region(handle, [image])
    client.register_system_shared_memory("photos", key, 2**17)
    [entry] = client.get_system_shared_memory_status()
    assert entry["name"] == "photos"
    there = triton.InferInput("image", image.shape, "UINT8")
    there.set_shared_memory("photos", image.nbytes)
    wanted = triton.InferRequestedOutput("embedding")
    wanted.set_shared_memory("photos", 4096, offset=start)
    answer = client.infer("tiny-embed", [there], outputs=[wanted])
    described = answer.get_output("embedding")
    assert described["parameters"]["shared_memory_region"] == "photos"
    read = shared.get_contents_as_numpy(handle, np.float32, [2**15])[2**14 :]
    assert np.allclose(read[: len(embedding)], embedding, atol=1e-6)
    wanted.set_shared_memory("photos", 8, offset=start)
    with pytest.raises(InferenceServerException, match="shared memory has 8"):
        client.infer("tiny-embed", [there], outputs=[wanted])
    there.set_shared_memory("photos", 2**17, offset=1)
    with pytest.raises(InferenceServerException, match="not inside"):
        client.infer("tiny-embed", [there])
    client.unregister_system_shared_memory("photos")
    with pytest.raises(InferenceServerException, match="no shared memory region"):
        client.infer("tiny-embed", [there])


def test_tensors_come_and_go_in_memory_of_a_device(
    client: Any, embedding: Any, jpegs: dict[str, bytes], devices: StandIn
) -> None:
    image = encoded(jpegs["chelsea"])
    handle, held = devices.allocate(image.nbytes + 4096)
    held[: image.nbytes] = image.tobytes()
    size = len(held)
    client.register_cuda_shared_memory("gpu", base64.b64encode(handle), 1, size)
    [entry] = client.get_cuda_shared_memory_status()
    assert entry == {"owner": "", "name": "gpu", "device_id": 1, "byte_size": size}
    assert client.get_system_shared_memory_status() == []
    there = triton.InferInput("image", image.shape, "UINT8")
    there.set_shared_memory("gpu", image.nbytes)
    wanted = triton.InferRequestedOutput("embedding")
    wanted.set_shared_memory("gpu", 4096, offset=image.nbytes)
    answer = client.infer("tiny-embed", [there], outputs=[wanted])
    assert answer.get_output("embedding")["parameters"]["shared_memory_region"] == "gpu"
    written = np.frombuffer(held, np.float32, len(embedding), image.nbytes)
    assert np.allclose(written, embedding, atol=1e-6)
    wrong: list[Callable[[], Any]] = [
        lambda: client.register_cuda_shared_memory("more", base64.b64encode(handle), 1, size + 1),
        lambda: client.register_cuda_shared_memory("gpu", base64.b64encode(handle), 1, size),
        lambda: client.register_cuda_shared_memory("short", b"aGFuZGxl", 0, 64),
        lambda: client.get_cuda_shared_memory_status("more"),
    ]
    for call in wrong:
        with pytest.raises(InferenceServerException):
            call()
    client.unregister_cuda_shared_memory("gpu")
    assert not devices.opened
    with pytest.raises(InferenceServerException, match="no shared memory region"):
        client.infer("tiny-embed", [there])


def done(work: Coroutine[Any, Any, T]) -> T:
    """What a call returns that waits for a device alone."""
    return asyncio.run(work)


def test_only_memory_under_the_settings_prefix_is_registered(region: tuple[str, Any]) -> None:
    key, _ = region
    with pytest.raises(InvalidInputError, match="turned off"):
        done(SharedMemory("").of(None).register("a", key, 0, 64))
    memory = SharedMemory(PREFIX).of(None)
    for other in ("/elsewhere", f"/../{PREFIX}", f"/{PREFIX}/../passwd", ""):
        with pytest.raises(InvalidInputError, match="begin with"):
            done(memory.register("a", other, 0, 64))
    with pytest.raises(InvalidInputError, match="cannot be opened"):
        done(memory.register("a", f"/{PREFIX}_none", 0, 64))
    with pytest.raises(InvalidInputError, match="fewer than"):
        done(memory.register("a", key, 1, 2**17))
    done(memory.register("a", key, 0, 2**17))
    with pytest.raises(PayloadTooLargeError):
        done(memory.read(Place("a", 1024), 1023))
    os.truncate(f"/dev/shm{key}", 100)  # a mapping would end the process here
    with pytest.raises(InvalidInputError, match="fewer than"):
        done(memory.read(Place("a", 1024), 2**20))
    with pytest.raises(InvalidInputError, match="fewer than"):
        done(memory.write(Place("a", 1024), bytes(1024)))
    assert os.stat(f"/dev/shm{key}").st_size == 100
    os.truncate(f"/dev/shm{key}", 2**17)


def api_key(name: str, *scopes: Scope) -> ApiKey:
    return ApiKey(name, frozenset(scopes or ("infer",)))


def test_a_region_is_its_owners_alone(region: tuple[str, Any]) -> None:
    key, _ = region
    memory = SharedMemory(PREFIX)
    own, other = memory.of(api_key("own")), memory.of(api_key("other"))
    done(own.register("a", key, 0, 2**17))
    for use in (
        lambda: done(other.read(Place("a", 64), 64)),
        lambda: done(other.write(Place("a", 64), bytes(64))),
        lambda: other.status(SystemRegion, "a"),
    ):
        with pytest.raises(NotFoundError):
            use()
    with pytest.raises(ConflictError, match="another API key"):
        done(other.register("b", key, 0, 64))
    done(other.unregister(SystemRegion, "a"))
    done(other.unregister(SystemRegion))
    assert other.status(SystemRegion) == []
    assert [found.owner for found in own.status(SystemRegion)] == ["own"]
    admin = memory.of(api_key("root", "admin"))
    assert [found.name for found in admin.status(SystemRegion)] == ["a"]
    done(admin.unregister(SystemRegion))  # its own
    assert own.status(SystemRegion, "a")
    done(admin.unregister(SystemRegion, "a"))
    assert own.status(SystemRegion) == []
    done(other.register("a", key, 0, 64))


def test_memory_that_is_named_after_an_api_key_is_for_that_key_alone() -> None:
    key = f"/{PREFIX}own:photos"
    path = Path(f"/dev/shm{key}")
    path.write_bytes(bytes(64))
    try:
        memory = SharedMemory(PREFIX)
        for other in (api_key("other"), api_key("root", "admin"), api_key("o")):
            with pytest.raises(PermissionDeniedError, match="'own'"):
                done(memory.of(other).register("squatted", key, 0, 64))
        done(memory.of(api_key("own")).register("photos", key, 0, 64))
        done(SharedMemory(PREFIX).of(None).register("photos", key, 0, 64))  # where no keys are used
    finally:
        path.unlink()


def test_an_owners_regions_are_bounded(region: tuple[str, Any]) -> None:
    key, _ = region
    memory = SharedMemory(PREFIX)
    own = memory.of(api_key("own"))
    with pytest.raises(PayloadTooLargeError, match=str(MAX_OWN_BYTES)):
        done(own.register("large", key, 0, MAX_OWN_BYTES + 1))
    for number in range(MAX_OWN_REGIONS):
        done(own.register(str(number), key, 0, 64))
    with pytest.raises(PayloadTooLargeError, match=f"{MAX_OWN_REGIONS} regions"):
        done(own.register("more", key, 0, 64))
    done(own.unregister(SystemRegion, "0"))
    done(own.register("more", key, 0, 64))


def test_regions_are_owned_over_rest_and_grpc(
    tiny_catalog: Path, region: tuple[str, Any], jpegs: dict[str, bytes]
) -> None:
    key, _ = region
    keys: dict[str, Any] = {"api_keys": ("first", "second"), "admin_keys": ("root",)}
    body = {"key": key, "offset": 0, "byte_size": 2**17}
    wanted = {"shared_memory_region": "a", "shared_memory_byte_size": 4096}
    inference = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": wanted}]
    }
    with running(tiny_catalog, shared_memory=PREFIX, **keys) as server:

        def ask(user: str, method: str, path: str, **given: Any) -> Any:
            headers = {"X-API-Key": user}
            return server.client.request(method, f"/v2/{path}", headers=headers, **given)

        server.wait_ready()
        regions = "systemsharedmemory"
        assert ask("first", "POST", f"{regions}/region/a/register", json=body).is_success
        assert ask("second", "POST", f"{regions}/unregister").is_success
        assert ask("second", "GET", f"{regions}/status").json() == []
        infer = ask("second", "POST", "models/tiny/infer", json=inference)
        assert (infer.status_code, "no shared memory region" in infer.text) == (404, True)
        [entry] = ask("root", "GET", f"{regions}/status").json()
        assert (entry["name"], entry["owner"]) == ("a", "api-key-1")
        with grpc.insecure_channel(server.grpc) as channel:
            stub: Any = GRPCInferenceServiceStub(channel)

            def listed(user: str) -> list[str]:
                request = oip.SystemSharedMemoryStatusRequest()
                found = stub.SystemSharedMemoryStatus(request, metadata=[("x-api-key", user)])
                return list(found.regions)

            register = oip.SystemSharedMemoryRegisterRequest(
                name="a", key=f"{key}_none", byte_size=64
            )
            with pytest.raises(grpc.RpcError, match="cannot be opened"):
                stub.SystemSharedMemoryRegister(register, metadata=[("x-api-key", "second")])
            register.key = key
            with pytest.raises(grpc.RpcError, match="another API key"):  # of REST and gRPC together
                stub.SystemSharedMemoryRegister(register, metadata=[("x-api-key", "second")])
            assert ask("first", "POST", f"{regions}/unregister").is_success
            stub.SystemSharedMemoryRegister(register, metadata=[("x-api-key", "second")])
            assert [listed(user) for user in ("first", "second", "root")] == [
                [], ["a"], ["api-key-2/a"]
            ]  # fmt: skip
            forget = oip.SystemSharedMemoryUnregisterRequest()
            stub.SystemSharedMemoryUnregister(forget, metadata=[("x-api-key", "first")])
            assert listed("second") == ["a"]


@pytest.fixture
def chelsea(jpegs: dict[str, bytes], tmp_path: Path) -> str:
    """The path of a photo."""
    path = tmp_path / "chelsea.jpg"
    path.write_bytes(jpegs["chelsea"])
    return str(path)


def seen_by(program: str, *arguments: str) -> Any:
    """What a program of this folder prints: what tritonclient saw over gRPC."""
    command = [sys.executable, "-m", f"tests.service.{program}", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    return json.loads(ran.stdout)


def test_tritonclient_uses_the_extensions_over_grpc(
    server: Running, embedding: Any, chelsea: str, priorities: list[bool], devices: StandIn
) -> None:
    handle, held = devices.allocate(8192)
    arguments = [server.grpc, chelsea, f"/{PREFIX}_grpc", base64.b64encode(handle).decode()]
    seen = seen_by("triton_grpc_extensions", *arguments)
    assert priorities == [True, False, False]
    assert np.allclose(seen["embedding"][0], embedding, atol=1e-6)
    assert np.allclose(seen["shared"][0], embedding, atol=1e-6)
    assert len(seen["beside"]) == 3
    assert seen["regions"] == ["in", "out"]
    assert seen["after"] == []
    assert seen["cuda"] == {"regions": {"gpu": [0, 8192]}, "after": {}}
    assert np.allclose(np.frombuffer(held, np.float32, len(embedding)), embedding, atol=1e-6)
    assert seen["config"]["max_batch_size"] == 64
    assert int(seen["config"]["dynamic_batching"]["priority_levels"]) == 2
    assert seen["config"]["input"][0]["data_type"] == "TYPE_STRING"
    [entry] = seen["statistics"]["model_stats"]
    assert int(entry["inference_count"]) >= 2


def test_tritonclient_streams_over_grpc(server: Running, embedding: Any, chelsea: str) -> None:
    def count(outcome: str) -> float:
        labels = {"task": "open-inference", "outcome": outcome}
        return server.metric("vitrail_requests_total", **labels)

    before = {outcome: count(outcome) for outcome in ("ok", "invalid")}
    seen = seen_by("triton_grpc_stream", server.grpc, chelsea)
    first, bad, unknown, last, labels = seen["in_order"]
    for number, (name, is_final, values) in ((0, first), (3, last)):
        assert (name, is_final) == (str(number), True)
        assert np.allclose(values, embedding, atol=1e-6)
    assert "image" in bad
    assert "none" in unknown
    assert (labels[0], len(labels[2])) == ("4", 5)
    assert seen["unread"]["ids"] == [str(number) for number in range(100)]
    assert seen["unread"]["meanwhile"] < 100  # the server stopped reading
    assert seen["cancelled"] == ["StatusCode.CANCELLED", "7"]
    assert count("invalid") == before["invalid"] + 2
    assert count("ok") >= before["ok"] + 3 + 100 + 2
    wait_until(lambda: server.metric("vitrail_requests_in_flight", protocol="grpc") == 0)
