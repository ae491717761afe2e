"""Published layouts against the outputs of the authors' own code, from `shared/goldens` and
`shared/goldens2`."""

import argparse
import json
import shutil
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from models import Registry, load_checkpoint
from models.checkpoints.checkpoint import save_checkpoint
from models.checkpoints.containers import open_container
from models.checkpoints.formats import detect_format
from models.checkpoints.loading import read_checkpoint
from models.checkpoints.store import Store
from models.errors import CheckpointError
from models.inference import HeadCall, run_rows
from models.inputs.tokenizers import CuttingTokenizer, OpenAITokenizer, bound_words
from models.model import Model
from models.networks.vitgan import Modulated

GOLDENS = Path(__file__).parents[3] / "shared/goldens"
GOLDENS2 = GOLDENS.with_name("goldens2")
INPUTS = (
    "pixel_values", "token_ids", "noise", "input_res", "latent", "noise_0", "noise_1", "noise_2",
    "noise_3", "target_pixel_values",
)  # fmt: skip
# These take no photos, or look at them window by window.
OTHER_INPUTS = ("_video", "vitgan", "seg_", "segment", "_ade20k", "_nyu")
# A name's ending says which input it belongs to, or which of a file's sets of weights.
ALTERNATIVES = ("", "_hires", "_alt", "_hr", "_2", "_large")
SETS = ("_student", "_momentum", "_ema", "_online")
# About the tokenizer of the full vocabulary, which the fixtures' small models do not have; and
# Scale-MAE's training loss is not computed.
OTHERS = ("tokenizer_token_ids", "logits_model_ema")
EXCEPT = dict.fromkeys(("scale_mae", "scale_mae_progressive"), ("loss",))

FIRST_ROUND = (
    "a_clip", "attmask", "attmask_backbone", "beit", "beit_abspos", "beit_finetuned", "clip",
    "clip_dense", "clip_jit", "convnext_v2", "convnext_v2_fcmae", "dhvt", "dhvt_imagenet", "dino",
    "dino_backbone", "dino_linear", "esvit", "ft_clip", "ggem", "ibot", "ibot_backbone",
    "ibot_swin", "irt", "mae", "mae_finetuned", "moco_v3", "moco_v3_conv", "moco_v3_linear",
    "ms_clip", "ms_clip_2h", "mvit", "mvit_in1k", "mvit_v1", "mvit_v1_video", "mvit_video",
    "patchconvnet", "patchconvnet_multiclass", "peco", "peco_finetuned", "pit", "pit_distilled",
    "pyramid_tnt", "scale_mae", "scale_mae_finetuned", "sdmae", "sdmae_finetuned",
    "semantic_segmentation", "semantic_segmentation_convnext", "sit", "sit_classifier",
    "small_scale_vits", "small_scale_vits_cait", "small_scale_vits_finetuned",
    "small_scale_vits_swin", "supmae", "supmae_finetuned", "tinymim", "tinymim_finetuned",
    "tnt", "vit_augreg", "vit_augreg_gap", "vit_augreg_prelogits", "vitgan", "vitgan_inr",
    "vqt", "vqt_mae", "vqt_wsum",
)  # fmt: skip
# Those of the second round that load.
SECOND_ROUND = tuple(Path(__file__).with_name("second_round.txt").read_text().split())
FIXTURES = FIRST_ROUND + SECOND_ROUND


def folder_of(name: str) -> Path:
    """A fixture's folder; skips the test where it is missing."""
    for folder in (GOLDENS / name, GOLDENS2 / name):
        if folder.is_dir():
            return folder
    pytest.skip(f"the fixture {name} is not here (shared/goldens, shared/goldens2)")


def fixture(
    name: str, file: str = "checkpoint.*", **arguments: Any
) -> tuple[Model, dict[str, torch.Tensor], dict[str, Any]]:
    folder = folder_of(name)
    meta = json.loads((folder / "meta.json").read_text())
    path = next(iter(sorted(folder.glob(file))))
    model = load_checkpoint(path, arguments=meta["hyperparameters"], **arguments)
    return model, load_file(folder / "golden.safetensors"), meta


