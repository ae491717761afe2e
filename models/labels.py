"""Names of classes: timm's own tables by name, a file, or a list in the catalog."""

from pathlib import Path

from timm.data import ImageNetInfo
from timm.data.imagenet_info import infer_imagenet_subset

from models.errors import CatalogError


def load_labels(labels: str | list[str], base: Path) -> tuple[str, ...]:
    """Resolve a catalog's `labels`.

    Args:
        labels: a list of names, `imagenet-1k` (or another subset that timm knows), or the path
            of a text file with one name a line, relative to `base`.

    Raises:
        CatalogError: neither a known table nor a readable file.
    """
    if isinstance(labels, list):
        return tuple(labels)
    if labels.startswith("imagenet"):
        info = ImageNetInfo(labels)
        return tuple(info.index_to_description(i) for i in range(info.num_classes()))
    try:
        lines = (base / labels).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CatalogError(f"labels {labels!r}: no known table, and no such file") from error
    return tuple(line.strip() for line in lines if line.strip())


def labels_for_timm(architecture: object, num_classes: int) -> tuple[str, ...]:
    """The names timm has for an ImageNet classifier, else the class numbers."""
    subset = infer_imagenet_subset(architecture)
    if subset is not None:
        info = ImageNetInfo(subset)
        if info.num_classes() == num_classes:
            return tuple(info.index_to_description(i) for i in range(num_classes))
    return tuple(str(i) for i in range(num_classes))
