"""Whatever is changed in a file or its arguments: the authors' outputs, or an error of ours.

Files are damaged, relabelled, rewrapped and mixed; arguments are left out, or make no sense. The
nightly test changes every fixture in many ways, the other one some fixtures in a few.
"""

import json
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import load_checkpoint
from models.checkpoints.loading import read_checkpoint
from models.errors import ModelsError
from tests.models.mutations import (
    ARCHITECTURES,
    FLAT,
    Change,
    changed_files,
    changed_settings,
    dropped_arguments,
    mixed_files,
    nonsense_arguments,
    read_content,
    rewrapped_files,
    write_content,
)
from tests.models.test_fixtures import ALTERNATIVES, FIXTURES, INPUTS, folder_of

pytestmark = pytest.mark.filterwarnings("ignore")
COMPANIONS = ("checkpoint", "golden", "meta")
SOME = ("cait", "dino_backbone", "lit_text_transformer", "mvit_in21k", "open_clip_siglip", "pit",
        "vit_augreg")  # fmt: skip
# Tables of a configuration, whose code has defaults for what they leave out; arguments that make
# another model of the file; and the weights that are served where a file has them.
STATED = ("backbone", "neck", "decode_head", "test_cfg", "vision_cfg", "text_cfg", "MVIT", "DATA",
          "logit_multiplier", "band_config", "state_dict_ema", "out_indices",
          "patch_padding")  # fmt: skip


