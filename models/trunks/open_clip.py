"""The image towers of open_clip's models, as trunks."""

from typing import Any

from torch import Tensor, nn

from models.inputs.transforms import Preprocess
from models.networks.dense_clip import dense_pass
from models.trunks.base import ClosedTrunk, ImageTrunk, Placement, TrunkOutput, state_digest
from models.trunks.features import NOTHING, Need


class OpenClipTrunk(ClosedTrunk, ImageTrunk):
    """The image tower of an open_clip model; its pooled output is the projected embedding."""

    def __init__(
        self, architecture: str, network: nn.Module, preprocess: Preprocess, placement: Placement
    ) -> None:
        self.architecture = architecture
        self.preprocess = preprocess
        visual: Any = getattr(network, "visual", network)
        self.digest = state_digest(visual.state_dict())
        self.network: Any = placement.apply(visual)
        self.placement = placement

    def forward(self, pixels_BCHW: Tensor, need: Need = NOTHING) -> TrunkOutput:
        pixels_BCHW = self.placement.prepare(pixels_BCHW, self.preprocess)
        if not need.dense:
            return TrunkOutput(self.network(pixels_BCHW).unsqueeze(1), 1, (0, 0))
        embedding, dense = dense_pass(self.network, pixels_BCHW)
        grid = (dense.shape[2], dense.shape[3])
        return TrunkOutput(embedding.unsqueeze(1), 1, grid, dense=dense)

    def pool(self, output: TrunkOutput) -> Tensor:
        return output.features[:, 0]

    def before_projection(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """`image_features_pre_projection` (B, width), of towers that are open_clip's own ViT."""
        if getattr(self.network, "proj", None) is None:
            return {}
        pixels_BCHW = self.placement.prepare(pixels_BCHW, self.preprocess)
        hidden = self.network.transformer(self.network._embeds(pixels_BCHW))
        return {"image_features_pre_projection": self.network._pool(hidden)[0]}
