"""`/embed?output=tokens`: patch tokens, compared with timm's and open_clip's own."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import timm
import torch
from google.protobuf.struct_pb2 import Struct
from PIL import Image
from safetensors.torch import load_file

from models import Registry, load_checkpoint
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from models.errors import InputError
from service import limits
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from tests.conftest import Running, running
from tests.service.test_cli import vitrail


@pytest.fixture(scope="module", params=["embedded", "apart"])
def server(request: pytest.FixtureRequest, tiny_catalog: Path) -> Iterator[Running]:
    with running(tiny_catalog, apart=request.param == "apart") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def timms(tiny_catalog: Path) -> dict[str, Any]:
    """timm's own networks with the catalog's weights, and their input for a photo."""
    networks = {}
    for name, architecture in (("tiny", "test_vit"), ("conv", "test_convnext")):
        network = timm.create_model(architecture).eval()
        network.load_state_dict(load_file(tiny_catalog.parent / f"{name}.safetensors"))
        networks[name] = network
    return networks


@torch.inference_mode()
def timm_tokens(network: Any, photo: Image.Image, layers: list[int] | None = None) -> Any:
    """The last output of timm's network for a photo, or outputs of blocks without the prefix."""
    config = timm.data.resolve_model_data_config(network)
    pixels = timm.data.create_transform(**config)(photo)[None]
    if layers is None:
        return network.forward_features(pixels)[0].numpy()
    outputs = network.forward_intermediates(pixels, indices=layers, intermediates_only=True)
    return [output[0].flatten(1).T.numpy() for output in outputs]


def embed(server: Running, image: bytes, query: str = "", **request: Any) -> dict[str, Any]:
    response = server.client.post(
        f"/embed?model=tiny&output=tokens&{query}",
        content=image,
        headers={"Content-Type": "image/jpeg"},
        **request,
    )
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def close(actual: Any, expected: np.ndarray) -> bool:
    array = np.asarray(actual, np.float32)
    scale = float(np.abs(expected).max())
    return array.shape == expected.shape and float(np.abs(array - expected).max()) <= 1e-5 * scale


