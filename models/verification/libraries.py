"""The libraries that networks come from, as further references: timm, open_clip, transformers.

Each builds the network itself. timm and open_clip also have their own transform, and read the file
themselves if they know the layout. Otherwise they get the weights as Vitrail has converted them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from open_clip import image_transform
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import open_container
from models.checkpoints.families.open_clip import MODES
from models.heads.classify import Classify
from models.heads.embed import Embed
from models.inputs.normalize import Normalize
from models.inputs.transforms import Preprocess
from models.inputs.transforms import create_transform as create_own_transform
from models.model import Model
from models.verification.comparison import Outputs
from models.verification.huggingface import transformers_encoder

# Of Vitrail's own ViT: parts that timm's class does not have, and options that change nothing where
# an image has the size that the network was trained at.
OWN_PARTS = ("conv_stem", "gated", "resnet", "distilled")
OWN_OPTIONS = ("positions", "norm_eps", "padding", "whole_patches")


@dataclass(frozen=True, slots=True)
class Library:
    """A library's implementation of a model of images.

    Args:
        name: the library with its version, and how it got the weights; why it is not compared if
            there is no `run`.
        run: the outputs of an RGB image, under the names of `outputs_of`.
    """

    name: str
    run: Callable[[Image.Image], Outputs] | None = None


def libraries_of(model: Model, checkpoint: Checkpoint, path: Path) -> Iterator[Library]:
    """The other implementations of a model.

    Args:
        model: in eager float32 on the CPU.
        checkpoint: the file as Vitrail has read it.
        path: the file.
    """
    found = _transformers(model, checkpoint)
    others = any(checkpoint.arguments.get(name) for name in OWN_PARTS)
    plain_vit = checkpoint.architecture == "vit" and not others
    if checkpoint.library == "timm" or plain_vit:
        yield _timm(model, checkpoint, path)
    elif _has_open_clip_towers(checkpoint):
        yield _open_clip(checkpoint, path)
    elif found is None:
        yield Library(f"no library has {checkpoint.architecture}: not compared with one")
    if found is not None:
        yield found


def _timm(model: Model, checkpoint: Checkpoint, path: Path) -> Library:
    spec = model.trunk.preprocess
    heads = {
        "embedding": _plain_embedding(model),
        "logits": isinstance(model.heads[model.task], Classify) and model.trunk.exponents is None,
    }
    name = f"timm {version('timm')}"
    if not any(heads.values()):
        return Library(f"{name}: not compared; the heads are Vitrail's")
    if (transform := _timms_transform(spec)) is None:
        return Library(f"{name}: not compared; it has no such transform")
    if _side(checkpoint.arguments.get("img_size")) not in (None, tuple(spec.input_size)):
        return Library(f"{name}: not compared; it resizes positions by a rule of its own")
    try:
        network = _read_by_timm(checkpoint, path)
        name += ", which reads the file itself"
    except Exception:  # timm raises errors of many kinds for layouts that it does not know
        network = _built_by_timm(checkpoint)
        name += ", with the converted weights"
    network = network.eval()

    @torch.inference_mode()
    def run(image: Image.Image) -> Outputs:
        features = network.forward_features(transform(image)[None])
        pooled = {
            "embedding": network.forward_head(features, pre_logits=True),
            "logits": network.forward_head(features),
        }
        return _rows({key: pooled[key] for key, comparable in heads.items() if comparable})

    return Library(name, run)


def _transformers(model: Model, checkpoint: Checkpoint) -> Library | None:
    """transformers' network behind timm's transform, if it has the network, and the embedding is
    what it pools."""
    spec = model.trunk.preprocess
    transform = _timms_transform(spec)
    size = _side(checkpoint.arguments.get("img_size"))
    if transform is None or not _plain_embedding(model) or size not in (None, spec.input_size):
        return None
    library = f"transformers {version('transformers')}"
    try:
        found = transformers_encoder(checkpoint)
    except Exception as error:  # transformers raises errors of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Library(f"{library}: not compared; {reason}")
    if found is None:
        return None
    name, encode = found

    @torch.inference_mode()
    def run(image: Image.Image) -> Outputs:
        return _rows({"embedding": encode(transform(image)[None])})

    return Library(f"{library}'s {name}, with the converted weights", run)


def _timms_transform(spec: Any) -> Any:
    """timm's transform; None for one that it has not."""
    if not isinstance(spec, Preprocess) or spec.crop_mode == "letterbox" or not spec.antialias:
        return None
    if spec.crop_early:  # which timm has not
        normalize, transform = Normalize(spec), create_own_transform(spec)
        return lambda image: normalize(transform(image)[None])[0]
    return create_transform(
        input_size=(3, *spec.input_size),
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        mean=spec.mean,
        std=spec.std,
    )