class Fixture:
    """A published file, its arguments and its authors' outputs."""

    def __init__(self, name: str, folder: Path) -> None:
        """
        Args:
            folder: where changed files are written, with the file's companions.
        """
        source = folder_of(name)
        self.name = name
        self.path = next(iter(sorted(source.glob("checkpoint.*"))))
        self.arguments: dict[str, Any] = json.loads((source / "meta.json").read_text())[
            "hyperparameters"
        ]
        self.golden = load_file(source / "golden.safetensors")
        self.assumed = read_checkpoint(self.path, self.arguments).assumed
        self.preprocess = load_checkpoint(self.path, self.arguments).trunk.preprocess
        for companion in source.iterdir():
            if not companion.name.startswith(COMPANIONS):
                os.symlink(companion, folder / companion.name)
        self.target = folder / self.path.name

    @property
    def content(self) -> Any:
        return read_content(self.path)

    def check_file(self, how: str, content: Any, *, stated: bool = False) -> None:
        write_content(self.target, content)
        self.check(how, self.target, self.arguments, stated=stated)

    def check(
        self,
        how: str,
        path: Path,
        arguments: Any,
        sizes: tuple[str, ...] = ALTERNATIVES,
        *,
        stated: bool = False,
    ) -> None:
        """Load and run: equal, refused, with other assumptions, or else as the change states."""
        try:
            model = load_checkpoint(path, arguments)
            outputs = {ending: self.run(model, ending) for ending in self.endings(sizes)}
            if self.equal(outputs) and model.trunk.preprocess == self.preprocess:
                return
            assumed = read_checkpoint(path, arguments).assumed
        except ModelsError:
            return
        except Exception as error:
            pytest.fail(f"{self.name}, {how}: {type(error).__name__}: {error}")
        if assumed == self.assumed and not stated:
            pytest.fail(f"{self.name}, {how}: another network or transform, and nothing assumed")

    def endings(self, sizes: tuple[str, ...]) -> Iterator[str]:
        for ending in sizes:
            if any(f"{key}{ending}" in self.golden for key in INPUTS if key != "noise"):
                yield ending

    def run(self, model: Any, ending: str) -> Mapping[str, Tensor]:
        golden = self.golden
        masked = "mask" in golden and "noise" not in golden
        names = (*INPUTS, "mask") if masked else INPUTS
        given = {key: golden[f"{key}{ending}"] for key in names if f"{key}{ending}" in golden}
        for name in ("token_ids", "pixel_values", "input_res_2"):
            if name in golden:
                given.setdefault(name, golden[name])
        outputs: Mapping[str, Tensor] = model.run(**given)
        return outputs

    def equal(self, outputs: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Whether all outputs that the authors have are theirs; some may be gone."""
        return all(
            value.shape == self.golden[f"{key}{ending}"].shape
            and torch.allclose(value, self.golden[f"{key}{ending}"].float(), atol=1e-5, rtol=0)
            for ending, named in outputs.items()
            for key, value in named.items()
            if f"{key}{ending}" in self.golden and key not in INPUTS
        )


@pytest.mark.parametrize("name", SOME)
def test_a_changed_checkpoint_is_refused_or_the_same(name: str, tmp_path: Path) -> None:
    fixture, random = Fixture(name, tmp_path), Random(name)
    for how, content in sample(random, changed_files(fixture.content, random, 2), 3):
        fixture.check_file(how, content)
    for how, arguments in sample(random, nonsense_arguments(fixture.arguments), 3):
        fixture.check(how, fixture.path, arguments, stated=subject(how) in STATED)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("beit2_pretrain", "early_layers = -3"),
        ("seg_fcn_beit", "backbone: out_indices = [1, 2]"),
        ("seg_ibot_upernet", "test_cfg: crop_size = [1, 2]"),
        ("seg_setr_naive", "decode_head: in_index = [1, 2]"),
        ("open_clip_coca", "text_cfg: heads = True"),
        ("open_clip_siglip", "vision_cfg: timm_model_kwargs: num_heads = -3"),
    ],
)
def test_arguments_that_once_broke_a_pass_are_refused(name: str, how: str, tmp_path: Path) -> None:
    fixture = Fixture(name, tmp_path)
    [arguments] = [each for said, each in nonsense_arguments(fixture.arguments) if said == how]
    with pytest.raises(ModelsError):
        load_checkpoint(fixture.path, arguments)


def subject(how: str) -> str:
    """The argument that a change is about."""
    return how.removeprefix("without ").partition(" ")[0].removesuffix(":")


def sample(random: Random, changes: Iterator[Change], count: int) -> list[Change]:
    listed = list(changes)
    return random.sample(listed, min(count, len(listed)))


@pytest.mark.nightly
@pytest.mark.parametrize("name", FIXTURES)
def test_changed_files_are_refused_or_the_same(name: str, tmp_path: Path) -> None:
    fixture, random = Fixture(name, tmp_path), Random(name)
    if name == "clip_jit":
        pytest.skip("a TorchScript archive, which is not rewritten here")
    content = fixture.content
    for how, changed in changed_files(content, random, 6):
        fixture.check_file(how, changed)
    for how, changed in changed_settings(content):
        fixture.check_file(how, changed, stated=subject(how) in STATED)
    rewrapped = () if fixture.path.suffix in FLAT else rewrapped_files(content)
    for how, changed in rewrapped:  # files of other kinds, with the same network
        write_content(fixture.target, changed)
        fixture.check(how, fixture.target, fixture.arguments, ALTERNATIVES[:1], stated=True)
    following = FIXTURES[(FIXTURES.index(name) + 1) % len(FIXTURES)]
    if following != "clip_jit":
        path = next(iter(sorted(folder_of(following).glob("checkpoint.*"))))
        others = {following: read_content(path)}
        for how, changed in islice(mixed_files(content, others), 3):
            fixture.check_file(how, changed)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FIXTURES)
def test_changed_arguments_are_refused_or_give_the_same(name: str, tmp_path: Path) -> None:
    fixture = Fixture(name, tmp_path)
    for how, arguments in (
        *dropped_arguments(fixture.arguments),
        *nonsense_arguments(fixture.arguments),
        *(
            (f"architecture = {architecture}", fixture.arguments | {"architecture": architecture})
            for architecture in ARCHITECTURES
        ),
    ):
        fixture.check(how, fixture.path, arguments, stated=subject(how) in STATED)
