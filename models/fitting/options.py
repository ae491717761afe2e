"""Options of a fit. The defaults are those of the experiment in `docs/benchmarks.md`."""

import math
from dataclasses import dataclass

from models.errors import InputError
from models.heads.registry import head_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """Options of a fit.

    Args:
        kind: the head's kind.
        seed: of the holdout split, the initialisation and the order of examples.
        holdout: the share of each class that is held out to decide when to stop.
        epochs: the most epochs.
        patience: epochs without improvement before training stops.
        batch_size: images per training step.
        learning_rate: of AdamW; None for the kind's default.
        weight_decay: of AdamW.
        queries: query tokens per block (vqt).
        layers: number of last blocks whose class tokens are the features; 0 for the trunk's pooled
            output (linear).
        keep: share of the features that is kept. Below 1, a group lasso selects them first, as in
            Head2Toe (arXiv 2201.03529) and VQT (arXiv 2212.03220).
        lasso: weight of the group lasso.
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
        """The learning rate: `learning_rate`, or the kind's default."""
        default = 0.003 if self.kind == "vqt" else 0.001
        return default if self.learning_rate is None else self.learning_rate

    def check(self) -> "FitOptions":
        """Check that all options are in range, and return them unchanged.

        Raises:
            InputError: an option is out of range. The error names the first one.
        """
        kinds = [kind for kind, head in head_classes().items() if head.is_fittable]
        if self.kind not in kinds:
            raise InputError(
                f"kind is {self.kind!r}; it must be one of {', '.join(kinds)}", field="kind"
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
                raise InputError(f"{name} is {value}; it must be {low} to {high}", field=name)
        return self
