"""Attention maps: which patches the class token reads."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from models.tasks.base import NPY, PNG, Arrays, Body, Options, Output, Task
from models.tasks.rendering import first_of, image_size, to_base64


class AttentionOptions(Options):
    output: Literal["overlay", "map", "npy"] = Field(
        "overlay",
        description="base64 of a PNG of the map on the image (overlay) or of the map alone (map), "
        "or of an .npy file.",
    )
    head: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="One attention head, counted from 0. If not given: their mean, or all in npy.",
    )


def _render(arrays: Arrays) -> dict[str, Any]:
    [drawn] = [arrays[name] for name in ("overlay", "map", "npy") if name in arrays]
    places = {name: arrays[name].tolist() for name in ("heads", "grid", "region")}
    return {**image_size(arrays), **places, "attention": to_base64(drawn)}


def _line(entry: Mapping[str, Any]) -> str:
    rows, columns = entry["grid"]
    return f"{entry['width']}x{entry['height']}: {entry['heads']} heads of {rows}x{columns} patches"


TASK = Task(
    name="attention",
    summary="Show which patches a model attends to.",
    options=AttentionOptions,
    outputs=(
        Output("size", "INT64", (-1, 2)),
        Output("overlay", "BYTES", (-1,), form=True),
        Output("map", "BYTES", (-1,), on_request=True, form=True),
        Output("npy", "BYTES", (-1,), on_request=True, form=True),
    ),
    render=_render,
    line=_line,
    bodies=(Body(PNG, first_of("overlay", "map")), Body(NPY, first_of("npy"))),
)
