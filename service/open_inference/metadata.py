"""What the protocol tells of a server and its models."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from service.errors import NotFoundError
from service.open_inference.inputs import PIXEL_TYPES
from service.open_inference.outputs import outputs_of

NAME = "vitrail"
VERSION = "1"
EXTENSIONS = ("classification", "binary_tensor_data", "model_repository")


def server_metadata() -> dict[str, Any]:
    """`GET /v2`."""
    return {"name": NAME, "version": version("vitrail"), "extensions": list(EXTENSIONS)}


def check_version(given: str) -> None:
    """Models have one version, 1."""
    if given not in ("", VERSION):
        raise NotFoundError(f"no version {given!r}; models have version {VERSION}")


def model_metadata(model: Mapping[str, Any]) -> dict[str, Any]:
    """`GET /v2/models/{name}`, from a model's description."""
    size = model.get("preprocess", {}).get("input_size", (-1, -1))
    modalities = model.get("modalities", ("image",))
    inputs: list[dict[str, Any]] = []
    if "image" in modalities:
        inputs.append({"name": "image", "datatype": "BYTES", "shape": [-1]})
        shape = [-1, 3, *size]
        inputs.append({"name": "pixel_values", "datatype": PIXEL_TYPES[0], "shape": shape})
    for name in ("text", "video"):
        if name in modalities:
            inputs.append({"name": name, "datatype": "BYTES", "shape": [-1]})
    if "latent" in modalities:
        inputs.append({"name": "seed", "datatype": "INT64", "shape": [-1]})
        dim = model.get("preprocess", {}).get("latent_dim", -1)
        inputs.append({"name": "latent", "datatype": PIXEL_TYPES[0], "shape": [-1, dim]})
    outputs = [
        {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
        for _, spec in outputs_of(model).values()
    ]
    return {
        "name": model["name"],
        "versions": [VERSION],
        "platform": "vitrail_torch",
        "inputs": inputs,
        "outputs": outputs,
    }


def is_ready(model: Mapping[str, Any]) -> bool:
    """Whether a described model answers now."""
    return model["state"] == "ready" and not model["reason"]


def repository_index(models: Sequence[Mapping[str, Any]], ready: bool) -> list[dict[str, str]]:
    """`POST /v2/repository/index`: every model, or only those that answer now."""
    states = {"ready": "READY", "loading": "LOADING"}
    return [
        {
            "name": model["name"],
            "version": VERSION,
            "state": states.get(model["state"], "UNAVAILABLE"),
            "reason": model["reason"] or "",
        }
        for model in models
        if is_ready(model) or not ready
    ]
