"""The image towers of open_clip's models."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.inputs.transforms import Preprocess
from models.networks.dense_clip import can_be_dense, dense_pass
from models.trunks.base import ImageTrunk, PixelInput
from models.trunks.devices import Placement
from models.trunks.features import PassPlan
from models.trunks.output import TrunkOutput


class OpenClipPass(nn.Module):
    """Pixels to `embedding` (B, D), projected; and `dense` (B, D, h, w) if the plan has it."""

    def __init__(self, network: nn.Module, plan: PassPlan, pixel_input: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self.pixel_input = pixel_input
        self._plan = plan

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        pixels = self.pixel_input(pixels)
        if not self._plan.dense:
            return {"embedding": self.network(pixels)}
        embedding, dense = dense_pass(self.network, pixels)
        return {"embedding": embedding, "dense": dense}


class OpenClipTrunk(ImageTrunk):
    """The image tower of an open_clip model. Its pooled output is the projected embedding."""

    def __init__(
        self, architecture: str, network: nn.Module, preprocess: Preprocess, placement: Placement
    ) -> None:
        visual: Any = getattr(network, "visual", network)
        super().__init__(architecture, visual, preprocess, placement)
        self.has_dense = can_be_dense(self.network)

    def create_pass(self, plan: PassPlan) -> nn.Module:
        return OpenClipPass(self.network, plan, PixelInput(self.preprocess, self.placement))

    def output(self, batch: Tensor, tensors: Mapping[str, Tensor]) -> TrunkOutput:
        features = tensors["embedding"].unsqueeze(1)
        if (dense := tensors.get("dense")) is None:
            return TrunkOutput(features, 1, (0, 0))
        return TrunkOutput(features, 1, (dense.shape[2], dense.shape[3]), dense=dense)

    def pool(self, output: TrunkOutput) -> Tensor:
        return output.features[:, 0]

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
