"""Every published layout behind a server: one line in a catalog, real photos in, answers out."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from models.checkpoints.containers import open_container
from models.checkpoints.formats import detect_format
from models.inference import HeadCall, run_rows
from models.inputs.normalize import Normalize
from models.inputs.types import Latent, Seed, Video
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from tests.conftest import Running, encode, running
from tests.models.test_fixtures import FIRST_ROUND, GOLDENS, fixture

GENERATORS = ("vitgan", "vitgan_inr")
CLIPS = ("mvit_video", "mvit_v1_video")
SERVED = [name for name in FIRST_ROUND if name not in (*GENERATORS, *CLIPS)]
LOOKING = ("attmask", "dino", "ibot", "mae", "patchconvnet", "patchconvnet_multiclass")
DRAWING = ("mae", "scale_mae", "sdmae", "supmae")


def _path(name: str) -> Path:
    return next(iter(sorted((GOLDENS / name).glob("checkpoint*"))))


def _entries(name: str) -> list[str]:
    meta = json.loads((GOLDENS / name / "meta.json").read_text())
    settings = meta["hyperparameters"]
    lines = [f'[trunks.{name}]\nsource = "file:{_path(name)}"\n[trunks.{name}.arguments]']
    plain = {k: v for k, v in settings.items() if isinstance(v, int | float | str | list)}
    lines += [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    if "spectral_multipliers" in settings:
        lines.append(f"[trunks.{name}.arguments.spectral_multipliers]")
        lines += [f'"{k}" = {v}' for k, v in settings["spectral_multipliers"].items()]
    if "configs" in settings:
        lines.append(f"[trunks.{name}.arguments.configs]")
        lines.append(f"inner_heads = {settings['configs']['inner_heads']}")
    task = "generate" if name in GENERATORS else "classify" if name in CLIPS else "embed"
    lines.append(f'[models.{name}]\ntrunk = "{name}"\ntask = "{task}"\n')
    if task == "embed" and "logits" in meta["outputs"]:
        lines.append(f'[models.{name}-classify]\ntrunk = "{name}"\ntask = "classify"\n')
    return lines


APART = pytest.param("gateway and worker apart", marks=pytest.mark.nightly)


@pytest.fixture(scope="module", params=["in one process", APART])
def server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Running]:
    """All fixtures in one catalog, each a trunk and the models on it."""
    if not GOLDENS.is_dir():
        pytest.skip("the fixtures are not here (shared/goldens)")
    lines = [line for name in (*SERVED, *GENERATORS, *CLIPS) for line in _entries(name)]
    catalog = tmp_path_factory.mktemp("published") / "published.toml"
    catalog.write_text("\n".join(lines))
    with running(catalog, apart="apart" in request.param) as started:
        started.wait_ready()
        yield started


def clip_of(photos: list[Image.Image], form: str = "mp4", codec: str = "libx264") -> bytes:
    """A clip of some seconds: each photo for ten frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height = 160, 120
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for photo in photos:
            pixels = np.asarray(photo.resize((160, 120)))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            for _ in range(10):
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip(photos: dict[str, Image.Image]) -> bytes:
    return clip_of([photos["chelsea"], photos["coffee"], photos["rocket"]])


@pytest.mark.parametrize("name", SERVED)
def test_a_photo_is_answered(server: Running, name: str, jpegs: dict[str, bytes]) -> None:
    described = server.client.get(f"/models/{name}").json()
    assert described["format"] == detect_format(open_container(_path(name)), {})[0].NAME
    files = {"image": jpegs["chelsea"]}
    answer = server.client.post("/embed", files=files, params={"model": name})
    assert answer.status_code == 200, answer.text[:300]
    embedding = np.array(answer.json()["results"][0]["embedding"])
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    classifier = f"{name}-classify"
    if server.client.get(f"/models/{classifier}").status_code == 200:
        answer = server.client.post("/classify", files=files, params={"model": classifier})
        assert answer.status_code == 200, answer.text[:300]
        assert len(answer.json()["results"][0]["predictions"]) == 5