@pytest.mark.parametrize("name", FIXTURES)
def test_outputs_are_the_references(name: str) -> None:
    model, golden, meta = fixture(name)
    skipped = EXCEPT.get(name, ())
    for ending in ALTERNATIVES:
        if any(f"{key}{ending}" in golden for key in INPUTS if key != "noise"):
            check_outputs(model, golden, meta, ending, skipped)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        (name, "student")
        for name in (
            "attmask",
            "dino",
            "esvit",
            "ibot",
            "sit",
            "small_scale_vits",
        )
    ]
    + [("a_clip", "online"), ("ft_clip", "ema"), ("moco_v3", "momentum")],
)
def test_other_weights_of_the_file_can_be_chosen(name: str, weights: str) -> None:
    model, golden, _ = fixture(name, weights=weights)
    outputs = model.run(**{key: golden[key] for key in INPUTS if key in golden})
    own = [key for key in golden if key.endswith(f"_{weights}")]
    assert own
    for key in own:
        found = outputs[key.removesuffix(f"_{weights}")]
        assert torch.allclose(found, golden[key], atol=1e-5, rtol=0), key
    with pytest.raises(CheckpointError, match=r"no weights 'other'|not a whole ViT"):
        fixture(name, weights="other")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("convnext_v2", "checkpoint_published.pt"),
        ("ft_clip_deepspeed", "mp_rank_00_model_states.pt"),
        ("convnext_v2_fcmae", "checkpoint_pt_only.pt"),
        ("mae", "checkpoint_encoder_only.pth"),
        ("sdmae", "checkpoint_encoder.pth"),
        ("vit_augreg", "checkpoint_linen.npz"),
    ],
)
def test_further_published_forms_give_the_same(name: str, file: str) -> None:
    model, golden, _ = fixture(name, file)
    found = model.run(golden["pixel_values"])
    for key in ("embedding", "tokens", "logits"):
        if key in golden:
            assert torch.allclose(found[key], golden[key], atol=1e-5, rtol=0), key


@pytest.mark.parametrize(("name", "part"), [("beit", "model"), ("sit", "teacher")])
def test_weights_in_half_precision_give_the_same_outputs(
    name: str, part: str, tmp_path: Path
) -> None:
    folder = folder_of(name)
    saved = torch.load(folder / "checkpoint.pth", weights_only=False)
    saved[part] = {key: value.half() for key, value in saved[part].items()}
    torch.save(saved, tmp_path / "half.pth")
    hyperparameters = json.loads((folder / "meta.json").read_text())["hyperparameters"]
    model = load_checkpoint(tmp_path / "half.pth", arguments=hyperparameters)
    whole, golden, _ = fixture(name)
    inputs = {key: golden[key] for key in ("pixel_values", "mask") if key in golden}
    found, expected = model.run(**inputs), whole.run(**inputs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=0.02, rtol=0), key


def test_a_scale_mae_of_absolute_scale_knows_no_other() -> None:
    model, golden, _ = fixture("scale_mae", absolute_scale=True)
    given = {key: golden[key] for key in ("pixel_values", "noise")}
    plain = model.run(**given, input_res=torch.ones(2))
    scaled = model.run(**given, input_res=torch.full((2,), 3.0))
    for key in ("embedding", "tokens", "reconstruction"):
        assert torch.equal(plain[key], scaled[key]), key
    head = model.heads["embed"]
    [row, _] = run_rows(model.trunk, golden["pixel_values"], HeadCall.of(head, {"gsd": 3.0}))
    assert np.array_equal(row["embedding"], plain["embedding"][0].numpy())


def test_a_clip_of_others_may_have_exact_gelu() -> None:
    model, golden, _ = fixture("clip_dense", activation="gelu")
    kinds = [type(module).__name__ for module in model.trunk.network.modules()]
    assert "GELU" in kinds
    assert "QuickGELU" not in kinds
    found = model.run(golden["pixel_values"])["feature_map"]
    assert not torch.allclose(found, golden["feature_map"], atol=1e-4)


def test_only_ms_clip_s_is_read_as_such() -> None:
    folder = GOLDENS / "ms_clip"
    if not folder.is_dir():
        pytest.skip("the fixture ms_clip is not here (shared/goldens)")
    custom = json.loads((folder / "meta.json").read_text())["hyperparameters"]["CUSTOM"]
    for change in ({"PRALLEL_T2B_USECLS": False}, {"PRALLEL_T2B_PADDINGS": [1, 0, 0, 0, 0]},
                   {"PARALLEL_STRIDES": [1, 2, 2, 2, 2]}, {"PARALLEL_LATERAL_LAYER": [1, 2]},
                   {"PARALLEL_LATERAL_LAYER": [1, 2, 3, 3, 4]}):  # fmt: skip
        message = r"MS-CLIP-S as published|not a patch|5 parts to set|in their order"
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder / "checkpoint.pth", {"CUSTOM": {**custom, **change}})


