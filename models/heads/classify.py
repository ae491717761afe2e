"""The classifier that came with the checkpoint."""

from torch import Tensor

from models.errors import CatalogError
from models.heads.ranking import Ranking
from models.trunks.base import Trunk, TrunkOutput


class Classify(Ranking):
    def __init__(self, trunk: Trunk, labels: tuple[str, ...]) -> None:
        if trunk.num_classes == 0:
            raise CatalogError(f"{trunk.architecture} was loaded without a classifier")
        if len(labels) != trunk.num_classes:
            raise CatalogError(
                f"{len(labels)} labels for a classifier of {trunk.num_classes} classes"
            )
        super().__init__(labels)
        self.trunk = trunk

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        return {"logits": self.trunk.classify(output)}
