"""The differences between a model's outputs and those of a reference, for the same inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import EngineError

# The named outputs of one input.
Outputs = Mapping[str, np.ndarray]

FLOAT32_TOLERANCE = 1e-5
# What is required of a lower precision or of the fast transform where no tolerance is set.
MIN_AGREEMENT = 0.99


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model's agreement with a reference.

    Args:
        reference: what it was compared with; if it was not, why not.
        errors: the largest difference over the largest value of the reference, by output. Empty if
            nothing was compared.
        inputs: the number of inputs.
        tolerance: the largest error that passes; None: top-1 agreement and cosine decide.
        top1_agreement: the share of inputs with the same best class, of models with logits.
        cosine: the smallest cosine similarity of an input's embeddings.
    """

    reference: str
    errors: Mapping[str, float]
    inputs: int
    tolerance: float | None
    top1_agreement: float | None = None
    cosine: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the model agrees with the reference, or there was nothing to compare."""
        if self.tolerance is not None:
            return all(error <= self.tolerance for error in self.errors.values())
        scores = (self.top1_agreement, self.cosine)
        return all(score is None or score >= MIN_AGREEMENT for score in scores)

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain values."""
        return {
            "reference": self.reference,
            "passed": self.passed,
            "errors": dict(self.errors),
            "inputs": self.inputs,
            "tolerance": self.tolerance,
            "top1_agreement": self.top1_agreement,
            "cosine": self.cosine,
        }


def compare_outputs(
    reference: str,
    expected: Sequence[Outputs],
    actual: Sequence[Outputs],
    tolerance: float | None,
) -> Comparison:
    """Compare the outputs that both have, input by input.

    Args:
        expected: the reference's outputs.
        actual: the model's.

    Raises:
        EngineError: an output of another shape, values that are not finite, or no common output.
    """
    names = [name for name in expected[0] if name in actual[0]]
    if not names:
        raise EngineError(f"{reference} has no output in common with the model")
    errors = {
        name: _largest_error(name, [row[name] for row in expected], [row[name] for row in actual])
        for name in names
    }
    top1 = cosine = None
    if "logits" in names and expected[0]["logits"].ndim == 1:
        same = [
            int(theirs["logits"].argmax()) == int(ours["logits"].argmax())
            for theirs, ours in zip(expected, actual, strict=True)
        ]
        top1 = sum(same) / len(same)
    if "embedding" in names:
        cosine = min(
            _cosine(theirs["embedding"], ours["embedding"])
            for theirs, ours in zip(expected, actual, strict=True)
        )
    return Comparison(reference, errors, len(expected), tolerance, top1, cosine)


def _largest_error(
    name: str, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]
) -> float:
    for theirs, ours in zip(expected, actual, strict=True):
        if theirs.shape != ours.shape:
            raise EngineError(f"{name} has shape {ours.shape} instead of {theirs.shape}")
        if not (np.isfinite(theirs).all() and np.isfinite(ours).all()):
            raise EngineError(f"{name} has values that are not finite")
    pairs = list(zip(expected, actual, strict=True))
    difference = max(float(np.abs(ours - theirs).max(initial=0)) for theirs, ours in pairs)
    scale = max(float(np.abs(theirs).max(initial=0)) for theirs, _ in pairs)
    return difference / max(scale, 1e-12)


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    lengths = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(first @ second) / max(lengths, 1e-12)
