"""What heads share that compare images with labels made up by the caller."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import InputError
from models.inputs.prompts import check_labels, expand_templates


class Prompted:
    """`templates` and `labels` are the model's own, which a request may replace. `finish` takes
    `classes` (K, D), the labels' embeddings of unit length, and the `labels` themselves."""

    templates: tuple[str, ...]
    labels: tuple[str, ...]

    def check_prompt(self, options: Mapping[str, Any]) -> None:
        """Raise InputError for labels or templates that cannot be used, or if there are none."""
        labels = options.get("labels")
        if labels is None and not self.labels:
            raise InputError("labels are missing", field="labels")
        if labels is not None:
            check_labels(labels)
        if options.get("templates") is not None:
            expand_templates(options["templates"])

    def prompt(self, options: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The labels and templates that a request's options come to."""
        labels = options.get("labels")
        templates = options.get("templates")
        return (
            self.labels if labels is None else tuple(labels),
            self.templates if templates is None else expand_templates(templates),
        )


def answering(options: Mapping[str, Any], labels: Sequence[str], classes: Any) -> dict[str, Any]:
    """A request's options as `finish` takes them, once the labels have been read."""
    rest = {name: value for name, value in options.items() if name != "templates"}
    return {**rest, "labels": labels, "classes": classes}
