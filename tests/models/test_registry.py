import gc
import json
import pickle
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models import Model, Registry, load_checkpoint
from models.catalog import load_catalog
from models.description import State
from models.errors import CatalogError, CheckpointError, ModelNotReadyError, SourceError


@pytest.fixture
def registry(tiny_catalog: Path) -> Registry:
    return Registry.from_catalog(tiny_catalog, device="cpu")


def test_models_on_one_trunk_share_its_weights(registry: Registry) -> None:
    assert registry.get("tiny").trunk is registry.get("tiny-embed").trunk
    assert registry.get("tiny").trunk is not registry.get("conv").trunk


def test_states_are_told_truthfully(registry: Registry) -> None:
    assert registry.state("tiny") is State.UNLOADED
    with pytest.raises(ModelNotReadyError, match="unloaded"):
        registry.ready("tiny")
    registry.load("tiny")
    described = registry.describe("tiny")
    assert described.is_ready
    assert described.labels == 1000
    assert described.memory_bytes is not None
    assert described.memory_bytes > 100_000
    assert described.format == "timm"
    registry.unload("tiny")
    assert registry.describe("tiny").state == "unloaded"


def test_the_trunk_goes_with_its_last_model(registry: Registry) -> None:
    first = registry.get("tiny").trunk
    registry.get("tiny-embed")
    registry.unload("tiny")
    assert registry.get("tiny").trunk is first
    registry.unload("tiny")
    registry.unload("tiny-embed")
    assert registry.get("tiny").trunk is not first


def test_unloading_frees_the_weights(registry: Registry) -> None:
    weights = weakref.ref(registry.get("tiny").trunk.network)
    gc.disable()  # the registry itself must see to it
    try:
        registry.unload("tiny")
        assert weights() is None
    finally:
        gc.enable()


def test_a_model_that_cannot_load_says_why(tiny_catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(tiny_catalog.read_text())
    registry = Registry.from_catalog(path, device="cpu")
    with pytest.raises(CheckpointError, match="no such file"):
        registry.load("tiny")
    assert registry.state("tiny") is State.FAILED
    assert "no such file" in str(registry.describe("tiny").reason)
    for name in ("tiny.safetensors", "conv.safetensors"):
        (tmp_path / name).write_bytes((tiny_catalog.parent / name).read_bytes())
    registry.load("tiny")
    assert registry.state("tiny") is State.READY


def test_digests_follow_the_weights_and_nothing_else(registry: Registry) -> None:
    digest = registry.get("tiny").digest
    assert digest != registry.get("conv").digest
    registry.unload("tiny")
    assert registry.get("tiny").digest == digest


def test_a_trunk_whose_model_failed_is_not_kept(tiny_catalog: Path) -> None:
    def fail(model: Model) -> None:
        raise CheckpointError("the trunk does not run")

    registry = Registry.from_catalog(tiny_catalog, device="cpu", on_load=fail)
    with pytest.raises(CheckpointError):
        registry.load("tiny")
    assert registry.state("tiny") is State.FAILED
    assert registry.loaded_trunk("tiny") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), "missing: norm.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "left over: extra"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm.bias \(3,\) instead of"),
    ],
)
def test_loading_is_strict(
    tiny_catalog: Path, tmp_path: Path, change: object, message: str
) -> None:
    state = load_file(tiny_catalog.parent / "tiny.safetensors")
    assert callable(change)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "changed.safetensors", {"architecture": "test_vit"})


def test_load_checkpoint_gives_timms_numbers(tiny_catalog: Path) -> None:
    path = tiny_catalog.parent / "tiny.safetensors"
    model = load_checkpoint(path, {"architecture": "test_vit", "unheard_of": 3})
    network = timm.create_model("test_vit").eval()
    network.load_state_dict(load_file(path))
    pixels = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        expected = network(pixels)
        features = network.forward_features(pixels)
    outputs = model.run(pixel_values=pixels)
    assert torch.allclose(outputs["logits"], expected, atol=1e-5)
    assert torch.allclose(outputs["tokens"], features, atol=1e-5)


