"""LoRA adapters: peft's files beside a trunk, against peft's own merged weights."""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file, save

from models import Registry, load_checkpoint
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from models.checkpoints.peft import read_adapter, read_archive
from models.errors import CheckpointError
from models.heads.lora import create_lora, lora_state
from models.inference import HeadCall, run_pass
from models.model import Model
from models.trunks.adapting import create_adapter
from service.metrics import Metrics
from service.stubs import vision_pb2 as pb
from service.stubs.vision_pb2_grpc import VisionStub
from service.worker.device import CpuDevice
from service.worker.runner import Item, Runner, Threads
from tests.conftest import Running, encode, running
from tests.models.test_vqt import KINDS, linear_head, random_head, small_trunk

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Files = Mapping[str, bytes]


def network_of(catalog: Path) -> Any:
    network = timm.create_model("test_vit").eval()
    network.load_state_dict(load_file(catalog.parent / "tiny.safetensors"))
    return network


def make_adapter(network: Any, folder: Path, seed: int, **options: Any) -> tuple[Files, Any]:
    """What peft saves for an adapter with random weights, and the network with it merged in."""
    torch.manual_seed(seed)
    options = {
        "target_modules": ["qkv", "attn.proj", "fc1", "fc2"],
        "r": 4,
        "lora_alpha": 8,
    } | options
    adapted: Any = get_peft_model(network, LoraConfig(**options, init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    return files, adapted.merge_and_unload().eval()


@pytest.fixture(scope="module")
def adapters(
    tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Files, Any]]:
    """Adapters of several ranks and targets by name, each with its merged network."""
    kinds: dict[str, dict[str, Any]] = {
        "all": {},
        "qkv": {"target_modules": ["qkv"], "r": 2, "lora_alpha": 4},
        "rs": {"r": 9, "use_rslora": True},
        "patterns": {
            "rank_pattern": {"blocks.0.attn.qkv": 3, "fc1": 6},
            "alpha_pattern": {"fc2": 32},
        },
        "head": {"target_modules": ["qkv"], "modules_to_save": ["head"]},
    }
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(network_of(tiny_catalog), folder / name, seed, **options)
        for seed, (name, options) in enumerate(kinds.items())
    }


@pytest.fixture(scope="module", params=["embedded", "apart"])
def server(
    request: pytest.FixtureRequest, tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = str(tmp_path_factory.mktemp("heads"))
    with running(tiny_catalog, apart=request.param == "apart", heads_folder=folder) as server:
        server.wait_ready()
        yield server


def upload(server: Running, name: str, files: Files, **fields: str) -> Any:
    parts = [("file", (filename, content)) for filename, content in files.items()]
    data = {"name": name, "trunk": "tiny", "kind": "lora", **fields}
    return server.client.post("/heads", data=data, files=parts)


def logits_of(network: Any, photo: Image.Image) -> np.ndarray:
    config = timm.data.resolve_model_data_config(network)
    with torch.inference_mode():
        logits: np.ndarray = network(timm.data.create_transform(**config)(photo)[None])[0].numpy()
    return logits


def scores(server: Running, model: str, image: bytes, classes: int) -> np.ndarray:
    """The probabilities in the order of the classes."""
    url = f"/classify?model={model}&top_k={classes}"
    response = server.client.post(url, content=image, headers={"Content-Type": "image/png"})
    assert response.status_code == 200, response.text
    by_class = np.empty(classes)
    for prediction in response.json()["results"][0]["predictions"]:
        by_class[prediction["index"]] = prediction["score"]
    return by_class


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max())
    return np.asarray(exponents / exponents.sum())


def close(actual: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max())


def test_adapters_are_models_that_equal_the_merged_weights(
    server: Running, adapters: dict[str, tuple[Files, Any]], photos: dict[str, Image.Image]
) -> None:
    image = encode(photos["chelsea"], "PNG")
    before = server.client.post(
        "/embed?model=tiny", content=image, headers={"Content-Type": "image/png"}
    ).json()["results"]
    for name, (files, merged) in adapters.items():
        created = upload(server, name, files)
        assert created.status_code == 201, created.text
        assert created.json()["trunk"] == "tiny"
        assert created.json()["head"]["kind"] == "lora"
        expected = softmax(logits_of(merged, photos["chelsea"]))
        assert close(scores(server, name, image, len(expected)), expected), name
    names = [head["name"] for head in server.client.get("/heads").json()["heads"]]
    assert set(names) >= set(adapters)
    # several adapters and the trunk itself on one image, in one request
    answer = server.client.post(
        "/predict", data={"models": [*adapters, "tiny"]}, files={"image": ("a.png", image)}
    ).json()["results"][0]["outputs"]
    best = {name: output["predictions"][0] for name, output in answer.items()}
    for name, (_, merged) in adapters.items():
        expected = softmax(logits_of(merged, photos["chelsea"]))
        assert best[name]["index"] == int(expected.argmax())
        assert best[name]["score"] == pytest.approx(float(expected.max()), rel=1e-4)
    after = server.client.post(
        "/embed?model=tiny", content=image, headers={"Content-Type": "image/png"}
    ).json()["results"]
    assert after == before  # the trunk's own answers are as they were, to the bit
    for name in adapters:
        assert server.client.delete(f"/heads/{name}").status_code == 204
        assert server.client.get(f"/heads/{name}").status_code == 404


