"""Fitting heads: what counts as examples, what is learnt, and what goes wrong how."""

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.checkpoints.checkpoint import HeadState
from models.errors import CheckpointError, InputError
from models.fitting.dataset import Progress
from models.fitting.examples import Example, check_classes, read_archive, read_examples, split
from models.fitting.fit import Fitted, fit, run_directly
from models.fitting.options import FitOptions
from models.fitting.report import write_report
from models.heads.files import HeadFile, decode_head, encode_head, read_head, save_head
from models.heads.registry import create_head
from models.model import Model
from tests.conftest import encode
from tests.models.test_vqt import KINDS, small_trunk

QUICK = FitOptions(epochs=12, patience=12, batch_size=4)


def striped(angle: int, seed: int) -> bytes:
    """Upright or lying stripes in random colours, which a mean colour cannot tell apart."""
    random = np.random.default_rng(seed)
    light, dark = random.integers(120, 255, 3), random.integers(0, 100, 3)
    stripes = (np.arange(64) // random.integers(3, 7)) % 2
    image = np.where(stripes[None, :, None], light, dark) * np.ones((64, 64, 1))
    return encode(Image.fromarray(image.astype(np.uint8)).rotate(angle), "PNG")


def stripes(count: int = 12) -> list[Example]:
    return [
        Example(f"{label}/{i}.png", label, striped(angle, i + 100 * angle))
        for label, angle in (("lying", 90), ("upright", 0))
        for i in range(count)
    ]


def fitted(
    tmp_path: Path,
    options: FitOptions,
    examples: Sequence[Example] | None = None,
    limit_bytes: int = 2**30,
) -> tuple[Model, Fitted, list[Progress]]:
    trunk = small_trunk(*KINDS["registers and layer scale"])
    steps: list[Progress] = []
    result = fit(
        stripes() if examples is None else examples,
        trunk,
        "small",
        options,
        tmp_path,
        run=run_directly(trunk),
        progress=steps.append,
        limit_bytes=limit_bytes,
    )
    head = result.head
    model = Model("stripes", trunk, create_head(head.kind, trunk, head.labels, head.state))
    return model, result, steps


@pytest.mark.parametrize(
    "options",
    [
        replace(QUICK, kind="vqt"),
        replace(QUICK, kind="vqt", queries=2, keep=0.4, lasso=1e-3),
        replace(QUICK, kind="linear"),
        replace(QUICK, kind="linear", layers=2),
        replace(QUICK, kind="linear", layers=3, keep=0.5),
    ],
    ids=["vqt", "vqt selected", "linear", "linear of blocks", "linear selected"],
)
def test_a_fitted_head_tells_classes_apart_that_it_has_not_seen(
    tmp_path: Path, options: FitOptions
) -> None:
    model, result, steps = fitted(tmp_path, options, stripes(25))
    fresh = [(label, striped(angle, 9000 + i)) for i in range(10)
             for label, angle in (("lying", 90), ("upright", 0))]  # fmt: skip
    answers = model.predict([image for _, image in fresh], top_k=1)
    right = sum(
        answer["predictions"][0]["label"] == label
        for answer, (label, _) in zip(answers, fresh, strict=True)
    )
    assert right >= 16  # by chance in one of 170 tries
    assert steps[0].stage == "images"
    assert steps[-1].stage == "training"
    assert np.sum(result.report["confusion"]) == result.report["holdout_images"]
    held = [name.split("/")[0] for name in result.report["holdout"]]
    assert held.count("lying") == held.count("upright") == 5


def test_selection_keeps_the_share_asked_for(tmp_path: Path) -> None:
    _, result, _ = fitted(tmp_path, replace(QUICK, kind="vqt", keep=0.25, lasso=1e-3))
    available = 24 * (1 + 3)
    assert len(result.head.state.tensors["indices"]) == available // 4
    assert result.head.state.tensors["classifier.0.weight"].shape == (2, available // 4)


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    first, again, other = (
        encode_head(fitted(tmp_path, replace(QUICK, seed=seed))[1].head) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_features_that_do_not_fit_on_disk_are_computed_anew(tmp_path: Path) -> None:
    """Room for none of them, for some, and for all: the same head comes out."""
    none, some, every = (
        fitted(tmp_path, QUICK, limit_bytes=room)[1].head.state.tensors
        for room in (0, 100_000, 2**30)
    )
    for name, tensor in every.items():  # but for rounding, which depends on the batches
        assert torch.allclose(some[name], tensor, atol=1e-3), name
        assert torch.allclose(none[name], tensor, atol=1e-3), name


def test_the_head_survives_its_file(tmp_path: Path) -> None:
    model, result, _ = fitted(tmp_path, QUICK)
    save_head(result.head, tmp_path / "heads" / "stripes.safetensors")
    read = read_head(tmp_path / "heads" / "stripes.safetensors")
    trunk = model.trunk
    read.check_trunk(trunk.digest, trunk.preprocess.digest)
    again = Model("again", trunk, create_head(read.kind, trunk, read.labels, read.state))
    image = striped(0, 1)
    assert again.predict([image]) == model.predict([image])
    assert again.digest == model.digest
    with pytest.raises(CheckpointError, match="made for another trunk"):
        read.check_trunk("sha256:other", trunk.preprocess.digest)
    pinned = replace(read, trunk_source="pypi:x==1#sha256=abc")
    pinned.check_trunk("sha256:rounded", trunk.preprocess.digest, "pypi:x==1#sha256=abc")
    for source in ("pypi:x==1#sha256=abd", "", "file:x"):
        with pytest.raises(CheckpointError, match="made for another trunk"):
            pinned.check_trunk("sha256:rounded", trunk.preprocess.digest, source)
    with pytest.raises(CheckpointError, match="made for another preprocessing"):
        read.check_trunk(trunk.digest, "sha256:other")


def test_the_report_is_written_as_pictures_too(tmp_path: Path) -> None:
    _, result, _ = fitted(tmp_path, QUICK)
    write_report(result.report, tmp_path / "report")
    for name in ("curve.png", "confusion.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert picture.width > 200
    assert (tmp_path / "report/report.json").read_text().startswith("{")


def test_unreadable_images_are_skipped_and_told(tmp_path: Path) -> None:
    broken = Example("lying/broken.png", "lying", b"no image")
    gone = Example("lying/gone.png", "lying", tmp_path / "gone.png")
    _, result, _ = fitted(tmp_path, QUICK, [*stripes(), broken, gone])
    skipped = {item["name"]: item["reason"] for item in result.report["skipped"]}
    assert skipped.keys() == {"lying/broken.png", "lying/gone.png"}
    assert "not an image" in skipped["lying/broken.png"]
    assert result.report["images"] == 24


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "0 class; a head needs at least two"),
        (stripes()[:12], "1 class"),
        (stripes()[:13], "a single image of upright"),
        ([*stripes()[:13], Example("upright/x.png", "upright", b"?")],
         "a single image of upright.*after 1 unreadable images.*upright/x.png"),
    ],
)  # fmt: skip
def test_too_few_examples_are_refused(
    tmp_path: Path, examples: list[Example], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fitted(tmp_path, QUICK, examples)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"kind": "quadratic"}, "kind"), ({"holdout": 1.0}, "holdout"), ({"epochs": 0}, "epochs"),
        ({"learning_rate": float("nan")}, "learning_rate"), ({"keep": 0.0}, "keep"),
        ({"kind": "linear", "layers": 4}, "layers"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(
    tmp_path: Path, wrong: dict[str, object], field: str
) -> None:
    with pytest.raises(InputError) as caught:
        fitted(tmp_path, replace(QUICK, **wrong))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_splits_hold_out_of_every_class_and_leave_some() -> None:
    labels = ["a"] * 2 + ["b"] * 10 + ["c"] * 100
    kept, held = split(labels, 0.2, seed=5)
    assert sorted([*kept, *held]) == list(range(112))
    counts = [sum(labels[i] == label for i in held) for label in "abc"]
    assert counts == [1, 2, 20]
    assert split(labels, 0.2, 5)[1].tolist() == held.tolist() != split(labels, 0.2, 6)[1].tolist()


# -- where examples come from ------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(
        ("cat/1.png", "cat/deep/2.PNG", "dog/3.jpg", "loose.png", "dog/notes.txt")
    ):
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(striped(0, number))
    return tmp_path / "pets"


