"""`config.json` of transformers: reading it, and refusing what it states and is not supported."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.known import whole
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.tasks.labels import as_label

NAME = "transformers"
FILE = "config.json"
# From a file, its `config.json` and the transform of its `preprocessor_config.json`.
Converter = Callable[[Container, Mapping[str, Any], Preprocess], Checkpoint]


def read_beside(path: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file beside a checkpoint; empty if there is no such file.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    file = path.parent / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a configuration: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a configuration")
    return content


def read_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names of `config.json`, in order; empty if they are only numbered, or some class
    has none."""
    named = config.get("id2label")
    if not isinstance(named, Mapping) or all(
        name == f"LABEL_{index}" for index, name in named.items()
    ):
        return ()
    if named.keys() != set(map(str, range(len(named)))):  # ConvNeXt's with 21,841 classes
        return ()
    return tuple(as_label(named[str(index)]) for index in range(len(named)))


def require(config: Mapping[str, Any], **values: Any) -> None:
    """Refuse other values than these. Names that are not stated are taken to have them.

    Raises:
        CheckpointError: a value differs. transformers follows the configuration and ignores what
            else is in the file, so the weights alone do not tell what it computes.
    """
    for name, value in values.items():
        found = config.get(name)
        if found is not None and found != value:
            raise CheckpointError(
                f"{FILE}: {name} is {found!r}; for these weights only {value!r} is supported"
            )


def side(config: Mapping[str, Any], name: str, default: int) -> int:
    """A size in pixels that may be stated as two equal sides.

    Raises:
        CheckpointError: the sides differ, or are not whole numbers.
    """
    value = config.get(name, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return whole(name, value)


def require_size(preprocess: Preprocess, size: int) -> None:
    """
    Raises:
        CheckpointError: the transform gives images of another size than a network takes.
    """
    if preprocess.input_size != (size, size):
        raise CheckpointError(
            f"images are {preprocess.input_size} pixels by the image processor's file, and {size} "
            f"in {FILE}"
        )


def require_positions(size: int, network: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: `size`, in pixels, has other patches than the weights have positions for.
    """
    patch = network["patch_size"]
    if size // patch != network["img_size"] // patch:
        raise CheckpointError(
            f"image_size is {size}; the weights have positions for {network['img_size']} pixels"
        )


def split(
    tensors: Mapping[str, Tensor], prefix: str, dropped: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights that are served, without the prefix of the backbone, and the keys of others.

    Args:
        dropped: beginnings of the names, without the prefix, of weights that are not served.
    """
    kept: dict[str, Tensor] = {}
    others = []
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        if name.startswith(dropped):
            others.append(key)
        else:
            kept[name] = value
    return kept, tuple(others)
