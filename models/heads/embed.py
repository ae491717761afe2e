"""Pooled features of a trunk as a retrieval embedding."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from torch import Tensor, nn

from models.checkpoints.checkpoint import HeadState
from models.errors import InputError
from models.heads.base import Head
from models.heads.tokens import (
    GRID,
    asks_tokens,
    check_tokens,
    token_request,
    token_tensors,
    unit_length,
)
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest
from models.trunks.masked import ScaleMaeTrunk
from models.trunks.output import TrunkOutput
from models.trunks.pooling import gem, ggem, pca_projection

POOLINGS = ("cls", "mean", "max", "gem", "ggem")


class Embed(Head):
    """`pooling` None is the checkpoint's own. The others pool the last layer's features.

    `mean`, `max`, `gem` (generalized mean, p = 3; Radenovic et al., arXiv 1711.02512) and `ggem`
    (one learned p per group of channels; arXiv 2212.04114) are over patches, without class and
    register tokens.

    Scale-MAE's features (arXiv 2212.14532) depend on the ground sample distance `gsd` of the sent
    image in metres per pixel. Resizing it to the trunk's input changes the distance as much.
    Without `gsd`, a pixel of the input covers what the model calls 1, as in upstream's evaluation.
    """

    kind = "embed"
    task = "embed"
    state_name = "pca"
    forward_options = frozenset({"pooling", "gsd", "output", "layers", "prefix"})

    def __init__(
        self,
        trunk: Trunk,
        *,
        projection: nn.Module | None = None,
        pooling: str | None = None,
    ) -> None:
        """
        Args:
            projection: what follows the pooling, (B, D) to (B, E).
            pooling: what None means in a request; None: the trunk's own.
        """
        self.trunk = trunk
        if projection is not None:
            self.network = trunk.placement.apply(projection)
        self.pooling = pooling
        # The numbers of first dimensions that it was trained to be cut to (Matryoshka embeddings,
        # arXiv 2205.13147).
        self.trained_dimensions: Sequence[int] = ()
        if trunk.takes_gsd:
            self.request = FeatureRequest(pixels=True, features=False)

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        if state is None:
            return cls(trunk)
        return cls(trunk, projection=pca_projection(state.tensors), pooling="cls")

    @classmethod
    def comes_with(cls, trunk: Trunk, states: Mapping[str, HeadState]) -> bool:
        return trunk.modality != "latent"

    def check(self, options: Mapping[str, Any]) -> None:
        if "gsd" in options and not self.trunk.takes_gsd:
            raise InputError("gsd is for Scale-MAE; this model does not take it", field="gsd")
        check_tokens(self.trunk, options)
        self._check_dimensions(options)
        pooling = options.get("pooling")
        if pooling is None:
            return
        problem = None
        if pooling not in POOLINGS:
            problem = f"pooling is {pooling!r}; it can be {', '.join(POOLINGS)}"
        elif not self.trunk.has_tokens:
            problem = f"{self.trunk.architecture} yields one embedding; leave pooling out"
        elif self.network is not None and pooling != self.pooling:
            problem = "this model projects its own pooling; leave pooling out"
        elif pooling == "ggem" and self.trunk.exponents is None:
            problem = "pooling ggem needs exponents learned with the checkpoint; this one has none"
        elif pooling == "cls" and self.trunk.num_prefix_tokens == 0:
            problem = f"pooling cls needs a class token; {self.trunk.architecture} has none"
        if problem is not None:
            raise InputError(problem, field="pooling")

    def feature_request(self, options: Mapping[str, Any]) -> FeatureRequest:
        if asks_tokens(options) and not self.trunk.takes_gsd:
            return token_request(self.trunk, options)
        return self.request

    def answer_values(self, options: Mapping[str, Any]) -> int:
        if not asks_tokens(options):
            return 0
        return self.trunk.token_values(options.get("layers", ()))

    def _check_dimensions(self, options: Mapping[str, Any]) -> None:
        dimensions = options.get("dimensions")
        if dimensions in (None, *self.trained_dimensions) or options.get("truncate"):
            return
        trained = ", ".join(map(str, self.trained_dimensions))
        reason = f"it was trained for {trained}" if trained else "it was not trained for fewer"
        raise InputError(
            f"dimensions is {dimensions}; this model's embeddings lose more than precision when "
            f"they are cut there: {reason}. Leave dimensions out, or send truncate=true",
            field="dimensions",
        )

    def at_size(self, options: Mapping[str, Any], size: tuple[int, int]) -> Mapping[str, Any]:
        if (gsd := options.get("gsd")) is None:
            return options
        height, width = self.trunk.preprocess.input_size
        shrinking = (size[0] * size[1] / (width * height)) ** 0.5
        return {**options, "gsd": gsd * shrinking}

    def forward(
        self,
        output: TrunkOutput,
        /,
        *,
        pooling: str | None = None,
        gsd: float = 1.0,
        layers: Sequence[int] = (),
        prefix: bool = False,
        **form: Any,
    ) -> dict[str, Tensor]:
        """`embedding` (B, E), or what `token_tensors` returns if `form` has `output="tokens"`.
        `gsd` is that of the input's pixels."""
        if isinstance(self.trunk, ScaleMaeTrunk):
            assert output.pixels is not None
            scale = output.pixels.new_full((len(output.pixels),), gsd)
            output = self.trunk.forward_at_scale(output, scale)
        if asks_tokens(form):
            return token_tensors(output, layers, prefix)
        pooled = self.pool(output, pooling or self.pooling)
        return {"embedding": pooled if self.network is None else self.network(pooled)}

    def pool(self, output: TrunkOutput, pooling: str | None) -> Tensor:
        """(B, D) by one of the poolings; None is the trunk's own."""
        match pooling:
            case "cls":
                return output.tokens_BTD[:, 0]
            case "mean":
                return output.patches_BTD.mean(1)
            case "max":
                return output.patches_BTD.amax(1)
            case "gem":
                return gem(output.patches_BTD)
            case "ggem":
                assert self.trunk.exponents is not None
                return ggem(output.patches_BTD, self.trunk.exponents)
        return self.trunk.pool(output)

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        normalize: bool = True,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> dict[str, np.ndarray]:
        """`embedding` (D,) float32: its first `dimensions`, then of unit length if `normalize`; or
        `tokens` (T, D), or `tokens.N` for each layer, each of unit length if `normalize`. With the
        `grid` (2,) of patches comes the `region` (4,) that they cover, see `Preprocess.region`.

        `truncate` has been considered by `check`.
        """
        if "embedding" not in row:
            grid = {GRID: row[GRID]} if GRID in row else {}
            tokens = {name: row[name] for name in row if name != GRID}
            if normalize:
                tokens = {name: unit_length(array) for name, array in tokens.items()}
            if grid:
                grid["region"] = np.array(self.trunk.preprocess.region(*size))
            return tokens | grid
        embedding = row["embedding"]
        if dimensions is not None:
            if dimensions > len(embedding):
                raise InputError(
                    f"dimensions is {dimensions}; this model has {len(embedding)}",
                    field="dimensions",
                )
            embedding = embedding[:dimensions]
        if normalize:
            embedding = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
        return {"embedding": embedding}
