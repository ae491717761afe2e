"""The networks that are measured, with random weights: no download is needed."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from benchmarks.gpu.options import Options
from models.heads.registry import create_head
from models.inference import HeadCall
from models.registry import Registry
from models.trunks.base import Trunk

# timm's names; arguments of the checkpoint.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit-b16": ("vit_base_patch16_224", {}),
    "clip-l14": ("vit_large_patch14_clip_224", {}),  # the image tower
    "dinov2-b": ("vit_base_patch14_dinov2", {"img_size": 224}),
    "convnextv2-b": ("convnextv2_base", {}),
    "lite0": ("efficientnet_lite0", {}),
    "tiny": ("test_vit", {}),  # to try the benchmark itself
}


def catalog(options: Options, network: str) -> Path:
    """A catalog of one network as `NAME` (classify) and `NAME-embed`, written where missing."""
    path = options.folder / f"{network}.toml"
    if path.is_file():
        return path
    architecture, arguments = NETWORKS[network]
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    made = timm.create_model(architecture, num_classes=1000, **arguments)
    save_file(made.state_dict(), options.folder / f"{network}.safetensors")
    settings = ", ".join(f"{key} = {value}" for key, value in arguments.items())
    path.write_text(
        f'[trunks.{network}]\nsource = "file:{network}.safetensors"\n'
        f'architecture = "{architecture}"\narguments = {{{settings}}}\n'
        f'[models.{network}]\ntrunk = "{network}"\ntask = "classify"\n'
        f'[models.{network}-embed]\ntrunk = "{network}"\ntask = "embed"\n'
    )
    return path


def load_trunk(
    options: Options, network: str, engine: str, precision: str, transform: str = "exact"
) -> Trunk:
    """The network's trunk, with the pass of its classifier built."""
    registry = Registry.from_catalog(
        catalog(options, network), device=str(options.device), engine=engine, precision=precision,
        transform=transform,
    )  # fmt: skip
    model = registry.get(network)
    model.build()
    return model.trunk


def blank_batch(trunk: Trunk, batch: int) -> torch.Tensor:
    return trunk.collate([trunk.blank() for _ in range(batch)])


def classifier(trunk: Trunk) -> HeadCall:
    labels = [str(number) for number in range(trunk.num_classes)]
    return HeadCall.of(create_head("classify", trunk, labels), {})
