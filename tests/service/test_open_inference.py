"""The Open Inference Protocol with its own clients: tritonclient over HTTP and gRPC, KServe's
probes, and plain curl-like requests."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from models.inputs.images import decode_image
from models.inputs.normalize import Normalize
from tests.conftest import Running, running

# Closed ones stay: their destructor fails in another thread, such as a server's.
CLIENTS: list[Any] = []
INFER = "/v2/models/tiny/infer"

ATTENTION = ["size", "overlay", "map", "npy"]


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def server(tiny_catalog: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(tiny_catalog, apart="apart" in request.param, admin_keys="boss") as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    opened = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield opened
    opened.close()
    CLIENTS.append(opened)


@pytest.fixture(scope="module")
def pixels(server: Running, jpegs: dict[str, bytes]) -> np.ndarray:
    """Chelsea twice, as the tiny trunk's transform leaves her: (2, 3, H, W) float32."""
    model = server.backend.registry.get("tiny")
    pixels = model.trunk.prepare(decode_image(jpegs["chelsea"]))[None]
    made: torch.Tensor = Normalize(model.trunk.preprocess)(pixels)
    repeated: np.ndarray = made.repeat(2, 1, 1, 1).numpy()
    return repeated


@pytest.fixture(scope="module")
def rest(server: Running, jpegs: dict[str, bytes]) -> Any:
    """What our own routes answer for chelsea: her predictions and her embedding."""

    def ask(path: str) -> Any:
        return server.client.post(path, content=jpegs["chelsea"]).json()["results"][0]

    return ask("/classify?top_k=3")["predictions"], ask("/embed?model=tiny-embed")["embedding"]


def encoded(image: bytes, count: int, *, binary: bool = True) -> Any:
    tensor = triton.InferInput("image", [count], "BYTES")
    content = image if binary else base64.b64encode(image)
    tensor.set_data_from_numpy(np.array([content] * count, dtype=object), binary_data=binary)
    return tensor


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_images_are_answered_with_named_tensors(
    client: Any, rest: Any, jpegs: dict[str, bytes], binary_in: bool, binary_out: bool
) -> None:
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary_out)
        for name in ("index", "label", "score", "embedding", "probabilities")
    ]
    answer = client.infer(
        "tiny",
        [encoded(jpegs["chelsea"], 2, binary=binary_in)],
        outputs=outputs,
        request_id="abc",
        parameters={"top_k": 3},
    )
    predictions, embedding = rest
    assert answer.get_response()["id"] == "abc"
    assert answer.as_numpy("index").tolist() == [[item["index"] for item in predictions]] * 2
    labels = [
        label.decode() if isinstance(label, bytes) else label
        for label in answer.as_numpy("label")[1].tolist()
    ]
    assert labels == [item["label"] for item in predictions]
    assert np.allclose(answer.as_numpy("score")[0], [item["score"] for item in predictions])
    assert np.allclose(answer.as_numpy("embedding")[1], embedding, atol=1e-6)
    probabilities = answer.as_numpy("probabilities")
    assert probabilities.shape == (2, 1000)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-4)
    assert probabilities[0].argmax() == predictions[0]["index"]


def test_all_outputs_come_when_none_is_named(
    client: Any, rest: Any, jpegs: dict[str, bytes]
) -> None:
    answer = client.infer("tiny", [encoded(jpegs["chelsea"], 1)])
    names = [output["name"] for output in answer.get_response()["outputs"]]
    assert names == ["index", "label", "score"]
    assert answer.as_numpy("score").shape == (1, 5)


@pytest.mark.parametrize("datatype", ["FP32", "FP16"])
def test_preprocessed_pixels_give_the_images_answer(
    client: Any, rest: Any, pixels: np.ndarray, datatype: str
) -> None:
    dtype = np.float32 if datatype == "FP32" else np.float16
    tensor = triton.InferInput("pixel_values", pixels.shape, datatype)
    tensor.set_data_from_numpy(pixels.astype(dtype))
    embedding = client.infer("tiny-embed", [tensor]).as_numpy("embedding")
    assert embedding.shape == (2, len(rest[1]))
    assert np.allclose(embedding[1], rest[1], atol=1e-5 if datatype == "FP32" else 1e-2)


