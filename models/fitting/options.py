"""How a head is fitted. Defaults are what the proof in the documentation was made with."""

import math
from dataclasses import dataclass

from models.errors import InputError
from models.heads.registry import head_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """`holdout` is the share of each class that decides when to stop; `patience` is in epochs.

    `learning_rate` None: what suits the kind. `queries`: query tokens a block (vqt). `layers`:
    class tokens of so many last blocks; 0 for the trunk's own pooled output (linear). `keep` < 1:
    that share of the features is selected by a group lasso of weight `lasso` first, as in the
    papers (Head2Toe, arXiv 2201.03529; VQT).
    """

    kind: str = "vqt"
    seed: int = 0
    holdout: float = 0.2
    epochs: int = 100
    patience: int = 15
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.1
    queries: int = 1
    layers: int = 0
    keep: float = 1.0
    lasso: float = 1e-4

    @property
    def rate(self) -> float:
        """The learning rate."""
        own = 0.003 if self.kind == "vqt" else 0.001
        return own if self.learning_rate is None else self.learning_rate

    def check(self) -> "FitOptions":
        """These, or InputError naming the first that is out of range."""
        kinds = [kind for kind, head in head_classes().items() if head.is_fittable]
        if self.kind not in kinds:
            raise InputError(
                f"kind is {self.kind!r}; heads that can be fitted: {', '.join(kinds)}", field="kind"
            )
        for name, low, high in (
            ("seed", 0, 2**32 - 1), ("holdout", 0.01, 0.9), ("epochs", 1, 10_000),
            ("patience", 1, 10_000), ("batch_size", 1, 1024), ("rate", 1e-7, 10),
            ("weight_decay", 0, 10), ("queries", 1, 64), ("layers", 0, 64), ("keep", 0.001, 1),
            ("lasso", 0, 100),
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                name = {"rate": "learning_rate"}.get(name, name)
                raise InputError(f"{name} is {value}; it can be {low} to {high}", field=name)
        return self
