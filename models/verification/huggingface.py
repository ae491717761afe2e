"""transformers' networks for the architectures that it also implements, with converted weights.

transformers reads weights under the names of the files on its hub, whatever it calls its modules.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoints.checkpoint import Checkpoint
from models.verification.hub_names import (
    BEIT,
    BLOCKS,
    CLIP,
    CONVNEXT,
    GATED,
    SCALED,
    TOKENS,
    apart,
    renamed,
)

# Pixels (B, 3, H, W) to pooled features (B, D).
Encoder = Callable[[Tensor], Tensor]

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
# Of Vitrail's ViT: options of networks that transformers has not.
VIT_OPTIONS = ("conv_stem", "resnet", "pre_norm")
# The options of CLIP's vision tower that transformers has, too.
VISION_OPTIONS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}


def transformers_encoder(checkpoint: Checkpoint) -> tuple[str, Encoder] | None:
    """The name of transformers' class for a checkpoint's images, and the network; None if it has
    none.

    Raises:
        RuntimeError: the class does not have these weights.
    """
    match checkpoint.architecture:
        case "vit" | "distilled-vit":
            return _vit(checkpoint)
        case "beit":
            return _beit(checkpoint)
        case "convnext" if not checkpoint.arguments.get("head_norm_first"):
            return _convnext(checkpoint)
    image = checkpoint.arguments.get("image", {})
    if image.get("architecture") == "open-clip-image" and _is_plain_clip(image["config"]):
        return _clip(checkpoint, image)
    return None


def _vit(checkpoint: Checkpoint) -> tuple[str, Encoder] | None:
    from transformers import (
        DeiTConfig,
        DeiTModel,
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        ViTConfig,
        ViTModel,
    )

    built, state = checkpoint.arguments, _encoder_of(checkpoint)
    scaled, registers = "blocks.0.ls1.gamma" in state, "reg_token" in state
    distilled, gated = "dist_token" in state, bool(built.get("gated"))
    activation = ACTIVATIONS.get(built.get("act_layer", "gelu"))
    if (
        any(built.get(name) for name in VIT_OPTIONS)
        or "cls_token" not in state
        or activation is None
        or (registers or gated) > scaled
        or (distilled and scaled)
    ):
        return None
    if built.get("no_embed_class"):  # the class token's position is nought
        nought = torch.zeros_like(state["cls_token"])
        state["pos_embed"] = torch.cat([nought, state["pos_embed"]], 1)
    norm = _take_pooling_norm(state, built)
    hidden, dim = state["blocks.0.mlp.fc1.weight"].shape
    sizes = _sizes(built) | {"hidden_act": activation, "qkv_bias": built.get("qkv_bias", True)}
    network: nn.Module
    if scaled:
        ratio = hidden * 3 / 4 / dim if gated else hidden / dim  # two thirds of it, twice
        if ratio != int(ratio):
            return None
        sizes |= {"mlp_ratio": int(ratio), "use_swiglu_ffn": gated}
        named = renamed(state, (*TOKENS, *SCALED, *(GATED if gated else ())))
        # a constant of training, which the class has all the same
        named["embeddings.mask_token"] = torch.zeros(1, dim)
        if registers:
            sizes["num_register_tokens"] = state["reg_token"].shape[1]
            network = _load(Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**sizes), named)
        else:
            network = _load(Dinov2Model, Dinov2Config(**sizes), named)
    else:
        sizes["intermediate_size"] = hidden
        named = renamed(state, (*TOKENS, *BLOCKS))
        if distilled:
            network = _load(DeiTModel, DeiTConfig(**sizes), named, add_pooling_layer=False)
        else:
            network = _load(ViTModel, ViTConfig(**sizes), named, add_pooling_layer=False)
    prefix = 1 + distilled + int(sizes.get("num_register_tokens", 0))
    if norm is not None:
        network.layernorm = nn.Identity()

    def encode(pixels: Tensor) -> Tensor:
        tokens: Tensor = network(pixels).last_hidden_state
        if built.get("global_pool", "token") == "token":
            return tokens[:, 0]
        mean = tokens[:, prefix:].mean(1)
        return mean if norm is None else norm(mean)

    return type(network).__name__, encode


def _take_pooling_norm(state: dict[str, Tensor], built: Mapping[str, Any]) -> nn.Module | None:
    """The norm behind the pooling, if that is where a ViT has its last one; the state gets a norm
    before the pooling in its place, which is not to be used."""
    if "fc_norm.weight" not in state:
        return None
    weight, bias = state.pop("fc_norm.weight"), state.pop("fc_norm.bias")
    state["norm.weight"], state["norm.bias"] = weight, bias
    norm = nn.LayerNorm(len(weight), eps=built.get("norm_eps", 1e-6))
    norm.load_state_dict({"weight": weight, "bias": bias})
    return norm


def _beit(checkpoint: Checkpoint) -> tuple[str, Encoder] | None:
    from transformers import BeitConfig, BeitModel

    built, state = checkpoint.arguments, _encoder_of(checkpoint)
    average = built["global_pool"] == "avg"
    if "blocks.0.attn.q_bias" not in state or average != ("fc_norm.weight" in state):
        return None
    for key in [key for key in state if key.endswith(".attn.q_bias")]:
        block = key.removesuffix("q_bias")
        state[f"{block}query.bias"] = state.pop(key)
        state[f"{block}value.bias"] = state.pop(f"{block}v_bias")
    scaled = "blocks.0.gamma_1" in state
    config = BeitConfig(
        **_sizes(built),
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        layer_scale_init_value=0.1 if scaled else 0.0,
        use_absolute_position_embeddings="pos_embed" in state,
        use_relative_position_bias=bool(built["use_rel_pos_bias"]),
        use_shared_relative_position_bias=bool(built["use_shared_rel_pos_bias"]),
        use_mean_pooling=average,
    )
    network = _load(BeitModel, config, renamed(state, (*TOKENS, *BLOCKS, *BEIT)))
    return "BeitModel", lambda pixels: network(pixels).pooler_output


def _convnext(checkpoint: Checkpoint) -> tuple[str, Encoder]:
    from transformers import ConvNextConfig, ConvNextModel, ConvNextV2Config, ConvNextV2Model

    built = checkpoint.arguments
    named = renamed(_encoder_of(checkpoint), CONVNEXT)
    sizes: dict[str, Any] = {
        "depths": list(built["depths"]),
        "hidden_sizes": list(built["dims"]),
        "layer_norm_eps": 1e-6,
    }
    if built["use_grn"]:
        named = {k: v[None, None, None] if ".grn." in k else v for k, v in named.items()}
        network = _load(ConvNextV2Model, ConvNextV2Config(**sizes), named)
    else:
        sizes["layer_scale_init_value"] = 0.0 if built["ls_init_value"] is None else 1.0
        network = _load(ConvNextModel, ConvNextConfig(**sizes), named)
    return type(network).__name__, lambda pixels: network(pixels).pooler_output


def _is_plain_clip(config: Mapping[str, Any]) -> bool:
    """Whether the image tower is CLIP's ViT without options of open_clip's."""
    stated = {name for name, value in config.items() if value not in (None, False)}
    return isinstance(config.get("layers"), int) and stated <= VISION_OPTIONS


def _clip(checkpoint: Checkpoint, image: Mapping[str, Any]) -> tuple[str, Encoder]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    prefix = "image."
    state = {
        key.removeprefix(prefix): value.float()
        for key, value in checkpoint.state_dict.items()
        if key.startswith(prefix)
    }
    projection = state.pop("proj").T.contiguous()
    state = {re.sub(r"\.in_proj_", ".qkv.", key): value for key, value in state.items()}
    named = {f"vision_model.{k}": v for k, v in renamed(apart(state), CLIP).items()}
    width, _, patch, _ = state["conv1.weight"].shape
    size = image["config"].get("image_size", 224)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
        num_hidden_layers=image["config"]["layers"],
        num_attention_heads=width // image["config"].get("head_width", 64),
        image_size=size,
        patch_size=patch,
        projection_dim=len(projection),
        hidden_act="quick_gelu" if image["quick_gelu"] else "gelu",
        layer_norm_eps=1e-5,
    )
    named["visual_projection.weight"] = projection
    network = _load(CLIPVisionModelWithProjection, config, named)
    return type(network).__name__, lambda pixels: network(pixels).image_embeds


def _encoder_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights without the classifier, with queries, keys and values apart."""
    state = {key: value.float() for key, value in checkpoint.state_dict.items()}
    classifiers = ("head.weight", "head.bias", "head.fc.", "head_dist.")
    return apart({key: value for key, value in state.items() if not key.startswith(classifiers)})


def _sizes(built: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that all configurations of ViTs call alike."""
    return {
        "hidden_size": built["embed_dim"],
        "num_hidden_layers": built["depth"],
        "num_attention_heads": built["num_heads"],
        "image_size": built["img_size"],
        "patch_size": built["patch_size"],
        "layer_norm_eps": built.get("norm_eps", 1e-6),
    }


def _load(kind: Any, config: Any, state: Mapping[str, Tensor], **options: Any) -> Any:
    """A network in eval mode, all of whose weights are in the state, and none else.

    Raises:
        RuntimeError: they are not.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    network, found = kind.from_pretrained(
        None, config=config, state_dict=dict(state), output_loading_info=True, **options
    )
    wrong = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    if wrong:
        raise RuntimeError(f"{kind.__name__} has other weights: {', '.join(map(str, wrong[:5]))}")
    return network.eval()