def test_folders_are_classes(folder: Path) -> None:
    found = {example.name: example.label for example in read_examples(folder)}
    assert found == {"cat/1.png": "cat", "cat/deep/2.PNG": "cat", "dog/3.jpg": "dog"}
    with pytest.raises(InputError, match="no such folder"):
        read_examples(folder / "none")
    with pytest.raises(InputError, match="no image in a folder"):
        read_examples(folder / "cat" / "deep")


def test_a_class_has_a_name_that_answers_can_hold(folder: Path) -> None:
    try:
        (folder / "dog").rename(folder / os.fsdecode(b"h\xfcnd"))
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    with pytest.raises(InputError, match="no name in UTF-8") as caught:
        read_examples(folder)
    assert str(caught.value).isascii()


def test_a_table_names_paths_and_labels(folder: Path) -> None:
    table = folder / "table.csv"
    table.write_text("path,label,note\ncat/1.png,Katze,\ndog/3.jpg,Hund,x\n", encoding="utf-8-sig")
    found = read_examples(table)
    assert [(example.name, example.label) for example in found] == [
        ("cat/1.png", "Katze"), ("dog/3.jpg", "Hund")]  # fmt: skip
    assert found[0].read() == (folder / "cat/1.png").read_bytes()
    table.write_text("file,class\n1,2\n")
    with pytest.raises(InputError, match="columns path and label"):
        read_examples(table)


