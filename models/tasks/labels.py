"""Class names: timm's tables and data sets by name, a file, or a list in the catalog."""

from pathlib import Path

from models.errors import CatalogError


def load_labels(labels: str | list[str], base: Path) -> tuple[str, ...]:
    """The class names that a catalog's `labels` stands for.

    Args:
        labels: a list of names; `imagenet-1k` or another subset that timm knows; a set of
            `models/segmentation/label_sets`; or the path of a text file with one name per line.
        base: the folder that a path is relative to.

    Raises:
        CatalogError: neither a known table nor a readable file in UTF-8.
    """
    # imported late, because timm imports torch
    from models.segmentation.label_sets import label_sets, load_label_set

    if isinstance(labels, list):
        return tuple(labels)
    if labels in label_sets():
        return load_label_set(labels)[0]
    if labels.startswith("imagenet"):
        from timm.data import ImageNetInfo

        info = ImageNetInfo(labels)
        return tuple(info.index_to_description(i) for i in range(info.num_classes()))
    try:
        lines = (base / labels).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CatalogError(f"labels {labels!r}: not a known table, and no such file") from error
    except UnicodeDecodeError as error:
        raise CatalogError(f"labels {labels!r}: the file is not UTF-8: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def as_label(name: object) -> str:
    """A checkpoint's name of a class, with "?" for what is not Unicode text: no answer could hold
    it."""
    return str(name).encode(errors="replace").decode()


def numbered_labels(count: int) -> tuple[str, ...]:
    """Class indices as names, for models without class names."""
    return tuple(str(index) for index in range(count))
