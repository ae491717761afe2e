"""What heads share that compare images with labels given as texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from models.checkpoints.checkpoint import HeadState
from models.errors import CatalogError, InputError
from models.heads.base import Head
from models.inputs.prompts import check_labels, expand_templates
from models.trunks.base import Trunk
from models.trunks.text import TextTrunk

# An answer has the labels once for each image; a number takes some twenty characters.
CHARACTERS_PER_VALUE = 20


@dataclass(frozen=True, slots=True)
class Similarity:
    """How similarities of two towers become logits: cosine times `scale`, plus `bias` (of sigmoid
    models, else None)."""

    scale: float
    bias: float | None = None


class Prompted(Head):
    """A request may replace the model's own `templates` and `labels`. `finish` takes `classes`
    (K, D), the labels' embeddings of unit length, and the `labels` themselves."""

    templates: Sequence[str]
    text_embed: Head | None = None

    @classmethod
    def create_prompted(
        cls,
        image: Trunk,
        text: TextTrunk,
        similarity: Similarity | None,
        *,
        state: HeadState | None = None,
        join: Any = None,
        templates: Sequence[str],
        labels: Sequence[str] = (),
    ) -> Self:
        """The head for two towers.

        Args:
            similarity: how the towers were trained to be compared; None if they were not trained
                together.
            state: settings of the head that came with the checkpoint.
            join: projections that bring towers to one space that were not trained together, see
                `models/trunks/conse.py`.

        Raises:
            CatalogError: towers that this head cannot compare.
        """
        raise CatalogError(f"the head {cls.kind} takes no prompts")

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise InputError if labels are missing, or labels or templates cannot be used."""
        labels = options.get("labels")
        if labels is None and not self.labels:
            raise InputError("labels are missing", field="labels")
        if labels is not None:
            check_labels(labels)
        if options.get("templates") is not None:
            expand_templates(options["templates"])

    def answer_values(self, options: Mapping[str, Any]) -> int:
        characters = sum(map(len, options.get("labels") or ()))
        return characters // CHARACTERS_PER_VALUE

    def prompt(self, options: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The labels and templates of a request's options."""
        labels = options.get("labels")
        templates = options.get("templates")
        return (
            tuple(self.labels if labels is None else labels),
            tuple(self.templates) if templates is None else expand_templates(templates),
        )


def with_class_embeddings(
    options: Mapping[str, Any], labels: Sequence[str], classes: Any
) -> dict[str, Any]:
    """A request's options as `finish` takes them: labels with their embeddings, no templates."""
    rest = {name: value for name, value in options.items() if name != "templates"}
    return {**rest, "labels": labels, "classes": classes}