def test_bf16_pixels_come_as_raw_halves(server: Running, rest: Any, pixels: np.ndarray) -> None:
    halves = (pixels.view(np.uint32) >> 16).astype("<u2").tobytes()
    entry = {"name": "pixel_values", "datatype": "BF16", "shape": pixels.shape,
             "parameters": {"binary_data_size": len(halves)}}  # fmt: skip
    head = json.dumps({"inputs": [entry]}).encode()
    answer = server.client.post(
        "/v2/models/tiny-embed/infer",
        content=head + halves,
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    embedding = answer.json()["outputs"][0]["data"]
    assert np.allclose(embedding[: len(rest[1])], rest[1], atol=5e-2)


@pytest.mark.parametrize("output", ["score", "probabilities"])
def test_the_classification_extension_names_the_best(
    client: Any, rest: Any, jpegs: dict[str, bytes], output: str
) -> None:
    wanted = triton.InferRequestedOutput(output, class_count=3)
    texts = client.infer("tiny", [encoded(jpegs["chelsea"], 2)], outputs=[wanted]).as_numpy(output)
    assert texts.shape == (2, 3)
    for text, item in zip(texts[0].tolist(), rest[0], strict=True):
        score, index, label = text.decode().split(":")
        assert float(score) == pytest.approx(item["score"], abs=1e-5)
        assert (int(index), label) == (item["index"], item["label"])


def test_the_server_and_its_models_are_described(client: Any, server: Running) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.get_server_metadata()["name"] == "vitrail"
    model = client.get_model_metadata("tiny")
    size = list(server.backend.registry.get("tiny").trunk.preprocess.input_size)
    assert model["inputs"] == [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, *size]},
    ]
    names = [output["name"] for output in model["outputs"]]
    classified = ["index", "label", "score", "probabilities"]
    assert names == [*classified, "embedding", "tokens", *ATTENTION]
    states = {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}
    assert states == dict.fromkeys(("tiny", "tiny-embed", "conv"), "READY")


def test_models_load_and_unload_with_the_admin_key(client: Any, server: Running) -> None:
    with pytest.raises(InferenceServerException, match="key"):
        client.unload_model("conv")
    boss = {"X-API-Key": "boss"}
    client.unload_model("conv", headers=boss)
    assert not client.is_model_ready("conv")
    index = server.client.post("/v2/repository/index", json={"ready": True}).json()
    assert {entry["name"] for entry in index} == {"tiny", "tiny-embed"}
    client.load_model("conv", headers=boss)
    assert client.is_model_ready("conv")


def test_kserves_probes_work(server: Running) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready", "/v2"):
        assert server.client.get(path).status_code == 200
    assert server.client.get("/v2/models/none/ready").status_code == 404


def test_a_whole_body_may_be_one_image(server: Running, rest: Any, jpegs: dict[str, bytes]) -> None:
    answer = server.client.post(
        INFER, content=jpegs["chelsea"], headers={"Inference-Header-Content-Length": "0"}
    ).json()
    assert answer["outputs"][0]["data"][:3] == [item["index"] for item in rest[0]]


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"], **changes}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"inputs": [tensor(name="picture")]}, 422, "picture"),
        ({"inputs": []}, 422, "none"),
        ({"inputs": [tensor(datatype="FP32")]}, 422, "BYTES"),
        ({"inputs": [tensor(shape=[2])]}, 422, "2 elements"),
        ({"inputs": [tensor(shape=[1, 2])]}, 422, "[N, 1]"),
        ({"inputs": [tensor(shape=[0], data=[])]}, 422, "no elements"),
        ({"inputs": [tensor(shape=[-1])]}, 422, "negative"),
        ({"inputs": [tensor(data=["not base64!"])]}, 422, "base64"),
        ({"inputs": [tensor(data=None)]}, 422, "neither"),
        ({"inputs": [tensor()]}, 422, "image"),
        ({"inputs": [tensor(shape=[65], data=["AAAA"] * 65)]}, 413, "64"),
        ({"inputs": [tensor(parameters={"binary_data_size": 10})]}, 422, "binary_data_size"),
        ({"inputs": [tensor()], "outputs": [{"name": "logit"}]}, 422, "logit"),
        ({"inputs": [tensor()], "parameters": {"topk": 3}}, 422, "topk"),
        ({"inputs": [tensor()], "parameters": {"top_k": 0}}, 422, "top_k"),
        ({"inputs": [tensor()], "parameters": {"timeout": "soon"}}, 422, "timeout"),
        ({"inputs": "image"}, 422, "inputs"),
        ([], 400, "object"),
        ({"inputs": [tensor(name="pixel_values", datatype="INT8", shape=[1])]}, 422, "INT8"),
        (
            {"inputs": [tensor(name="pixel_values", datatype="FP32", shape=[1], data=[0.5])]},
            422,
            "[N, 3, height, width]",
        ),
        (
            {
                "inputs": [
                    tensor(
                        name="pixel_values", datatype="FP32", shape=[1, 3, 1, 1], data=[[[["a"]]]]
                    )
                ]
            },
            422,
            "numbers",
        ),
        (
            {
                "inputs": [
                    tensor(name="pixel_values", datatype="FP32", shape=[1, 3, 1, 1], data=[1, 2, 3])
                ]
            },
            422,
            "shape",
        ),
    ],
)
def test_wrong_requests_are_told_in_the_protocols_own_words(
    server: Running, body: Any, status: int, says: str
) -> None:
    answer = server.client.post(INFER, json=body)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]
    assert answer.json()["detail"] == answer.json()["error"]


