"""Preprocessing of small-scale ViTs (arXiv 2210.07240): the data set's statistics, no crop.

Upstream is github.com/hananshafi/vits-for-small-scale-datasets.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families.heads import assumed
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

Triple = tuple[float, float, float]

STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "CIFAR100": ((0.507, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
    "Tiny-Imagenet": ((0.4802, 0.4481, 0.3975), (0.277, 0.2691, 0.2821)),
    "CINIC": (
        (0.47889522, 0.47227842, 0.43047404),
        (0.24205776, 0.23828046, 0.25874835),
    ),
}
SIZES = {"Tiny-Imagenet": 64}  # pixels; 32 for the others


def dataset_of(arguments: Mapping[str, Any]) -> str:
    """`arguments["dataset"]`; CIFAR10 by default.

    Raises:
        CheckpointError: its statistics are not known.
    """
    dataset = arguments.get("dataset", "CIFAR10")
    if not isinstance(dataset, str) or dataset not in STATISTICS:
        raise CheckpointError(f"dataset is {dataset!r}; set one of {', '.join(STATISTICS)}")
    return dataset


def image_size(arguments: Mapping[str, Any]) -> int:
    """The size of the data set's images in pixels."""
    return SIZES.get(dataset_of(arguments), 32)


def preprocess_for(arguments: Mapping[str, Any]) -> Preprocess:
    """The data set's preprocessing."""
    dataset = dataset_of(arguments)
    mean, std = STATISTICS[dataset]
    return Preprocess(
        crop_mode="squash" if dataset == "CINIC" else "center",
        crop_pct=1.0,
        interpolation="bilinear",
        mean=mean,
        std=std,
    )


def with_dataset(checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint, with the data set among what was assumed if the arguments have none."""
    dataset = assumed(arguments, dataset="CIFAR10")
    return replace(checkpoint, assumed={**checkpoint.assumed, **dataset})