def test_systems_mix_freely_in_one_request(server: Running, jpegs: dict[str, bytes]) -> None:
    files = [("image", ("photo", jpegs[name])) for name in ("chelsea", "coffee", "rocket")]
    answer = server.client.post("/predict", files=files, data={"models": SERVED})
    assert answer.status_code == 200, answer.text[:300]
    for result in answer.json()["results"]:
        found: dict[str, Any] = result["outputs"]
        assert found.keys() == set(SERVED)
        assert not [name for name, output in found.items() if "error" in output]


# -- where a model looks ---------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOKING)
def test_attention_comes_as_pictures_and_numbers(
    server: Running, name: str, photos: dict[str, Image.Image], jpegs: dict[str, bytes]
) -> None:
    photo = photos["chelsea"]

    def ask(**options: Any) -> dict[str, Any]:
        answer = server.client.post(
            "/attention", files={"image": jpegs["chelsea"]}, params={"model": name, **options}
        )
        assert answer.status_code == 200, answer.text[:300]
        result: dict[str, Any] = answer.json()["results"][0]
        return result

    drawn = ask()
    assert (drawn["width"], drawn["height"]) == photo.size
    for form in ("overlay", "map"):
        picture = Image.open(io.BytesIO(base64.b64decode(ask(output=form)["attention"])))
        assert picture.size == photo.size
    maps = np.load(io.BytesIO(base64.b64decode(ask(output="npy")["attention"])))
    assert maps.shape == (drawn["heads"], *drawn["grid"])
    assert (maps >= 0).all()
    assert (maps.sum((1, 2)) <= 1 + 1e-5).all()
    one = np.load(io.BytesIO(base64.b64decode(ask(output="npy", head=0)["attention"])))
    np.testing.assert_array_equal(one, maps[:1])


def test_attention_is_the_references(server: Running) -> None:
    model, golden, _ = fixture("dino")
    head = model.head("attention", {})
    [row, *_] = run_rows(model.trunk, golden["pixel_values"], HeadCall(head))
    side = row["attention"].shape[-1]
    reference = golden["attention"][0, :, 0, 1:].reshape(-1, side, side)
    np.testing.assert_allclose(row["attention"], reference, atol=1e-5)


def test_attention_itself_can_be_the_answer(server: Running, jpegs: dict[str, bytes]) -> None:
    for accept, output in (("image/png", "overlay"), ("application/x-npy", "npy")):
        answer = server.client.post(
            "/attention",
            params={"model": "dino", "output": output},
            content=jpegs["chelsea"],
            headers={"Accept": accept, "Content-Type": "image/jpeg"},
        )
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, accept)


def test_models_that_cannot_show_attention_say_so(server: Running, jpegs: dict[str, bytes]) -> None:
    for params in ("model=convnext_v2", "model=dino&head=99"):
        answer = server.client.post("/attention", content=jpegs["chelsea"], params=params)
        assert answer.status_code == 422, answer.text[:300]


# -- drawing what is hidden ------------------------------------------------------------------


def _picture(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), np.float32)


