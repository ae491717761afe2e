"""Names of classes: timm's tables and data sets' by name, a file, or a list in the catalog."""

from pathlib import Path

from timm.data import ImageNetInfo
from timm.data.imagenet_info import infer_imagenet_subset
from torch import nn

from models.errors import CatalogError
from models.segmentation.label_sets import label_sets, load_label_set


def load_labels(labels: str | list[str], base: Path) -> tuple[str, ...]:
    """Resolve a catalog's `labels`.

    Args:
        labels: a list of names, `imagenet-1k` (or another subset that timm knows), a set of
            `models/segmentation/label_sets`, or the path of a text file with one name a line, relative to
            `base`.

    Raises:
        CatalogError: neither a known table nor a readable file.
    """
    if isinstance(labels, list):
        return tuple(labels)
    if labels in label_sets():
        return load_label_set(labels)[0]
    if labels.startswith("imagenet"):
        info = ImageNetInfo(labels)
        return tuple(info.index_to_description(i) for i in range(info.num_classes()))
    try:
        lines = (base / labels).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CatalogError(f"labels {labels!r}: no known table, and no such file") from error
    return tuple(line.strip() for line in lines if line.strip())


def pretrained_labels(network: nn.Module) -> tuple[str, ...]:
    """The names of an ImageNet classifier from the hub, or none where timm does not know them.

    timm tells the subset by the number of classes, so this is only for weights known to be its own.
    """
    subset = infer_imagenet_subset(network)
    return load_labels(subset, Path()) if subset else ()


def numbered_labels(count: int) -> tuple[str, ...]:
    """What classes are called when nobody said: their numbers."""
    return tuple(str(index) for index in range(count))
