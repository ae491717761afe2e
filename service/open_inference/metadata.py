"""The protocol's metadata of a server and its models."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from models.description import ModelDescription, State
from service.errors import NotFoundError
from service.open_inference.inputs import BULK, FLOAT_TYPES, INTERACTIVE
from service.open_inference.outputs import outputs_of
from service.statistics import ModelStatistics

NAME = "vitrail"
VERSION = "1"
EXTENSIONS = (
    "classification",
    "binary_tensor_data",
    "model_repository",
    "model_configuration",
    "statistics",
    "system_shared_memory",
    "cuda_shared_memory",
)
PLATFORM = "vitrail_torch"
# The names of data types in configurations, where they differ from `TYPE_` and the protocol's.
CONFIG_TYPES = {"BYTES": "TYPE_STRING"}


def server_metadata() -> dict[str, Any]:
    """`GET /v2`."""
    return {"name": NAME, "version": version("vitrail"), "extensions": list(EXTENSIONS)}


def check_version(version: str) -> None:
    """Check the version in a request: empty, or 1, the only version that models have.

    Raises:
        NotFoundError: another version.
    """
    if version not in ("", VERSION):
        raise NotFoundError(f"no version {version!r}; models have version {VERSION}")


def model_metadata(model: ModelDescription) -> dict[str, Any]:
    """`GET /v2/models/{name}`. Sizes that depend on the weights are -1 before loading."""
    outputs = [
        {
            "name": item.output.name,
            "datatype": item.output.datatype,
            "shape": list(item.output.shape),
        }
        for item in outputs_of(model).values()
    ]
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": _inputs(model),
        "outputs": outputs,
    }


def model_config(model: ModelDescription, max_images: int) -> dict[str, Any]:
    """`GET /v2/models/{name}/config`: Triton's model configuration, as far as it applies.

    Args:
        max_images: the most inputs of a request, which clients take for `max_batch_size`.
    """
    described = model_metadata(model)

    def tensors(name: str) -> list[dict[str, Any]]:
        return [
            {
                "name": tensor["name"],
                "data_type": CONFIG_TYPES.get(tensor["datatype"], f"TYPE_{tensor['datatype']}"),
                "dims": tensor["shape"][1:] or [1],  # without the batch
            }
            for tensor in described[name]
        ]

    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": NAME,
        "max_batch_size": max_images,
        "input": tensors("inputs"),
        "output": tensors("outputs"),
        "dynamic_batching": {"priority_levels": BULK, "default_priority_level": INTERACTIVE},
    }


def model_statistics(
    models: Sequence[ModelDescription], statistics: Mapping[str, ModelStatistics]
) -> list[dict[str, Any]]:
    """`model_stats` of `GET /v2/models/stats`: what each model has done since the start of the
    process that was asked."""
    return [
        {"name": model.name, "version": VERSION}
        | statistics.get(model.name, ModelStatistics()).to_json()
        for model in models
    ]


def repository_index(models: Sequence[ModelDescription], ready_only: bool) -> list[dict[str, str]]:
    """`POST /v2/repository/index`: every model, or only those that answer now."""
    states: dict[str, str] = {State.READY: "READY", State.LOADING: "LOADING"}
    return [
        {
            "name": model.name,
            "version": VERSION,
            "state": states.get(model.state, "UNAVAILABLE"),
            "reason": model.reason or "",
        }
        for model in models
        if model.is_ready or not ready_only
    ]


def _inputs(model: ModelDescription) -> list[dict[str, Any]]:
    preprocess = model.preprocess or {}
    modalities = model.modalities or ("image",)
    inputs: list[dict[str, Any]] = []
    if "image" in modalities:
        inputs.append({"name": "image", "datatype": "BYTES", "shape": [-1]})
        shape = [-1, 3, *preprocess.get("input_size", (-1, -1))]
        inputs.append({"name": "pixel_values", "datatype": FLOAT_TYPES[0], "shape": shape})
    for name in ("text", "video"):
        if name in modalities:
            inputs.append({"name": name, "datatype": "BYTES", "shape": [-1]})
    if "latent" in modalities:
        inputs.append({"name": "seed", "datatype": "INT64", "shape": [-1]})
        shape = [-1, preprocess.get("latent_dim", -1)]
        inputs.append({"name": "latent", "datatype": FLOAT_TYPES[0], "shape": shape})
    return inputs
