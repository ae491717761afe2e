"""The towers of open_clip's models (github.com/mlfoundations/open_clip), by its configurations.

Towers in timm and in transformers are built here: open_clip has no way to state their sizes, and
fetches the configurations of the latter from the hub.
"""

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
from open_clip.hf_model import _POOLERS
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer
from timm.layers import AttentionPool2d, Mlp, RotAttentionPool2d
from torch import Tensor, nn

from models.networks.text_encoders import create_encoder


class TimmTower(nn.Module):
    """A timm network and a projection, with open_clip's names: `trunk` and `head`.

    Args:
        pool, proj: `timm_pool` and `timm_proj` of the configuration.
        network: arguments of the timm network.
    """

    def __init__(
        self,
        name: str,
        *,
        embed_dim: int,
        pool: str,
        proj: str | None,
        proj_bias: bool,
        network: Mapping[str, Any],
    ) -> None:
        super().__init__()
        attention = pool in ("abs_attn", "rot_attn")
        projected = proj in ("linear", "mlp")
        if not projected and not attention:  # the network's own classifier projects, if anything
            classes = 0 if proj == "none" else embed_dim
            self.trunk: Any = timm.create_model(
                name, num_classes=classes, global_pool=pool, **network
            )
        else:
            self.trunk = timm.create_model(name, **network)
            pooling = {"global_pool": "" if attention else pool} if pool else {}
            self.trunk.reset_classifier(0, **pooling)
        width = int(self.trunk.num_features)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if pool == "abs_attn":
            size = self.trunk.default_cfg["pool_size"]
            layers["pool"] = AttentionPool2d(width, feat_size=size, out_features=embed_dim)
        elif pool == "rot_attn":
            layers["pool"] = RotAttentionPool2d(width, out_features=embed_dim)
        width = embed_dim if attention else width
        if proj == "linear":
            layers["proj"] = nn.Linear(width, embed_dim, bias=proj_bias)
        elif proj == "mlp":
            layers["mlp"] = Mlp(width, 2 * embed_dim, embed_dim, bias=(True, proj_bias))
        self.head = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.head(self.trunk(x))
        return embedding


def image_tower(*, embed_dim: int, quick_gelu: bool, config: Mapping[str, Any]) -> nn.Module:
    """An image tower; `config` is `vision_cfg`, with `timm_model_kwargs` for other sizes of a timm
    network."""
    sizes = dict(config)
    network = sizes.pop("timm_model_kwargs", {})
    settings = CLIPVisionCfg(**sizes | {"output_tokens": False})
    if not settings.timm_model_name:
        tower: nn.Module = _build_vision_tower(embed_dim, settings, quick_gelu)
        return tower
    return TimmTower(
        settings.timm_model_name,
        embed_dim=embed_dim,
        pool=settings.timm_pool,
        proj=settings.timm_proj,
        proj_bias=settings.timm_proj_bias,
        network=network,
    )


class HfTower(nn.Module):
    """An encoder of transformers and a projection, with the names of open_clip's `HFTextEncoder`.

    Args:
        kind: of `create_encoder`.
        pooler: `hf_pooler_type` of the configuration.
        hidden: channels of the projection's hidden layer; 0 for a linear projection, None for none.
        sizes: arguments of transformers' configuration.
    """

    def __init__(
        self, *, kind: str, embed_dim: int, pooler: str, hidden: int | None, **sizes: Any
    ) -> None:
        super().__init__()
        self.transformer: Any = create_encoder(kind, pools=pooler == "cls_pooler", **sizes)
        config = self.transformer.config
        self.pooler = _POOLERS[pooler]()
        self.padding = int(config.pad_token_id)
        width = int(config.hidden_size)
        self.proj: nn.Module = nn.Identity()
        if hidden == 0:
            self.proj = nn.Linear(width, embed_dim, bias=False)
        elif hidden:
            first, last = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, embed_dim, False)
            self.proj = nn.Sequential(first, nn.GELU(), last)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != self.padding).long()
        pooled = self.pooler(self.transformer(input_ids=ids, attention_mask=mask), mask)
        embedding: Tensor = self.proj(pooled)
        return embedding


def clip_text(*, norm_eps: float = 1e-5, quick_gelu: bool = True, **sizes: Any) -> nn.Module:
    """OpenAI's text transformer: `sizes` are arguments of open_clip's `TextTransformer`."""
    norm_layer = partial(LayerNorm, eps=norm_eps)
    act_layer = QuickGELU if quick_gelu else nn.GELU
    tower: nn.Module = TextTransformer(act_layer=act_layer, norm_layer=norm_layer, **sizes)
    return tower


def text_tower(*, embed_dim: int, quick_gelu: bool, config: Mapping[str, Any]) -> nn.Module:
    """A text transformer; `config` is `text_cfg`."""
    settings = CLIPTextCfg(**{**config, "output_tokens": False})
    tower: nn.Module = _build_text_tower(embed_dim, settings, quick_gelu)
    return tower


NETWORKS = {
    "clip-text": clip_text,
    "open-clip-image": image_tower,
    "open-clip-text": text_tower,
    "open-clip-hf": HfTower,
}