@pytest.mark.parametrize("side", [3, 4, 5])
def test_a_generator_doubles_whatever_its_blur(side: int) -> None:
    layer = Modulated(6, 4, 3, 8, up=True, demodulate=True, blur=side)
    assert layer(torch.randn(2, 6, 8, 8), torch.randn(2, 8)).shape == (2, 4, 16, 16)


def test_exact_gelu_can_be_asked_for() -> None:
    model, golden, _ = fixture("vit_augreg", act="gelu")
    logits = model.run(golden["pixel_values"])["logits"]
    assert torch.allclose(logits, golden["logits_gelu_erf"], atol=1e-5, rtol=0)


def test_every_fixture_is_of_one_format() -> None:
    """Detection is from the keys: no file is taken for several formats, or for another's."""
    if not GOLDENS.is_dir():
        pytest.skip("the fixtures are not here (shared/goldens)")
    formats = {}
    for name in FIRST_ROUND:
        for path in sorted((GOLDENS / name).glob("checkpoint*")):
            container = open_container(path)
            formats[f"{name}/{path.name}"] = detect_format(container, {})[0].NAME
    same = {"attmask": "ibot", "peco": "beit", "supmae_finetuned": "mae-finetuned",
            "sdmae_finetuned": "mae-finetuned", "tinymim_finetuned": "mae-finetuned",
            "mae_finetuned": "mae-finetuned", "attmask_backbone": "ibot-backbone"}  # fmt: skip
    for name, found in formats.items():
        if (wanted := same.get(name.partition("/")[0])) is not None:
            assert found == wanted, name
    assert formats["dino/checkpoint.pth"] == "dino"
    assert formats["dino_backbone/checkpoint.pth"] == "dino-backbone"
    assert formats["sdmae/checkpoint.pth"] == "sdmae"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vqt", {}),
        ("vqt", {"backbone": "backbone.npz"}),
        ("vqt_wsum", {"backbone": "backbone.npz"}),
        ("vqt_mae", {}),
    ],
)
def test_a_backbone_may_lie_beside_what_was_trained(name: str, arguments: dict[str, Any]) -> None:
    check_outputs(*fixture(name, "tuned_only.pth", **arguments))


def check_outputs(
    model: Model,
    golden: dict[str, torch.Tensor],
    meta: dict[str, Any],
    ending: str = "",
    skipped: tuple[str, ...] = (),
) -> None:
    """All outputs of the input with that ending, which is given under the plain name."""
    masked = "mask" in golden and "noise" not in golden  # otherwise it is an output
    inputs = (*INPUTS, "mask") if masked else INPUTS
    given = {key: golden[f"{key}{ending}"] for key in inputs if f"{key}{ending}" in golden}
    if "token_ids" in golden:
        given.setdefault("token_ids", golden["token_ids"])
    if "pixel_values" in golden:  # where only the rest differs
        given.setdefault("pixel_values", golden["pixel_values"])
    if "input_res_2" in golden:  # Scale-MAE's decoders draw for these
        given["input_res_2"] = golden["input_res_2"]
    outputs = model.run(**given)
    ours = {f"{key}{ending}" for key in inputs}
    others = tuple(e for e in (*ALTERNATIVES, *SETS) if e and e != ending)
    wanted = {
        key for key in golden.keys() - ours
        if key.endswith(ending) and not key.endswith((*others, *OTHERS)) and key not in skipped
        and not (ending == "" and key.startswith(inputs))
    }  # fmt: skip
    for key in wanted:
        found, reference = outputs[key.removesuffix(ending)], golden[key].float()
        assert found.shape == reference.shape, key
        # float32 has seven digits: depths and pixels are larger than 1
        tolerance = 1e-5 * max(1.0, float(reference.abs().max()))
        assert torch.allclose(found, reference, atol=tolerance, rtol=0), key


@pytest.mark.parametrize(
    ("name", "tokenizer"), [("clip", OpenAITokenizer), ("a_clip", CuttingTokenizer)]
)
def test_tokenizers_are_upstreams(name: str, tokenizer: type[OpenAITokenizer]) -> None:
    path = GOLDENS / name / "tokenizer_cases.json"
    if not path.is_file():
        pytest.skip(f"the fixture {name} is not here (shared/goldens)")
    cases = json.loads(path.read_text())["cases"]
    ids = tokenizer(77)([case["text"] for case in cases])
    assert ids.tolist() == [case["token_ids"] for case in cases]


