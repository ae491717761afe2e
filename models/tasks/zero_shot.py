"""Zero-shot classification: labels that come with the request."""

from pydantic import Field

from models.tasks.base import Options, Output, Task
from models.tasks.rendering import predictions, predictions_line

MAX_LABELS = 1000


class ZeroShotOptions(Options):
    labels: list[str] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABELS,
        description="The labels to score; the model's own set if it has one.",
    )
    templates: list[str] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABELS,
        description="Sentences with {} for the label, or imagenet-80, imagenet-7, photo, plain.",
    )
    multi_label: bool | None = Field(
        None, description="Score each label by itself; as the model was trained if not given."
    )


TASK = Task(
    name="zero-shot",
    summary="Score labels given as texts: all of them, best first.",
    options=ZeroShotOptions,
    outputs=(
        Output("index", "INT64", (-1, -1)),
        Output("label", "BYTES", (-1, -1)),
        Output("score", "FP32", (-1, -1)),
    ),
    render=predictions,
    line=predictions_line,
    example={"labels": ["an astronaut", "a cat", "a cup of coffee"]},
)
