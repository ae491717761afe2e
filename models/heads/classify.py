"""The classifier that came with the checkpoint."""

from collections.abc import Sequence
from typing import Self

from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.errors import CatalogError
from models.heads.ranking import Ranking
from models.trunks.base import Trunk
from models.trunks.output import TrunkOutput


class Classify(Ranking):
    kind = "classify"

    def __init__(self, trunk: Trunk, labels: Sequence[str]) -> None:
        if trunk.num_classes == 0:
            raise CatalogError(f"{trunk.architecture} was loaded without a classifier")
        if len(labels) != trunk.num_classes:
            raise CatalogError(
                f"{len(labels)} labels for a classifier of {trunk.num_classes} classes"
            )
        super().__init__(labels)
        self.trunk = trunk

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        return cls(trunk, labels)

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        return {"logits": self.trunk.classify(output)}