def test_embeddings_and_tokens_of_an_adapter(
    server: Running, adapters: dict[str, tuple[Files, Any]], photos: dict[str, Image.Image]
) -> None:
    files, merged = adapters["all"]
    assert upload(server, "emb", files).status_code == 201
    image = {"image": ("a.png", encode(photos["coffee"], "PNG"))}
    options = {"model": "emb", "normalize": "false"}
    config = timm.data.resolve_model_data_config(merged)
    pixels = timm.data.create_transform(**config)(photos["coffee"])[None]
    with torch.inference_mode():
        features = merged.forward_features(pixels)
        pooled = merged.forward_head(features, pre_logits=True)[0].numpy()
        layer = merged.forward_intermediates(pixels, indices=[1], intermediates_only=True)[0]
    embedded = server.client.post("/embed", data=options, files=image).json()["results"][0]
    assert close(np.array(embedded["embedding"]), pooled)
    data: dict[str, Any] = {**options, "output": "tokens"}
    tokens = server.client.post("/embed", data=data, files=image).json()["results"][0]["tokens"]
    assert close(np.array(tokens), features[0, merged.num_prefix_tokens :].numpy())
    one = server.client.post("/embed", data={**data, "layers": "1"}, files=image).json()
    assert close(np.array(one["results"][0]["tokens"]["1"]), layer[0].flatten(1).T.numpy())
    assert server.client.delete("/heads/emb").status_code == 204


def test_an_archive_and_grpc_bring_the_same(
    server: Running, adapters: dict[str, tuple[Files, Any]], photos: dict[str, Image.Image]
) -> None:
    files, _ = adapters["qkv"]
    archive = zipped({f"my-adapter/{name}": content for name, content in files.items()})
    query = {"name": "zipped", "trunk": "tiny", "kind": "lora"}
    headers = {"Content-Type": "application/zip"}
    raw = server.client.post("/heads", params=query, content=archive, headers=headers)
    assert raw.status_code == 201, raw.text
    named = server.client.post(
        "/heads",
        data={**query, "name": "named"},
        files=[(name, (name, content)) for name, content in files.items()],
    )
    assert named.status_code == 201, named.text
    with grpc.insecure_channel(server.grpc) as channel:
        request = pb.PutHeadRequest(name="rpc", content=archive, trunk="tiny", kind="lora")
        VisionStub(channel).PutHead(request)
    digests = {
        json.dumps(server.client.get(f"/heads/{name}").json()["model_digest"])
        for name in ("zipped", "named", "rpc")
    }
    assert len(digests) == 1
    again = upload(server, "rpc", files)
    assert again.status_code == 409
    assert upload(server, "rpc", files, replace="true").status_code == 201


def test_adapters_survive_a_restart(
    tiny_catalog: Path, tmp_path: Path, adapters: dict[str, tuple[Files, Any]],
    photos: dict[str, Image.Image],
) -> None:  # fmt: skip
    image = encode(photos["rocket"], "PNG")
    files, merged = adapters["head"]
    expected = softmax(logits_of(merged, photos["rocket"]))
    folder = str(tmp_path / "heads")
    for restarted in (False, True):
        with running(tiny_catalog, heads_folder=folder) as server:
            server.wait_ready()
            if not restarted:
                assert upload(server, "kept", files).status_code == 201
            assert close(scores(server, "kept", image, len(expected)), expected)


def test_rows_of_many_adapters_share_a_batch(
    tiny_catalog: Path, adapters: dict[str, tuple[Files, Any]], photos: dict[str, Image.Image]
) -> None:
    registry = Registry.from_catalog(tiny_catalog, device="cpu")
    base = registry.get("tiny")
    models = [adapted(base, *adapters[name]) for name in adapters]
    images = list(photos.values())
    prepared = [base.trunk.prepare(image) for image in images]
    rows = [(model, number) for number in range(len(images)) for model in [base, *models]]
    calls = [[HeadCall(model.heads["classify"])] for model, _ in rows]
    mixed = run_pass(base.trunk, base.trunk.collate([prepared[n] for _, n in rows]), calls)
    networks = [network_of(tiny_catalog), *(merged for _, merged in adapters.values())]
    for position, ((_, number), [row]) in enumerate(zip(rows, mixed, strict=True)):
        assert not isinstance(row, Exception)
        expected = logits_of(networks[position % len(networks)], images[number])
        assert close(row["logits"], expected), position