def unit(tokens: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(tokens, axis=-1, keepdims=True)
    return np.asarray(tokens / lengths)


def test_tokens_are_timms_without_and_with_prefix(
    server: Running, timms: dict[str, Any], photos: dict[str, Image.Image]
) -> None:
    image = lossless(photos["chelsea"])
    expected = timm_tokens(timms["tiny"], photos["chelsea"])
    prefix = timms["tiny"].num_prefix_tokens
    assert prefix > 0
    body = embed(server, image)
    assert close(body["results"][0]["tokens"], unit(expected[prefix:]))
    assert body["dimensions"] == expected.shape[1]
    raw = embed(server, image, "normalize=false&prefix=true")
    assert close(raw["results"][0]["tokens"], expected)


def test_layers_come_by_number(
    server: Running, timms: dict[str, Any], photos: dict[str, Image.Image]
) -> None:
    image = lossless(photos["coffee"])
    tokens = embed(server, image, "normalize=false&layers=1&layers=3")["results"][0]["tokens"]
    expected = timm_tokens(timms["tiny"], photos["coffee"], [1, 3])
    assert list(tokens) == ["1", "3"]
    assert close(tokens["1"], expected[0])
    assert close(tokens["3"], expected[1])
    [one] = embed(server, image, "normalize=false&layers=3")["results"]
    assert close(one["tokens"]["3"], expected[1])


def test_grid_and_region_say_where_the_patches_are(
    server: Running, photos: dict[str, Image.Image]
) -> None:
    entry = embed(server, lossless(photos["chelsea"]))["results"][0]  # 451 x 300
    rows, columns = entry["grid"]
    assert rows == columns
    assert rows * columns == len(entry["tokens"])
    left, top, right, bottom = entry["region"]  # a square in the middle
    assert right - left == pytest.approx(bottom - top)
    assert (left + right, top + bottom) == pytest.approx((451, 300))
    assert 0 <= top < bottom <= 300
    assert "grid" not in embed(server, lossless(photos["chelsea"]), "layers=1")["results"][0]


def test_encodings_are_those_of_embeddings_and_several_come_by_name(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    image = jpegs["rocket"]
    tokens = np.array(embed(server, image)["results"][0]["tokens"], np.float32)
    query = "encoding=float&encoding=base64&encoding=int8&encoding=binary"
    forms = embed(server, image, query)["results"][0]["tokens"]
    assert list(forms) == ["float", "base64", "int8", "binary"]
    assert np.allclose(forms["float"], tokens, atol=1e-6)
    rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in forms["base64"]]
    assert np.array_equal(np.stack(rows), np.array(forms["float"], np.float32))
    assert np.abs(np.array(forms["int8"]) - tokens * 127).max() <= 0.5001
    assert np.array_equal(np.array(forms["binary"]), np.packbits(tokens > 0, axis=-1))
    both = server.client.post(
        "/embed", json=payload(image, model="tiny", encoding=["float", "base64"])
    ).json()["results"][0]["embedding"]
    assert np.array_equal(
        np.array(both["float"], np.float32), np.frombuffer(base64.b64decode(both["base64"]), "<f4")
    )
    alone = server.client.post("/embed", json=payload(image, model="tiny", encoding=["float"]))
    assert alone.json()["results"][0]["embedding"] == both["float"]


def test_every_way_in_gives_the_same(server: Running, jpegs: dict[str, bytes]) -> None:
    image, query = jpegs["astronaut"], "encoding=base64&layers=0"
    expected = embed(server, image, query)["results"]
    form = {"model": "tiny", "output": "tokens", "encoding": "base64", "layers": ["0"]}
    multipart = server.client.post("/embed", files={"image": ("a.jpg", image)}, data=form)
    assert multipart.json()["results"] == expected
    options = {"model": "tiny", "output": "tokens", "encoding": "base64", "layers": [0]}
    assert (
        server.client.post("/embed", json=payload(image, **options)).json()["results"] == expected
    )


def test_npy_has_an_axis_for_inputs_and_for_layers(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    files = [("image", ("a.jpg", jpegs[name])) for name in ("coffee", "rocket")]
    headers = {"Accept": "application/x-npy"}

    def array(query: str) -> np.ndarray:
        url = f"/embed?model=tiny&output=tokens{query}"
        loaded: np.ndarray = np.load(
            io.BytesIO(server.client.post(url, files=files, headers=headers).content)
        )
        return loaded

    tokens = array("")
    assert tokens.ndim == 3
    assert close(embed(server, jpegs["rocket"])["results"][0]["tokens"], tokens[1])
    layers = array("&layers=2&layers=0")
    assert layers.shape == (2, 2, *tokens.shape[1:])
    one = embed(server, jpegs["coffee"], "layers=2")["results"][0]["tokens"]
    assert close(one["2"], layers[0, 0])


def test_a_feature_map_is_its_cells_row_by_row(
    server: Running, timms: dict[str, Any], photos: dict[str, Image.Image]
) -> None:
    image = lossless(photos["chelsea"])
    url = "/embed?model=conv&output=tokens&normalize=false"
    headers = {"Content-Type": "image/png"}
    tokens = server.client.post(url, content=image, headers=headers).json()["results"][0]["tokens"]
    expected = timm_tokens(timms["conv"], photos["chelsea"])
    assert close(tokens, expected.reshape(len(expected), -1).T)
    stages = server.client.post(f"{url}&layers=0&layers=2", content=image, headers=headers).json()
    first, last = timm_tokens(timms["conv"], photos["chelsea"], [0, 2])
    assert close(stages["results"][0]["tokens"]["0"], first)
    assert close(stages["results"][0]["tokens"]["2"], last)
    assert stages["dimensions"] is None  # stages have different ones


def test_tokens_share_a_pass_with_other_tasks(tiny_catalog: Path, jpegs: dict[str, bytes]) -> None:
    with running(tiny_catalog) as server:
        server.wait_ready()
        with grpc.insecure_channel(server.grpc) as channel:
            calls = []
            forms: list[dict[str, Any]] = [{}, {"output": "tokens"}]
            for options in [*forms, {"output": "tokens", "layers": [1]}]:
                struct = Struct()
                struct.update(options)
                calls.append(pb.Call(model="tiny", task="embed", options=struct))
            calls.append(pb.Call(model="tiny", task="classify"))
            request = pb.PredictRequest(images=[jpegs["coffee"]], calls=calls)
            before = server.metric("vitrail_batch_size_count", trunk="tiny")
            response = VisionStub(channel).Predict(request)
        names = [[tensor.name for tensor in out.tensors] for out in response.results[0].outputs]
        assert names[:3] == [["embedding"], ["tokens", "grid", "region"], ["tokens.1"]]
        assert server.metric("vitrail_batch_size_count", trunk="tiny") == before + 1


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("model=tiny&output=tokens&layers=99", "layers"),
        ("model=tiny&output=tokens&layers=-1", "layers"),
        ("model=tiny&output=tokens&layers=1&layers=1", "layers"),
        ("model=tiny&output=tokens&pooling=cls", "pooling"),
        ("model=tiny&layers=1", "layers"),
        ("model=tiny&prefix=true", "prefix"),
        ("model=tiny&output=patches", "output"),
        ("model=tiny&encoding=float&encoding=hex", "encoding"),
    ],
)
def test_what_cannot_be_is_refused(
    server: Running, jpegs: dict[str, bytes], query: str, field: str
) -> None:
    files = {"image": ("a.jpg", jpegs["coffee"])}
    response = server.client.post(f"/embed?{query}", files=files)
    assert response.status_code == 422
    assert field in json.dumps(response.json()["errors"])


