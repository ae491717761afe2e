"""Generation: images from seeds or latent vectors."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from models.inputs.types import Input, Latent, Seed
from models.tasks.base import PNG, Arrays, Body, Options, Output, Task
from models.tasks.rendering import first_of, image_size, to_base64

MAX_IMAGES = 64
MAX_LATENT = 8192

# One error for all that is wrong in one.
Vector = Annotated[list[float], Field(fail_fast=True)]
Vectors = Annotated[list[Vector], Field(fail_fast=True)]


class GenerateOptions(Options):
    input_fields: ClassVar[frozenset[str]] = frozenset({"n", "seed", "latent"})

    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="Number of images (1).")
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**53,
        description="The first image's seed (0); each further image's is one more.",
    )
    latent: Vector | Vectors | None = Field(
        None,
        min_length=1,
        max_length=MAX_LATENT,
        description="Instead of a seed: a latent vector, or several. No noise is added.",
    )

    @model_validator(mode="after")
    def _check_latent(self) -> Self:
        if self.latent is None:
            return self
        if self.seed is not None or self.n is not None:
            raise ValueError("latent excludes seed and n")
        if isinstance(self.latent[0], list):
            if len(self.latent) > MAX_IMAGES:
                raise ValueError(f"{len(self.latent)} latent vectors; the limit is {MAX_IMAGES}")
            if any(len(row) > MAX_LATENT for row in self.latent if isinstance(row, list)):
                raise ValueError(f"a latent vector has at most {MAX_LATENT} numbers")
        return self

    def inputs(self) -> Sequence[Input]:
        if self.latent is None:
            first = self.seed or 0
            return [Seed(first + i) for i in range(self.n or 1)]
        rows = self.latent if isinstance(self.latent[0], list) else [self.latent]
        return [Latent(np.array(row, np.float32)) for row in rows]


def _render(arrays: Arrays) -> dict[str, Any]:
    return {**image_size(arrays), "image": to_base64(arrays["png"])}


def _line(entry: Mapping[str, Any]) -> str:
    return f"{entry['width']}x{entry['height']}"


TASK = Task(
    name="generate",
    summary="Generate images from seeds or latent vectors.",
    options=GenerateOptions,
    outputs=(Output("size", "INT64", (-1, 2)), Output("png", "BYTES", (-1,))),
    render=_render,
    line=_line,
    modalities=(),
    example={"seed": 7},
    bodies=(Body(PNG, first_of("png")),),
)