def test_an_adapter_leaves_query_tokens_of_other_rows_alone() -> None:
    trunk = small_trunk(*KINDS["class token"])
    layer = trunk.adapters.layers["blocks.0.mlp.fc1"]
    matrices = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    adapted = linear_head(trunk, 1)
    adapted.adapt(create_adapter(trunk, {"blocks.0.mlp.fc1": matrices}))
    # as many query tokens as rows, so that no layer can tell them apart
    calls = [[HeadCall(random_head(trunk, 2, queries=2))], [HeadCall(adapted)]]
    runner = Runner("x", trunk, CpuDevice(), Threads(1, 1), Metrics(CollectorRegistry()))
    items = [Item.awaited("x", trunk.blank(), own)[0] for own in calls]
    together = runner._run(items)
    for item, rows in zip(items, together, strict=True):
        assert not isinstance(rows[0], Exception)
        [[alone]] = runner._run([item])
        assert not isinstance(alone, Exception)
        np.testing.assert_allclose(rows[0]["logits"], alone["logits"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="passes of their own"):
        run_pass(trunk, trunk.collate([trunk.blank()] * len(items)), calls)


def test_the_windows_of_a_swin_keep_their_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, small = "swin_tiny_patch4_window7_224", {
        "embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 3,
    }  # fmt: skip
    network = timm.create_model(name, **small).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint = Checkpoint(
        format="timm", architecture=name, arguments=small, state_dict=network.state_dict()
    )
    save_checkpoint(checkpoint, tmp_path / "swin.safetensors")
    base = load_checkpoint(tmp_path / "swin.safetensors")
    targets = ["qkv", "attn.proj", "fc1", "reduction"]
    files, merged = make_adapter(network, tmp_path / "lora", 1, target_modules=targets)
    model = adapted(base, files, merged)
    prepared = base.trunk.samples(3)
    calls = [[HeadCall(each.heads["classify"])] for each in (base, model, base)]
    rows = run_pass(base.trunk, base.trunk.collate(prepared), calls)
    plain = run_pass(base.trunk, base.trunk.collate(prepared), [calls[0]] * 3)
    alone = run_pass(base.trunk, base.trunk.collate(prepared[1:2]), [calls[1]])
    with torch.inference_mode():
        spec = base.trunk.preprocess
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
        expected = merged((prepared[1][None] / 255 - mean) / std)[0].numpy()
    assert close(rows[1][0]["logits"], expected)  # type: ignore[index]
    assert close(alone[0][0]["logits"], expected)  # type: ignore[index]
    for row in (0, 2):
        assert close(rows[row][0]["logits"], plain[row][0]["logits"])  # type: ignore[index]


def test_another_engine_leaves_adapters_to_eager(
    tiny_catalog: Path, adapters: dict[str, tuple[Files, Any]], photos: dict[str, Image.Image]
) -> None:
    image = encode(photos["coffee"], "PNG")
    files, merged = adapters["all"]
    expected = softmax(logits_of(merged, photos["coffee"]))
    registry = Registry.from_catalog(tiny_catalog, device="cpu", engine="openvino")
    model = adapted(registry.get("tiny"), files, merged)
    assert model.trunk.splits_adapters
    [answer] = model.predict([image], top_k=len(expected))
    for prediction in answer["predictions"]:
        assert prediction["score"] == pytest.approx(
            expected[prediction["index"]], abs=1e-5 * float(expected.max())
        )


def test_transformers_names_are_understood(
    tiny_catalog: Path, adapters: dict[str, tuple[Files, Any]], photos: dict[str, Image.Image]
) -> None:
    base = Registry.from_catalog(tiny_catalog, device="cpu").get("tiny")
    network = network_of(tiny_catalog)
    torch.manual_seed(3)
    width, classes = network.embed_dim, 5
    classifier = "base_model.model.classifier"
    tensors = {
        f"{classifier}.weight": torch.randn(classes, width),
        f"{classifier}.bias": torch.randn(classes),
    }
    for number, block in enumerate(network.blocks):
        for part, layer in ((0, "attention.q_proj"), (2, "attention.v_proj"), (None, "mlp.fc1")):
            linear = block.mlp.fc1 if part is None else block.attn.qkv
            down, up = torch.randn(4, width) / 10, torch.randn(linear.out_features, 4) / 10
            rows = slice(None) if part is None else slice(part * width, (part + 1) * width)
            name = f"base_model.model.vit.layers.{number}.{layer}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up[rows].clone()}
            with torch.no_grad():
                linear.weight[rows] += 2 * up[rows] @ down
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "modules_to_save": ["classifier"]}
    files = {CONFIG: json.dumps(settings).encode(), WEIGHTS: save(tensors)}
    model = adapted(base, files, None)
    [row] = run_pass(
        base.trunk,
        base.trunk.collate([base.trunk.prepare(photos["coffee"])]),
        [[HeadCall(model.heads["classify"])]],
    )
    network.head = torch.nn.Linear(width, classes)
    network.head.weight.data = tensors[f"{classifier}.weight"]
    network.head.bias.data = tensors[f"{classifier}.bias"]
    assert close(row[0]["logits"], logits_of(network, photos["coffee"]))  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"an_option_of_tomorrow": "on"}, "an_option_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"r": 0}, "r is not a number above 0"),
        ({"r": 3}, "not of rank 3"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"rank_pattern": {".*": 4}}, "pattern"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
)
def test_options_that_are_not_supported_are_refused_by_name(
    adapters: dict[str, tuple[Files, Any]], settings: dict[str, Any], message: str
) -> None:
    files, _ = adapters["all"]
    config = {**json.loads(files[CONFIG]), **settings}
    with pytest.raises(CheckpointError, match=message):
        read_adapter(json.dumps(config).encode(), files[WEIGHTS])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blocks.9.attn.qkv": (4, 64, 192)}, "no linear layer"),
        ({"blocks.0.attn.qkv": (4, 65, 192)}, "takes 64"),
        ({"head": (4, 64, 1000)}, "does not call head"),
        ({"blocks.0.attn.qkv": (600, 64, 192)}, "the limit is 512"),
        ({}, "no matrices"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(
    server: Running, tensors: dict[str, tuple[int, int, int]], message: str
) -> None:
    named = {}
    rank = 4
    for name, (rank, inputs, outputs) in tensors.items():
        named[f"base_model.model.{name}.lora_A.weight"] = torch.ones(rank, inputs)
        named[f"base_model.model.{name}.lora_B.weight"] = torch.ones(outputs, rank)
    config = json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4}).encode()
    response = upload(server, "wrong", {CONFIG: config, WEIGHTS: save(named)})
    assert response.status_code == 422, response.text
    assert message in response.json()["detail"]
    assert server.client.get("/heads/wrong").status_code == 404


