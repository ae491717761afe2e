"""Output tensors: what each task has, what a request asks for, and how results become them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.errors import InvalidInputError, ServiceError
from service.parameters import validated_call
from service.types import Call, ImageResult, InferResult

DEFAULT_TOP_K = 5
# Of these tasks' outputs a call yields one, by its option `output`.
FORMS: Mapping[str, Sequence[str]] = {
    "segment": ("png", "rle", "polygons", "mask", "overlay", "logits"),
    "attention": ("overlay", "map", "npy"),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An output as metadata tells of it; -1 where the size varies. Unless asked for by name,
    those that are `on_request` are left out."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    on_request: bool = False


SPECS: Mapping[str, Sequence[TensorSpec]] = {
    "classify": (
        TensorSpec("index", "INT64", (-1, -1)),
        TensorSpec("label", "BYTES", (-1, -1)),
        TensorSpec("score", "FP32", (-1, -1)),
        TensorSpec("probabilities", "FP32", (-1, -1), on_request=True),
    ),
    "zero-shot": (
        TensorSpec("index", "INT64", (-1, -1)),
        TensorSpec("label", "BYTES", (-1, -1)),
        TensorSpec("score", "FP32", (-1, -1)),
    ),
    "embed": (TensorSpec("embedding", "FP32", (-1, -1)),),
    "segment": (
        TensorSpec("size", "INT64", (-1, 2)),
        TensorSpec("index", "INT64", (-1, -1)),
        TensorSpec("label", "BYTES", (-1, -1)),
        TensorSpec("pixels", "INT64", (-1, -1)),
        TensorSpec("png", "BYTES", (-1,)),
        TensorSpec("rle", "BYTES", (-1,), on_request=True),
        TensorSpec("polygons", "BYTES", (-1,), on_request=True),
        TensorSpec("mask", "UINT8", (-1, -1, -1), on_request=True),
        TensorSpec("overlay", "BYTES", (-1,), on_request=True),
        TensorSpec("logits", "BYTES", (-1,), on_request=True),
    ),
    "attention": (
        TensorSpec("size", "INT64", (-1, 2)),
        TensorSpec("overlay", "BYTES", (-1,)),
        TensorSpec("map", "BYTES", (-1,), on_request=True),
        TensorSpec("npy", "BYTES", (-1,), on_request=True),
    ),
    "reconstruct": (
        TensorSpec("size", "INT64", (-1, 2)),
        TensorSpec("drawn", "BYTES", (-1,)),
        TensorSpec("pasted", "BYTES", (-1,)),
        TensorSpec("seen", "BYTES", (-1,)),
        TensorSpec("mask", "UINT8", (-1, -1, -1)),
    ),
    "generate": (
        TensorSpec("size", "INT64", (-1, 2)),
        TensorSpec("png", "BYTES", (-1,)),
    ),
}


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output asked for by name; `classification` k turns it into the k best classes."""

    name: str
    classification: int = 0
    binary: bool | None = None


def outputs_of(model: Mapping[str, Any]) -> dict[str, tuple[str, TensorSpec]]:
    """A described model's outputs by name, each with the task that has it; its own task first."""
    found: dict[str, tuple[str, TensorSpec]] = {}
    for task in model["tasks"]:
        for spec in SPECS.get(task, ()):
            found.setdefault(spec.name, (task, spec))
    return found


class Plan:
    """The calls that answer a request for a model's outputs, and the tensors made of them."""

    def __init__(
        self,
        model: Mapping[str, Any],
        requested: Sequence[RequestedOutput],
        options: Mapping[str, Any],
    ) -> None:
        """
        Args:
            model: as `GET /models/{name}` describes it.
            options: for the first task that is asked.

        Raises:
            InvalidInputError: an output or option that the model does not have.
        """
        self._model = model
        self._specs = outputs_of(model)
        own = [RequestedOutput(spec.name) for task, spec in self._specs.values()
               if task == model["task"] and not spec.on_request]  # fmt: skip
        self.requested = list(requested) or own
        for output in self.requested:
            self._check(output)
        tasks = list(dict.fromkeys(self._specs[output.name][0] for output in self.requested))
        calls = [validated_call(model["name"], tasks[0], options)]
        calls += [Call(model["name"], task) for task in tasks[1:]]
        self._top_k = int(calls[0].options.get("top_k", DEFAULT_TOP_K))
        self.calls = [special for call in calls for special in self._specialised(call)]

    def collect(self, result: InferResult) -> list[np.ndarray]:
        """The requested outputs, in order, first dimension the images.

        Raises:
            ServiceError: an image failed, for tensors cannot tell of failed rows.
        """
        return [self._tensor(output, result.images) for output in self.requested]

    def _check(self, output: RequestedOutput) -> None:
        if output.name not in self._specs:
            raise InvalidInputError(
                f"no output {output.name!r}; there are {', '.join(self._specs)}", field="outputs"
            )
        if output.classification < 0 or (
            output.classification and output.name not in ("score", "probabilities")
        ):
            raise InvalidInputError(
                "classification is a positive number, for score or probabilities",
                field="outputs",
            )

    def _specialised(self, call: Call) -> list[Call]:
        """The call with what its outputs need: more classes, or one call for each mask's form."""
        names = [output.name for output in self.requested]
        if call.task == "classify":
            top_k = max(self._top_k, *(output.classification for output in self.requested))
            classes = int(self._model.get("labels") or top_k)
            top_k = classes if "probabilities" in names else min(top_k, max(classes, self._top_k))
            return [Call(call.model, call.task, {**call.options, "top_k": top_k})]
        if (known := FORMS.get(call.task or "")) is not None:
            forms = [name for name in names if name in known] or [known[0]]
            return [Call(call.model, call.task, {**call.options, "output": form}) for form in forms]
        return [call]

    def _tensor(self, output: RequestedOutput, images: Sequence[ImageResult]) -> np.ndarray:
        task, spec = self._specs[output.name]
        rows = [self._arrays(image, task, output.name) for image in images]
        if output.classification:
            return np.stack([_best(row, output.classification) for row in rows])
        if output.name == "probabilities":
            return np.stack([_by_class(row) for row in rows])
        arrays = [row[output.name] for row in rows]
        if (spec.datatype, spec.shape) == ("BYTES", (-1,)):  # files, and so no array
            return np.array([array.tobytes() for array in arrays], dtype=object)
        if task == "classify":
            arrays = [array[: self._top_k] for array in arrays]
        if len({array.shape for array in arrays}) > 1:
            raise InvalidInputError(
                f"{output.name}: images of different sizes do not make one tensor; "
                "send them one by one, or ask for png",
                field="outputs",
            )
        return np.stack(arrays)

    def _arrays(self, image: ImageResult, task: str, name: str) -> Mapping[str, np.ndarray]:
        if image.error is not None:
            raise image.error
        for call, output in zip(self.calls, image.outputs, strict=True):
            form = call.options.get("output", name) if name in FORMS.get(task, ()) else name
            if call.task == task and form == name:
                if isinstance(output, ServiceError):
                    raise output
                return output
        raise AssertionError(f"no call yields {name}")


def _best(row: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """The classification extension's text: `score:index:label`."""
    columns = (row["score"][:count], row["index"][:count], row["label"][:count])
    return np.array(
        [f"{score:f}:{index}:{label}" for score, index, label in zip(*columns, strict=True)]
    )


def _by_class(row: Mapping[str, np.ndarray]) -> np.ndarray:
    probabilities = np.empty_like(row["score"])
    probabilities[row["index"]] = row["score"]
    return probabilities