def test_an_answer_that_is_too_large_is_refused_before_it_is_computed(
    server: Running, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    [entry] = embed(server, jpegs["coffee"], "prefix=true")["results"]
    values = np.array(entry["tokens"]).size
    monkeypatch.setattr(limits, "MAX_ANSWER_VALUES", 2 * values)
    files = [("image", ("a.jpg", jpegs["coffee"]))] * 2
    before = server.metric("vitrail_batch_size_count", trunk="tiny")
    url = "/embed?model=tiny&output=tokens"
    response = server.client.post(f"{url}&layers=0&layers=1", files=files)
    assert response.status_code == 413, response.text
    assert server.metric("vitrail_batch_size_count", trunk="tiny") == before
    assert server.client.post(url, files=files).status_code == 200


def test_clip_towers_give_the_tokens_that_open_clip_gives(
    clip: tuple[Path, Any], photos: dict[str, Image.Image]
) -> None:
    model = Registry.from_catalog(clip[0], device="cpu").get("clip")
    options: dict[str, Any] = {"task": "embed", "output": "tokens", "normalize": False}
    [entry] = model.predict([photos["coffee"]], **options)
    pixels = model.trunk.prepare(photos["coffee"])[None]
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (model.trunk.preprocess.mean, model.trunk.preprocess.std)
    )
    tower = clip[1].visual
    with torch.inference_mode():
        normalised = (pixels / 255 - mean) / std
        tower.output_tokens = True
        pooled, tokens = tower(normalised)
        tower.output_tokens = False
        outputs = tower.forward_intermediates(normalised, indices=[0], output_fmt="NLC")
    assert close(entry["tokens"], tokens[0].numpy())
    [layers] = model.predict([photos["coffee"]], **options, layers=[0])
    assert close(layers["tokens"]["0"], outputs["image_intermediates"][0][0].numpy())
    [embedded] = model.predict([photos["coffee"]], task="embed", normalize=False)
    assert close(embedded["embedding"], pooled[0].numpy())
    [prefixed] = model.predict([photos["coffee"]], **options, prefix=True)
    assert len(prefixed["tokens"]) == len(entry["tokens"]) + 1
    with pytest.raises(InputError, match="no patch tokens"):
        model.head_for("text", "embed", {"output": "tokens"})


def test_a_swin_gives_its_map(tmp_path: Path, photos: dict[str, Image.Image]) -> None:
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 3}
    network = timm.create_model(name, **small).eval()
    checkpoint = Checkpoint(
        format="timm", architecture=name, arguments=small, state_dict=network.state_dict()
    )
    save_checkpoint(checkpoint, tmp_path / "swin.safetensors")
    model = load_checkpoint(tmp_path / "swin.safetensors")
    options: dict[str, Any] = {"task": "embed", "output": "tokens"}
    [entry] = model.predict([photos["coffee"]], **options, normalize=False)
    expected = timm_tokens(network, photos["coffee"])
    assert close(entry["tokens"], expected.reshape(-1, expected.shape[-1]))
    with pytest.raises(InputError, match="cannot be read"):
        model.predict([photos["coffee"]], **options, layers=[0])


def test_the_command_line_prints_tokens(
    server: Running, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    (tmp_path / "a.jpg").write_bytes(jpegs["coffee"])
    arguments = ["embed", str(tmp_path), "--url", server.url, "--model", "tiny", "--form", "tokens"]
    done = vitrail(*arguments, "--layers", "1", "--json")
    assert done.returncode == 0, done.stderr
    expected = embed(server, jpegs["coffee"], "layers=1")["results"][0]["tokens"]
    assert close(json.loads(done.stdout)["tokens"]["1"], np.array(expected["1"]))
    assert "tokens: " in vitrail(*arguments).stdout
    assert vitrail(*arguments, "--output", str(tmp_path / "a.npy")).returncode == 2


def lossless(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


def payload(image: bytes, **options: Any) -> dict[str, Any]:
    return {"images": [{"base64": base64.b64encode(image).decode()}], **options}