def _side(size: Any) -> tuple[int, int] | None:
    """(height, width) of an argument `img_size`."""
    return None if size is None else (size, size) if isinstance(size, int) else tuple(size)


def _read_by_timm(checkpoint: Checkpoint, path: Path) -> Any:
    """The network, loaded strictly by timm's own conversion of the file."""
    overlay = {
        "file": str(path),
        "custom_load": path.suffix == ".npz",
        "num_classes": checkpoint.arguments.get("num_classes", 1000),
    }
    return timm.create_model(
        checkpoint.architecture,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **checkpoint.arguments,
    )


def _built_by_timm(checkpoint: Checkpoint) -> Any:
    """timm's network with the converted weights; for Vitrail's own ViT the class that it derives
    from."""
    state = dict(checkpoint.state_dict)
    network: Any
    if checkpoint.library == "timm":
        network = timm.create_model(checkpoint.architecture, **checkpoint.arguments)
    else:
        own = {*OWN_PARTS, *OWN_OPTIONS}
        arguments = {key: value for key, value in checkpoint.arguments.items() if key not in own}
        if arguments.get("reg_tokens") and not arguments["no_embed_class"]:
            # timm's registers have positions if class tokens have; adding these first is the same
            arguments["no_embed_class"], table = True, state["pos_embed"]
            state["cls_token"] = state["cls_token"] + table[:, :1]
            state["pos_embed"] = table[:, 1:]
        norm_layer = partial(nn.LayerNorm, eps=checkpoint.arguments.get("norm_eps", 1e-6))
        network = VisionTransformer(**arguments, norm_layer=norm_layer)
    network.load_state_dict(state)
    return network


def _plain_embedding(model: Model) -> bool:
    """Whether `embed` returns the trunk's own pooled features."""
    embed = model.heads.get("embed")
    return (
        isinstance(embed, Embed)
        and embed.network is None
        and embed.pooling is None
        and model.trunk.exponents is None
    )


def _has_open_clip_towers(checkpoint: Checkpoint) -> bool:
    """Whether open_clip itself builds both towers from the configuration."""
    image, text = (checkpoint.arguments.get(name, {}) for name in ("image", "text"))
    architectures = image.get("architecture"), text.get("architecture")
    own = (
        "timm_model_kwargs" in image.get("config", {})
        or checkpoint.heads
        or checkpoint.format == "transformers"  # whose names open_clip does not read
    )
    return architectures == ("open-clip-image", "open-clip-text") and not own


def _open_clip(checkpoint: Checkpoint, path: Path) -> Library:
    image, text = checkpoint.arguments["image"], checkpoint.arguments["text"]
    tensors = open_container(path).tensors
    kind = CustomTextCLIP if any(key.startswith("text.") for key in tensors) else CLIP
    config = {**image["config"], "output_tokens": False}  # CoCa's, of which only one is compared
    network: Any = kind(image["embed_dim"], config, text["config"], quick_gelu=image["quick_gelu"])
    own = network.state_dict().keys()
    network.load_state_dict({key: value.float() for key, value in tensors.items() if key in own})
    network = network.eval()
    spec = checkpoint.preprocess or Preprocess()
    modes = {ours: theirs for theirs, ours in MODES.items()}
    transform: Any = image_transform(
        spec.input_size,
        is_train=False,
        mean=spec.mean,
        std=spec.std,
        resize_mode=modes[spec.crop_mode],
        interpolation=spec.interpolation,
    )

    @torch.inference_mode()
    def run(image: Image.Image) -> Outputs:
        return _rows({"embedding": network.encode_image(transform(image)[None])})

    return Library(
        f"open_clip {version('open_clip_torch')}, which gets the file's own weights", run
    )


def _rows(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor[0].float().numpy() for name, tensor in tensors.items()}
