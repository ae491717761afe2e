"""Output tensors: which a model has, which a request selects, and how results become them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.description import ModelDescription
from models.tasks.base import Output, Task
from models.tasks.classify import DEFAULT_TOP_K
from models.tasks.table import tasks
from service.errors import InvalidInputError, PayloadTooLargeError, ServiceError
from service.open_inference.shared_memory import Place
from service.parameters import validated_call
from service.types import Call, ImageResult, InferResult

# The outputs of a task that ranks classes: one element for each class, best first.
RANKING = frozenset({"index", "label", "score"})
# An answer has a copy for each output that is requested.
MAX_OUTPUTS = 64
# An output derived from a ranking of all classes: their scores in the order of the classes.
PROBABILITIES = "probabilities"


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request selects by name."""

    name: str
    # If positive: text of this many best classes instead of numbers (the classification extension).
    classification: int = 0
    # Whether REST returns it as binary data; None for the request's default.
    binary: bool | None = None
    # Where it is written instead of into the response.
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """An output, and the task that returns it."""

    task: Task
    output: Output

    @property
    def is_ranked(self) -> bool:
        """Whether it has a score for each class, so that the best classes can be named."""
        names = {output.name for output in self.task.outputs}
        return names >= RANKING and self.output.name in ("score", PROBABILITIES)

    @property
    def is_file(self) -> bool:
        """Whether an element is a file's content, which results have as bytes (N,) uint8."""
        return (self.output.datatype, self.output.shape) == ("BYTES", (-1,))


def outputs_of(model: ModelDescription) -> dict[str, TaskOutput]:
    """A model's outputs by name. If several tasks have one of that name, the first task's."""
    outputs: dict[str, TaskOutput] = {}
    for task in (tasks()[name] for name in model.tasks if name in tasks()):
        for output in task.outputs:
            outputs.setdefault(output.name, TaskOutput(task, output))
    return outputs


class OutputSelection:
    """The outputs that a request selects, and the calls that return them.

    Attributes:
        requested: the outputs, in the response's order.
        calls: one for each task, or for each form of a task's output.
    """

    def __init__(
        self,
        model: ModelDescription,
        requested: Sequence[RequestedOutput],
        options: Mapping[str, Any],
    ) -> None:
        """
        Args:
            requested: empty for those of the model's own task that are not `on_request`.
            options: for the task of the first output.

        Raises:
            InvalidInputError: the model has no such output or option.
            PayloadTooLargeError: too many outputs are requested.
        """
        if len(requested) > MAX_OUTPUTS:
            raise PayloadTooLargeError(f"{len(requested)} outputs; the limit is {MAX_OUTPUTS}")
        self._classes = model.labels
        self._outputs = outputs_of(model)
        self.requested = list(requested) or [
            RequestedOutput(name)
            for name, item in self._outputs.items()
            if item.task.name == model.task and not item.output.on_request
        ]
        if not self.requested:
            raise InvalidInputError(f"the task {model.task!r} has no outputs", field="outputs")
        for output in self.requested:
            self._check(output)
        names = list(dict.fromkeys(self._outputs[item.name].task.name for item in self.requested))
        calls = [validated_call(model.name, names[0], options)]
        calls += [Call(model.name, name) for name in names[1:]]
        # a default above the number of classes would be refused
        default = min(DEFAULT_TOP_K, self._classes or DEFAULT_TOP_K)
        self._top_k = int(calls[0].options.get("top_k", default))
        self.calls = [adapted for call in calls for adapted in self._adapt(call)]

    def collect(self, result: InferResult) -> list[np.ndarray]:
        """The requested outputs in order. Their first dimension is the number of inputs.

        Raises:
            ServiceError: an input failed; a tensor cannot leave out a row.
        """
        return [self._tensor(output, result.images) for output in self.requested]

    def _check(self, output: RequestedOutput) -> None:
        if output.name not in self._outputs:
            raise InvalidInputError(
                f"no output {output.name!r}; outputs: {', '.join(self._outputs)}", field="outputs"
            )
        if output.classification < 0 or (
            output.classification and not self._outputs[output.name].is_ranked
        ):
            raise InvalidInputError(
                f"classification is a positive number, for score or {PROBABILITIES}",
                field="outputs",
            )

    def _adapt(self, call: Call) -> list[Call]:
        """The call with more classes if an output needs them, or a call for each form."""
        task = tasks()[str(call.task)]
        names = [output.name for output in self.requested]
        if _has_top_k(task):
            top_k = max(self._top_k, *(output.classification for output in self.requested))
            classes = int(self._classes or top_k)
            top_k = classes if PROBABILITIES in names else min(top_k, max(classes, self._top_k))
            return [Call(call.model, call.task, {**call.options, "top_k": top_k})]
        if task.forms:
            forms = [name for name in names if name in task.forms] or [task.forms[0]]
            return [Call(call.model, call.task, {**call.options, "output": form}) for form in forms]
        return [call]

    def _tensor(self, requested: RequestedOutput, images: Sequence[ImageResult]) -> np.ndarray:
        name, item = requested.name, self._outputs[requested.name]
        rows = [self._arrays(image, item) for image in images]
        if requested.classification:
            return np.stack([_best(row, requested.classification) for row in rows])
        if name == PROBABILITIES:
            return np.stack([_by_class(row) for row in rows])
        arrays = [row[name] for row in rows]
        if item.is_file:
            return np.array([array.tobytes() for array in arrays], dtype=object)
        if _has_top_k(item.task):
            arrays = [array[: self._top_k] for array in arrays]
        if len({array.shape for array in arrays}) > 1:
            raise InvalidInputError(
                f"{name}: images of different sizes do not make one tensor; "
                "send them one by one, or request png",
                field="outputs",
            )
        return np.stack(arrays)

    def _arrays(self, image: ImageResult, item: TaskOutput) -> Mapping[str, np.ndarray]:
        """The arrays of the call that returns an output."""
        if image.error is not None:
            raise image.error
        name = item.output.name
        for call, output in zip(self.calls, image.outputs, strict=True):
            form = call.options.get("output", name) if item.output.form else name
            if call.task == item.task.name and form == name:
                if isinstance(output, ServiceError):
                    raise output
                return output
        raise AssertionError(f"no call returns {name}")


def _has_top_k(task: Task) -> bool:
    """Whether the task returns the best classes only."""
    return "top_k" in task.options.model_fields


def _best(row: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """The best classes as the classification extension writes them, `score:index:label`."""
    columns = (row["score"][:count], row["index"][:count], row["label"][:count])
    return np.array(
        [f"{score:f}:{index}:{label}" for score, index, label in zip(*columns, strict=True)]
    )


def _by_class(row: Mapping[str, np.ndarray]) -> np.ndarray:
    """The scores (K,) in the order of the classes, from a ranking of all K classes."""
    probabilities = np.empty_like(row["score"])
    probabilities[row["index"]] = row["score"]
    return probabilities
