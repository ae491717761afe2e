"""Options of a fit. The defaults are those of the experiment in `docs/heads.md`."""

import math
from dataclasses import dataclass

from models.errors import InputError
from models.heads.registry import head_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """Options of a fit.

    Args:
        kind: the head's kind.
        seed: for the holdout split, initialisation and order of examples.
        holdout: share of each class that is held out to decide when to stop.
        epochs: the most epochs.
        patience: epochs without improvement before training stops.
        learning_rate: None for the kind's default.
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
        """The learning rate, by default that of the kind."""
        default = 0.003 if self.kind == "vqt" else 0.001
        return default if self.learning_rate is None else self.learning_rate

    def check(self) -> "FitOptions":
        """Return the options unchanged.

        Raises:
            InputError: an option is out of range; it names the first.
        """
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
