"""The image towers of open_clip's models."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.inputs.transforms import Preprocess
from models.networks.dense_clip import can_be_dense, dense_pass
from models.trunks.devices import Placement
from models.trunks.features import FeatureRequest, PassPlan
from models.trunks.image import ImageTrunk
from models.trunks.image_tokens import (
    block_count,
    check_layers,
    prefix_tokens,
    token_values,
    tower_tokens,
)
from models.trunks.output import TrunkOutput, by_number
from models.trunks.pixel_input import PixelInput


class OpenClipPass(nn.Module):
    """Pixels to `embedding` (B, D), projected; `dense` (B, D, h, w) and what `tower_tokens` returns
    if the plan has them."""

    def __init__(self, network: nn.Module, plan: PassPlan, pixel_input: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self.pixel_input = pixel_input
        self._plan = plan

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        pixels = self.pixel_input(pixels)
        plan, tensors = self._plan, {}
        if plan.tokens:
            tensors = tower_tokens(self.network, pixels, sorted(plan.layers))
        if plan.dense:
            embedding, dense = dense_pass(self.network, pixels)
            tensors = {**tensors, "embedding": embedding, "dense": dense}
        return tensors or {"embedding": self.network(pixels)}


class OpenClipTrunk(ImageTrunk):
    """The image tower of an open_clip model. Its pooled output is the projected embedding."""

    def __init__(
        self, architecture: str, network: nn.Module, preprocess: Preprocess, placement: Placement
    ) -> None:
        visual: Any = getattr(network, "visual", network)
        super().__init__(architecture, visual, preprocess, placement)
        self.has_dense = can_be_dense(self.network)
        self.layer_count = block_count(self.network)
        self._prefix = prefix_tokens(self.network)

    def create_pass(self, plan: PassPlan) -> nn.Module:
        return OpenClipPass(self.network, plan, PixelInput(self.preprocess, self.placement))

    def output(self, batch: Tensor, tensors: Mapping[str, Tensor]) -> TrunkOutput:
        features = tensors["embedding"].unsqueeze(1)
        dense, tokens = tensors.get("dense"), tensors.get("tokens")
        grid = (0, 0) if dense is None else (dense.shape[2], dense.shape[3])
        prefix = 1 if tokens is None else self._prefix or 0
        layers = by_number(tensors, "layers")
        return TrunkOutput(features, prefix, grid, layers=layers, dense=dense, tower_tokens=tokens)

    def pool(self, output: TrunkOutput) -> Tensor:
        return output.features[:, 0]

    def token_request(self, layers: Sequence[int]) -> FeatureRequest:
        if self._prefix is None:
            return super().token_request(layers)
        check_layers(self.architecture, self.layer_count, layers)
        return FeatureRequest(layers=frozenset(layers), tokens=True)

    def token_values(self, layers: Sequence[int]) -> int:
        return token_values(self.network) * max(1, len(layers))

    @property
    def patch_size(self) -> tuple[int, int]:
        rows, columns = getattr(getattr(self.network, "conv1", None), "kernel_size", (0, 0))
        return rows, columns

    def before_projection(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """`image_features_pre_projection` (B, width), of towers that are open_clip's own ViT."""
        if getattr(self.network, "proj", None) is None:
            return {}
        pixels_BCHW = PixelInput(self.preprocess, self.placement)(pixels_BCHW)
        hidden = self.network.transformer(self.network._embeds(pixels_BCHW))
        return {"image_features_pre_projection": self.network._pool(hidden)[0]}