@pytest.mark.parametrize("name", DRAWING)
def test_hidden_patches_are_drawn(server: Running, name: str, jpegs: dict[str, bytes]) -> None:
    def ask(**options: Any) -> dict[str, Any]:
        answer = server.client.post(
            "/reconstruct", files={"image": jpegs["coffee"]}, params={"model": name, **options}
        )
        assert answer.status_code == 200, answer.text[:300]
        result: dict[str, Any] = answer.json()["results"][0]
        return result

    first, again, other = ask(seed=1), ask(seed=1), ask(seed=2)
    assert first == again
    assert first["mask"] != other["mask"]
    mask = np.array(ask(mask_ratio=0.5)["mask"])
    assert mask.size - mask.sum() == mask.size // 2
    drawn, pasted = _picture(first["drawn"]), _picture(first["pasted"])
    assert drawn.shape == (first["height"], first["width"], 3)
    hidden = np.kron(np.array(first["mask"]), np.ones([drawn.shape[0] // len(first["mask"])] * 2))
    np.testing.assert_array_equal(drawn[hidden > 0], pasted[hidden > 0])
    assert np.abs(drawn[hidden == 0] - pasted[hidden == 0]).mean() > 1


def test_what_mae_draws_is_the_references(server: Running) -> None:
    """The route's head draws what the fixture's decoder does, for the fixture's noise."""
    model, golden, _ = fixture("mae")
    from models.heads.reconstruct import Reconstruct
    from models.networks.masked import patch_statistics, patchify

    head = model.heads["reconstruct"]
    assert isinstance(head, Reconstruct)
    pixels = golden["pixel_values"]
    with torch.inference_mode():
        drawn = head.draw(head.encode(pixels, golden["noise"], None), pixels)
    mean, deviation = patch_statistics(patchify(pixels, 8))
    reference = golden["reconstruction"] * deviation + mean
    torch.testing.assert_close(patchify(drawn, 8), reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ratio", [0.999, 1, 0, -1, "nan"])
def test_everything_or_nothing_cannot_be_hidden(
    server: Running, ratio: Any, jpegs: dict[str, bytes]
) -> None:
    params = {"model": "mae", "mask_ratio": ratio}
    answer = server.client.post("/reconstruct", content=jpegs["coffee"], params=params)
    assert answer.status_code == 422, answer.text[:300]
    assert "mask_ratio" in answer.text


# -- ground sample distance ------------------------------------------------------------------


def test_embeddings_of_scale_mae_depend_on_the_ground_covered(
    server: Running, photos: dict[str, Image.Image]
) -> None:
    model, _, _ = fixture("scale_mae")
    size = model.trunk.preprocess.input_size[0]
    content = encode(photos["coffee"].resize((2 * size, 2 * size)), "PNG")

    def embed(**options: Any) -> np.ndarray:
        answer = server.client.post(
            "/embed", files={"image": content}, params={"model": "scale_mae", **options}
        )
        assert answer.status_code == 200, answer.text[:300]
        return np.array(answer.json()["results"][0]["embedding"])

    pixels = model.trunk.prepare(Image.open(io.BytesIO(content)))[None]
    for gsd in (0.3, 2.5):
        # the input has half the resolution, so that each of its pixels covers twice as much
        normalised = Normalize(model.trunk.preprocess)(pixels)
        named = model.run(normalised, input_res=torch.tensor([2 * gsd]))
        reference = torch.nn.functional.normalize(named["embedding"], dim=-1)[0]
        np.testing.assert_allclose(embed(gsd=gsd), reference, atol=1e-5)
    np.testing.assert_allclose(embed(), embed(gsd=0.5), atol=1e-5)
    for params in ("model=dino&gsd=1", "model=scale_mae&gsd=0", "model=scale_mae&gsd=inf"):
        answer = server.client.post("/embed", files={"image": content}, params=params)
        assert answer.status_code == 422, answer.text[:300]
        assert "gsd" in answer.text


# -- clips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPS)
def test_clips_are_classified(server: Running, name: str, clip: bytes) -> None:
    model, _, _ = fixture(name)
    [reference] = model.predict([clip])
    assert model.predict([Video(clip)]) == [reference]
    by_part = server.client.post("/classify", files={"video": clip}, params={"model": name})
    raw = server.client.post(
        "/classify", content=clip, params={"model": name}, headers={"Content-Type": "video/mp4"}
    )
    text = base64.b64encode(clip).decode()
    json_body = {"videos": [{"base64": text}], "model": name}
    for answer in (by_part, raw, server.client.post("/classify", json=json_body)):
        assert answer.status_code == 200, answer.text[:300]
        for found, wanted in zip(
            answer.json()["results"][0]["predictions"], reference["predictions"], strict=True
        ):
            assert found["index"] == wanted["index"]
            assert found["score"] == pytest.approx(wanted["score"], abs=1e-5)


@pytest.mark.parametrize(("form", "codec"), [("webm", "libvpx-vp9"), ("gif", "gif")])
def test_clips_come_in_other_containers_too(
    server: Running, form: str, codec: str, photos: dict[str, Image.Image]
) -> None:
    content = clip_of([photos["rocket"], photos["coffee"]], form, codec)
    answer = server.client.post(
        "/classify", files={"video": content}, params={"model": "mvit_video"}
    )
    assert answer.status_code == 200, answer.text[:300]


def test_bad_clips_are_refused_clearly(
    server: Running, clip: bytes, jpegs: dict[str, bytes]
) -> None:
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    for content in (b"", b"nonsense", clip[:300], clip[: len(clip) // 2], playlist,
                    jpegs["coffee"], b"GIF89a" + bytes(50)):  # fmt: skip
        answer = server.client.post(
            "/classify", files={"video": content}, params={"model": "mvit_video"}
        )
        assert answer.status_code == 422, answer.text[:300]
        assert "video" in answer.json()["detail"]
    files = {"image": jpegs["coffee"]}
    answer = server.client.post("/classify", files=files, params={"model": "mvit_video"})
    assert "takes videos, not images" in answer.json()["detail"]
    answer = server.client.post("/embed", files={"video": clip}, params={"model": "dino"})
    assert "takes images, not videos" in answer.json()["detail"]
    good_and_bad = [("video", ("a", clip)), ("video", ("b", b"bad"))]
    answer = server.client.post("/classify", files=good_and_bad, params={"model": "mvit_video"})
    good, bad = answer.json()["results"]
    assert "predictions" in good
    assert bad["error"]["status"] == 422


# -- generators ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_images_are_generated(server: Running, name: str) -> None:
    model, golden, _ = fixture(name)

    def ask(**body: Any) -> list[np.ndarray]:
        answer = server.client.post("/generate", json={"model": name, **body})
        assert answer.status_code == 200, answer.text[:300]
        return [_picture(result["image"]) for result in answer.json()["results"]]

    drawn = ask(n=3, seed=5)
    assert _equal_when_rounded(drawn[1], ask(seed=6)[0])
    assert not _equal_when_rounded(drawn[0], drawn[1])
    latent = golden["latent"]
    for found, reference in zip(ask(latent=latent.tolist()), golden["images"], strict=True):
        wanted = np.rint(reference.clamp(0, 1).permute(1, 2, 0).numpy() * 255)
        assert np.abs(found - wanted).max() <= 1
    assert len(ask()) == 1
    [by_library] = model.predict([5])
    assert model.predict([Seed(5)]) == [by_library]
    assert _equal_when_rounded(_picture(by_library["image"]), drawn[0])
    [by_library] = model.predict([Latent(latent[0].numpy())])
    np.testing.assert_array_equal(_picture(by_library["image"]), ask(latent=latent[0].tolist())[0])


def _equal_when_rounded(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether pictures are equal but for one level in up to a hundredth of their values: a pass of
    one image and one of several may differ in the last bit before they are rounded."""
    difference = np.abs(one - other)
    return bool(difference.max() <= 1 and (difference > 0).mean() <= 0.01)


def test_generating_takes_parameters_in_every_way(server: Running) -> None:
    requests: list[dict[str, Any]] = [
        {"params": {"model": "vitgan", "n": 2}},
        {"data": {"model": "vitgan", "n": "2"}},
        {"json": {"model": "vitgan", "n": 2}},
        {"json": {"n": 2}},
    ]
    for request in requests:
        answer = server.client.post("/generate", **request)
        assert answer.status_code == 200, answer.text[:300]
        assert len(answer.json()["results"]) == 2
    picture = server.client.post("/generate", headers={"Accept": "image/png"})
    assert Image.open(io.BytesIO(picture.content)).size == (32, 32)


@pytest.mark.parametrize(
    "body",
    [
        {"n": 0},
        {"n": 65},
        {"seed": -1},
        {"seed": 2**63},
        {"latent": [1.0]},
        {"latent": []},
        {"latent": ["x"]},
        {"latent": [0.0] * 48, "seed": 1},
        {"images": [{"base64": ""}]},
        {"model": "dino"},
    ],
)
def test_bad_parameters_of_generators_are_refused(server: Running, body: dict[str, Any]) -> None:
    content = json.dumps({"model": "vitgan", **body})
    answer = server.client.post(
        "/generate", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422, answer.text[:300]


def test_numbers_that_are_not_finite_are_no_json(server: Running) -> None:
    content = json.dumps({"model": "vitgan", "latent": [1e400] * 48})  # writes `Infinity`
    answer = server.client.post(
        "/generate", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400, answer.text[:300]


def test_a_wrong_latent_vector_fails_alone(server: Running) -> None:
    body = {"model": "vitgan", "latent": [[0.0] * 48, [0.0]]}
    good, bad = server.client.post("/generate", json=body).json()["results"]
    assert "image" in good
    assert "shape [48]" in bad["error"]["detail"]


# -- gRPC ------------------------------------------------------------------------------------


def test_the_same_over_grpc(server: Running, clip: bytes, jpegs: dict[str, bytes]) -> None:
    image = jpegs["chelsea"]
    with grpc.insecure_channel(server.grpc) as channel:
        stub = VisionStub(channel)
        looked = stub.Attention(pb.TaskRequest(images=[image], model="dino"))
        assert {t.name for t in looked.results[0].tensors} >= {"overlay", "heads", "grid"}
        drawn = stub.Reconstruct(pb.TaskRequest(images=[image], model="mae"))
        assert {t.name for t in drawn.results[0].tensors} >= {"drawn", "pasted", "mask"}
        made = stub.Generate(pb.TaskRequest(seeds=[1, 2], model="vitgan"))
        assert len(made.results) == 2
        classified = stub.Classify(pb.TaskRequest(videos=[clip], model="mvit_video"))
        assert len(classified.results[0].tensors[0].contents) == 5 * 8
        words = pb.Tensor(name="latent", datatype="BYTES", shape=[1], contents=b"\x01\0\0\0a")
        with pytest.raises(grpc.RpcError, match="latent"):
            stub.Generate(pb.TaskRequest(latents=[words], model="vitgan"))
        with pytest.raises(grpc.RpcError, match="not negative"):
            stub.Generate(pb.TaskRequest(seeds=[-1], model="vitgan"))


def test_the_same_over_the_open_inference_protocol(server: Running, clip: bytes) -> None:
    def infer(model: str, tensor: dict[str, Any]) -> dict[str, Any]:
        answer = server.client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]})
        assert answer.status_code == 200, answer.text[:300]
        return {output["name"]: output["data"] for output in answer.json()["outputs"]}

    seed = {"name": "seed", "datatype": "INT64", "shape": [2], "data": [1, 2]}
    assert len(infer("vitgan", seed)["png"]) == 2
    latent = {"name": "latent", "datatype": "FP32", "shape": [1, 48], "data": [0.1] * 48}
    assert len(infer("vitgan", latent)["png"]) == 1
    content = base64.b64encode(clip).decode()
    video = {"name": "video", "datatype": "BYTES", "shape": [1], "data": [content]}
    assert len(infer("mvit_video", video)["score"]) == 5
    described = server.client.get("/v2/models/vitgan").json()
    assert [item["name"] for item in described["inputs"]] == ["seed", "latent"]
