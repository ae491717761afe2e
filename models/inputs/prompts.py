"""Prompt templates: labels to sentences, and the sentences' embeddings to one per label.

The embeddings of a label in several templates are normalised, averaged and normalised again, which
is CLIP's prompt ensembling (arXiv 2103.00020, section 3.1.4).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from models.errors import InputError

MAX_LABEL_CHARACTERS = 1000
MAX_TEMPLATES = 100
PLACE = "{}"


def _text(template: object) -> str:
    """The text of one of open_clip's templates, which are functions of the class name."""
    return str(template(PLACE))  # type: ignore[operator]


NAMED_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "imagenet-80": tuple(map(_text, OPENAI_IMAGENET_TEMPLATES)),
    "imagenet-7": tuple(map(_text, SIMPLE_IMAGENET_TEMPLATES)),
    "photo": ("a photo of a {}.",),
    "plain": (PLACE,),
}
DEFAULT_TEMPLATES = "photo"


def expand_templates(templates: Sequence[str] | str) -> tuple[str, ...]:
    """Templates, with the names of sets (`NAMED_TEMPLATES`) replaced by their templates.

    Raises:
        InputError: no template, more than MAX_TEMPLATES, or one that is not the name of a set and
            does not have exactly one `{}` for the label.
    """
    expanded: list[str] = []
    for template in [templates] if isinstance(templates, str) else templates:
        if template in NAMED_TEMPLATES:
            expanded += NAMED_TEMPLATES[template]
        elif template.count(PLACE) == 1 and len(template) <= MAX_LABEL_CHARACTERS:
            expanded.append(template)
        else:
            raise InputError(
                f"template {template[:80]!r} must have one {{}} for the label and at most "
                f"{MAX_LABEL_CHARACTERS} characters, or name a set: {', '.join(NAMED_TEMPLATES)}",
                field="templates",
            )
    if not 1 <= len(expanded) <= MAX_TEMPLATES:
        raise InputError(
            f"{len(expanded)} templates; there can be 1 to {MAX_TEMPLATES}", field="templates"
        )
    return tuple(expanded)


def check_labels(labels: Sequence[str]) -> None:
    """Check a request's labels.

    Raises:
        InputError: no label, or one that is empty, repeated or over MAX_LABEL_CHARACTERS long.
    """
    if not labels:
        raise InputError("labels are missing; give at least one", field="labels")
    for position, label in enumerate(labels):
        if not label.strip():
            raise InputError(f"label {position} is empty", field="labels")
        if len(label) > MAX_LABEL_CHARACTERS:
            raise InputError(
                f"label {position} has {len(label)} characters; "
                f"the limit is {MAX_LABEL_CHARACTERS}",
                field="labels",
            )
    if len(set(labels)) < len(labels):
        repeated = next(label for label in labels if labels.count(label) > 1)
        raise InputError(f"label {repeated!r} is repeated; labels must be distinct", field="labels")


def prompts(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every label in every template, ordered by label."""
    return [template.replace(PLACE, label) for label in labels for template in templates]


def ensemble(embeddings_ND: np.ndarray, templates: int) -> np.ndarray:
    """Embeddings of `prompts` (labels * templates, D) to unit vectors (labels, D), float32."""
    unit = _normalised(embeddings_ND.astype(np.float32))
    return _normalised(unit.reshape(-1, templates, unit.shape[1]).mean(1))


def _normalised(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)
