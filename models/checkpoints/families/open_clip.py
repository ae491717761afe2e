"""open_clip's configurations: of a model beside its file, in the arguments, or by name."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg
from torch import Tensor

from models.checkpoints.containers import Container
from models.checkpoints.families.known import whole, wholes
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

FILE = "open_clip_config.json"
MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
# What OpenAI's archives hold beside the weights.
OPENAI_SETTINGS = ("input_resolution", "context_length", "vocab_size")
COUNTS = ("layers", "width", "heads", "head_width", "num_heads", "depth", "embed_dim")
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True, slots=True)
class Configuration:
    """A model's configuration.

    Args:
        model: `embed_dim`, `vision_cfg`, `text_cfg`, and what else the model has.
        preprocess: `mean`, `std`, `interpolation`, `resize_mode`.
        assumed: what of it is assumed.
    """

    model: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    assumed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quick_gelu(self) -> bool:
        return bool(self.model.get("quick_gelu", False))

    @property
    def transform(self) -> Preprocess:
        size = self.model["vision_cfg"].get("image_size", 224)
        return Preprocess(
            input_size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            crop_mode=MODES[self.preprocess["resize_mode"]],  # type: ignore[arg-type]
            crop_pct=1.0,
            interpolation=self.preprocess["interpolation"],
            mean=tuple(self.preprocess["mean"]),
            std=tuple(self.preprocess["std"]),
        )


def is_openai(container: Container) -> bool:
    """Whether a file in OpenAI's layout is OpenAI's, by the settings that no one else stores."""
    return container.tensors.keys() >= set(OPENAI_SETTINGS)


def has_configuration(container: Container, arguments: Mapping[str, Any]) -> bool:
    """Whether `read_configuration` has something to read. A configuration beside a file of OpenAI's
    is another file's."""
    if "vision_cfg" in arguments or arguments.get("architecture") in open_clip.list_models():
        return True
    return not is_openai(container) and (container.path.parent / FILE).is_file()


def read_configuration(container: Container, arguments: Mapping[str, Any]) -> Configuration:
    """The configuration: `embed_dim`, `vision_cfg`, `text_cfg` and `preprocess_cfg` of the
    arguments, that of the `architecture` in open_clip, or that beside the file, in this order.

    Raises:
        CheckpointError: there is none, or it has options that open_clip does not have.
    """
    stored = _read_file(container)
    architecture = arguments.get("architecture")
    if "vision_cfg" in arguments:
        names = ("quick_gelu", "init_logit_bias", "multimodal_cfg", "embed_dim")
        model = {name: arguments[name] for name in names if name in arguments}
        model |= {name: arguments.get(name) for name in ("vision_cfg", "text_cfg")}
        given = arguments.get("preprocess_cfg") or stored.get("preprocess_cfg")
    elif architecture in open_clip.list_models():
        return _by_name(container, str(architecture), arguments.get("pretrained"))
    else:
        model = stored.get("model_cfg", stored)
        given = stored.get("preprocess_cfg")
    _check(container, model)
    if is_openai(container):
        if model.get("quick_gelu") is False:
            raise CheckpointError(f"{container.path}: quick_gelu is false; OpenAI's have QuickGELU")
        model = {**model, "quick_gelu": True}
    preprocess, assumed = _preprocess(given)
    return Configuration(model, preprocess, assumed)


def _read_file(container: Container) -> dict[str, Any]:
    path = container.path.parent / FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _by_name(container: Container, architecture: str, tag: Any) -> Configuration:
    """The configuration that open_clip has under that name, with the activation and the transform
    of its published weights: those of the `tag`, OpenAI's of a file of theirs, or what all share.

    Raises:
        CheckpointError: open_clip has no weights of that tag.
    """
    model = deepcopy(open_clip.get_model_config(architecture))
    tags = list_pretrained_tags_by_model(architecture)
    if tag is not None and tag not in tags:
        raise CheckpointError(
            f"open_clip has no weights {tag!r} of {architecture}; it has {', '.join(tags)}"
        )
    if tag is None and is_openai(container):
        tag, model["quick_gelu"] = "openai" if "openai" in tags else None, True
    published = [get_pretrained_cfg(architecture, name) for name in tags if tag in (None, name)]
    transforms = [{name: each.get(name) for name in PREPROCESS} for each in published]
    alike = transforms and all(transform == transforms[0] for transform in transforms)
    preprocess, assumed = _preprocess(transforms[0] if alike else None)
    if not model.get("quick_gelu", False) and any(each.get("quick_gelu") for each in published):
        if tag is None:  # open_clip has the same name for weights of either activation
            assumed["quick_gelu"] = False
        else:
            model["quick_gelu"] = True
    return Configuration(model, preprocess, assumed)


def _preprocess(given: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The transform, completed by open_clip's defaults, and what of it was assumed."""
    defaults = PreprocessCfg()
    chosen = {name: getattr(defaults, name) for name in PREPROCESS}
    stated = {name: value for name, value in (given or {}).items() if name in PREPROCESS and value}
    unstated = {name: value for name, value in chosen.items() if name not in stated}
    assumed = {"preprocess_cfg": unstated} if unstated else {}
    complete = chosen | stated
    if complete["resize_mode"] not in MODES:
        raise CheckpointError(
            f"preprocess_cfg.resize_mode is {complete['resize_mode']!r}; it is {' or '.join(MODES)}"
        )
    return complete, assumed


def _check(container: Container, model: Mapping[str, Any]) -> None:
    """Refuse configurations that are not complete, or have options unknown to open_clip."""
    for name, kind, extra in (
        ("vision_cfg", CLIPVisionCfg, ("timm_model_kwargs",)),
        ("text_cfg", CLIPTextCfg, ()),
    ):
        config = model.get(name)
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{container.path}: its configuration has no {name}")
        known = {item.name for item in fields(kind)} | set(extra)
        unknown = [key for key, value in config.items() if key not in known]
        if name == "text_cfg":  # sizes of a BERT
            unknown = [key for key in unknown if not key.startswith("hf_")]
        if unknown:
            raise CheckpointError(
                f"{container.path}: {name} has options that open_clip does not have: "
                f"{', '.join(unknown)}"
            )
        _check_counts(name, config)
        _check_counts(name, config.get("timm_model_kwargs"))
    if not isinstance(model.get("embed_dim"), int):
        raise CheckpointError(f"{container.path}: its configuration has no embed_dim")


def _check_counts(name: str, config: Any) -> None:
    """
    Raises:
        CheckpointError: a number of layers, channels or heads is not a whole number from 1.
    """
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if key in COUNTS and value is not None:
            (wholes if isinstance(value, list) else whole)(f"{name}.{key}", value)


def architectures_like(tensors: Mapping[str, Tensor]) -> list[str]:
    """open_clip's names of models whose plain ViT has these shapes."""
    if "visual.proj" not in tensors or "visual.conv1.weight" not in tensors:
        return []
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    cells = tensors["visual.positional_embedding"].shape[0] - 1
    text = next((v for k, v in tensors.items() if k.endswith("token_embedding.weight")), None)
    found = (width, patch, cells, tensors["visual.proj"].shape[1])
    names = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, language = config["vision_cfg"], config["text_cfg"]
        side, step = vision.get("image_size", 224), vision.get("patch_size", 16)
        if not (isinstance(side, int) and isinstance(step, int)) or "timm_model_name" in vision:
            continue
        shapes = (vision.get("width", 768), step, (side // step) ** 2, config["embed_dim"])
        words = (language.get("vocab_size", 49408), language.get("width", 512))
        if shapes == found and (text is None or tuple(text.shape) == words):
            names.append(name)
    return names
