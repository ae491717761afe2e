"""Classification: the best of a model's fixed classes."""

from pydantic import Field

from models.tasks.base import Options, Output, Task
from models.tasks.rendering import predictions, predictions_line

MAX_CLASSES = 1000
DEFAULT_TOP_K = 5


class ClassifyOptions(Options):
    # None is DEFAULT_TOP_K, or all classes of a model that has fewer.
    top_k: int | None = Field(
        None, ge=1, le=MAX_CLASSES, description=f"Best classes to return ({DEFAULT_TOP_K})."
    )


TASK = Task(
    name="classify",
    summary="Classify images: the best classes with their probabilities.",
    options=ClassifyOptions,
    outputs=(
        Output("index", "INT64", (-1, -1)),
        Output("label", "BYTES", (-1, -1)),
        Output("score", "FP32", (-1, -1)),
        Output("probabilities", "FP32", (-1, -1), on_request=True),
    ),
    render=predictions,
    line=predictions_line,
    modalities=("image", "video"),
    example={"top_k": 3},
)
