"""The parameters of each task's route, as pydantic models: one declaration for form, query, JSON
and the OpenAPI page."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.inputs.types import Input, Latent, Seed
from service.errors import FieldError, InvalidInputError, InvalidParametersError
from service.types import Call

MAX_LABELS = 1000
MAX_MODELS = 256
MAX_TEXTS = 2048
MAX_DRAWN = 64
MAX_LATENT = 8192


class Parameters(BaseModel):
    """What every task takes. Unknown parameters are errors, so that a typo never passes."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    task: ClassVar[str | None] = None

    timing: bool = Field(False, description="Add `timing`: milliseconds by stage.")

    def calls(self) -> list[Call]:
        """The models wanted, with the options for each."""
        raise NotImplementedError

    def given(self) -> Sequence[Input] | None:
        """What comes as parameters, instead of images."""
        return None


class TaskParameters(Parameters):
    """What the routes of a single model take."""

    model: str | None = Field(
        None, max_length=200, description="A model of the catalog; its default for the task."
    )

    def calls(self) -> list[Call]:
        options = self.model_dump(
            exclude={"model", "timing", "encoding", "texts"}, exclude_none=True
        )
        return [Call(self.model, self.task, options)]


class ClassifyParameters(TaskParameters):
    task = "classify"

    top_k: int | None = Field(None, ge=1, le=MAX_LABELS, description="Best classes to return (5).")


class ZeroShotParameters(TaskParameters):
    task = "zero-shot"

    labels: list[str] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABELS,
        description="What the images may show; the model's own set if it has one.",
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


class EmbedParameters(TaskParameters):
    task = "embed"

    texts: list[str] | None = Field(
        None, min_length=1, max_length=MAX_TEXTS, description="Texts instead of images."
    )
    pooling: Literal["cls", "mean", "max", "gem", "ggem"] | None = Field(
        None, description="How tokens become one vector; the model's own way if not given."
    )
    normalize: bool = Field(True, description="Scale to unit length.")
    dimensions: int | None = Field(None, ge=1, description="Keep only the first so many.")
    encoding: Literal["float", "base64", "int8", "binary"] = Field(
        "float",
        description="A list of numbers; base64 of little-endian float32; whole numbers from -127 "
        "to 127 for -1 to 1; or a bit a dimension, eight to a number, first one highest.",
    )

    gsd: float | None = Field(
        None,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Metres of ground a pixel of the sent image covers; of Scale-MAE (no scale).",
    )

    def given(self) -> Sequence[Input] | None:
        return self.texts


class SegmentParameters(TaskParameters):
    task = "segment"

    output: Literal["png", "rle", "polygons", "overlay", "logits", "mask"] = Field(
        "png",
        description="base64 of an indexed PNG, COCO run lengths, polygons with holes; base64 of a "
        "PNG on the image, or of an .npy file of logits or of the class numbers.",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Foreground is above this (0.5); of several classes the best has at least this "
        "probability, or the place is left unlabelled (0).",
    )
    min_area: int | None = Field(
        None, ge=0, description="Smaller regions, in pixels, become background (0)."
    )
    labels: list[str] | None = Field(
        None, min_length=1, max_length=MAX_LABELS, description="For text-prompted models."
    )
    templates: list[str] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABELS,
        description="As for /zero-shot; for text-prompted models.",
    )


class AttentionParameters(TaskParameters):
    task = "attention"

    output: Literal["overlay", "map", "npy"] = Field(
        "overlay", description="base64 of a PNG on the image or alone, or of an .npy file."
    )
    head: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="One head, from 0; if not given their mean, or all in npy.",
    )


class ReconstructParameters(TaskParameters):
    task = "reconstruct"

    mask_ratio: float | None = Field(
        None, gt=0, lt=1, description="Share of patches to hide; as trained if not given."
    )
    seed: int = Field(0, ge=0, lt=2**53, description="Which ones: the same for the same seed.")


class GenerateParameters(TaskParameters):
    task = "generate"

    n: int | None = Field(None, ge=1, le=MAX_DRAWN, description="How many images (1).")
    seed: int | None = Field(
        None, ge=0, lt=2**53, description="The first one's; each further one's is one more (0)."
    )
    latent: list[float] | list[list[float]] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LATENT,
        description="Instead of a seed: a latent vector, or several, each drawn without noise.",
    )

    @model_validator(mode="after")
    def _check_latent(self) -> Self:
        if self.latent is None:
            return self
        if self.seed is not None or self.n is not None:
            raise ValueError("latent comes without seed and n")
        if isinstance(self.latent[0], list):
            if len(self.latent) > MAX_DRAWN:
                raise ValueError(f"{len(self.latent)} latent vectors; the limit is {MAX_DRAWN}")
            if any(len(row) > MAX_LATENT for row in self.latent if isinstance(row, list)):
                raise ValueError(f"a latent vector has at most {MAX_LATENT} numbers")
        return self

    def calls(self) -> list[Call]:
        return [Call(self.model, self.task, {})]

    def given(self) -> Sequence[Input]:
        if self.latent is None:
            first = self.seed or 0
            return [Seed(first + i) for i in range(self.n or 1)]
        rows = self.latent if isinstance(self.latent[0], list) else [self.latent]
        return [Latent(np.array(row, np.float32)) for row in rows]


class PredictParameters(Parameters):
    models: list[str] = Field(
        min_length=1, max_length=MAX_MODELS, description="Each answers with its own task."
    )

    def calls(self) -> list[Call]:
        return [Call(name, None) for name in dict.fromkeys(self.models)]


class HeadParameters(BaseModel):
    """What `POST /heads` takes either way."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="What to call the head; the model's name.")
    trunk: str | None = Field(
        None, description="The trunk to fit on; of an upload only where its name differs here."
    )
    replace: bool = Field(False, description="Instead of the head of that name.")


class FitParameters(BaseModel):
    """How to fit; see `models/fitting/options.py`, which has the defaults and bounds."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["linear", "vqt"] | None = None
    seed: int | None = None
    holdout: float | None = None
    epochs: int | None = None
    patience: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    queries: int | None = None
    layers: int | None = None
    keep: float | None = None
    lasso: float | None = None


_TASKS = (
    ClassifyParameters,
    ZeroShotParameters,
    EmbedParameters,
    SegmentParameters,
    AttentionParameters,
    ReconstructParameters,
    GenerateParameters,
)
TASKS = {str(p.task): p for p in _TASKS}

M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], fields: Mapping[str, Any]) -> M:
    """The fields as a pydantic model.

    Raises:
        InvalidParametersError: with one entry for each field that is wrong.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        wrong = [
            FieldError(".".join(str(part) for part in item["loc"]), item["msg"])
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        summary = "; ".join(f"{field}: {detail}" for field, detail in wrong)
        raise InvalidParametersError(summary, fields=wrong) from error


def validated_call(model: str | None, task: str | None, options: Mapping[str, Any]) -> Call:
    """A call whose options came as plain values, not through a route.

    Raises:
        ServiceError: a wrong option, or options for a task that is not named.
    """
    if task in TASKS:
        return validate(TASKS[task], {**options, "model": model}).calls()[0]
    if options and task is None:
        raise InvalidInputError("options need a task", field="task")
    return Call(model, task, options)  # no model does an unknown task, and that will be told


@cache
def list_fields(parameters: type[Parameters]) -> frozenset[str]:
    """The parameters that may be repeated in forms and queries."""
    schema: dict[str, Any] = parameters.model_json_schema()["properties"]
    return frozenset(
        name
        for name, field in schema.items()
        if any(kind.get("type") == "array" for kind in (field, *field.get("anyOf", ())))
    )
