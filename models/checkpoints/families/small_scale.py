"""Small-scale ViTs (arXiv 2210.07240): networks for the images of five small data sets.

Images have the data set's statistics, and are not cropped. Upstream is
github.com/hananshafi/vits-for-small-scale-datasets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families.heads import assumed
from models.checkpoints.families.self_supervised import backbone_checkpoint
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

Triple = tuple[float, float, float]
HEADS = {192: 12}  # of the published ViT
CELLS = 16  # rows of a Swin's patches: three stages, the last of which is one window of four


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set's number of classes, its images' size in pixels, and their statistics."""

    classes: int
    size: int
    mean: Triple
    std: Triple


DATASETS = {
    "CIFAR10": Dataset(10, 32, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "CIFAR100": Dataset(100, 32, (0.507, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "SVHN": Dataset(10, 32, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
    "Tiny-Imagenet": Dataset(200, 64, (0.4802, 0.4481, 0.3975), (0.277, 0.2691, 0.2821)),
    "CINIC": Dataset(
        10,
        32,
        (0.47889522, 0.47227842, 0.43047404),
        (0.24205776, 0.23828046, 0.25874835),
    ),
}


def small_scale_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    dropped: tuple[str, ...] = (),
) -> Checkpoint:
    """A backbone as a checkpoint of format `name`.

    Args:
        arguments: those of its family, and `dataset` (the one with images of the network's size
            and as many classes).
        dropped: keys that only training used.

    Raises:
        CheckpointError: the data set is unknown, or none or several are plausible.
    """
    stated = _stated(arguments)
    patches = tensors.get("patch_embed.proj.weight")
    patch = 0 if patches is None or patches.dim() != 4 else patches.shape[-1]
    checkpoint = backbone_checkpoint(
        name,
        tensors,
        arguments,
        preprocess=Preprocess(crop_pct=1.0, interpolation="bilinear"),
        dropped=dropped,
        img_size=CELLS * patch if stated is None else DATASETS[stated].size,
        published=HEADS,
    )
    assert checkpoint.preprocess is not None
    size, classes = checkpoint.preprocess.input_size[0], checkpoint.arguments["num_classes"]
    dataset = stated or _dataset(size, classes)
    statistics = DATASETS[dataset]
    preprocess = replace(
        checkpoint.preprocess,
        crop_mode="squash" if dataset == "CINIC" else "center",
        mean=statistics.mean,
        std=statistics.std,
    )
    inferred = assumed(arguments, dataset=dataset)
    return replace(checkpoint, preprocess=preprocess, assumed={**checkpoint.assumed, **inferred})


def _stated(arguments: Mapping[str, Any]) -> str | None:
    """`arguments["dataset"]`, if there is one.

    Raises:
        CheckpointError: it is unknown.
    """
    stated = arguments.get("dataset")
    if stated is None or (isinstance(stated, str) and stated in DATASETS):
        return stated
    raise CheckpointError(f"dataset is {stated!r}; set one of {', '.join(DATASETS)}")


def _dataset(size: int, classes: int) -> str:
    """The data set with images of this size and as many classes.

    Args:
        classes: 0 for a backbone without a classifier.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    plausible = [
        name for name, d in DATASETS.items() if d.size == size and classes in (0, d.classes)
    ]
    if not plausible:
        counted = f" and {classes} classes" if classes else ""
        raise CheckpointError(
            f"images of {size} pixels{counted} belong to none of {', '.join(DATASETS)}; dataset "
            "says whose statistics normalise them all the same"
        )
    if len(plausible) > 1:
        raise CheckpointError(
            "the file does not say which data set's statistics normalise its images; set dataset: "
            f"one of {', '.join(plausible)}"
        )
    return plausible[0]
