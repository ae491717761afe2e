"""Scale-MAE's embeddings (arXiv 2212.14532), which depend on how much ground a pixel covers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.heads.embed import Embed
from models.trunks.base import TrunkOutput
from models.trunks.features import Need


class ScaledEmbed(Embed):
    """`gsd` is that of the image as it was sent, in metres a pixel; resizing it to the trunk's
    input changes it by as much. Without one, a pixel of the input covers what the model calls 1, as
    in upstream's evaluation."""

    forward_options = frozenset({"pooling", "gsd"})

    def needs(self, rows: Sequence[int]) -> Need:
        return Need(pixels=True, features=False)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check({name: value for name, value in options.items() if name != "gsd"})

    def at_size(self, options: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """`options` of `forward` for an image of that (width, height)."""
        if (gsd := options.get("gsd")) is None:
            return dict(options)
        height, width = self.trunk.preprocess.input_size
        shrinking = (size[0] * size[1] / (width * height)) ** 0.5
        return {**options, "gsd": gsd * shrinking}

    def forward(
        self, output: TrunkOutput, *, pooling: str | None = None, gsd: float = 1.0
    ) -> dict[str, Tensor]:
        """`gsd` is that of the input's pixels here."""
        assert output.pixels is not None
        scale = output.pixels.new_full((len(output.pixels),), gsd)
        network: Any = self.trunk.network
        features = network.forward_features(output.pixels, scale)
        scaled = replace(output, features=features, prefix=network.num_prefix_tokens)
        return super().forward(scaled, pooling=pooling)
