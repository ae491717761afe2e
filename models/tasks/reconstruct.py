"""Reconstruction: a masked autoencoder predicts the patches that were hidden from it."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from models.tasks.base import PNG, Arrays, Body, Options, Output, Task
from models.tasks.rendering import first_of, image_size, to_base64


class ReconstructOptions(Options):
    mask_ratio: float | None = Field(
        None, gt=0, lt=1, description="Share of patches to hide; as trained if not given."
    )
    seed: int = Field(
        0, ge=0, lt=2**53, description="Chooses the patches; the same seed hides the same ones."
    )


def _render(arrays: Arrays) -> dict[str, Any]:
    pictures = {name: to_base64(arrays[name]) for name in ("drawn", "pasted", "seen")}
    return {**image_size(arrays), **pictures, "mask": arrays["mask"].tolist()}


def _line(entry: Mapping[str, Any]) -> str:
    cells = [cell for row in entry["mask"] for cell in row]
    return f"{entry['width']}x{entry['height']}: {sum(cells)} of {len(cells)} patches hidden"


TASK = Task(
    name="reconstruct",
    summary="Hide patches of the images and let a masked autoencoder predict them: `drawn` is "
    "predicted throughout, `pasted` (the one returned as a PNG) keeps the visible patches, `seen` "
    "is what the model saw.",
    options=ReconstructOptions,
    outputs=(
        Output("size", "INT64", (-1, 2)),
        Output("drawn", "BYTES", (-1,)),
        Output("pasted", "BYTES", (-1,)),
        Output("seen", "BYTES", (-1,)),
        Output("mask", "UINT8", (-1, -1, -1)),
    ),
    render=_render,
    line=_line,
    bodies=(Body(PNG, first_of("pasted")),),
)