def test_training_containers_are_unwrapped(tiny_catalog: Path, tmp_path: Path) -> None:
    state = load_file(tiny_catalog.parent / "tiny.safetensors")
    wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "training.pth")
    model = load_checkpoint(tmp_path / "training.pth", {"architecture": "test_vit"})
    assert model.tasks == ("classify", "embed", "attention")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (str(Path("/tmp/vitrail-was-here")),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_from_a_file_is_ever_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint(path, {"architecture": "test_vit"})
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        load_checkpoint(path, {"architecture": "test_vit"})
    assert not Path("/tmp/vitrail-was-here").exists()


def test_archives_that_would_swell_are_not_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", weight=np.zeros(2**26, np.uint8))
    torch.save({"weight": torch.zeros(2**26, dtype=torch.uint8)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    for name in ("bomb.npz", "bomb.pth"):
        with pytest.raises(CheckpointError, match="nothing was unpacked"):
            load_checkpoint(tmp_path / name, {"architecture": "test_vit"})


def test_tensors_cannot_claim_more_than_the_file_holds(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(2**20, 2**20)
    for number, content in enumerate(({"weight": huge}, {"model": {"weight": huge}, "epoch": 1})):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="claims more numbers"):
            load_checkpoint(path, {"architecture": "test_vit"})


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".onnx", ".pth"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    for content in (b"", b"not a checkpoint at all", bytes(4096)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path, {"architecture": "test_vit"})


def test_an_unknown_layout_is_told_with_its_keys_and_the_remedy(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"layer\.weight.*--architecture"):
        load_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no architecture 'vit_gigantic'"):
        load_checkpoint(tmp_path / "a.safetensors", {"architecture": "vit_gigantic"})


@pytest.fixture(params=[7])
def hub_cache(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of a hub that has one repository, `stub/tiny`; nothing else can be reached."""
    classes = request.param
    snapshot = tmp_path / "models--stub--tiny" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--stub--tiny" / "refs").mkdir()
    (tmp_path / "models--stub--tiny" / "refs" / "main").write_text("0")
    network = timm.create_model("test_vit", num_classes=classes)
    save_file(network.state_dict(), snapshot / "model.safetensors")
    pretrained = {"input_size": [3, 160, 160], "crop_pct": 0.5, "num_classes": classes}
    config = {"architecture": "test_vit", "num_classes": classes, "pretrained_cfg": pretrained}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


HUB = """
[trunks.stub]
source = "hf-hub:stub/{name}"
[models.stub]
trunk = "stub"
task = "classify"
"""


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_loads_by_timms_own_rules(tmp_path: Path) -> None:
    path = tmp_path / "hub.toml"
    path.write_text(HUB.format(name="tiny"))
    model = Registry(load_catalog(path), device="cpu").get("stub")
    assert model.trunk.num_classes == 7
    assert model.trunk.preprocess.crop_pct == 0.5
    answer = model.predict([Image.new("RGB", (50, 50), "red")], top_k=7)
    assert len(answer[0]["predictions"]) == 7


@pytest.mark.parametrize("hub_cache", [1000], indirect=True)
@pytest.mark.usefixtures("hub_cache")
def test_a_hub_classifier_of_imagenet_has_its_names(tmp_path: Path) -> None:
    path = tmp_path / "hub.toml"
    path.write_text(HUB.format(name="tiny"))
    best = (
        Registry(load_catalog(path), device="cpu").get("stub").predict([Image.new("RGB", (9, 9))])
    )
    predictions = {p["index"]: p["label"] for p in best[0]["predictions"]}
    info = timm.data.ImageNetInfo("imagenet-1k")
    assert predictions == {index: info.index_to_description(index) for index in predictions}


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    path = tmp_path / "hub.toml"
    path.write_text(HUB.format(name="absent"))
    with pytest.raises(SourceError, match="hf-hub:stub/absent"):
        Registry(load_catalog(path), device="cpu").get("stub")


def test_unknown_devices_and_precisions_are_refused(tiny_catalog: Path) -> None:
    with pytest.raises(CatalogError, match="unknown device"):
        Registry.from_catalog(tiny_catalog, device="quantum")
    with pytest.raises(CatalogError, match="float7"):
        Registry.from_catalog(tiny_catalog, device="cpu", precision="float7")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_other_precisions_stay_close(tiny_catalog: Path, precision: str) -> None:
    image = Image.effect_noise((200, 200), 80).convert("RGB")
    exact = Registry.from_catalog(tiny_catalog, device="cpu").get("tiny-embed")
    close = Registry.from_catalog(tiny_catalog, device="cpu", precision=precision).get("tiny-embed")
    vectors = [torch.tensor(m.predict([image])[0]["embedding"]) for m in (exact, close)]
    assert torch.dot(*vectors) > 0.99
