"""Labels as the sentences that a text tower reads, and their embeddings as one for each label.

Several templates a label, embedded, normalised, averaged and normalised again: the ensembling of
CLIP (arXiv 2103.00020, section 3.1.4).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from models.errors import InputError

MAX_LABEL_CHARACTERS = 1000
MAX_TEMPLATES = 100
PLACE = "{}"


def _text(template: object) -> str:
    """open_clip's templates are functions of the class name."""
    return str(template(PLACE))  # type: ignore[operator]


NAMED_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "imagenet-80": tuple(map(_text, OPENAI_IMAGENET_TEMPLATES)),
    "imagenet-7": tuple(map(_text, SIMPLE_IMAGENET_TEMPLATES)),
    "photo": ("a photo of a {}.",),
    "plain": (PLACE,),
}
DEFAULT_TEMPLATES = "photo"


def expand_templates(templates: Sequence[str] | str) -> tuple[str, ...]:
    """Templates, any of which may be the name of a set of them.

    Raises:
        InputError: none, too many, or one that is neither a name nor has one place for a label.
    """
    given = [templates] if isinstance(templates, str) else list(templates)
    found: list[str] = []
    for template in given:
        if template in NAMED_TEMPLATES:
            found += NAMED_TEMPLATES[template]
        elif template.count(PLACE) == 1 and len(template) <= MAX_LABEL_CHARACTERS:
            found.append(template)
        else:
            raise InputError(
                f"template {template[:80]!r} has no single {{}} for the label, and is none of the "
                f"sets {', '.join(NAMED_TEMPLATES)}",
                field="templates",
            )
    if not 1 <= len(found) <= MAX_TEMPLATES:
        raise InputError(
            f"{len(found)} templates; there can be 1 to {MAX_TEMPLATES}", field="templates"
        )
    return tuple(found)


def check_labels(labels: Sequence[str]) -> None:
    """Refuse what cannot be told apart or read.

    Raises:
        InputError: no label, an empty, a repeated or an overlong one.
    """
    if not labels:
        raise InputError("labels are missing", field="labels")
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
        raise InputError(f"label {repeated!r} is given twice", field="labels")


def prompts(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every label in every template, label by label."""
    return [template.replace(PLACE, label) for label in labels for template in templates]


def ensemble(embeddings_ND: np.ndarray, templates: int) -> np.ndarray:
    """(labels * templates, D) embeddings of `prompts` to (labels, D) of unit length, float32."""
    unit = _normalised(embeddings_ND.astype(np.float32))
    return _normalised(unit.reshape(-1, templates, unit.shape[1]).mean(1))


def _normalised(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)
