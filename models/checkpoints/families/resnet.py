"""ResNets with bottlenecks (arXiv 1512.03385) in torchvision's names, which are timm's."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families.known import Known
from models.inputs.transforms import Preprocess
from models.networks import OWN

MARKS = {
    "conv1.weight",
    "bn1.running_mean",
    "layer1.0.conv3.weight",
    "layer1.0.downsample.0.weight",
}


def resnet_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    known: Known,
    *,
    preprocess: Preprocess | None = None,
    dropped: tuple[str, ...] = (),
) -> Checkpoint:
    """A ResNet as a checkpoint of format `name`.

    Args:
        known: `img_size` in pixels, one side or both (224, assumed).
        preprocess: everything but the input size.
        dropped: keys that only training used.
    """
    layers = [1, 2, 3, 4]
    head = tensors.get("fc.weight")
    base = preprocess or Preprocess()
    return Checkpoint(
        format=name,
        architecture="resnet",
        library=OWN,
        arguments={
            "layers": [
                len({key.split(".")[1] for key in tensors if key.startswith(f"layer{layer}.")})
                for layer in layers
            ],
            "channels": [tensors[f"layer{layer}.0.conv1.weight"].shape[0] for layer in layers],
            "stem_width": tensors["conv1.weight"].shape[0],
            "num_classes": 0 if head is None else head.shape[0],
        },
        state_dict=dict(tensors),
        preprocess=replace(base, input_size=known.image_size()),
        dropped=dropped,
        assumed=known.assumed,
    )