def test_wrong_names_versions_and_bodies_are_told(client: Any, server: Running) -> None:
    with pytest.raises(InferenceServerException, match="no model 'none'"):
        client.get_model_metadata("none")
    with pytest.raises(InferenceServerException, match="no version '2'"):
        client.infer("tiny", [encoded(b"x", 1)], model_version="2")
    header = {"Inference-Header-Content-Length": "99"}
    assert server.client.post(INFER, content=b"{}", headers=header).status_code == 400
    assert server.client.post(INFER, content=b"{").status_code == 400
    trailing = b'{"inputs": []}xyz'
    header = {"Inference-Header-Content-Length": str(len(trailing) - 3)}
    assert server.client.post(INFER, content=trailing, headers=header).status_code == 422


def test_a_deadline_in_microseconds_is_kept(server: Running, jpegs: dict[str, bytes]) -> None:
    image = base64.b64encode(jpegs["chelsea"]).decode()
    body = {"inputs": [tensor(data=[image])], "parameters": {"timeout": 1}}
    answer: httpx.Response = server.client.post(INFER, json=body)
    assert answer.status_code == 504


def test_tritonclient_speaks_grpc(
    server: Running, rest: Any, jpegs: dict[str, bytes], pixels: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "chelsea.jpg").write_bytes(jpegs["chelsea"])
    np.save(tmp_path / "pixels.npy", pixels)
    program = Path(__file__).with_name("triton_grpc.py")
    arguments = [server.grpc, str(tmp_path / "chelsea.jpg"), str(tmp_path / "pixels.npy")]
    command = [sys.executable, str(program), *arguments]
    ran = subprocess.run(command, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    seen = json.loads(ran.stdout)
    predictions, embedding = rest
    assert seen["live"]
    assert seen["ready"]
    assert seen["model_ready"]
    assert seen["server"]["name"] == "vitrail"
    assert seen["id"] == "7"
    assert seen["label"] == [[item["label"] for item in predictions]] * 2
    assert np.allclose(seen["score"][1], [item["score"] for item in predictions], atol=1e-6)
    for name, atol in (("embedding", 1e-5), ("prepared", 1e-5), ("half", 1e-2)):
        assert np.allclose(seen[name][0], embedding, atol=atol)
    assert seen["classified"][0].split(":")[1:] == [
        str(predictions[0]["index"]),
        predictions[0]["label"],
    ]
    assert {entry["name"] for entry in seen["index"]["models"]} == {"tiny", "tiny-embed", "conv"}
    assert [entry["name"] for entry in seen["model"]["inputs"]] == ["image", "pixel_values"]
    statuses = {name: status for name, (status, _) in seen["errors"].items()}
    assert statuses.pop("model") == "StatusCode.NOT_FOUND"
    assert set(statuses.values()) == {"StatusCode.INVALID_ARGUMENT"}
    assert seen["load"] == "StatusCode.UNAUTHENTICATED"
