"""Weights that processes share: views of a mapped file, where nobody writes to it."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import Registry
from models.checkpoints import sources
from models.checkpoints.store import Store, file_digest
from tests.conftest import TINY_CATALOG


@pytest.fixture
def catalog(tiny_catalog: Path, tmp_path: Path) -> Path:
    """The tiny catalog with files of its own."""
    for name in ("tiny", "conv"):
        shutil.copy(tiny_catalog.with_name(f"{name}.safetensors"), tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY_CATALOG)
    return tmp_path / "tiny.toml"


def embed(registry: Registry, photo: bytes) -> np.ndarray:
    [embedded] = registry.get("tiny-embed").predict([photo])
    return np.asarray(embedded["embedding"])


def mapped(registry: Registry, weights: Path) -> list[bool]:
    """For each parameter of the trunk, whether it is in the file's mapping."""
    ranges = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(weights))
    ]
    network = registry.load_trunk("tiny").trunk.network
    return [any(p.data_ptr() in each for each in ranges) for p in network.parameters()]


def overwrite(path: Path) -> None:
    """Write other weights of the same size over a file."""
    tensors = {key: value + 1 for key, value in load_file(path).items()}
    save_file(tensors, path.with_suffix(".new"))
    with path.open("r+b") as file:
        file.write(path.with_suffix(".new").read_bytes())


def test_a_file_that_is_written_over_changes_no_loaded_weights(
    catalog: Path, jpegs: dict[str, bytes]
) -> None:
    registry = Registry.from_catalog(catalog, device="cpu")
    before = embed(registry, jpegs["coffee"])
    overwrite(weights := catalog.with_name("tiny.safetensors"))
    assert np.array_equal(embed(registry, jpegs["coffee"]), before)
    assert not any(mapped(registry, weights))


def test_mapped_weights_are_the_same_and_outlive_their_files_name(
    catalog: Path, jpegs: dict[str, bytes]
) -> None:
    copied, shared = (
        Registry.from_catalog(catalog, device="cpu", map_weights=way) for way in (False, True)
    )
    before = embed(copied, jpegs["coffee"])
    assert np.array_equal(embed(shared, jpegs["coffee"]), before)
    assert copied.load_trunk("tiny").trunk.digest == shared.load_trunk("tiny").trunk.digest
    weights = catalog.with_name("tiny.safetensors")
    assert all(mapped(shared, weights))
    save_file({"other": torch.zeros(1)}, weights.with_suffix(".new"))
    os.replace(weights.with_suffix(".new"), weights)
    assert np.array_equal(embed(shared, jpegs["coffee"]), before)


def test_weights_of_another_dtype_are_copied(catalog: Path, jpegs: dict[str, bytes]) -> None:
    path = catalog.with_name("tiny.safetensors")
    save_file({key: value.half() for key, value in load_file(path).items()}, path)
    copied, shared = (
        Registry.from_catalog(catalog, device="cpu", map_weights=way) for way in (False, True)
    )
    assert np.array_equal(embed(copied, jpegs["coffee"]), embed(shared, jpegs["coffee"]))
    assert not any(mapped(shared, path))
    assert {value.dtype for value in shared.load_trunk("tiny").trunk.network.parameters()} == {
        torch.float32
    }


@pytest.mark.parametrize("way", [None, True, False])
def test_what_is_in_the_store_is_mapped_unless_that_is_turned_off(
    catalog: Path, monkeypatch: pytest.MonkeyPatch, way: bool | None
) -> None:
    """On a file system where files change below those who map them it has to be off."""
    weights = catalog.with_name("tiny.safetensors")
    source = f"https://models.example/tiny.safetensors#sha256={file_digest(weights)}"
    monkeypatch.setattr(sources, "_download", lambda source, target: shutil.copy(weights, target))
    catalog.write_text(catalog.read_text().replace("file:tiny.safetensors", source))
    store = Store(catalog.parent / "store")
    registry = Registry.from_catalog(catalog, store=store, device="cpu", map_weights=way)
    registry.load_trunk("tiny")
    assert all(mapped(registry, store.path(source, ".safetensors"))) == (way is not False)
