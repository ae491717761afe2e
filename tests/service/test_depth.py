"""/depth: metres of each pixel over REST, gRPC and the command line."""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest
from google.protobuf.struct_pb2 import Struct
from PIL import Image

from models import load_checkpoint
from service.rpc.wire import from_tensor
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from tests.conftest import Running, encode, running
from tests.models.test_fixtures import folder_of

NAME = "dinov2_nyu_linear4"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("depth") / "catalog.toml"
    arguments = "{num_heads = 3, out_index = [0, 1, 2, 3], max_depth = 80}"
    path.write_text(
        f'[trunks.near]\nsource = "file:{folder_of(NAME)}/checkpoint.pth"\n'
        f'arguments = {arguments}\n[models.near]\ntrunk = "near"\ntask = "depth"\n'
    )
    with running(path) as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def photo(photos: dict[str, Image.Image]) -> Image.Image:
    return photos["rocket"].resize((150, 100))


@pytest.fixture(scope="module")
def metres(photo: Image.Image) -> np.ndarray:
    """What the library computes for the photo, (H, W)."""
    folder = folder_of(NAME)
    arguments = json.loads((folder / "meta.json").read_text())["hyperparameters"]
    model = load_checkpoint(folder / "checkpoint.pth", arguments)
    [answer] = model.predict([encode(photo, "PNG")], output="npy")
    loaded: np.ndarray = np.load(io.BytesIO(base64.b64decode(answer["depth"])))
    return loaded


def test_depth_has_the_images_size_and_says_its_range(
    server: Running, photo: Image.Image, metres: np.ndarray
) -> None:
    image = encode(photo, "PNG")
    answer = server.client.post("/depth", files={"image": image}).json()["results"][0]
    assert (answer["width"], answer["height"]) == photo.size == metres.shape[::-1]
    assert answer["minimum"] == pytest.approx(float(metres.min()), abs=1e-4)
    assert answer["maximum"] == pytest.approx(float(metres.max()), abs=1e-4)
    encoded = np.frombuffer(base64.b64decode(answer["depth"]), np.uint8)
    levels = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    assert levels is not None
    assert levels.dtype == np.uint16
    assert (levels.min(), levels.max()) == (0, 65535)
    span = answer["maximum"] - answer["minimum"]
    np.testing.assert_allclose(levels / 65535 * span + answer["minimum"], metres, atol=1e-4)


def test_an_accepted_media_type_chooses_the_form(
    server: Running, photo: Image.Image, metres: np.ndarray
) -> None:
    image = encode(photo, "PNG")

    def ask(media_type: str) -> Any:
        return server.client.post(
            "/depth", content=image, headers={"Accept": media_type, "Content-Type": "image/png"}
        )

    array = ask("application/x-npy")
    assert array.headers["content-type"] == "application/x-npy"
    loaded = np.load(io.BytesIO(array.content))
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, metres, atol=1e-4)
    picture = ask("image/png")
    assert Image.open(io.BytesIO(picture.content)).size == photo.size
    refused = server.client.post("/depth?output=jpeg", files={"image": image})
    assert refused.status_code == 422


def test_grpc_returns_the_same(server: Running, photo: Image.Image, metres: np.ndarray) -> None:
    image = encode(photo, "PNG")
    options = Struct()
    options.update({"output": "npy"})
    with grpc.insecure_channel(server.grpc) as channel:
        stub = VisionStub(channel)
        inputs = pb.Inputs(images=[image])
        inferred = stub.Infer(pb.InferRequest(task="depth", inputs=inputs, options=options))
        call = pb.Call(model="near", task="depth", options=options)
        predicted = stub.Predict(pb.PredictRequest(images=[image], calls=[call]))
    for result in (inferred.results[0], predicted.results[0].outputs[0]):
        arrays = {tensor.name: from_tensor(tensor) for tensor in result.tensors}
        loaded = np.load(io.BytesIO(arrays["npy"].tobytes()))
        np.testing.assert_allclose(loaded, metres, atol=1e-4)


def test_the_command_prints_a_line(
    server: Running, photo: Image.Image, metres: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(encode(photo, "PNG"))
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "depth", str(tmp_path), "--url", server.url],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"150x100: {metres.min():.3f} to {metres.max():.3f}" in done.stdout


def test_a_model_without_depth_says_so(tiny: Running, jpegs: dict[str, bytes]) -> None:
    answer = tiny.client.post("/depth?model=tiny", files={"image": jpegs["coffee"]})
    assert answer.status_code == 422
    assert "does not do 'depth'" in answer.json()["detail"]