def test_words_are_taken_apart_as_by_open_clip_and_not_kept() -> None:
    own, bounded = OpenAITokenizer(77), OpenAITokenizer(77)
    bound_words(bounded)
    kept = len(bounded.cache)
    random = Random(0)
    letters = "aaabcdeeefghijklmnoopqrstuvwxyz'éß日本0123456789.,!?-<|>"
    texts = ["".join(random.choices(letters, k=random.randrange(1, 60))) for _ in range(2000)]
    texts += ["<|endoftext|> <|startoftext|>a", "a" * 3000, "lol" * 500]
    for text in texts:
        assert bounded.encode(text) == own.encode(text), text
    assert len(bounded.cache) == kept


def test_ggem_is_a_pooling_that_can_be_asked_for() -> None:
    model, golden, _ = fixture("ggem")
    head = model.head("embed", {"pooling": "ggem"})
    call = HeadCall.of(head, {"pooling": "ggem"})
    [row] = run_rows(model.trunk, golden["pixel_values"][:1], call)
    assert np.allclose(row["embedding"], golden["pool_ggem"][0], atol=1e-5)


def test_the_served_descriptor_is_reduced_by_the_pca() -> None:
    model, golden, meta = fixture("irt")
    [row] = run_rows(model.trunk, golden["pixel_values"][:1], HeadCall(model.heads["embed"]))
    served = model.heads["embed"].finish(row, (64, 64))["embedding"]
    assert served.shape == (meta["hyperparameters"]["pca_dim"],)
    assert np.allclose(served, golden["embedding_pca"][0], atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in FIXTURES if not any(other in name for other in OTHER_INPUTS)]
)
def test_real_photos_are_answered_from_the_file_as_it_is(
    name: str, photos: dict[str, Image.Image]
) -> None:
    """By the file's own input size and preprocessing, which `run` on given pixels does not use."""
    model, _, meta = fixture(name)
    preprocess = model.trunk.preprocess
    stated = meta["preprocess"]
    if "frames" in stated:
        pytest.skip("takes clips")
    settings = meta["hyperparameters"]
    side = settings.get("img_size") or settings.get("image_size") or stated["size"]
    side = side[0] if isinstance(side, list) and side is stated["size"] else side
    assert preprocess.input_size == (tuple(side) if isinstance(side, list) else (side, side))
    assert preprocess.crop_pct == stated["crop_pct"]
    assert preprocess.mean == tuple(meta["preprocess"]["mean"])
    assert preprocess.std == tuple(meta["preprocess"]["std"])
    [answer] = model.predict([photos["chelsea"]], task="embed")
    assert np.isfinite(answer["embedding"]).all()


