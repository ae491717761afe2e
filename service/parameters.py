"""The parameters of each route as pydantic models, for forms, queries, JSON bodies and OpenAPI."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from models.tasks.base import Options
from models.tasks.table import get_task, tasks
from service.errors import FieldError, InvalidInputError, InvalidParametersError
from service.types import Call

# REST's ways to send an image, for errors.
HOW_TO_SEND = (
    "send images as file parts `image` (curl -F image=@FILE), one as the body, or in JSON as "
    '{"images": [{"base64": "..."}]}'
)
MAX_MODELS = 256
# A request has fewer fields than this, and an answer names no more of those that are invalid.
MAX_FIELDS = 1000
MAX_FIELD_ERRORS = 20
MAX_NAME = 64  # characters of a name that is compared with those that exist


class Parameters(Options):
    """The parameters that every inference route takes."""

    timing: bool = Field(False, description="Add `timing`: milliseconds by stage.")

    def calls(self) -> list[Call]:
        """The models to run, each with its options."""
        raise NotImplementedError


class TaskParameters(Parameters):
    """The parameters that every task's route takes beside the task's own options."""

    task: ClassVar[str]

    model: str | None = Field(
        None, max_length=200, description="A model of the catalog; its default for the task."
    )

    def calls(self) -> list[Call]:
        return [Call(self.model, self.task, self.head_options())]


class PredictParameters(Parameters):
    models: list[str] = Field(
        min_length=1, max_length=MAX_MODELS, description="Each answers with its own task."
    )

    def calls(self) -> list[Call]:
        return [Call(name, None) for name in dict.fromkeys(self.models)]


class HeadParameters(BaseModel):
    """The parameters of `POST /heads`, for an upload and for a fit."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of the head, and of the model that it becomes.")
    trunk: str | None = Field(
        None,
        description="The trunk to fit on. For an upload: only if the trunk's name differs here.",
    )
    replace: bool = Field(False, description="Replace the head of that name.")


class FitParameters(BaseModel):
    """How to fit; `models/fitting/options.py` has the defaults and bounds."""

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


@cache
def task_parameters(task: str) -> type[TaskParameters]:
    """The parameters of a task's route: its options, `model` and `timing`.

    Raises:
        TaskError: no such task.
    """
    options = get_task(task).options
    name = options.__name__.removesuffix("Options") + "Parameters"
    model = create_model(name, __base__=(options, TaskParameters))
    parameters = cast(type[TaskParameters], model)  # mypy takes it for the bases' common one
    parameters.task = task
    return parameters


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], fields: Mapping[str, Any]) -> M:
    """The fields as a pydantic model.

    Raises:
        InvalidParametersError: with an entry for each invalid field, up to MAX_FIELD_ERRORS.
    """
    if len(fields) > MAX_FIELDS:
        raise InvalidParametersError(f"{len(fields)} parameters; the limit is {MAX_FIELDS}")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        invalid = [
            FieldError(_field(item["loc"]), _detail(item, model))
            for item in error.errors(include_url=False, include_input=False, include_context=False)[
                :MAX_FIELD_ERRORS
            ]
        ]
        summary = "; ".join(f"{field}: {detail}" for field, detail in invalid)
        raise InvalidParametersError(summary, fields=invalid) from error


def _detail(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """What is wrong with a field, with a hint for a mistyped name."""
    if error["type"] != "extra_forbidden":
        return str(error["msg"])
    name = str(error["loc"][-1])
    if name.startswith("{"):
        return "JSON needs the header Content-Type: application/json"
    if name == "image":
        return f"no such parameter; {HOW_TO_SEND}"
    if len(error["loc"]) > 1 or len(name) > MAX_NAME:
        return "no such parameter"
    similar = get_close_matches(name, model.model_fields, 1)
    return f"no such parameter; did you mean {similar[0]}?" if similar else "no such parameter"


def _field(loc: Sequence[str | int]) -> str:
    """The field that pydantic's location names, without the kinds of a union, as `list[int]`."""
    parts = [str(part) for part in loc]
    return ".".join(parts[:1] + [part for part in parts[1:] if "[" not in part])


def validated_call(model: str | None, task: str | None, options: Mapping[str, Any]) -> Call:
    """A call for protocols that name the model and the task beside the options.

    A task that the table does not have passes: the backend refuses it, as it refuses a task that
    the model does not do.

    Raises:
        ServiceError: an invalid option, or options without a task.
    """
    if task in tasks():
        [call] = validate(task_parameters(str(task)), {**options, "model": model}).calls()
        return call
    if options and task is None:
        raise InvalidInputError("options need a task", field="task")
    return Call(model, task, options)


@cache
def list_fields(parameters: type[Parameters]) -> frozenset[str]:
    """The parameters that may be repeated in forms and queries."""
    schema: dict[str, Any] = parameters.model_json_schema()["properties"]
    return frozenset(
        name
        for name, field in schema.items()
        if any(kind.get("type") == "array" for kind in (field, *field.get("anyOf", ())))
    )
