"""Depth: how far away each pixel is."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from models.tasks.base import NPY, PNG, Arrays, Body, Options, Output, Task
from models.tasks.rendering import first_of, image_size, to_base64


class DepthOptions(Options):
    output: Literal["png", "npy"] = Field(
        "png",
        description="png: base64 of a 16-bit PNG, 0 at the minimum and 65535 at the maximum. npy: "
        "base64 of an .npy file of float32 metres (height, width).",
    )


def _render(arrays: Arrays) -> dict[str, Any]:
    minimum, maximum = arrays["range"].tolist()
    [drawn] = [arrays[name] for name in ("png", "npy") if name in arrays]
    return {
        **image_size(arrays),
        "minimum": minimum,
        "maximum": maximum,
        "depth": to_base64(drawn),
    }


def _line(entry: Mapping[str, Any]) -> str:
    size = f"{entry['width']}x{entry['height']}"
    return f"{size}: {entry['minimum']:.3f} to {entry['maximum']:.3f}"


TASK = Task(
    name="depth",
    summary="Estimate how far away each pixel is, in metres if the model was trained so.",
    options=DepthOptions,
    outputs=(
        Output("size", "INT64", (-1, 2)),
        Output("range", "FP32", (-1, 2)),
        Output("png", "BYTES", (-1,), form=True),
        Output("npy", "BYTES", (-1,), on_request=True, form=True),
    ),
    render=_render,
    line=_line,
    bodies=(Body(PNG, first_of("png")), Body(NPY, first_of("npy"), form="npy")),
)
