"""What an engine reports about the passes that it runs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreement of a pass with eager float32, measured on real inputs."""

    # The largest difference over the largest value of the output that it is in.
    largest_error: float
    # The number of inputs.
    inputs: int
    # The share of inputs with the same best class, for trunks with a classifier.
    top1_agreement: float | None = None
    # The mean cosine similarity of the pooled outputs, for other trunks.
    cosine: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The member `agreement` of a model's description."""
        score = (
            {"cosine": self.cosine}
            if self.top1_agreement is None
            else {"top1_agreement": self.top1_agreement}
        )
        return {"largest_error": self.largest_error, "inputs": self.inputs, **score}


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What runs a trunk's passes."""

    # The engine's name.
    name: str
    # Its agreement with eager; None for eager itself.
    agreement: Agreement | None = None
    # Why it is not another engine.
    reason: str = ""

    def to_json(self) -> dict[str, Any] | None:
        """The member `agreement` of a model's description; None for eager."""
        return None if self.agreement is None else self.agreement.to_json()