def archive(files: dict[str, bytes]) -> io.BytesIO:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in files.items():
            target.writestr(name, data)
    return content


@pytest.mark.parametrize("above", ["", "pets/", "my/pets/"])
def test_archives_hold_folders_of_classes(above: str) -> None:
    files = {f"{above}cat/1.png": b"1", f"{above}dog/a/2.png": b"2", "__MACOSX/cat/1.png": b"-"}
    found = read_archive(archive(files), 100)
    assert [(example.label, example.image) for example in found] == [("cat", b"1"), ("dog", b"2")]


def test_archives_that_are_none_or_too_much_are_refused() -> None:
    for content, message in (
        (io.BytesIO(b"no archive"), "cannot be read"),
        (archive({"notes.txt": b"x"}), "has no images"),
        (archive({"cat/1.png": b"x", "2.png": b"x"}), "2.png is not in a folder"),
        (archive({"cat/1.png": bytes(10**6)}), "1 images of 1000000 bytes"),
    ):
        with pytest.raises(InputError, match=message):
            read_archive(content, 1000)


def test_one_class_in_an_archive_is_still_one_class() -> None:
    with pytest.raises(InputError, match="1 class"):
        check_classes(read_archive(archive({"pets/cat/1.png": b"1", "pets/cat/2.png": b"2"}), 9))


# -- files that are no heads -------------------------------------------------------------------


def some_head(**changed: object) -> HeadFile:
    state = HeadState({"classifier.0.weight": torch.ones(2, 3)}, {})
    values = {"kind": "linear", "trunk": "t", "trunk_digest": "d", "preprocess_digest": "p",
              "labels": ("a", "b"), "state": state} | changed  # fmt: skip
    return HeadFile(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable safetensors file"),
        (encode_head(some_head())[:-2], "not a readable safetensors file"),
        (b"\x80\x02cos\nsystem\n", "not a readable safetensors file"),
        (encode_head(some_head(kind="magic")), "a 'magic' head"),
        (encode_head(some_head(task="segment")), "for the task 'segment'"),
        (encode_head(some_head(labels=())), "0 labels"),
        (encode_head(some_head(labels=("a", "b\ud800"))), "not Unicode text"),
        (encode_head(some_head(trunk="\udcff")), "not Unicode text"),
        (
            encode_head(some_head(state=HeadState({"w": torch.tensor([float("inf")])}))),
            "not finite",
        ),
    ],
)
def test_files_that_are_no_heads_say_why(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decode_head(content)


def test_a_plain_safetensors_file_is_no_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="not a head"):
        read_head(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="No such file"):
        read_head(tmp_path / "none.safetensors")