def test_what_is_no_adapter_is_refused(
    server: Running, adapters: dict[str, tuple[Files, Any]]
) -> None:
    files, _ = adapters["qkv"]
    cases: list[tuple[Files, dict[str, str], str]] = [
        ({CONFIG: files[CONFIG]}, {}, "is missing"),
        (files, {"kind": "linear"}, "kind=lora"),
        (files, {"trunk": "nowhere"}, "the catalog has"),
        ({CONFIG: b"[" * 100_000, WEIGHTS: files[WEIGHTS]}, {}, "not JSON"),
        ({CONFIG: files[CONFIG], WEIGHTS: b"\xff" * 100}, {}, "safetensors"),
        ({CONFIG: files[CONFIG], WEIGHTS: header(shape=[2**40, 0])}, {}, "shape"),
        ({CONFIG: files[CONFIG], WEIGHTS: header(dtype="F64")}, {}, "F64"),
        ({"adapter.zip": b"PK nothing"}, {}, "zip"),
        ({"adapter.zip": zipped({CONFIG: files[CONFIG]})}, {}, "no adapter_model"),
    ]
    for parts, fields, message in cases:
        response = upload(server, "wrong", parts, **fields)
        assert response.status_code == 422, (message, response.text)
        assert message in response.json()["detail"], response.text


def test_a_bomb_is_refused_by_its_size() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CONFIG, b" " * 10_000_000)
    with pytest.raises(CheckpointError, match="the limit is"):
        read_archive(buffer.getvalue())


def adapted(base: Model, files: Files, _: Any) -> Model:
    """A model of an adapter on a model's trunk, in the library."""
    state = lora_state(read_adapter(files[CONFIG], files[WEIGHTS]), base.trunk)
    labels = [str(number) for number in range(state_classes(state, base))]
    head, adapter = create_lora(base.trunk, labels, state)
    return Model("adapted", base.trunk, head, adapter=adapter)


def state_classes(state: Any, base: Model) -> int:
    weight = state.tensors.get("classifier.0.weight")
    return base.trunk.num_classes if weight is None else len(weight)


def zipped(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def header(dtype: str = "F32", shape: Any = (1,)) -> bytes:
    """A safetensors file that declares one tensor."""
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]}
    text = json.dumps({"base_model.model.x.lora_A.weight": entry}).encode()
    return len(text).to_bytes(8, "little") + text