@pytest.mark.parametrize("numpy_name", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_training_leftovers_that_run_nothing_are_let_pass(tmp_path: Path, numpy_name: str) -> None:
    """Schedules leave numpy's scalars in optimizers, under numpy 1's and 2's names of them."""
    network = timm.create_model("test_vit")
    path = tmp_path / "training.pth"
    learning_rate = np.float64(0.1)
    content = {
        "model": network.state_dict(),
        "optimizer": {"param_groups": [{"lr": learning_rate, "step": np.int64(3)}]},
        "args": argparse.Namespace(lr=learning_rate),
    }
    torch.save(content, path)
    raw = path.read_bytes()
    swapped = tmp_path / "renamed.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(swapped, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
                    data = data.replace(name + b"\n", numpy_name.encode() + b"\n")
            new.writestr(item, data)
    assert b"multiarray" in raw
    model = load_checkpoint(swapped, {"architecture": "test_vit"})
    assert model.task == "classify"


def test_code_in_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", evil)
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=r"os\.system"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def vqt_file(tmp_path: Path, change: Any) -> Path:
    """The fixture's VQT checkpoint with its head changed."""
    folder = GOLDENS / "vqt"
    if not folder.is_dir():
        pytest.skip("the fixture vqt is not here (shared/goldens)")
    content = torch.load(folder / "checkpoint.pth", weights_only=True)
    change(content["model"])
    torch.save(content, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def test_a_selection_of_features_needs_to_be_told(tmp_path: Path) -> None:
    """Upstream stores the narrower classifier alone; which features it sees is in another file."""
    chosen = [3, 50, 100, 190]

    def select(state: dict[str, torch.Tensor]) -> None:
        state["head.last_layer.weight"] = state["head.last_layer.weight"][:, chosen]

    path = vqt_file(tmp_path, select)
    arguments = json.loads((GOLDENS / "vqt/meta.json").read_text())["hyperparameters"]
    with pytest.raises(
        CheckpointError, match="takes 4 features of 192; the tensor indices must say"
    ):
        load_checkpoint(path, arguments)
    np.save(tmp_path / "chosen.npy", np.array(chosen))
    golden = load_file(GOLDENS / "vqt/golden.safetensors")
    state = torch.load(path, weights_only=True)["model"]
    weight, bias = state["head.last_layer.weight"], state["head.last_layer.bias"]
    wanted = golden["embedding"][:, chosen] @ weight.T + bias
    for indices in (chosen, "chosen.npy"):
        model = load_checkpoint(path, {**arguments, "indices": indices})
        logits = model.run(golden["pixel_values"])["logits"]
        assert torch.allclose(logits, wanted, atol=1e-5)


def test_a_head_of_several_layers_is_read(tmp_path: Path) -> None:
    """MODEL.MLP_NUM above 0: Linear, ReLU, BatchNorm1d and Dropout, then the last layer."""
    torch.manual_seed(0)
    norm: Any = torch.nn.BatchNorm1d(20)
    torch.nn.init.normal_(norm.running_mean)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    first = torch.nn.Linear(192, 20)
    hidden = torch.nn.Sequential(first, torch.nn.ReLU(), norm, torch.nn.Dropout()).eval()
    last = torch.nn.Linear(20, 7)

    def deepen(state: dict[str, torch.Tensor]) -> None:
        state |= {f"head.projection.{key}": value for key, value in hidden.state_dict().items()}
        state |= {f"head.last_layer.{key}": value for key, value in last.state_dict().items()}

    path = vqt_file(tmp_path, deepen)
    arguments = json.loads((GOLDENS / "vqt/meta.json").read_text())["hyperparameters"]
    golden = load_file(GOLDENS / "vqt/golden.safetensors")
    with torch.no_grad():
        wanted = last(hidden(golden["embedding"]))
    logits = load_checkpoint(path, arguments).run(golden["pixel_values"])["logits"]
    assert torch.allclose(logits, wanted, atol=1e-5)


def test_a_missing_backbone_says_what_to_do(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"module.linear.weight": torch.zeros(3, 8),
                        "module.linear.bias": torch.zeros(3)}},
        tmp_path / "linear.pth",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"put backbone\.pth or .* beside it"):
        load_checkpoint(tmp_path / "linear.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), "missing: norm.weight"),
        (lambda state: state.update({"blocks.0.mlp.extra": torch.ones(1)}), "left over: blocks.0"),
        (
            lambda state: state.update({"norm.weight": torch.full((192,), float("nan"))}),
            r"not finite: norm\.weight",
        ),
        (lambda state: state.update({"norm.weight": torch.ones(7)}), r"wrong shape: norm.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    """Of a DINO backbone, detected by its keys; nothing is filled in or left out silently."""
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).state_dict()
    change(state)
    torch.save(state, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "backbone.pth")


def test_files_that_are_no_checkpoints_say_so(tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.pth"
    torch.save({"a": torch.ones(1000)}, truncated)
    truncated.write_bytes(truncated.read_bytes()[:2000])
    evil = tmp_path / "evil.pth"
    evil.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    foreign = tmp_path / "foreign.pth"
    torch.save({"something": torch.ones(3), "else": torch.ones(3)}, foreign)
    for path, message in (
        (truncated, "not a readable torch file.*is it cut off"),
        (evil, "could run code"),
        (photo, "not a checkpoint"),
        (foreign, "no known format"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)


def test_dinos_linear_weights_may_see_the_mean_patch_interleaved(tmp_path: Path) -> None:
    """As published for ViT-B: twice the channels, class token and mean taking turns."""
    folder = GOLDENS / "dino_linear"
    if not folder.is_dir():
        pytest.skip("the fixture dino_linear is not here (shared/goldens)")
    arguments = json.loads((folder / "meta.json").read_text())["hyperparameters"]
    for told in ("n_last_blocks", "avgpool_patchtokens"):  # the weights' size tells
        del arguments[told]
    shutil.copy(folder / "backbone.pth", tmp_path / "backbone.pth")
    weight, bias = torch.randn(5, 96), torch.randn(5)
    state = {"module.linear.weight": weight, "module.linear.bias": bias}
    torch.save({"epoch": 1, "state_dict": state, "best_acc": 50.0}, tmp_path / "linear.pth")
    pixels = load_file(folder / "golden.safetensors")["pixel_values"]
    outputs = load_checkpoint(tmp_path / "linear.pth", arguments).run(pixels)
    tokens = outputs["tokens"]
    features = torch.empty(len(tokens), 96)
    features[:, 0::2], features[:, 1::2] = tokens[:, 0], tokens[:, 1:].mean(1)
    assert torch.allclose(outputs["embedding"], features, atol=1e-5)
    assert torch.allclose(outputs["logits"], features @ weight.T + bias, atol=1e-4)


def test_vqts_options_change_the_features() -> None:
    """NORMALIZE_FEATS off, and POOLING_FEATS, which averages a block's queries."""
    plain, golden, _ = fixture("vqt", normalize_feats=False)
    found = plain.run(golden["pixel_values"])["embedding"]
    queries = golden["query_outputs"].flatten(1)
    wanted = torch.cat([golden["backbone_embedding"], queries], 1)
    assert torch.allclose(found, wanted, atol=1e-5)
    with pytest.raises(CheckpointError, match="indices must be 192 integers"):
        fixture("vqt_wsum", indices=[0, 1, 2])


def test_a_clips_towers_are_served_apart(tmp_path: Path, photos: dict[str, Image.Image]) -> None:
    """As a catalog has them: two trunks of one file, each with its queue."""
    path = GOLDENS / "a_clip" / "checkpoint.pth"
    if not path.is_file():
        pytest.skip("the fixture a_clip is not here (shared/goldens)")
    arguments = "arguments = {vision_heads = 4, transformer_heads = 2}"
    (tmp_path / "a_clip.toml").write_text(
        f'[trunks.image]\nsource = "file:{path}"\n{arguments}\n'
        f'[trunks.text]\nsource = "file:{path}"\ntower = "text"\n{arguments}\n'
        '[models.a-clip]\ntrunk = "image"\ntext = "text"\ntask = "zero-shot"\n'
        '[models.embed]\ntrunk = "image"\ntask = "embed"\n'
    )
    registry = Registry.from_catalog(tmp_path / "a_clip.toml", store=Store(tmp_path / "store"))
    golden = load_file(GOLDENS / "a_clip" / "golden.safetensors")
    model = registry.get("a-clip")
    outputs = model.run(golden["pixel_values"], golden["token_ids"])
    for key in ("image_embedding", "text_embedding"):
        assert torch.allclose(outputs[key], golden[key], atol=1e-5, rtol=0), key
    [answer] = registry.get("embed").predict([photos["coffee"]])
    assert len(answer["embedding"]) == golden["image_embedding"].shape[1]


@pytest.mark.parametrize("name", FIXTURES)
def test_what_is_converted_says_everything_and_gives_the_same(name: str, tmp_path: Path) -> None:
    model, golden, meta = fixture(name)
    path = next(iter(sorted(folder_of(name).glob("checkpoint.*"))))
    save_checkpoint(read_checkpoint(path, meta["hyperparameters"]), tmp_path / "own.safetensors")
    converted = load_checkpoint(tmp_path / "own.safetensors")
    given = {key: golden[key] for key in INPUTS if key in golden}
    before, after = model.run(**given), converted.run(**given)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert converted.digest == model.digest


@pytest.mark.parametrize("name", FIXTURES)
def test_a_file_that_lacks_a_weight_is_refused_as_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Whichever it is: by an error of ours that names it, never by torch's or Python's."""
    folder = folder_of(name)
    path = next(iter(sorted(folder.glob("checkpoint*"))))
    if path.suffix in (".npz", ".safetensors") or name == "clip_jit":
        pytest.skip("rewritten here are torch's plain files alone")
    arguments = json.loads((folder / "meta.json").read_text())["hyperparameters"]
    for companion in folder.iterdir():
        if not companion.name.startswith("checkpoint"):
            shutil.copy(companion, tmp_path)
    keys = list(open_container(path).tensors)
    refused = 0
    for key in keys[:: max(1, len(keys) // 5)]:
        content = torch.load(path, weights_only=False)
        for state in (content, *(part for part in content.values() if isinstance(part, dict))):
            state.pop(key, None)
            state.pop(f"module.{key}", None)
        torch.save(content, tmp_path / path.name)
        try:
            load_checkpoint(tmp_path / path.name, arguments)
        except CheckpointError:
            refused += 1
    assert refused
